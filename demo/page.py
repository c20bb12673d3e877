"""A page in the browser: paint a hole into a picture of a cat and see it filled in, round by round.

The bundled weights, at http://127.0.0.1:7860:   python demo.py
Your own:                                        python demo.py --checkpoint RUN/maskgit.safetensors --port 8000

Needs gradio: pip install -r requirements-demo.txt. The page works without a network: whatever it loads comes from this
server, and nothing is reported to anyone. The model sees a square of the picture, which the user places; what lies outside
the square and outside the hole comes back bit for bit.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import html
import inspect
import io
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from models import MaskGIT
from models.decoding import DECODERS, Round, iterative_decode
from models.maskgit import pixel_to_token_mask
from models.pictures import View
from models.schedule import SCHEDULES
from pictures.files import find_images
from pictures.images import open_rgb, read_mask
from utils import Parser, UserError, pick_device, run_cli

try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect
except ImportError:    # only the page needs it; `main` says how to get it
    gr, ClientDisconnect = None, ConnectionError

HERE = Path(__file__).resolve().parent.parent
DEFAULTS = {name: p.default for name, p in inspect.signature(iterative_decode).parameters.items()}
MAX_SAMPLES = 8
MAX_ROUNDS = 30
MIN_SIDE = 16            # pixels of the picture; a smaller square holds no face
CANVAS = (512, 1024)     # least and largest side of the editor's canvas, in pixels; the square is scaled to fit
HOLE_COLOUR = "#e0218a"
OPEN, DONE = (224, 33, 138), (226, 232, 240)    # RGB of open and of settled tokens
LOOPBACK = ("127.0.0.1", "localhost", "::1")


# ---- pictures ----


@dataclass(frozen=True)
class Picture:
    """A picture as the user gave it, and the square of it that the model sees."""

    pixels: np.ndarray             # (H, W, 3) uint8
    name: str                      # without suffix, safe as part of a file name
    box: tuple[int, int, int]      # left, top, side of the square

    @property
    def crop(self) -> np.ndarray:
        """(side, side, 3), a view."""
        left, top, side = self.box
        return self.pixels[top : top + side, left : left + side]

    def placed(self, left: float, top: float, side: float) -> Picture:
        """The same picture with another square, moved and shrunk as needed to lie inside."""
        height, width = self.pixels.shape[:2]
        side = min(max(int(side), MIN_SIDE), height, width)
        return replace(self, box=(min(max(int(left), 0), width - side), min(max(int(top), 0), height - side), side))

    def with_crop(self, crop: np.ndarray) -> Picture:
        """The same picture with other pixels in its square."""
        changed = replace(self, pixels=self.pixels.copy())
        changed.crop[:] = crop
        return changed


def open_picture(path: str, max_pixels: int) -> tuple[Picture, list[str]]:
    """Read an uploaded file. The square is the largest one in the middle. Notes say what was changed in reading."""
    name = Path(path).name
    notes = check_file(path, name, max_pixels)
    pixels = np.asarray(open_rgb(path, name))
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise UserError(f"{name} has {width}x{height} pixels; at least {MIN_SIDE}x{MIN_SIDE} are needed")
    side = min(height, width)
    stem = re.sub(r"[^\w-]+", "_", Path(path).stem)[:60] or "picture"
    return Picture(pixels, stem, ((width - side) // 2, (height - side) // 2, side)), notes


def check_file(path: str, name: str, max_pixels: int) -> list[str]:
    """Refuse what is no picture or too large before it is decoded; say what will be lost in reading the others."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            mode, frames, alpha = image.mode, getattr(image, "n_frames", 1), image.has_transparency_data
    except Image.DecompressionBombError:
        raise UserError(f"{name} has far more pixels than the {max_pixels:,} allowed") from None
    except Exception as error:    # a broken file makes decoders raise anything
        raise UserError(f"{name} is not a picture that can be read; use PNG, JPEG or WebP") from error
    if width * height > max_pixels:
        raise UserError(f"{name} has {width}x{height} pixels, more than the {max_pixels:,} allowed; make it smaller")
    notes = []
    if frames > 1:
        notes.append(f"It has {frames} frames; the first one is used.")
    if mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        notes.append(f"Its {mode} colours were converted to RGB.")
    if alpha:
        notes.append("Its transparent parts were put on white.")
    return notes


