"""Decodes the true tokens of pictures: the best that any prediction of tokens could give."""
import torch
from torch import Tensor

from models import MaskGIT
from models.convert import finish, shrink


@torch.no_grad()
def reconstruct(model: MaskGIT, image: Tensor, hole: Tensor, known: bool = True, paste: bool = True) -> Tensor:
    """Encode a clean picture with nothing hidden, and decode its tokens.

    Args:
        image: uint8 (3, H, W) of any size; it is resized to the model's.
        hole: bool (1, H, W).
        known: show the known pixels and the hole to the decoder, where it takes them.
        paste: put the known pixels back.
    Returns:
        uint8 (3, H, W).
    """
    whole, _ = shrink(image, torch.zeros_like(hole), model.image_size)                    # (1, 3, size, size)
    tokens = model.vqgan.encode(whole.to(model.device))                                   # (1, N)
    if known:
        small, small_hole = (x.to(model.device) for x in shrink(image, hole, model.image_size))
        decoded = model.decode(tokens, small.masked_fill(small_hole.bool(), 0), small_hole)
    else:
        decoded = model.vqgan.decode(tokens).float().clamp(-1, 1)
    return finish(decoded[0].cpu(), image, hole, paste)
