"""Reads masks: which pixels of a picture are the hole."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pictures.images import LUMA, read_image, read_picture
from utils import UserError, notice

COLOURS = ("black", "white")
THRESHOLD = 128     # gray levels below it are black
LARGE = 0.6         # share of a picture from which on a hole may be the known part, taken for the hole
MIDDLE = (32, 223)  # gray levels between them are neither black nor white...
PHOTOGRAPH = 0.5    # ...and a file with a larger share of them is no mask


def read_pair(image_path: Path, mask_path: Path, hole: str = "black") -> tuple[Tensor, Tensor]:
    """A picture (3, H, W) uint8 and its hole (1, H, W) bool, which fit together; see `read_mask` and `check_hole`."""
    image, mask = read_image(image_path), read_mask(mask_path, hole)
    check_hole(mask, mask_path, hole, image.shape[1:], image_path.name)
    return image, mask


def check_hole(mask: Tensor, path: Path, hole: str, size: tuple[int, int], picture: str) -> None:
    """Refuse a mask that has not the picture's `size` (H, W) or leaves nothing known; notice a very large hole.

    Args:
        path, hole: what the mask was read with.
        picture: the picture's name, for messages.
    """
    if mask.shape[1:] != tuple(size):
        sizes = f"{mask.shape[2]}x{mask.shape[1]}, the picture {picture} {size[1]}x{size[0]}"
        raise UserError(f"mask {path} is {sizes}; they must have the same size")
    other = COLOURS[1 - COLOURS.index(hole)]
    if bool(mask.all()):
        raise UserError(f"mask {path} hides the whole picture: nothing is left to complete it from; if {other} marks the "
                        f"hole, give --mask-hole {other}")    # fmt: skip
    share = mask.float().mean().item()
    if share > LARGE:
        notice(f"the hole of {path} is {share:.0%} of the picture; if it is the other part, give --mask-hole {other}",
               "such large holes", path.name)    # fmt: skip


def read_mask(path: str | Path, hole: str = "black") -> Tensor:
    """Read a mask as bool (1, H, W), True = hole.

    Args:
        hole: which colour marks the hole in the file, black or white. Gray levels in between (a mask saved as JPEG, or
            resized) are cut at 128, with a notice; of two colours the darker is black, whatever they are (0 and 1).
            A transparent part of the file decides instead of the colours where these say nothing; see `_hole_by_alpha`.
    Raises:
        UserError: the file can't be read, or is a photograph.
    """
    pixels = read_picture(path).pixels                                          # (H, W, C)
    channels = pixels.shape[2]
    if channels in (2, 4):
        opaque = pixels[:, :, -1] >= (1 + np.iinfo(pixels.dtype).max) // 2
        pixels = pixels[:, :, :-1]
        if opaque.any() and not opaque.all():
            return torch.from_numpy(_hole_by_alpha(pixels, opaque, hole, Path(path)))[None]
    black = _black(pixels, Path(path))
    return torch.from_numpy(black if hole == "black" else ~black)[None]


def _black(pixels: np.ndarray, path: Path) -> np.ndarray:
    """The black part of a mask without alpha channel: (H, W, 1 or 3) -> bool (H, W)."""
    both, top = _two_colours(pixels), np.iinfo(pixels.dtype).max
    first, second = (_gray(pixels[place]) for place in both) if both else (0.0, 0.0)
    if both and not (min(first, second) > top / 2 and abs(first - second) < top / 8):    # such are two kinds of white
        if first == second:
            raise UserError(f"mask {path} has two colours that are equally bright; save it in black and white")
        if {first, second} != {0, top}:
            notice(f"mask {path} has two levels, {min(first, second):g} and {max(first, second):g}; "
                   "they are taken for black and white", "masks of two other levels", path.name)    # fmt: skip
        return (pixels == pixels[both[0] if first < second else both[1]]).all(2)
    if pixels.max() == 1:    # nothing but the upper one of 0 and 1
        return np.zeros(pixels.shape[:2], bool)
    if pixels.dtype == np.uint16:
        pixels = pixels // 257 if pixels.max() > 255 else pixels
    gray = pixels.astype(np.int64).sum(2) / pixels.shape[2]
    middle = ((gray > MIDDLE[0]) & (gray < MIDDLE[1])).mean()
    if middle > PHOTOGRAPH:
        raise UserError(f"mask {path} looks like a photograph: {middle:.0%} of its pixels are neither black nor white; "
                        "give a black-and-white mask (are pictures and masks swapped?)")    # fmt: skip
    soft = ((pixels != 0) & (pixels != 255)).any(2).mean()
    if soft > 0:
        notice(f"mask {path} has gray levels between 0 and 255 in {soft:.1%} of its pixels; "
               f"those below {THRESHOLD} count as black", "masks with gray levels", path.name)    # fmt: skip
    return gray < THRESHOLD


def _two_colours(pixels: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Where the first pixels of the two colours are, if there are just two."""
    other = (pixels != pixels[0, 0]).any(2)                                     # (H, W)
    if not other.any():
        return None
    place = np.unravel_index(other.argmax(), other.shape)
    return ((0, 0), place) if bool((pixels[other] == pixels[place]).all()) else None


def _gray(colour: np.ndarray) -> float:
    return float(colour[0]) if len(colour) == 1 else float(colour @ LUMA)


def _hole_by_alpha(colours: np.ndarray, opaque: np.ndarray, hole: str, path: Path) -> np.ndarray:
    """The hole of a mask that is transparent in part: bool (H, W).

    One colour, the transparent pixels included, says nothing: the hole is what is transparent (white all over: the smaller
    part). One colour on others is paint: the hole is what is painted. Black and white mark it as ever, and what is
    transparent is known. Anything else is a picture with the hole cut out.
    """
    painted, rest = colours[opaque], colours[~opaque]                           # (M, C), (M', C)
    top = int(np.iinfo(colours.dtype).max)
    bright = painted.mean(1) > top / 2
    if (painted == painted[0]).all():
        same = bool((rest == painted[0]).all())
        clear = same and not (bright[0] and opaque.mean() < 0.5)
        result, said = (~opaque, "is transparent") if clear else (opaque, "is painted")
    elif ((painted == 0) | (painted == top)).all(1).mean() > 1 - PHOTOGRAPH and bright.any() and not bright.all():
        result = np.zeros_like(opaque)
        result[opaque] = bright if hole == "white" else ~bright
        said = f"is {hole}; transparent pixels are known"
    else:
        result, said = ~opaque, "is transparent"
    notice(f"mask {path} has an alpha channel: the hole is what {said}, {result.mean():.0%} of the picture",
           "masks with an alpha channel", path.name)    # fmt: skip
    return result
