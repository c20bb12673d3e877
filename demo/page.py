"""What the page's controls do. Which there are: layout.py. Needs Gradio."""
from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from demo.completing import Completion, complete, write_preview
from demo.layout import lay_out, status_html
from demo.painting import editor_value, painted
from demo.photos import Photo, Sample, open_mask, open_photo, to_pil
from demo.rounds import rounds_html
from models import MaskGIT
from models.completion import Progress
from utils import UserError

SMALL = (64, 64)    # height and width of the pictures of the exercise
WAIT_FOR_EDITOR = """async () => {
    while (!document.querySelector("#editor canvas")) await new Promise(done => setTimeout(done, 200));
    return [];
}"""


def sentences(handler: Callable) -> Callable:
    """Shows what the user did wrong in the page's status line."""

    @functools.wraps(handler)
    def guarded(self: Page, *args: Any, **options: Any) -> dict:
        try:
            return handler(self, *args, **options)
        except ValueError as error:
            return {self.ui.status: status_html(str(error), error=True)}

    return guarded


def show_progress(progress: gr.Progress) -> Callable[[Progress], None]:
    """Gradio's bar for the progress of `complete_pictures`."""

    def show(p: Progress) -> None:
        level = f"level {p.level} of {p.levels}, " if p.levels > 1 else ""
        progress((p.level - 1 + p.round / p.rounds) / p.levels, desc=f"Completing: {level}round {p.round}")

    return show


