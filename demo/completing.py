"""Completes pictures for the page and for programs that call it, within the page's limits."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from demo.photos import Photo, new_file, to_pil
from models import MaskGIT
from models.completion import Job, Progress, Snapshot, complete_pictures
from pictures.images import write_completed
from utils import UserError

MAX_COMPLETIONS = 8
MAX_ROUNDS = 30
MAX_SEED = 2**31 - 1
SHOWN = 1536    # longer side of a picture on the page; the file to download has the picture's own size


@dataclass(frozen=True)
class Completion:
    """One completed picture: two files, and all that it takes to make it again."""

    photo: Photo
    hole: Tensor               # (1, H, W) bool
    seed: int
    options: dict[str, Any]
    steps: int                 # rounds that it took
    file: Path                 # PNG of the picture's own size, depth and metadata
    preview: Path              # PNG to show on the page

    def snapshots(self, model: MaskGIT, on_progress: Callable[[Progress], None] | None = None) -> list[Snapshot]:
        """The state after every round. Completes the picture once more: the same seed gives the same picture."""
        job = Job(self.photo.picture.rgb(), self.hole, self.seed)
        return next(iter(complete_pictures(model, [job], keep_rounds=True, on_progress=on_progress, **self.options))).rounds


def check(photo: Photo | None, hole: Tensor | None, seed: int | None, count: int, options: dict[str, Any]) -> None:
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
    if not 1 <= (options.get("total_iter") or 1) <= MAX_ROUNDS:
        raise UserError(f"At most {MAX_ROUNDS} rounds are possible here.")


def complete(
    model: MaskGIT, photo: Photo | None, hole: Tensor | None, seed: int | None, count: int, folder: Path,
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
    image, made = photo.picture.rgb(), []
    jobs = [Job(image, hole, int(seed) + i) for i in range(int(count))]
    for job, result in zip(jobs, complete_pictures(model, jobs, on_progress=on_progress, **options), strict=True):
        file = new_file(folder, f"{photo.name}-seed{job.seed}")
        write_completed(file, photo.picture, result.image, hole)
        preview = write_preview(to_pil(result.image), folder)
        made.append(Completion(photo, hole, job.seed, options, result.steps, file, preview))
    return made


def write_preview(image: Image.Image, folder: Path) -> Path:
    """Write a picture to show on the page, made smaller where it is larger than the page needs."""
    path = new_file(folder, "image")
    image.thumbnail((SHOWN, SHOWN))
    image.save(path, compress_level=1)    # speed matters more than size
    return path
