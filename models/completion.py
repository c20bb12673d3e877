"""Complete pictures of any size: the one call behind the command, the page, the sweep and `MaskGIT.inpaint`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .convert import finish, shrink, to_uint8

if TYPE_CHECKING:
    from .maskgit import Completion, MaskGIT


class Job(NamedTuple):
    """One completion to make."""

    image: Tensor    # (3, H, W) uint8; what it holds inside the hole is ignored
    hole: Tensor     # (1, H, W) bool, True = to be filled
    seed: int


class Snapshot(NamedTuple):
    """The state before the first round of a level, or after a round."""

    level: int         # 0 is the coarsest
    picture: Tensor    # (3, h, w) uint8, of the level's size; the hole is gray before the first round
    masked: Tensor     # (rows, columns) bool, the tokens still to be filled


class Result(NamedTuple):
    image: Tensor              # (3, H, W) uint8, of the picture's own size
    rounds: list[Snapshot]     # empty without `keep_rounds`


class Progress(NamedTuple):
    """How far the batch at work is; all numbers count from 1."""

    level: int
    levels: int
    round: int
    rounds: int    # at most so many


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
        batch_size: pictures computed together.
        paste: put the known pixels back, bit for bit; False gives the whole decoded picture.
        precision: see `MaskGIT.complete`.
        on_progress: called after every round.
        keep_rounds: also give the picture and the masked tokens of every round.
        options: see `models.decoding.iterative_decode`.
    Yields:
        One result for each job, in order. A picture without a hole comes back as it is, if `paste`.
    """
    jobs = iter(jobs)
    while batch := list(islice(jobs, batch_size)):
        yield from complete_batch(model, batch, paste, precision, on_progress, keep_rounds, options)


def complete_batch(model, batch: list[Job], paste, precision, on_progress, keep_rounds, options) -> Iterator[Result]:
    small = [shrink(job.image, job.hole, model.image_size) for job in batch]
    image = torch.cat([x for x, _ in small]).to(model.device)                  # (B, 3, H, W)
    mask = torch.cat([m for _, m in small]).to(model.device)                   # (B, 1, H, W)
    total = options.get("sweet_spot") or options.get("total_iter", 10)
    report = (lambda t: on_progress(Progress(1, 1, t, total))) if on_progress else None
    done = model.complete(image, mask, [job.seed for job in batch], precision, on_round=report, **options)
    rounds = snapshots(model, image, mask, done, paste, precision) if keep_rounds else [[] for _ in batch]
    for job, picture, kept in zip(batch, done.images.cpu(), rounds, strict=True):
        yield Result(finish(picture, job.image, job.hole, paste), kept)


@torch.no_grad()
def snapshots(
    model: MaskGIT, image: Tensor, mask: Tensor, done: Completion, paste: bool, precision: str | None = None
) -> list[list[Snapshot]]:
    """The rounds of a batch, decoded: for each picture its snapshots."""
    hole, grid = mask.bool(), model.vqgan.config.grid
    with model.autocast(precision):
        decoded = [model.decode(r.tokens, image, mask, done.known.context) for r in done.rounds]
    shown = [torch.where(hole, x, image) if paste else x for x in decoded]
    pictures = to_uint8(torch.stack([image.masked_fill(hole, 0), *shown], 1)).cpu()              # (B, T + 1, 3, H, W)
    masked = torch.stack([done.known.hidden, *(r.masked for r in done.rounds)], 1).cpu()         # (B, T + 1, N)
    return [
        [Snapshot(0, picture, tokens.view(grid, grid)) for picture, tokens in zip(*rounds, strict=True)]
        for rounds in zip(pictures, masked, strict=True)
    ]
