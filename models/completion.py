"""Complete pictures of any size: the one call behind the command, the page, the sweep and `MaskGIT.inpaint`.

A picture is completed level by level (`models.levels`), a level in windows of the model's size (`models.windows`). A picture
of the model's own size has one level and one window.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .convert import resize, to_uint8
from .levels import Level, Region, count_levels, enlarged, make_levels, split, surroundings
from .windows import WindowedModel, make_layout, place_windows, ramp

if TYPE_CHECKING:
    from .maskgit import MaskGIT

REACH = 10          # tokens: side of the middle of a window; what lies there is seen well
BLOCK = 160         # tokens: side of the part of a level that is completed at once, which bounds the memory
MOST_PIXELS = 2**22    # of the pictures of a batch together, unless it is a single one


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


class Progress(NamedTuple):
    """How far the batch at work is; all numbers count from 1."""

    level: int
    levels: int
    round: int
    rounds: int    # at most so many


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
    """The answer to a part: for the last round, or for every round."""

    windows: list[Tensor]    # (W, 3, S, S) in [-1, 1]
    masked: list[Tensor]     # (W, N) bool, before the first round and after each
    steps: int


def complete_pictures(
    model: MaskGIT,
    jobs: Iterable[Job],
    *,
    batch_size: int = 16,
    paste: bool = True,
    precision: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    keep_rounds: bool = False,
    **options: Any,
) -> Iterator[Result]:
    """Complete many pictures, each of its own size, in batches. Jobs are taken only when a batch needs them.

    Args:
        jobs: any number of them; a result depends on its own job and the options, not on the others.
        batch_size: pictures of a batch, and windows computed together.
        paste: put the known pixels back, bit for bit; False gives the whole decoded picture.
        precision: see `MaskGIT.complete`.
        on_progress: called after every round.
        keep_rounds: also give the picture and the masked tokens of every round.
        options: see `models.decoding.iterative_decode`.
    Yields:
        One result for each job, in order. A picture without a hole comes back as it is, if `paste`.
    Raises:
        ValueError: an option makes no sense, or the model can't complete pictures in its precision.
    """
    for batch in batches(iter(jobs), batch_size):
        yield from complete_batch(model, batch, batch_size, paste, precision, on_progress, keep_rounds, options)


def batches(jobs: Iterator[Job], batch_size: int) -> Iterator[list[Job]]:
    batch: list[Job] = []
    for job in jobs:
        batch.append(job)
        if len(batch) == batch_size or sum(x.hole.numel() for x in batch) >= MOST_PIXELS:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.no_grad()
def complete_batch(model, batch: list[Job], batch_size, paste, precision, on_progress, keep_rounds, options) -> list[Result]:
    """Complete some pictures side by side; the windows that they need are computed together."""
    if model.transformer.pos_embed.dtype != torch.float32:
        raise ValueError(f"the model's weights are {model.transformer.pos_embed.dtype}; use model.float() and precision='bf16'")
    generators = [torch.Generator().manual_seed(int(job.seed)) for job in batch]
    pictures = [complete_one(model, job, paste) for job in batch]
    results: list[Result | None] = [None] * len(batch)
    answers: list[Filled | None] = [None] * len(batch)
    was_training = model.training
    model.eval()
    try:
        with model.autocast(precision):
            while True:
                parts = {}
                for i, picture in enumerate(pictures):
                    if results[i] is None:
                        try:
                            parts[i] = picture.send(answers[i])
                        except StopIteration as end:
                            results[i] = end.value
                if not parts:
                    return results
                mine = [generators[i] for i in parts]
                filled = fill(model, list(parts.values()), mine, batch_size, on_progress, keep_rounds, options)
                answers = [None] * len(batch)
                for i, answer in zip(parts, filled, strict=True):
                    answers[i] = answer
    finally:
        model.train(was_training)


def fill(model, parts: list[Part], generators, batch_size, on_progress, keep_rounds, options) -> list[Filled]:
    """Complete the windows of several pictures together."""
    layout = make_layout([part.corners for part in parts], [part.columns for part in parts], model.vqgan.config.grid)
    device = model.device
    image, mask = (torch.cat([part[k] for part in parts]).to(device) for k in (4, 5))
    guess = None
    if model.vqgan.config.guess:
        guess = torch.cat([image.new_zeros(len(p.image), 4, *p.image.shape[2:]) if p.guess is None else p.guess.to(device)
                           for p in parts])    # fmt: skip
    windows = WindowedModel(model, layout, image, mask.to(image.dtype), guess, batch_size)
    report = None
    if on_progress:
        level, levels = max((part.level, part.levels) for part in parts)
        total = options.get("sweet_spot") or options.get("total_iter") or options.get("max_iter", 8)
        report = lambda t: on_progress(Progress(level + 1, levels, t, total))    # noqa: E731
    rounds, known = windows.complete(generators, windows=layout.windows, on_round=report, **options)
    shown = rounds if keep_rounds else rounds[-1:]
    decoded = [windows.decode(r.tokens, known).cpu().split(layout.windows) for r in shown]
    masked = [known.hidden, *(r.masked for r in rounds)]
    steps = torch.stack([m.any(1) for m in masked[:-1]]).sum(0).tolist()
    seen = [m.flatten()[windows.index].cpu().split(layout.windows) for m in masked]
    return [Filled([d[i] for d in decoded], [m[i] for m in seen], steps[i]) for i in range(len(parts))]


def complete_one(model: MaskGIT, job: Job, paste: bool) -> Generator[Part, Filled, Result]:
    """One picture's way through its levels; it yields the windows it needs and is sent them filled."""
    size, stride = model.image_size, model.vqgan.config.stride
    if paste and not bool(job.hole.any()):
        return Result(job.image, [], 0)
    sides = job.hole.shape[1:]
    image, hole = job.image, job.hole
    if max(sides) < size:    # smaller than a window
        image, hole = resize(image, hole, [max(1, round(side * size / max(sides))) for side in sides])
    count = count_levels(hole, size, stride)
    whole = Region(0, hole.shape[1], 0, hole.shape[2])
    region = surroundings(hole, size * 2 ** (count - 1), stride * 2 ** (count - 1)) if paste else whole
    levels = make_levels(cut(image, region), cut(hole, region), count, size, stride)
    below, snapshots, steps = None, [], 0
    for number, level in enumerate(levels):
        everything = not paste and number == count - 1
        for block in split(*(side // stride for side in level.hole.shape[1:]), BLOCK):
            part = cut_windows(model, level, block, below, number, count, everything)
            if part is not None:
                filled = yield part
                steps += filled.steps
                snapshots += write_block(level, block, part, filled, stride, everything)
        below = level.pixels
    completed = image.clone()
    height, width = region.bottom - region.top, region.right - region.left
    cut(completed, region)[:] = levels[-1].pixels[:, :height, :width]
    if completed.shape[1:] != sides:
        completed = resize(completed, torch.zeros_like(hole), sides)[0]
    return Result(torch.where(job.hole, completed, job.image) if paste else completed, snapshots, steps)


def cut(picture: Tensor, region: Region) -> Tensor:
    return picture[:, region.top : region.bottom, region.left : region.right]


def cut_windows(
    model: MaskGIT, level: Level, block: Region, below: Tensor | None, number: int, count: int, everything: bool
) -> Part | None:
    """The windows that a block of a level needs, or None if its hole is empty."""
    config = model.vqgan.config
    size, stride, grid = config.image_size, config.stride, config.grid
    wanted = torch.zeros(level.hole.shape[1] // stride, level.hole.shape[2] // stride, dtype=torch.bool)
    pixels = Region(*(stride * edge for edge in block))
    touched = torch.ones(1) if everything else torch.nn.functional.max_pool2d(cut(level.hole, pixels).float(), stride)[0]
    wanted[block.top : block.bottom, block.left : block.right] = touched > 0
    if not bool(wanted.any()):
        return None
    corners = place_windows(wanted, grid, min(REACH, grid))
    inside = torch.arange(size)
    rows, columns = (stride * corners[:, i, None] + inside for i in (0, 1))      # (W, S)
    rows, columns = rows[:, :, None], columns[:, None, :]
    image = level.pixels[:, rows, columns].transpose(0, 1).float().div(127.5).sub(1)    # (W, 3, S, S)
    mask = level.hole[:, rows, columns].transpose(0, 1)                          # (W, 1, S, S)
    guess = None
    if below is not None and config.guess:
        guess = torch.cat([enlarged(below, stride * corners, size), mask.float()], 1)
    return Part(number, count, corners, wanted.shape[1], image, mask, guess)


def write_block(
    level: Level, block: Region, part: Part, filled: Filled, stride: int, everything: bool
) -> list[Snapshot]:
    """Fill a block's hole with the windows, averaged where they overlap. Returns the state of every round, if kept."""
    grid = part.image.shape[-1] // stride
    region = Region(*(stride * edge for edge in block))
    hole = cut(level.hole, region)
    weights = ramp(part.image.shape[-1])                                         # (S, S)
    corners = [(int(top) * stride, int(left) * stride) for top, left in part.corners]

    def overlap(top: int, left: int) -> tuple[tuple, tuple]:
        """The window's part of the block, in the block and in the window."""
        a, b = max(top, region.top), min(top + len(weights), region.bottom)
        c, d = max(left, region.left), min(left + len(weights), region.right)
        return (
            (..., slice(a - region.top, b - region.top), slice(c - region.left, d - region.left)),
            (..., slice(a - top, b - top), slice(c - left, d - left)),
        )

    places = [overlap(*corner) for corner in corners]
    total = torch.zeros(hole.shape)
    for outer, inner in places:
        total[outer] += weights[inner]
    before, pictures = level.pixels.clone() if len(filled.windows) > 1 else None, []
    for windows in filled.windows:
        mixed = torch.zeros(3, *hole.shape[1:])
        for (outer, inner), window in zip(places, windows, strict=True):
            mixed[outer] += window[inner] * (weights[inner] / total[outer][0])
        new = torch.ones_like(hole) if everything else hole
        cut(level.pixels, region)[:] = torch.where(new, to_uint8(mixed), cut(level.pixels, region))
        pictures.append(level.pixels.clone() if before is not None else None)
    snapshots = []
    if before is not None:
        before[:, level.hole[0]] = 128
        for picture, masked in zip([before, *pictures], filled.masked, strict=True):
            tokens = torch.zeros(level.hole.shape[1] // stride, level.hole.shape[2] // stride, dtype=torch.bool)
            for (top, left), window in zip(part.corners.tolist(), masked, strict=True):
                tokens[top : top + grid, left : left + grid] |= window.view(grid, grid)
            snapshots.append(Snapshot(part.level, picture, tokens))
    hole[:] = False
    return snapshots
