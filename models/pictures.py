"""From what people hold (PIL images, arrays, tensors of any size) to the model's float tensors, and back."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def to_tensor(image: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Any picture to uint8 (3, H, W), and the way back to its own kind.

    Args:
        image: PIL image; uint8 array (H, W, 3) or (H, W); tensor (3, H, W), uint8 or float in [0, 1].
    """
    if isinstance(image, Image.Image):
        return _from_array(np.asarray(image.convert("RGB"))), lambda x: Image.fromarray(_to_array(x))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise ValueError(f"an image array must be uint8 (H, W, 3) or (H, W), got {image.dtype} {image.shape}")
        rgb = np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image
        return _from_array(rgb), _to_array
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"an image tensor must be (3, H, W), got {tuple(image.shape)}")
        if image.dtype == torch.uint8:
            return image.cpu(), lambda x: x.to(image.device)
        if not image.is_floating_point() or image.min() < 0 or image.max() > 1:
            raise ValueError("an image tensor must be uint8, or floating point in [0, 1]")
        pixels = (image.float().cpu() * 255).round().to(torch.uint8)
        return pixels, lambda x: (x.float() / 255).to(image.device, image.dtype)
    raise ValueError(f"an image must be a PIL image, an array or a tensor, got {type(image).__name__}")


def to_mask(mask: Any, size: tuple[int, int]) -> Tensor:
    """Any mask to bool (1, H, W), True = hole. `size` is the picture's (H, W), which the mask must have too."""
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L"))
    hole = torch.as_tensor(np.ascontiguousarray(mask) if isinstance(mask, np.ndarray) else mask).cpu()
    if hole.dtype == torch.uint8:
        hole = hole >= 128
    hole = (hole > 0.5 if hole.is_floating_point() else hole != 0).reshape(hole.shape[-2:] if hole.numel() else (0, 0))
    if tuple(hole.shape) != tuple(size):
        raise ValueError(f"the mask is {hole.shape[1]}x{hole.shape[0]}, the picture {size[1]}x{size[0]}; they must agree")
    return hole.unsqueeze(0)


def shrink(pixels: Tensor, hole: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """To the model's size: (1, 3, size, size) in [-1, 1] and (1, 1, size, size) float, 1 where any hole pixel falls.

    The hole is blanked with the mean of the known pixels first, so that nothing of it is mixed into its surroundings.
    """
    image = pixels.float().div(127.5).sub(1).unsqueeze(0)                # (1, 3, H, W)
    mask = hole.float().unsqueeze(0)                                     # (1, 1, H, W)
    if image.shape[-2:] == (size, size):
        return image, mask
    mean = (image * (1 - mask)).sum((2, 3), keepdim=True) / (1 - mask).sum().clamp_min(1)
    image = torch.where(hole, mean, image)
    image = F.interpolate(image, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    covered = F.interpolate(mask, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return image, (covered > 1e-4).float()


def finish(decoded: Tensor, pixels: Tensor, hole: Tensor, paste: bool) -> Tensor:
    """The model's (3, size, size) picture in [-1, 1] to uint8 (3, H, W), with the known pixels put back if `paste`."""
    if decoded.shape[-2:] != pixels.shape[-2:]:
        size = tuple(pixels.shape[-2:])
        decoded = F.interpolate(decoded[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0]
    decoded = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return torch.where(hole, decoded, pixels) if paste else decoded


def _from_array(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous()


def _to_array(pixels: Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).contiguous().cpu().numpy()
