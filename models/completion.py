"""Complete pictures of any size: the one call behind the command, the page, the sweep and `MaskGIT.inpaint`.

A picture is completed level by level (`models.levels`), a level in windows of the model's size (`models.windows`). A picture
of the model's own size has one level and one window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .convert import Given
from .decoding import Options
from .pyramid import Filled, Job, Part, Result, Snapshot, complete_one
from .windows import WindowedModel, make_layout

if TYPE_CHECKING:
    from .maskgit import MaskGIT

__all__ = ["Job", "Progress", "Result", "Snapshot", "complete_pictures", "inpaint"]

MOST_PIXELS = 2**22    # of the pictures of a batch together, unless it is a single one
# How much more entropy a round may accept where there is a guess. The guess already says how tokens belong together, so
# sampling them at once loses less: on validation photographs the scores stay the same, in less time.
GUESSED = 10


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
        batch_size: pictures of a batch, and windows computed together.
        paste: put the known pixels back, bit for bit; False gives the whole decoded picture.
        precision: see `MaskGIT.complete`.
        on_progress: called after every round.
        keep_rounds: also give the picture and the masked tokens of every round.
        options: see `models.decoding.Options`.
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
        raise ValueError(f"the model's weights are {model.transformer.pos_embed.dtype}; use model.float(), precision='bf16'")
    generators = [torch.Generator().manual_seed(int(job.seed)) for job in batch]
    pictures = [complete_one(model.vqgan.config, job, paste, keep_rounds) for job in batch]
    results: dict[int, Result] = {}
    answers: dict[int, Filled] = {}
    was_training = model.training
    model.eval()
    try:
        with model.autocast(precision):
            while True:
                parts = {}
                for i, picture in enumerate(pictures):
                    try:
                        if i not in results:
                            parts[i] = picture.send(answers.get(i))
                    except StopIteration as end:
                        results[i] = end.value
                if not parts:
                    return [results[i] for i in range(len(batch))]
                mine = [generators[i] for i in parts]
                filled = fill(model, list(parts.values()), mine, batch_size, on_progress, keep_rounds, options)
                answers = dict(zip(parts, filled, strict=True))
    finally:
        model.train(was_training)


def fill(
    model, parts: list[Part], generators: list[torch.Generator], batch_size: int, on_progress, keep_rounds: bool,
    options: dict,
) -> list[Filled]:    # fmt: skip
    """Complete the windows of several pictures together."""
    layout = make_layout([part.corners for part in parts], [part.columns for part in parts], model.vqgan.config.grid)
    image = torch.cat([part.image for part in parts]).to(model.device)           # (W, 3, S, S)
    mask = torch.cat([part.mask for part in parts]).to(image)                    # (W, 1, S, S)
    guess = None
    if model.vqgan.config.guess:
        empty = (part.image.new_zeros(len(part.image), 4, *part.image.shape[2:]) for part in parts)
        guess = torch.cat([e if p.guess is None else p.guess for e, p in zip(empty, parts, strict=True)]).to(image)
    windows = WindowedModel(model, layout, image, mask, guess, batch_size)
    report = None
    if on_progress:
        level, levels = max((part.level, part.levels) for part in parts)
        report = lambda t: on_progress(Progress(level + 1, levels, t, Options(**options).rounds))    # noqa: E731
    scale = [n * (GUESSED if part.guess is not None else 1) for n, part in zip(layout.windows, parts, strict=True)]
    rounds, known = windows.complete(generators, scale=scale, on_round=report, **options)
    decoded = [windows.decode(r.tokens, known).cpu().split(layout.windows) for r in (rounds if keep_rounds else rounds[-1:])]
    masked = [known.hidden, *(r.masked for r in rounds)]                         # (B, L) each
    steps = torch.stack([m.any(1) for m in masked[:-1]]).sum(0).tolist()
    seen = [m.flatten()[windows.index].cpu().split(layout.windows) for m in masked]
    return [Filled([d[i] for d in decoded], [m[i] for m in seen], steps[i]) for i in range(len(parts))]


def inpaint(model: MaskGIT, image: Any, mask: Any, seed: int, num_samples: int, return_rounds: bool, options: dict) -> Any:
    """Complete pictures of the kinds people hold; see `MaskGIT.inpaint`."""
    for name, value in (("seed", seed), ("num_samples", num_samples), ("batch_size", options.get("batch_size", 1))):
        least = 0 if name == "seed" else 1
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= value < 2**63:
            raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}")
    several = isinstance(image, list | tuple) or isinstance(image, Tensor) and image.ndim == 4
    if several and num_samples > 1:
        raise ValueError("num_samples is for a single picture; give the picture several times instead")
    images, masks = (list(image), list(mask)) if several else ([image], [mask])
    if len(images) != len(masks):
        raise ValueError(f"{len(images)} pictures need as many masks, got {len(masks)}")
    given = [Given(*pair) for pair in zip(images, masks, strict=True)] * num_samples
    jobs = (Job(x.pixels, x.hole, seed + i) for i, x in enumerate(given))
    results = list(complete_pictures(model, jobs, keep_rounds=return_rounds, **options))
    completed = [x.restore(r.image, options.get("paste", True)) for x, r in zip(given, results, strict=True)]
    rounds = [r.rounds for r in results]
    if isinstance(image, Tensor) and several:
        completed = torch.stack(completed)
    elif not several and num_samples == 1:
        completed, rounds = completed[0], rounds[0]
    return (completed, rounds) if return_rounds else completed
