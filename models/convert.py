"""From what people hold (PIL images, arrays, tensors of any size) to the model's float tensors, and back."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

LARGE = 0.6         # share of a picture from which on a hole may be the known part, taken for the hole
PHOTOGRAPH = 0.5    # a mask with a larger share of grays is a photograph
ORIENTATION = 0x0112    # EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}    # fmt: skip

Restore = Callable[[Tensor, Tensor], Any]    # completed pixels, bool (1, H, W) which of them are new -> the user's kind


class Given:
    """A picture and its hole, of the kinds people hold.

    Args:
        image, mask: see `to_tensor` and `to_mask`.
    Raises:
        ValueError: they don't fit together, or there is no hole.
    """

    def __init__(self, image: Any, mask: Any) -> None:
        self.pixels, self._restore = to_tensor(image)                                     # (3, H, W) uint8
        self.hole = to_mask(mask, self.pixels.shape[-2:])                                 # (1, H, W) bool
        if not bool(self.hole.any()):
            raise ValueError("the mask has no hole: there is nothing to complete")

    def restore(self, completed: Tensor, paste: bool) -> Any:
        """A completion, uint8 (3, H, W), as a picture of the kind that was given."""
        return self._restore(completed, self.hole if paste else torch.ones_like(self.hole))


def to_tensor(image: Any) -> tuple[Tensor, Restore]:
    """Any picture to uint8 (3, H, W), and the way back to its own kind.

    Args:
        image: PIL image of 8 bits a channel (becomes RGB, alpha is dropped); uint8 array (H, W, 3) or (H, W); tensor
            (3, H, W), uint8 or float in [0, 1]. A PIL image is turned upright by its EXIF orientation.
    """
    if isinstance(image, Image.Image):
        image = upright(image)
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"an image must have 8 bits a channel, got PIL mode {image.mode!r}; scale it to 0..255")
        return _from_array(np.asarray(image.convert("RGB"))), lambda x, new: Image.fromarray(_to_array(x))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not image.size or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
            raise ValueError(f"an image array must be uint8 (H, W, 3) or (H, W), got {image.dtype} {image.shape}")
        rgb = np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image
        return _from_array(rgb), lambda x, new: _to_array(x)
    if isinstance(image, Tensor):
        return _from_tensor(image.detach())
    raise ValueError(f"an image must be a PIL image, an array or a tensor, got {type(image).__name__}")


def _from_tensor(image: Tensor) -> tuple[Tensor, Restore]:
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(f"an image tensor must be (3, H, W), got {tuple(image.shape)}")
    if image.dtype == torch.uint8:
        return image.cpu(), lambda x, new: x.to(image.device)
    if not image.is_floating_point():
        raise ValueError(f"an image tensor must be uint8, or floating point in [0, 1], got {image.dtype}")
    if not bool(((image >= 0) & (image <= 1)).all()):    # so written, it refuses NaN too
        raise ValueError(f"a floating-point image tensor must lie in [0, 1], got values {_span(image)}")
    pixels = (image.float().cpu() * 255).round().to(torch.uint8)

    def restore(x: Tensor, new: Tensor) -> Tensor:
        # Known pixels come back as they were given, not rounded to 256 levels.
        return torch.where(new.to(image.device), (x.float() / 255).to(image.device, image.dtype), image)

    return pixels, restore


def to_mask(mask: Any, size: tuple[int, int]) -> Tensor:
    """Any mask to bool (1, H, W), True = hole.

    Args:
        mask: PIL image, array or tensor, (H, W) or (1, H, W). The hole is True, or 1, or white (from the middle of the range
            on). Of a PIL image with an alpha channel see `_hole_by_alpha`. Mask *files* have it the other way round: black.
        size: the picture's (H, W), which the mask must have too.
    """
    if isinstance(mask, Image.Image):
        mask = _from_pil_mask(upright(mask))
    if isinstance(mask, np.ndarray) and mask.dtype.kind in "biuf":
        mask = torch.from_numpy(mask.astype(np.float32) / (257 if mask.dtype == np.uint16 and mask.max() > 255 else 1))
    if not isinstance(mask, Tensor):
        raise ValueError(f"a mask must be a PIL image, an array or a tensor of numbers, got {type(mask).__name__}")
    if tuple(mask.shape) not in (tuple(size), (1, *size)):
        swapped = "; are picture and mask swapped?" if mask.ndim == 3 and 3 in (mask.shape[0], mask.shape[2]) else ""
        shapes = f"the mask's shape is {tuple(mask.shape)}, the picture's (H, W) {tuple(size)}"
        raise ValueError(f"{shapes}; they must agree{swapped}")
    gray = mask.detach().float().cpu().reshape(1, *size)
    if not bool(((gray >= 0) & (gray <= 255)).all()):
        raise ValueError(f"a mask holds False and True, 0 and 1, or 0 and 255; this one has values {_span(gray)}")
    top = 1 if gray.max() <= 1 else 255
    between = ((gray > top / 8) & (gray < top * 7 / 8)).float().mean().item()
    if between > PHOTOGRAPH and len(gray.unique()) > 2:
        raise ValueError(
            f"the mask looks like a photograph: {between:.0%} of it is neither black nor white; is it a picture?"
        )
    hole = gray > 0.5 if top == 1 else gray >= 128
    if LARGE < hole.float().mean() < 1:
        share = f"{hole.float().mean():.0%} of the picture"
        warnings.warn(f"the hole is {share}; if it is the other part, invert the mask: white is the hole", stacklevel=2)
    return hole


def _from_pil_mask(mask: Image.Image) -> np.ndarray:
    """A mask as numbers, high = hole: of one channel, 8 or 16 bits."""
    if mask.mode.startswith("I"):    # 16 bits
        return np.asarray(mask).astype(np.uint16)
    if "A" in mask.getbands() or "transparency" in mask.info:
        *colours, alpha = np.moveaxis(np.asarray(mask.convert("RGBA")), 2, 0)
        opaque = alpha >= 128
        if opaque.any() and not opaque.all():
            return _hole_by_alpha(np.stack(colours), opaque)
    return np.asarray(mask if mask.mode == "1" else mask.convert("RGB").convert("L"))


def _hole_by_alpha(colours: np.ndarray, opaque: np.ndarray) -> np.ndarray:
    """The hole of a mask that is transparent in part: (3, H, W) uint8 and bool (H, W) -> bool (H, W).

    Paint of one colour is the hole, unless the transparent part has that colour too: then it is what is transparent. Black
    and white mean what they mean everywhere. Anything else is a picture with the hole cut out.
    """
    painted, rest = colours[:, opaque], colours[:, ~opaque]                               # (3, M), (3, M')
    bright = painted.mean(0) >= 128
    if (painted == painted[:, :1]).all():
        cut_out = (rest == painted[:, :1]).all() and not (bright[0] and opaque.mean() < 0.5)
        return ~opaque if cut_out else opaque
    if np.isin(painted, (0, 255)).all(0).mean() > PHOTOGRAPH and bright.any() and not bright.all():
        hole = opaque.copy()
        hole[opaque] = bright
        return hole
    return ~opaque


def upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation says that it is to be seen."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except (ValueError, TypeError, OSError, SyntaxError, OverflowError):    # EXIF that Pillow can't read
        turn = None
    return image if turn is None else image.transpose(turn)


def _span(values: Tensor) -> str:
    return f"from {values.min().item():g} to {values.max().item():g}"


def resize(pixels: Tensor, hole: Tensor, sides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A picture, uint8 (3, H, W), and its hole, bool (1, H, W), at another size.

    The hole is blanked with the mean of the known pixels first, so that nothing of it is mixed into its surroundings. It
    stays a hole wherever any of its pixels falls.
    """
    size = tuple(sides)
    if pixels.shape[-2:] == size:
        return pixels, hole
    image = pixels.float().div(127.5).sub(1).unsqueeze(0)                # (1, 3, H, W)
    mask = hole.float().unsqueeze(0)                                     # (1, 1, H, W)
    mean = (image * (1 - mask)).sum((2, 3), keepdim=True) / (1 - mask).sum().clamp_min(1)
    image = torch.where(hole, mean, image)
    image = F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    covered = F.interpolate(mask, size=size, mode="bilinear", antialias=True, align_corners=False)
    return to_uint8(image[0]), covered[0] > 1e-4


def to_uint8(image: Tensor) -> Tensor:
    """Float in [-1, 1] (clamped) to uint8 in [0, 255], rounded; the exact inverse of x / 127.5 - 1."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _from_array(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous()


def _to_array(pixels: Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).contiguous().cpu().numpy()
