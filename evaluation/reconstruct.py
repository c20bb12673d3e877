"""Decodes the true tokens of pictures: the best that any prediction of tokens could give."""
import torch
from torch import Tensor

from models import MaskGIT
from models.levels import Region, make_levels
from models.pyramid import Filled, cut_windows, write_block

BATCH = 16    # windows decoded together


@torch.no_grad()
def reconstruct(model: MaskGIT, image: Tensor, hole: Tensor, known: bool = True, paste: bool = True) -> Tensor:
    """Encode a clean picture with nothing hidden, and decode its tokens, in windows where it is larger than the model's.

    Args:
        image: uint8 (3, H, W) of any size.
        hole: bool (1, H, W).
        known: show the known pixels and the hole to the decoder, where it takes them.
        paste: put the known pixels back.
    Returns:
        uint8 (3, H, W).
    """
    c, (H, W) = model.vqgan.config, hole.shape[1:]
    [level] = make_levels(image, hole, 1, c.image_size, c.stride)
    block = Region(0, level.hole.shape[1] // c.stride, 0, level.hole.shape[2] // c.stride)
    part = cut_windows(c, level, block, None, 0, 1, everything=not paste)
    if part is None:    # no hole
        return image
    decoded = []
    for windows, masks in zip(part.image.split(BATCH), part.mask.split(BATCH), strict=True):
        windows, masks = windows.to(model.device), masks.to(model.device)
        tokens = model.vqgan.encode(windows)                                              # (B, N)
        if known:
            decoded.append(model.decode(tokens, windows.masked_fill(masks, 0), masks.to(windows.dtype)).cpu())
        else:
            decoded.append(model.vqgan.decode(tokens).float().clamp(-1, 1).cpu())
    write_block(level, block, part, Filled([torch.cat(decoded)], [], 0), c.stride, everything=not paste)
    completed = level.pixels[:, :H, :W]
    return torch.where(hole, completed, image) if paste else completed
