"""Completes pictures for the page and for programs that call it, within the page's limits."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from demo.photos import Photo, write_png
from models import MaskGIT
from models.completion import Job, Progress, Snapshot, complete_pictures
from utils import UserError

MAX_COMPLETIONS = 8
MAX_ROUNDS = 30
MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class Completion:
    """One completed picture. All that it takes to make it again is kept, but not its pixels: these are in the file."""

    photo: Photo
    hole: Tensor             # (1, H, W) bool
    seed: int
    file: Path               # PNG of the picture's own size
    options: dict[str, Any] = field(default_factory=dict)

    def snapshots(self, model: MaskGIT, on_progress: Callable[[Progress], None] | None = None) -> list[Snapshot]:
        """The state after every round. Completes the picture once more: the same seed gives the same picture."""
        job = Job(self.photo.image, self.hole, self.seed)
        return next(complete_pictures(model, [job], keep_rounds=True, on_progress=on_progress, **self.options)).rounds


def check(photo: Photo | None, hole: Tensor, seed: int | None, count: int, options: dict[str, Any]) -> None:
    """Refuse what can't be completed."""
    if photo is None:
        raise UserError("There is no picture yet: choose a sample or upload a picture.")
    if not hole.any():
        raise UserError("Nothing is painted yet: paint over the part to fill in, or upload a mask.")
    if hole.all():
        raise UserError("The whole picture is painted: leave a part of it for the model to go by.")
    if seed is None or not 0 <= seed <= MAX_SEED:
        raise UserError(f"The seed must be a whole number from 0 to {MAX_SEED}.")
    if not 1 <= count <= MAX_COMPLETIONS:
        raise UserError(f"Between 1 and {MAX_COMPLETIONS} completions are possible here.")
    if not 1 <= options.get("total_iter", 1) <= MAX_ROUNDS:
        raise UserError(f"Between 1 and {MAX_ROUNDS} rounds are possible here.")


def complete(
    model: MaskGIT, photo: Photo | None, hole: Tensor, seed: int | None, count: int, folder: Path,
    on_progress: Callable[[Progress], None] | None = None, **options: Any,
) -> list[Completion]:    # fmt: skip
    """Complete a picture `count` times, with the seeds `seed`, `seed` + 1, ...; the files are written into `folder`.

    Args:
        hole: (1, H, W) bool.
        options: see `models.completion.complete_pictures`.
    Raises:
        ValueError: with a sentence for the page.
    """
    check(photo, hole, seed, count, options)
    jobs = [Job(photo.image, hole, int(seed) + i) for i in range(int(count))]
    results = complete_pictures(model, jobs, on_progress=on_progress, **options)
    return [
        Completion(photo, hole, job.seed, write_png(result.image, folder, f"{photo.name}-seed{job.seed}"), options)
        for job, result in zip(jobs, results, strict=True)
    ]