def open_mask(path: str, picture: Picture, hole_colour: str, max_pixels: int) -> tuple[np.ndarray, list[str]]:
    """Read an uploaded mask, as large as the whole picture: the square's hole, (side, side) bool, and notes."""
    name = Path(path).name
    check_file(path, name, max_pixels)
    gray = np.asarray(open_rgb(path, name))
    hole = read_mask(path, hole_colour).numpy()[0]
    height, width = picture.pixels.shape[:2]
    if hole.shape != (height, width):
        size = f"{hole.shape[1]}x{hole.shape[0]} pixels, the picture {width}x{height}"
        raise UserError(f"the mask {name} has {size}; they must agree")
    left, top, side = picture.box
    inside = hole[top : top + side, left : left + side]
    notes = [f"Its {hole_colour} parts are the hole: {inside.mean():.0%} of the square."]
    if ((gray > 0) & (gray < 255)).any():
        notes.append("Its grays were taken for black or white, whichever is nearer.")
    if inside.sum() < hole.sum():
        notes.append("Holes outside the square are left as they are.")
    return inside, notes


# ---- the editor ----


def canvas_side(side: int) -> int:
    return min(max(side, CANVAS[0]), CANVAS[1])


def editor_value(picture: Picture, hole: np.ndarray | None = None) -> dict[str, Any]:
    """What the editor shows: the square, enlarged to paint in comfort, and the hole as a layer of paint."""
    size = (canvas_side(picture.box[2]),) * 2
    background = Image.fromarray(picture.crop).resize(size, Image.Resampling.BICUBIC)
    layers = []
    if hole is not None:
        paint = Image.new("RGBA", size, HOLE_COLOUR)
        paint.putalpha(Image.fromarray(hole.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST))
        layers = [paint]
    return {"background": background, "layers": layers, "composite": None}


def painted(editor: dict[str, Any] | None, side: int) -> np.ndarray:
    """(side, side) bool: the pixels whose middle is painted. A hole of `editor_value` comes back exactly up to side 1024."""
    hole = np.zeros((side, side), dtype=bool)
    for layer in (editor or {}).get("layers") or []:
        alpha = Image.fromarray(np.ascontiguousarray(layer[..., 3]))
        hole |= np.asarray(alpha.resize((side, side), Image.Resampling.NEAREST)) >= 128
    return hole