class Page:
    """The page and what its controls do.

    Args:
        model, photo_model: for pictures of the size of the exercise (64x64), and for all others; may be one and the same.
        folder: for the files that the page makes; must lie in Gradio's own temporary folder.
    """

    def __init__(
        self, model: MaskGIT, photo_model: MaskGIT, samples: list[Sample], max_pixels: int, folder: Path
    ) -> None:
        self.model, self.photo_model = model, photo_model
        self.samples, self.max_pixels, self.folder = samples, max_pixels, folder
        self.blocks, self.ui = lay_out([str(sample.file) for sample in samples])
        with self.blocks:
            self.connect()
        self.blocks.queue(max_size=16, default_concurrency_limit=1)

    def connect(self) -> None:
        """Which handler each control calls, and what it may change."""
        ui = self.ui
        shown = [ui.status, ui.photo, ui.editor, ui.samples]
        details = [ui.status, ui.chosen, ui.compare, ui.download, ui.reuse, ui.show_rounds, ui.history]
        # The last of several quick choices counts; Gradio's own way is to ignore all but the first. Its "always_last" keeps
        # the first event's data, though, so the handlers ask the galleries themselves what is chosen.
        quiet = dict(show_progress="hidden", api_visibility="private", trigger_mode="always_last")
        slow = dict(api_visibility="private", concurrency_id="model")
        if self.samples:
            self.blocks.load(self.sample, None, shown, js=WAIT_FOR_EDITOR, **quiet)
        ui.samples.select(self.take_sample, ui.samples, shown, **quiet)
        ui.upload.upload(self.take_upload, ui.upload, shown, **quiet)
        ui.upload_mask.upload(self.take_mask, [ui.upload_mask, ui.photo, ui.hole_colour], shown, **quiet)
        ui.wipe.click(self.wipe, ui.photo, shown, **quiet)
        ui.complete.click(
            self.press, [ui.photo, ui.editor, ui.seed, ui.count, ui.rounds, ui.sweet_spot, ui.schedule, ui.decoder,
                         ui.temperature, ui.choice],
            [ui.completions, ui.gallery, *details], show_progress_on=ui.compare, **slow,
        )    # fmt: skip
        ui.gallery.select(self.choose, [ui.gallery, ui.completions], details, **quiet)
        ui.reuse.click(self.reuse, [ui.completions, ui.chosen], shown, **quiet)
        ui.show_rounds.click(
            self.show_rounds, [ui.completions, ui.chosen], [ui.status, ui.history], show_progress_on=ui.history, **slow
        )
        ui.api_call.click(self.complete_file, ui.api, ui.api_result, api_name="complete", concurrency_id="model")

    # ---- the input ----

    def show(self, photo: Photo, text: str, notes: list[str] = ()) -> dict:
        """Put a picture and its hole into the editor."""
        ui, value = self.ui, editor_value(photo)
        return {
            ui.status: status_html(text, notes),
            ui.photo: photo,
            ui.editor: value | {
                "background": self.file(value["background"]), "layers": [self.file(layer) for layer in value["layers"]]
            },
            ui.samples: gr.Gallery(selected_index=None),    # so that the same sample can be chosen again
        }

    def file(self, image: Image.Image) -> str:
        return str(write_preview(image, self.folder))

    @sentences
    def take_sample(self, gallery: gr.Gallery) -> dict:
        return {} if gallery.selected_index is None else self.sample(gallery.selected_index) | {self.ui.samples: gr.skip()}

    @sentences
    def sample(self, index: int = 0) -> dict:
        photo = self.samples[index].open(self.max_pixels)
        return self.show(photo, f"Sample {photo}.", ["Press Complete, or paint another hole."])

    @sentences
    def take_upload(self, path: str) -> dict:
        photo, notes = open_photo(path, self.max_pixels)
        return self.show(photo, f"Opened {photo}.", [*notes, "Paint the hole, then press Complete."])

    @sentences
    def take_mask(self, path: str, photo: Photo | None, hole_colour: str) -> dict:
        if photo is None:
            raise UserError("Upload the picture first, then its mask.")
        photo, notes = open_mask(path, photo, hole_colour, self.max_pixels)
        return self.show(photo, "Read the mask.", notes)

    @sentences
    def wipe(self, photo: Photo | None) -> dict:
        return self.show(replace(photo, hole=None), "Removed the paint.") if photo else {}

    # ---- the result ----

    def model_for(self, photo: Photo | None) -> MaskGIT:
        return self.model if photo is None or photo.size == SMALL else self.photo_model

    def complete_file(
        self, image: str | None, mask: str | None, seed: int, hole: str, total_iter: int, temperature: float,
        progress: gr.Progress = gr.Progress(),    # noqa: B008
    ) -> str:    # fmt: skip
        """Complete a picture of any size. Returns a PNG of the same size; known pixels come back bit for bit.

        image: file of the picture. mask: file of the same size; its white parts are the hole, unless `hole` is "black".
        seed: the same seed gives the same picture. total_iter: rounds; 0: as many as the picture needs. temperature: 0 takes
        the likeliest content, 1 varies with the seed.
        """
        try:
            if image is None or mask is None:
                raise UserError("Give a picture and a mask of the same size.")
            photo, _ = open_photo(image, self.max_pixels)
            photo, _ = open_mask(mask, photo, hole, self.max_pixels)
            options = dict(total_iter=total_iter or None, temperature=temperature)
            model = self.model_for(photo)
            made = complete(model, photo, photo.hole, seed, 1, self.folder, show_progress(progress), **options)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return str(made[0].file)

    def press(
        self, photo: Photo | None, editor: dict | None, seed: int | None, count: int, total_iter: int, sweet_spot: int,
        schedule: str, decoder: str, temperature: float, choice: float, progress: gr.Progress = gr.Progress(),    # noqa: B008
    ) -> Iterator[dict]:    # fmt: skip
        ui, started = self.ui, time.perf_counter()
        try:
            made = complete(
                self.model_for(photo), photo, painted(editor, photo) if photo else None, seed, count, self.folder,
                on_progress=show_progress(progress), total_iter=int(total_iter) or None,
                sweet_spot=int(sweet_spot) or None, schedule=schedule, decoder=decoder,
                temperature=temperature, choice_temperature=choice,
            )    # fmt: skip
        except ValueError as error:
            yield {ui.status: status_html(str(error), error=True)}
            return
        seconds = time.perf_counter() - started
        thumbnails = [(str(one.preview), f"seed {one.seed}") for one in made] if len(made) > 1 else None
        number = f"{len(made)} completions" if len(made) > 1 else "One completion"
        steps = sorted({min(one.steps for one in made), max(one.steps for one in made)})
        rounds = f"{' to '.join(map(str, steps))} round{'s' if steps[-1] > 1 else ''}"
        yield {
            ui.completions: made,
            ui.gallery: gr.Gallery(thumbnails, visible=len(made) > 1),
            ui.status: status_html(f"{number} in {seconds:.2f} s, {rounds}. What you did not paint over is unchanged."),
            **self.details(made[0], 0),
        }

    def details(self, one: Completion, index: int) -> dict:
        """What the page shows of the chosen completion."""
        ui, before = self.ui, self.file(to_pil(one.photo.picture.rgb()))
        return {
            ui.chosen: index,
            ui.compare: (before, str(one.preview)),
            ui.download: gr.DownloadButton(f"Download PNG (seed {one.seed})", interactive=True, value=str(one.file)),
            ui.reuse: gr.Button(interactive=True),
            ui.show_rounds: gr.Button(interactive=True),
            ui.history: "",
        }

    @sentences
    def choose(self, gallery: gr.Gallery, made: list[Completion]) -> dict:
        chosen = gallery.selected_index
        return {} if not made or chosen is None else self.details(made[chosen], chosen)

    @sentences
    def reuse(self, made: list[Completion], index: int) -> dict:
        if not made:
            raise UserError("There is no completion yet.")
        one = made[index]
        photo, _ = open_photo(one.file, self.max_pixels)
        photo = replace(photo, name=one.photo.name)
        return self.show(photo, f"Seed {one.seed} is the picture now: paint the next hole.")

    @sentences
    def show_rounds(
        self, made: list[Completion], index: int, progress: gr.Progress = gr.Progress()    # noqa: B008
    ) -> dict:
        if not made:
            raise UserError("There is no completion yet.")
        snapshots = made[index].snapshots(self.model_for(made[index].photo), show_progress(progress))
        return {self.ui.history: rounds_html(snapshots, f"seed {made[index].seed}")}
