"""One picture's way through its levels, coarse to fine: which windows it needs, and what becomes of them."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .convert import resize, to_uint8
from .levels import Level, Region, count_levels, crop, deep, enlarge, enlarge_windows, make_levels, split, surroundings
from .tone import match_tone
from .windows import place_windows, ramp

if TYPE_CHECKING:
    from .vqgan import VQGANConfig

REACH = 12     # tokens: side of the middle of a window; what lies there is seen well
BLOCK = 160    # tokens: side of the part of a level that is completed at once, which bounds the memory


class Job(NamedTuple):
    """One completion to make."""

    image: Tensor    # (3, H, W) uint8; what it holds inside the hole is ignored
    hole: Tensor     # (1, H, W) bool, True = to be filled
    seed: int


class Snapshot(NamedTuple):
    """The state before the first round of a level, or after a round."""

    level: int         # 0 is the coarsest
    picture: Tensor    # (3, h, w) uint8: the hole and what surrounds it; the hole is gray before the first round
    masked: Tensor     # (rows, columns) bool, the tokens still to be filled


class Result(NamedTuple):
    image: Tensor              # (3, H, W) uint8, of the picture's own size
    rounds: list[Snapshot]     # empty without `keep_rounds`
    steps: int                 # rounds that it took, of all levels together


class Part(NamedTuple):
    """What a picture needs next: the windows of a block of one of its levels."""

    level: int
    levels: int
    corners: Tensor          # (W, 2) tops and lefts of the windows, in tokens
    columns: int             # width of the level in tokens
    image: Tensor            # (W, 3, S, S) in [-1, 1]
    mask: Tensor             # (W, 1, S, S) bool
    guess: Tensor | None     # (W, 4, S, S)


class Filled(NamedTuple):
    """The answer to a part."""

    windows: list[Tensor]    # (W, 3, S, S) in [-1, 1], after every round that is kept, at least the last
    masked: list[Tensor]     # (W, N) bool, before the first round and after each
    steps: int               # rounds


def complete_one(c: VQGANConfig, job: Job, paste: bool, keep_rounds: bool) -> Generator[Part, Filled, Result]:
    """Yields the windows that a picture needs next and is sent them filled, until it is complete.

    Args:
        paste: False gives the whole decoded picture, so its last level needs windows everywhere.
        keep_rounds: also give the rounds.
    """
    sides = job.hole.shape[1:]
    if paste and not bool(job.hole.any()):
        return Result(job.image, [], 0)
    image, hole = job.image, job.hole
    if max(sides) < c.image_size:
        image, hole = resize(image, hole, [max(1, round(side * c.image_size / max(sides))) for side in sides])
    count = count_levels(hole, c.image_size, c.stride)
    region = Region(0, hole.shape[1], 0, hole.shape[2])
    if paste:
        region = surroundings(hole, c.image_size * 2 ** (count - 1), c.stride * 2 ** (count - 1))
    levels = make_levels(crop(image, region), crop(hole, region), count, c.image_size, c.stride)
    below, snapshots, steps = None, [], 0
    for number, level in enumerate(levels):
        if below is not None and not c.guess:
            fill_core(level, below, c.image_size)
        everything = not paste and number == count - 1
        for block in split(*(side // c.stride for side in level.hole.shape[1:]), BLOCK):
            part = cut_windows(c, level, block, below, number, count, everything)
            if part is not None:
                filled = yield part
                steps += filled.steps
                pictures = write_block(level, block, part, filled, c.stride, everything)
                if keep_rounds:
                    snapshots += show_rounds(level, part, pictures, filled, c)
                crop(level.hole, block.scaled(c.stride))[:] = False
        below = level.pixels
    completed = image.clone()
    crop(completed, region)[:] = below[:, : region.bottom - region.top, : region.right - region.left]
    if paste and c.guess:    # models without a guess stay as they were
        completed = match_tone(image, completed, hole)
    if completed.shape[1:] != sides:
        completed = resize(completed, torch.zeros_like(hole), sides)[0]
    return Result(torch.where(job.hole, completed, job.image) if paste else completed, snapshots, steps)


def fill_core(level: Level, below: Tensor, size: int) -> None:
    """For models without a guess: what lies deep in the hole is taken from the level below, as if it were known."""
    core = level.hole & deep(level.hole, size)
    if bool(core.any()):
        level.pixels[:] = torch.where(core, to_uint8(enlarge(below)), level.pixels)
        level.hole[core] = False


def cut_windows(
    c: VQGANConfig, level: Level, block: Region, below: Tensor | None, number: int, count: int, everything: bool
) -> Part | None:
    """The windows that a block of a level needs, or None if nothing of it is hole."""
    size, stride, grid = c.image_size, c.stride, c.grid
    wanted = torch.zeros(level.hole.shape[1] // stride, level.hole.shape[2] // stride, dtype=torch.bool)
    inside = F.max_pool2d(crop(level.hole, block.scaled(stride)).float(), stride)[0] > 0
    wanted[block.top : block.bottom, block.left : block.right] = inside | everything
    if not bool(wanted.any()):
        return None
    corners = place_windows(wanted, grid, max(1, grid * REACH // 16))
    rows, columns = (stride * corners[:, i, None] + torch.arange(size) for i in (0, 1))              # (W, S)
    rows, columns = rows[:, :, None], columns[:, None, :]
    image = level.pixels[:, rows, columns].transpose(0, 1).float().div(127.5).sub(1)                 # (W, 3, S, S)
    mask = level.hole[:, rows, columns].transpose(0, 1)                                              # (W, 1, S, S)
    guess = None
    if below is not None and c.guess:
        guess = torch.cat([enlarge_windows(below, stride * corners, size), mask.float()], 1)
    return Part(number, count, corners, wanted.shape[1], image, mask, guess)


def write_block(
    level: Level, block: Region, part: Part, filled: Filled, stride: int, everything: bool
) -> list[Tensor]:
    """Fill the hole of a block with the windows, averaged where they overlap. Returns the level after every round kept."""
    region = block.scaled(stride)
    weights = ramp(part.image.shape[-1])                                                             # (S, S)
    places = []
    for y, x in (part.corners * stride).tolist():    # the window's part of the block, in the block and in the window
        top, bottom = max(y, region.top), min(y + len(weights), region.bottom)
        left, right = max(x, region.left), min(x + len(weights), region.right)
        outer = ..., slice(top - region.top, bottom - region.top), slice(left - region.left, right - region.left)
        places.append((outer, (..., slice(top - y, bottom - y), slice(left - x, right - x))))
    hole, before = crop(level.hole, region), crop(level.pixels, region)
    total = torch.zeros(hole.shape[1:])
    for outer, inner in places:
        total[outer] += weights[inner]
    pictures = []
    for windows in filled.windows:
        mixed = torch.zeros(before.shape)
        for (outer, inner), window in zip(places, windows, strict=True):
            mixed[outer] += window[inner] * (weights[inner] / total[outer])
        before[:] = torch.where(hole | everything, to_uint8(mixed), before)
        pictures.append(level.pixels.clone() if len(filled.windows) > 1 else level.pixels)
    return pictures


def show_rounds(level: Level, part: Part, pictures: list[Tensor], filled: Filled, c: VQGANConfig) -> list[Snapshot]:
    """The states of a level while one of its blocks is filled."""
    start = pictures[0].masked_fill(level.hole, 128)
    snapshots = []
    for picture, masked in zip([start, *pictures], filled.masked, strict=True):
        tokens = torch.zeros(level.hole.shape[1] // c.stride, level.hole.shape[2] // c.stride, dtype=torch.bool)
        for (top, left), window in zip(part.corners.tolist(), masked, strict=True):
            tokens[top : top + c.grid, left : left + c.grid] |= window.view(c.grid, c.grid)
        snapshots.append(Snapshot(part.level, picture, tokens))
    return snapshots
