"""The page: its layout, and what its controls do. Needs Gradio."""
from __future__ import annotations

import functools
import html
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
from PIL import Image

from demo.completing import MAX_COMPLETIONS, MAX_ROUNDS, Completion, complete
from demo.painting import CANVAS, PAINT, editor_value, painted
from demo.photos import HOLE_COLOURS, KEPT, Photo, Sample, open_mask, open_photo, to_pil, write_png
from demo.rounds import rounds_html
from models import MaskGIT
from models.completion import Progress
from models.decoding import DECODERS, iterative_decode
from models.schedule import SCHEDULES
from utils import UserError

DEFAULTS = {name: p.default for name, p in inspect.signature(iterative_decode).parameters.items()}
SHOWN = 1280    # longer side of a completion as the page shows it; the file to download has the picture's own size
INTRODUCTION = """# MaskGIT inpainting
Paint over a part of a picture, and the model makes up what could be there. What you don't paint over stays as it is."""


def status_html(text: str, notes: list[str] = (), error: bool = False) -> str:
    """The line under the button; screen readers read it out when it changes."""
    role, kind = ("alert", "error") if error else ("status", "fine")
    return f'<div role="{role}" class="status {kind}">{html.escape(" ".join([text, *notes]))}</div>'


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
        folder: for the files that the page makes; must lie in Gradio's own temporary folder.
        precision: see `MaskGIT.complete`.
    """

    def __init__(self, model: MaskGIT, samples: list[Sample], max_pixels: int, folder: Path, precision: str) -> None:
        self.model, self.samples, self.max_pixels, self.folder = model, samples, max_pixels, folder
        self.precision = precision
        self.ui = SimpleNamespace()

    # ---- layout ----

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="MaskGIT inpainting", analytics_enabled=False, delete_cache=(600, KEPT)) as blocks:
            gr.Markdown(INTRODUCTION)
            with gr.Row():
                with gr.Column(min_width=320):
                    self.input_column()
                with gr.Column(min_width=320):
                    self.result_column()
            self.connect()
        return blocks.queue(max_size=16, default_concurrency_limit=1)

    def input_column(self) -> None:
        ui = self.ui
        photo = replace(self.samples[0].open(self.max_pixels), hole=None) if self.samples else None
        ui.photo = gr.State(photo, time_to_live=KEPT)
        ui.samples = gr.Gallery(
            [Image.open(sample.file).convert("RGB") for sample in self.samples], label="Samples", columns=8, height="auto",
            format="png", visible=bool(self.samples), allow_preview=False, interactive=False, buttons=[],
            elem_id="samples", elem_classes="gallery-box",
        )    # fmt: skip
        with gr.Row(elem_classes="pair"):
            ui.upload = gr.UploadButton("Upload a picture", size="md", elem_id="upload")
            ui.upload_mask = gr.UploadButton("Upload a mask", size="md", elem_id="upload-mask")
        ui.editor = gr.ImageEditor(
            editor_value(photo) if photo else None, label="Paint the hole", type="numpy", format="png", sources=(),
            transforms=(), layers=False, buttons=[], canvas_size=(CANVAS[0], CANVAS[0]), height=520, elem_id="editor",
            brush=gr.Brush(default_size=32, colors=[PAINT], color_mode="fixed"), eraser=gr.Eraser(default_size=32),
        )    # fmt: skip
        ui.wipe = gr.Button("Remove the paint", size="md")

    def options(self) -> None:
        ui = self.ui
        with gr.Row():
            ui.count = gr.Slider(1, MAX_COMPLETIONS, 4, step=1, label="Completions", info="side by side")
            ui.seed = gr.Number(0, precision=0, minimum=0, maximum=2**31 - 1, label="Seed", info="same seed, same result")
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            last = DEFAULTS["total_iter"]
            with gr.Row():
                ui.rounds = gr.Slider(1, MAX_ROUNDS, last, step=1, label="Rounds", info="of the schedule")
                ui.sweet_spot = gr.Slider(1, last, last, step=1, label="Sweet spot", info="stop after this round")
            with gr.Row():
                heat, chance = DEFAULTS["temperature"], DEFAULTS["choice_temperature"]
                ui.temperature = gr.Slider(0, 2, heat, step=0.05, label="Temperature", info="0: likeliest, 2: most varied")
                ui.choice = gr.Slider(0, 20, chance, step=0.5, label="Choice temperature", info="chance in the order")
            with gr.Row():
                ui.schedule = gr.Dropdown(list(SCHEDULES), value=DEFAULTS["schedule"], label="Schedule")
                ui.decoder = gr.Dropdown(list(DECODERS), value=DEFAULTS["decoder"], label="Decoder")
            ui.hole_colour = gr.Radio(HOLE_COLOURS, value="black", label="Colour of the hole in uploaded masks")

    def result_column(self) -> None:
        ui = self.ui
        ui.completions, ui.chosen = gr.State([], time_to_live=KEPT), gr.State(0)
        self.options()
        ui.complete = gr.Button("Complete", variant="primary", elem_id="complete")
        hint = "Paint a hole, or choose a sample, which brings one." if self.samples else "Upload a picture to begin."
        ui.status = gr.HTML(status_html(hint), elem_id="status", padding=False)
        ui.compare = gr.ImageSlider(
            label="Before and after", interactive=False, format="png", buttons=["fullscreen"], max_height=520,
            elem_id="compare",
        )    # fmt: skip
        ui.gallery = gr.Gallery(
            label="Completions", columns=4, height="auto", allow_preview=False, interactive=False, visible=False, buttons=[],
            elem_id="results", elem_classes="gallery-box",
        )    # fmt: skip
        with gr.Row(elem_classes="pair"):
            ui.download = gr.DownloadButton("Download PNG", interactive=False, size="md", elem_id="download")
            ui.reuse = gr.Button("Use as next input", interactive=False, size="md", elem_id="reuse")
        ui.show_rounds = gr.Button("Show the rounds", interactive=False, size="md", elem_id="show-rounds")
        ui.history = gr.HTML(elem_id="history", padding=False)

    def connect(self) -> None:
        """Which handler each control calls, and what it may change."""
        ui = self.ui
        shown = [ui.status, ui.photo, ui.editor, ui.samples]
        details = [ui.status, ui.chosen, ui.compare, ui.download, ui.reuse, ui.show_rounds, ui.history]
        # The last of several quick choices counts; Gradio's own way is to ignore all but the first. Its "always_last" keeps
        # the first event's data, though, so the handlers ask the galleries themselves what is chosen.
        quiet = dict(show_progress="hidden", api_visibility="private", trigger_mode="always_last")
        slow = dict(api_visibility="private", concurrency_id="model")
        ui.samples.select(self.take_sample, ui.samples, shown, **quiet)
        ui.upload.upload(self.take_upload, ui.upload, shown, **quiet)
        ui.upload_mask.upload(self.take_mask, [ui.upload_mask, ui.photo, ui.hole_colour], shown, **quiet)
        ui.wipe.click(self.wipe, ui.photo, shown, **quiet)
        ui.rounds.change(lambda rounds: gr.Slider(maximum=rounds, value=rounds), ui.rounds, ui.sweet_spot, **quiet)
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

    # ---- the input ----

    def show(self, photo: Photo, text: str, notes: list[str] = ()) -> dict:
        """Put a picture and its hole into the editor."""
        ui, value = self.ui, editor_value(photo)
        return {
            ui.status: status_html(text, notes),
            ui.photo: photo,
            ui.editor: {
                "background": self.file(value["background"]),
                "layers": [self.file(layer) for layer in value["layers"]],
                "composite": None,
            },
            ui.samples: gr.Gallery(selected_index=None),    # so that the same sample can be chosen again
        }

    def file(self, image: Image.Image) -> str:
        return str(write_png(image, self.folder, "image"))

    @sentences
    def take_sample(self, gallery: gr.Gallery) -> dict:
        if gallery.selected_index is None:
            return {}
        photo = self.samples[gallery.selected_index].open(self.max_pixels)
        shown = self.show(photo, f"Sample {photo}.", ["Press Complete, or paint another hole."])
        return shown | {self.ui.samples: gr.skip()}

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

    def press(
        self, photo: Photo | None, editor: dict | None, seed: int | None, count: int, total_iter: int, sweet_spot: int,
        schedule: str, decoder: str, temperature: float, choice: float, progress: gr.Progress = gr.Progress(),    # noqa: B008
    ) -> Iterator[dict]:    # fmt: skip
        ui, started = self.ui, time.perf_counter()
        try:
            made = complete(
                self.model, photo, painted(editor, photo) if photo else None, seed, count, self.folder,
                on_progress=show_progress(progress), total_iter=int(total_iter), precision=self.precision,
                sweet_spot=min(int(sweet_spot), int(total_iter)), schedule=schedule, decoder=decoder,
                temperature=temperature, choice_temperature=choice,
            )    # fmt: skip
        except ValueError as error:
            yield {ui.status: status_html(str(error), error=True)}
            return
        seconds = time.perf_counter() - started
        thumbnails = [(self.small(one.file), f"seed {one.seed}") for one in made] if len(made) > 1 else None
        number = f"{len(made)} completions" if len(made) > 1 else "One completion"
        yield {
            ui.completions: made,
            ui.gallery: gr.Gallery(thumbnails, visible=len(made) > 1),
            ui.status: status_html(f"{number} in {seconds:.2f} s. What you did not paint over is unchanged."),
            **self.details(made[0], 0),
        }

    def small(self, file: Path) -> str:
        """A file to show on the page."""
        with Image.open(file) as image:
            if max(image.size) <= SHOWN:
                return str(file)
            image.thumbnail((SHOWN, SHOWN))
            return self.file(image)

    def details(self, one: Completion, index: int) -> dict:
        """What the page shows of the chosen completion."""
        ui, before = self.ui, to_pil(one.photo.image)
        before.thumbnail((SHOWN, SHOWN))
        return {
            ui.chosen: index,
            ui.compare: (self.file(before), self.small(one.file)),
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
        snapshots = made[index].snapshots(self.model, show_progress(progress))
        return {self.ui.history: rounds_html(snapshots, f"seed {made[index].seed}")}
