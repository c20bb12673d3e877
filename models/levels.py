"""Levels of a picture, from coarse to fine: each has twice the side of the one below it, the last the picture's own.

The coarse levels decide what is in a wide hole, the fine ones make it sharp. A thin hole is seen well at the picture's own
size and has that level alone. Only the hole and its surroundings are looked at, so the cost follows the hole's size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

THICK = 3 / 8    # of a window: around a square of such a side without a known pixel, it shows too little


class Level(NamedTuple):
    pixels: Tensor    # (3, h, w) uint8
    hole: Tensor      # (1, h, w) bool


class Region(NamedTuple):
    """A part of the picture: rows top to bottom, columns left to right, the ends not included."""

    top: int
    bottom: int
    left: int
    right: int

    def scaled(self, factor: int) -> "Region":
        return Region(*(factor * edge for edge in self))


def crop(picture: Tensor, region: Region) -> Tensor:
    """A view of a part of a picture (C, H, W)."""
    return picture[:, region.top : region.bottom, region.left : region.right]


def count_levels(hole: Tensor, size: int, stride: int) -> int:
    """How many levels a hole (1, H, W) needs: at the coarsest it is thin, or the picture fits into one window."""
    share, levels = hole[None].float(), 1                                        # (1, 1, H, W) of each pixel that is hole
    while max(share.shape[-2:]) > size and is_thick(share > 0.5, max(1, int(THICK * size / stride)), stride):
        share = F.avg_pool2d(share, 2, ceil_mode=True)
        levels += 1
    return levels


def is_thick(hole: Tensor, side: int, stride: int) -> bool:
    """Whether some square of side x side tokens of a hole (1, 1, H, W) holds no known pixel."""
    if min(hole.shape[-2:]) < side * stride:
        return False
    known = F.max_pool2d((~hole).float(), stride)                                # (1, 1, H / stride, W / stride)
    return not bool(F.max_pool2d(known, side, 1).all())


def surroundings(hole: Tensor, margin: int, unit: int) -> Region:
    """The hole (1, H, W) and `margin` pixels around it, as far as the picture goes; it starts at multiples of `unit`."""
    bounds = []
    for dim, length in ((2, hole.shape[1]), (1, hole.shape[2])):
        inside = hole[0].any(dim - 1).nonzero()
        first, last = int(inside[0]), int(inside[-1])
        bounds += [max(0, first - margin) // unit * unit, min(length, last + 1 + margin)]
    return Region(*bounds)


def make_levels(image: Tensor, hole: Tensor, count: int, size: int, stride: int) -> list[Level]:
    """The levels, coarse first; sides are made up by reflection to whole tokens and at least one window.

    Args:
        image, hole: (3, H, W) uint8 and (1, H, W) bool.
        count: number of levels.
        size: side of a window.
    """
    unit = stride * 2 ** (count - 1)
    sides = [max(size * 2 ** (count - 1), -(-side // unit) * unit) for side in hole.shape[1:]]
    levels = [Level(reflect(image, sides), reflect(hole, sides))]
    if count > 1:
        known = (~levels[0].hole).float()                                        # (1, h, w) share of each pixel
        total = levels[0].pixels.float() * known                                 # (3, h, w)
        for _ in range(count - 1):
            total, known = F.avg_pool2d(total, 2), F.avg_pool2d(known, 2)
            pixels = (total / known.clamp_min(1e-6)).round().clamp(0, 255).to(torch.uint8)
            levels.append(Level(pixels, known < 0.5))
    return levels[::-1]


def reflect(picture: Tensor, sides: list[int]) -> Tensor:
    """A copy of a picture (C, H, W), continued by reflection below and to the right: (C, *sides)."""
    for dim, side in enumerate(sides, 1):
        length = picture.shape[dim]
        place = torch.arange(side) % (2 * length)
        picture = picture.index_select(dim, torch.minimum(place, 2 * length - 1 - place))
    return picture


def split(rows: int, columns: int, most: int) -> list[Region]:
    """Even parts of at most `most` x `most`, row by row."""
    def cuts(length: int) -> list[tuple[int, int]]:
        parts = -(-length // most)
        edges = [length * i // parts for i in range(parts + 1)]
        return list(zip(edges, edges[1:], strict=False))

    return [Region(*a, *b) for a in cuts(rows) for b in cuts(columns)]


def deep(hole: Tensor, size: int) -> Tensor:
    """What lies deeper in a hole (1, h, w) than THICK of a window of `size` pixels: bool (1, h, w)."""
    reach = int(THICK * size)
    known = (~hole).float()[None]                                                # (1, 1, h, w)
    rows = F.max_pool2d(known, (2 * reach + 1, 1), 1, (reach, 0))
    return F.max_pool2d(rows, (1, 2 * reach + 1), 1, (0, reach))[0] == 0


def enlarge(below: Tensor) -> Tensor:
    """The level below, uint8 (3, h, w), twice as large: float (3, 2 h, 2 w) in [-1, 1]."""
    return _twice((below.float() / 127.5 - 1)[None])[0]


def enlarge_windows(below: Tensor, corners: Tensor, size: int) -> Tensor:
    """Windows of the enlarged level below: what `enlarge` gives there, without making the rest.

    Args:
        below: (3, h / 2, w / 2) uint8.
        corners: (W, 2) top and left of this level's windows, in pixels, even.
        size: side of a window.
    Returns:
        (W, 3, size, size) float in [-1, 1].
    """
    around = torch.arange(-3, size // 2 + 3)                                     # 3 pixels more than the window shows
    rows, columns = ((corners[:, i, None] // 2 + around).clamp(0, below.shape[i + 1] - 1) for i in (0, 1))
    small = below[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)      # (W, 3, s + 6, s + 6)
    return _twice(small.float() / 127.5 - 1)[..., 6:-6, 6:-6]


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False).clamp(-1, 1)