def outlined(picture: Picture, box: tuple[int, int, int]) -> Image.Image:
    """The whole picture, at most 640 pixels wide or high, with a square outlined and the rest dimmed."""
    small = Image.fromarray(picture.pixels)
    small.thumbnail((640, 640))
    scale = small.width / picture.pixels.shape[1]
    left, top, side = (round(value * scale) for value in box)
    dimmed = small.point(lambda value: value * 2 // 5)
    dimmed.paste(small.crop((left, top, left + side, top + side)), (left, top))
    ImageDraw.Draw(dimmed).rectangle((left, top, left + side - 1, top + side - 1), outline=HOLE_COLOUR, width=3)
    return dimmed


# ---- completing ----


@dataclass(frozen=True)
class Result:
    """What one press of the button made."""

    picture: Picture
    hole: np.ndarray              # (side, side) bool
    crops: list[np.ndarray]       # completions of the square, (side, side, 3) uint8
    rounds: list[Round]           # rows are the completions
    seeds: list[int]
    seconds: float

    def whole(self, index: int) -> Picture:
        """The whole picture with completion `index` in its square."""
        return self.picture.with_crop(self.crops[index])


def complete(
    model: MaskGIT, picture: Picture | None, hole: np.ndarray, seed: int | None, num_samples: int, total_iter: int,
    on_round: Callable[[int], None] | None = None, **options: Any,
) -> Result:    # fmt: skip
    """Complete the square. Raises ValueError with a sentence for the page."""
    if picture is None:
        raise UserError("There is no picture yet: take a sample or upload one.")
    if not hole.any():
        raise UserError("Nothing is painted yet: paint over the part to be filled in, or upload a mask.")
    if hole.all():
        raise UserError("The whole square is painted: leave a part of the picture for the model to go by.")
    if seed is None:
        raise UserError("The seed is empty: give a whole number.")
    if not (1 <= num_samples <= MAX_SAMPLES and 1 <= total_iter <= MAX_ROUNDS):
        raise UserError(f"At most {MAX_SAMPLES} completions and {MAX_ROUNDS} rounds are possible here.")
    started = time.perf_counter()
    done, rounds = model.inpaint(
        picture.crop, hole, seed=int(seed), num_samples=int(num_samples), total_iter=int(total_iter), on_round=on_round,
        return_rounds=True, **options,
    )    # fmt: skip
    crops = done if num_samples > 1 else [done]
    return Result(picture, hole, crops, rounds, [int(seed) + i for i in range(len(crops))], time.perf_counter() - started)


@dataclass(frozen=True)
class Step:
    """The state after a round, or before the first."""

    title: str
    note: str
    image: Image.Image     # what the model has so far, at its own size
    tokens: Image.Image    # one pixel a token


def steps(model: MaskGIT, result: Result, index: int) -> list[Step]:
    """How completion `index` came about, from the empty hole on."""
    view = View(result.picture.crop, result.hole, model.image_size)
    known, hole = (view.small[0] + 1) / 2, view.small_hole[0].bool()
    tokens = torch.stack([one.tokens[index] for one in result.rounds])                         # (T, N)
    pictures = model.render(tokens, (known * 255).round().to(torch.uint8), hole)               # T of (3, size, size)
    start = torch.where(hole, torch.tensor(OPEN).view(3, 1, 1), pictures[0]).to(torch.uint8)
    first = pixel_to_token_mask(view.small_hole, model.vqgan.config.stride)[0]                 # (N,)
    opened = [first] + [one.masked[index].cpu() for one in result.rounds]
    grid = model.vqgan.config.grid
    titles = ["Start"] + [f"Round {t}" for t in range(1, len(pictures) + 1)]
    return [
        Step(
            title, f"{int(left.sum())} of {int(first.sum())} tokens open", as_image(image),
            Image.fromarray(np.where(left.view(grid, grid, 1).numpy(), OPEN, DONE).astype(np.uint8)),
        )
        for title, image, left in zip(titles, [start, *pictures], opened, strict=True)
    ]    # fmt: skip


def as_image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


# ---- what the page shows ----


def data_url(kind: str, frames: list[Image.Image], **options: Any) -> str:
    """Pictures inside the page itself: no file on the server, nothing to clean up."""
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, **({"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}), **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def film(shown: list[Step]) -> str:
    """The rounds as an animation: the picture on the left, its tokens on the right."""
    frames = []
    for step in shown:
        frame = Image.new("RGB", (520, 256), "white")
        frame.paste(step.image.resize((256, 256), Image.Resampling.BICUBIC), (0, 0))
        frame.paste(step.tokens.resize((256, 256), Image.Resampling.NEAREST), (264, 0))
        frames.append(frame.quantize(256, Image.Quantize.FASTOCTREE))    # thirty times as fast as Pillow's default
    times = [800] + [350] * (len(frames) - 2) + [2000]    # ms
    return data_url("gif", frames, duration=times, loop=0)


def rounds_html(shown: list[Step], title: str) -> str:
    """Animation and strip."""
    items = "".join(
        f'<li><img src="{data_url("png", [step.image])}" alt="{step.title}: the picture">'
        f'<img class="tokens" src="{data_url("png", [step.tokens])}" alt="{step.title}: {step.note}">'
        f"<b>{step.title}</b><span>{step.note}</span></li>"
        for step in shown
    )
    return (
        f'<h3>How {html.escape(title)} came about</h3><img class="film" src="{film(shown)}" '
        f'alt="Animation of the rounds: the picture, and its tokens, the open ones coloured"><ol class="strip">{items}</ol>'
    )


def status_html(text: str, notes: list[str] = (), error: bool = False) -> str:
    """The line under the button; screen readers read it out when it changes."""
    role, kind = ("alert", "error") if error else ("status", "fine")
    return f'<div role="{role}" class="status {kind}">{html.escape(" ".join([text, *notes]))}</div>'


def picture_text(picture: Picture, verb: str) -> str:
    height, width = picture.pixels.shape[:2]
    return f"{verb} {picture.name}, {width} × {height} pixels."


def write_png(picture: Picture, folder: Path, name: str) -> str:
    """A file to download; those of more than an hour ago are removed."""
    for old in folder.glob("*/*.png"):
        if time.time() - old.stat().st_mtime > 3600:
            old.unlink(missing_ok=True)
    path = Path(tempfile.mkdtemp(dir=folder)) / f"{name}.png"
    Image.fromarray(picture.pixels).save(path, compress_level=1)    # large pictures: speed before size
    return str(path)


def save_whole(save: Callable[..., str]) -> Callable[..., str]:
    """Gradio's way to file a picture for the browser, which names the file by its content and writes it again when it comes
    again. A browser that is loading it just then would get a part; here the new file takes the old one's place at once."""

    def saved(image: Image.Image, cache_dir: str, *args: Any, **options: Any) -> str:
        cache = Path(cache_dir).resolve()
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as staging:
            made = Path(save(image, staging, *args, **options))    # STAGING/HASH/NAME
            path = cache / made.parent.name / made.name
            path.parent.mkdir(exist_ok=True)
            made.replace(path)
        return str(path)

    return saved


CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto; }
.gallery-box .grid-wrap { min-height: 0; max-height: none; height: auto; }
.gallery-box .grid-container { grid-auto-rows: auto; grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)); }
#samples .grid-container { padding-top: 1.6em; }
#samples .thumbnail-item { border-radius: 6px; }
#editor { height: min(520px, 92vw) !important; }
#editor [aria-label="Clear canvas"] { display: none; }    /* it would take the picture away, too */
.pair { flex-wrap: nowrap; }
.pair > * { min-width: 0 !important; }
.status { padding: .6em .9em; border-radius: 8px; border-left: 4px solid; overflow-wrap: anywhere; }
.status.fine { border-color: #0f766e; background: #0f766e18; }
.status.error { border-color: #b91c1c; background: #b91c1c1f; font-weight: 600; }
.film { width: 100%; max-width: 520px; border-radius: 8px; }
ol.strip { display: flex; gap: .6em; overflow-x: auto; list-style: none; margin: .6em 0 0; padding: 0 0 .6em;
  width: 0; min-width: 100%; }    /* as wide as the column, never wider */
ol.strip li { flex: 0 0 84px; display: flex; flex-direction: column; gap: 4px; margin: 0; }
ol.strip img { width: 84px; height: 84px; border-radius: 4px; }
ol.strip img.tokens { image-rendering: pixelated; }
ol.strip span { font-size: .8em; opacity: .8; }
@media (max-width: 640px) { #samples .grid-container { --grid-cols: 6 !important; } }
"""


def sentences(handler: Callable) -> Callable:
    """What a user did wrong becomes the page's status line; the server lives on."""

    @functools.wraps(handler)
    def guarded(self: Page, *args: Any) -> dict:
        try:
            return handler(self, *args)
        except ValueError as error:
            return {self.ui.status: status_html(str(error), error=True)}

    return guarded


class Page:
    """The page and what its controls do.

    Args:
        samples: (name, picture file, mask file or None).
        folder: for files to download; must lie in Gradio's own temporary folder.
        precision: fp32 or bf16.
    """

    def __init__(
        self, model: MaskGIT, samples: list[tuple[str, Path, Path | None]], max_pixels: int, folder: Path, precision: str
    ) -> None:
        self.model, self.samples, self.max_pixels, self.folder = model, samples, max_pixels, folder
        self.precision = precision
        self.ui = SimpleNamespace()

    # ---- layout ----

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="MaskGIT inpainting", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
            size = self.model.image_size
            gr.Markdown(
                "# MaskGIT inpainting\nPaint over a part of a cat's face: the model makes up what could be there, in a few "
                f"rounds, surest parts first. It works at {size} × {size} pixels. What you don't paint over stays as it is."
            )
            with gr.Row():
                with gr.Column(min_width=320):
                    self.input_column()
                with gr.Column(min_width=320):
                    self.result_column()
            self.connect()
        return blocks.queue(max_size=16, default_concurrency_limit=1)

    def input_column(self) -> None:
        ui = self.ui
        picture = self.sample(0)[0] if self.samples else None
        ui.picture = gr.State(picture, time_to_live=3600)
        ui.samples = gr.Gallery(
            [Image.open(path).convert("RGB") for _, path, _ in self.samples], label="Samples", columns=8, height="auto",
            format="png", visible=bool(self.samples), allow_preview=False, interactive=False, buttons=[],
            elem_id="samples", elem_classes="gallery-box",
        )    # fmt: skip
        with gr.Row(elem_classes="pair"):
            ui.upload = gr.UploadButton("Upload a picture", size="md", elem_id="upload")
            ui.upload_mask = gr.UploadButton("Upload a mask", size="md", elem_id="upload-mask")
        ui.editor = gr.ImageEditor(
            editor_value(picture) if picture else None, label="Paint the hole", type="numpy", format="png", sources=(),
            transforms=(), layers=False, buttons=[], canvas_size=(CANVAS[0], CANVAS[0]), height=520, elem_id="editor",
            brush=gr.Brush(default_size=32, colors=[HOLE_COLOUR], color_mode="fixed"), eraser=gr.Eraser(default_size=32),
        )    # fmt: skip
        ui.wipe = gr.Button("Remove the paint", size="md")
        with gr.Accordion("Place the square", visible=False, elem_id="square") as ui.square:
            gr.Markdown("The model sees the bright square. Click where its middle should be, or move the sliders.")
            ui.preview = gr.Image(show_label=False, interactive=False, buttons=[], format="png", elem_id="preview")
            ui.side, ui.left, ui.top = (
                gr.Slider(low, 1024, step=1, label=label) for low, label in ((MIN_SIDE, "Side"), (0, "Left"), (0, "Top"))
            )
            ui.use_square = gr.Button("Use this square", size="md")

    def options(self) -> None:
        ui = self.ui
        with gr.Row():
            ui.num_samples = gr.Slider(1, MAX_SAMPLES, 4, step=1, label="Completions", info="side by side")
            ui.seed = gr.Number(0, precision=0, minimum=0, maximum=2**31, label="Seed", info="same seed, same result")
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
            ui.hole_colour = gr.Radio(["black", "white"], value="black", label="Colour of the hole in uploaded masks")

    def result_column(self) -> None:
        ui = self.ui
        ui.result, ui.chosen = gr.State(time_to_live=3600), gr.State(0)
        self.options()
        ui.complete = gr.Button("Complete", variant="primary", elem_id="complete")
        hint = "Paint a hole, or take a sample, which brings one." if self.samples else "Upload a picture to begin."
        ui.status = gr.HTML(status_html(hint), elem_id="status", padding=False)
        ui.gallery = gr.Gallery(
            label="Completions", columns=2, height="auto", allow_preview=False, interactive=False, format="png",
            buttons=[], elem_id="results", elem_classes="gallery-box",
        )    # fmt: skip
        with gr.Row(elem_classes="pair"):
            ui.download = gr.DownloadButton("Download PNG", interactive=False, size="md", elem_id="download")
            ui.reuse = gr.Button("Use as next input", interactive=False, size="md", elem_id="reuse")
        ui.history = gr.HTML(elem_id="history", padding=False)

    def connect(self) -> None:
        """Which handler each control calls, and what it may change."""
        ui = self.ui
        square = [ui.square, ui.preview, ui.side, ui.left, ui.top]
        shown = [ui.status, ui.picture, ui.editor, *square, ui.samples]
        details = [ui.status, ui.chosen, ui.history, ui.download, ui.reuse]

        def press(*args: Any, progress: Any = gr.Progress()) -> Iterator[dict]:    # noqa: B008  (Gradio's way)
            yield from self.press(*args, progress=progress)

        # The last of several quick choices counts; Gradio's own way is to ignore all but the first. Its "always_last" keeps
        # the first event's data, though, so the handlers ask the galleries themselves what is chosen.
        quiet = dict(show_progress="hidden", api_visibility="private", trigger_mode="always_last")
        ui.samples.select(self.take_sample, ui.samples, shown, **quiet)
        ui.upload.upload(self.take_upload, ui.upload, shown, **quiet)
        ui.upload_mask.upload(self.take_mask, [ui.upload_mask, ui.picture, ui.hole_colour], [ui.status, ui.editor], **quiet)
        ui.wipe.click(self.wipe, ui.picture, [ui.status, ui.editor], **quiet)
        for slider in (ui.left, ui.top, ui.side):
            slider.input(self.move_square, [ui.picture, ui.left, ui.top, ui.side], square, **quiet)
        ui.preview.select(self.point_at, [ui.picture, ui.side], square, **quiet | {"trigger_mode": "multiple"})
        ui.use_square.click(self.use_square, [ui.picture, ui.left, ui.top, ui.side], shown, **quiet)
        ui.rounds.change(lambda rounds: gr.Slider(maximum=rounds, value=rounds), ui.rounds, ui.sweet_spot, **quiet)
        ui.complete.click(
            press, [ui.picture, ui.editor, ui.seed, ui.num_samples, ui.rounds, ui.sweet_spot, ui.schedule, ui.decoder,
                    ui.temperature, ui.choice],
            [ui.result, ui.gallery, *details], show_progress_on=ui.gallery, api_visibility="private",
        )    # fmt: skip
        ui.gallery.select(self.choose, [ui.gallery, ui.result], details, **quiet)
        ui.reuse.click(self.reuse, [ui.result, ui.chosen], shown, **quiet)

    def sample(self, index: int) -> tuple[Picture, np.ndarray | None]:
        _, path, mask = self.samples[index]
        picture, _ = open_picture(str(path), self.max_pixels)
        return picture, open_mask(str(mask), picture, "black", self.max_pixels)[0] if mask else None

    # ---- what the controls do ----

    @sentences
    def take_sample(self, gallery: gr.Gallery) -> dict:
        if gallery.selected_index is None:
            return {}
        picture, hole = self.sample(gallery.selected_index)
        shown = self.show(picture, picture_text(picture, "Sample"), ["Press Complete, or paint another hole."], hole)
        return shown | {self.ui.samples: gr.skip()}

    @sentences
    def take_upload(self, path: str) -> dict:
        picture, notes = open_picture(path, self.max_pixels)
        notes.append("Paint the hole, then press Complete.")
        return self.show(picture, picture_text(picture, "Opened"), notes)

    @sentences
    def take_mask(self, path: str, picture: Picture | None, hole_colour: str) -> dict:
        if picture is None:
            raise UserError("Upload the picture first, then its mask.")
        hole, notes = open_mask(path, picture, hole_colour, self.max_pixels)
        return {self.ui.status: status_html("Took the mask.", notes), self.ui.editor: editor_value(picture, hole)}

    @sentences
    def wipe(self, picture: Picture | None) -> dict:
        return {self.ui.editor: editor_value(picture)} if picture else {}

    def show(self, picture: Picture, text: str, notes: list[str] = (), hole: np.ndarray | None = None) -> dict:
        """Put a picture into the editor; one that is larger than the model's gets the controls of its square."""
        ui = self.ui
        size = self.model.image_size
        whole = picture.pixels.shape[:2] == (size, size)
        return {
            ui.status: status_html(text, notes),
            ui.picture: picture,
            ui.editor: editor_value(picture, hole),
            **self.square_controls(picture, picture.box),
            ui.square: gr.Accordion(visible=not whole, open=True),
            ui.samples: gr.Gallery(selected_index=None),    # so that the same sample can be taken again
        }

    def square_controls(self, picture: Picture, box: tuple[int, int, int], given: tuple = (None, None, None)) -> dict:
        """The preview, and the sliders' limits and values. A value that is `given` already is not sent back: by the time
        that it arrives, the visitor may have typed the next one."""
        ui = self.ui
        height, width = picture.pixels.shape[:2]
        left, top, side = box
        limits = (max(width - side, 1), max(height - side, 1), min(height, width))
        sliders = {
            slider: gr.Slider(maximum=limit) if value == old else gr.Slider(maximum=limit, value=value)
            for slider, limit, value, old in zip((ui.left, ui.top, ui.side), limits, box, given, strict=True)
        }
        return {ui.preview: outlined(picture, box), **sliders}

    @sentences
    def move_square(self, picture: Picture | None, left: float, top: float, side: float) -> dict:
        given = (left, top, side)
        return self.square_controls(picture, picture.placed(*given).box, given) if picture else {}

    @sentences
    def point_at(self, event: gr.SelectData, picture: Picture | None, side: float) -> dict:
        if picture is None:
            return {}
        height, width = picture.pixels.shape[:2]
        scale = max(height, width) / max(outlined(picture, picture.box).size)
        x, y = (value * scale for value in event.index)
        return self.square_controls(picture, picture.placed(x - side / 2, y - side / 2, side).box)

    @sentences
    def use_square(self, picture: Picture | None, left: float, top: float, side: float) -> dict:
        if picture is None:
            raise UserError("There is no picture yet: take a sample or upload one.")
        placed = picture.placed(left, top, side)
        left, top, side = placed.box
        return self.show(placed, f"The square of {side} pixels at {left}, {top} is in the editor. Paint the hole.")

    def press(
        self, picture: Picture | None, editor: dict | None, seed: int | None, num_samples: int, total_iter: int,
        sweet_spot: int, schedule: str, decoder: str, temperature: float, choice: float, *, progress: Callable,
    ) -> Iterator[dict]:    # fmt: skip
        ui = self.ui
        last = min(int(sweet_spot), int(total_iter))
        try:
            result = complete(
                self.model, picture, painted(editor, picture.box[2] if picture else 1), seed, num_samples, total_iter,
                on_round=lambda t: progress((t, last), desc="Completing", unit="rounds"), sweet_spot=last,
                schedule=schedule, decoder=decoder, temperature=temperature, choice_temperature=choice,
                precision=self.precision,
            )    # fmt: skip
        except ValueError as error:
            yield {ui.status: status_html(str(error), error=True)}
            return
        gallery = [(Image.fromarray(crop), f"seed {s}") for crop, s in zip(result.crops, result.seeds, strict=True)]
        count = f"{len(gallery)} completions" if len(gallery) > 1 else "One completion"
        yield {
            ui.result: result,
            ui.gallery: gr.Gallery(gallery, columns=1 if len(gallery) == 1 else 2 if len(gallery) <= 4 else 4),
            ui.status: status_html(f"{count} in {result.seconds:.2f} s. Known pixels are unchanged."),
        }
        yield self.details(result, 0)

    @sentences
    def choose(self, gallery: gr.Gallery, result: Result | None) -> dict:
        chosen = gallery.selected_index
        return {} if result is None or chosen is None else self.details(result, chosen)

    def details(self, result: Result, index: int) -> dict:
        """The rounds of one completion, and its file."""
        ui = self.ui
        name = f"{result.picture.name}-seed{result.seeds[index]}"
        return {
            ui.chosen: index,
            ui.history: rounds_html(steps(self.model, result, index), f"seed {result.seeds[index]}"),
            ui.download: gr.DownloadButton(
                f"Download PNG (seed {result.seeds[index]})", interactive=True,
                value=write_png(result.whole(index), self.folder, name),
            ),
            ui.reuse: gr.Button(interactive=True),
        }    # fmt: skip

    @sentences
    def reuse(self, result: Result | None, index: int) -> dict:
        if result is None:
            raise UserError("There is no completion yet.")
        return self.show(result.whole(index), f"Seed {result.seeds[index]} is the picture now: paint the next hole.")


# ---- the server ----


class OnlyFromHere:
    """ASGI middleware: the server fetches nothing from elsewhere, and the browser may load nothing from elsewhere."""

    POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def send_with_policy(message: dict) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", []).append((b"content-security-policy", self.POLICY.encode()))
            await send(message)

        if scope["type"] == "http" and re.search(r"/(file|proxy)=\w+:", scope["path"]):    # Gradio would fetch the address
            await send_with_policy({"type": "http.response.start", "status": 403})
            await send({"type": "http.response.body", "body": b"Addresses are not fetched here."})
            return
        with contextlib.suppress(ClientDisconnect):    # a visitor who leaves is no error
            await self.app(scope, receive, send_with_policy)


async def refuse_address(*_: Any) -> None:
    raise gr.Error("Addresses are not fetched here; upload a file.", print_exception=False)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = str(HERE / "checkpoints/cat64.safetensors")
    parser.add_argument("--checkpoint", default=bundled, help="model (default: the bundled one)")
    parser.add_argument("--samples", default=str(HERE / "samples"), help="folder with images/ and masks/ to choose from")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this computer only)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is about twice as fast")
    parser.add_argument("--max-pixels", type=int, default=24_000_000, help="of an uploaded picture (default: %(default)s)")
    parser.add_argument("--max-megabytes", type=int, default=24, help="of an uploaded file (default: %(default)s)")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    if gr is None:
        raise UserError("the page needs the package gradio; install it with: pip install -r requirements-demo.txt")
    if not 1 <= args.port <= 65535:
        raise UserError(f"--port must lie in 1..65535, got {args.port}")
    for name in ("max_pixels", "max_megabytes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.host not in LOOPBACK:
        print(
            f"notice: --host {args.host} lets everybody who reaches port {args.port} of this computer use the page: upload\n"
            f"files of up to {args.max_megabytes} MB and keep the processor busy. There is no password and no encryption.",
            file=sys.stderr,
        )


def find_samples(folder: Path) -> list[tuple[str, Path, Path | None]]:
    """(name, picture, its mask or None). The page works without samples, too."""
    if not (folder / "images").is_dir():
        print(f"notice: no samples in {folder / 'images'}; the page starts without", file=sys.stderr)
        return []
    masks = find_images(folder / "masks") if (folder / "masks").is_dir() else {}
    return [(name, path, masks.get(name)) for name, path in find_images(folder / "images").items()]


def launch(page: Page, args: argparse.Namespace) -> Any:
    """Start the server in its own threads; returns Gradio's app."""
    gr.processing_utils.save_pil_to_cache = save_whole(gr.processing_utils.save_pil_to_cache)
    blocks = page.build()
    gr.processing_utils.async_ssrf_protected_download = refuse_address    # Gradio would fetch "uploads" that are addresses
    try:
        blocks.launch(
            server_name=args.host, server_port=args.port, prevent_thread_lock=True, quiet=True, share=False, inbrowser=False,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"], primary_hue="pink"), css=CSS,
            max_file_size=f"{args.max_megabytes}mb", footer_links=[], run_history=False, ssr_mode=False, pwa=False,
            mcp_server=False, enable_monitoring=False, app_kwargs={"middleware": [Middleware(OnlyFromHere)]},
        )    # fmt: skip
    except OSError as error:
        where = f"{args.host}:{args.port}"
        raise UserError(f"can't listen at {where}: in use, or not of this computer; try another --port") from error
    return blocks


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_args(args)
    try:
        model = MaskGIT.from_pretrained(args.checkpoint).to(pick_device(args.device))
    except ValueError as error:
        raise UserError(str(error)) from error
    Image.MAX_IMAGE_PIXELS = args.max_pixels // 2 + 1    # whatever reads a picture here, Pillow refuses twice that
    warnings.simplefilter("ignore")                      # what is to be said is said on the page
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # so that the folder goes
    with tempfile.TemporaryDirectory(prefix="maskgit-demo-") as folder:    # all that the page writes, gone with it
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ALLOWED_PATHS": ""}
        page = Page(model, find_samples(Path(args.samples)), args.max_pixels, Path(folder), args.precision)
        blocks = launch(page, args)
        print(f"the page is at {blocks.local_url} (stop it with Ctrl-C)")
        try:
            blocks.block_thread()
        finally:
            blocks.close()
    return 0


if __name__ == "__main__":
    run_cli(main)
