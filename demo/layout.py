"""Which controls the page has. What they do: page.py. Needs Gradio."""
from __future__ import annotations

import html
from types import SimpleNamespace

import gradio as gr

from demo.completing import MAX_COMPLETIONS, MAX_ROUNDS, MAX_SEED
from demo.painting import CANVAS, PAINT
from demo.photos import KEPT
from models.decoding import DECODERS, Options
from models.schedule import SCHEDULES
from pictures.masks import COLOURS

DEFAULTS = Options()
INTRODUCTION = """# MaskGIT inpainting
Paint over a part of a picture, and the model makes up what could be there. What you don't paint over stays as it is."""


def status_html(text: str, notes: list[str] = (), error: bool = False) -> str:
    """The line under the button; screen readers read it out when it changes."""
    role, kind = ("alert", "error") if error else ("status", "fine")
    return f'<div role="{role}" class="status {kind}">{html.escape(" ".join([text, *notes]))}</div>'


def lay_out(samples: list[str]) -> tuple[gr.Blocks, SimpleNamespace]:
    """The page with its controls, and these by name. `samples` are picture files to choose from."""
    ui = SimpleNamespace()
    with gr.Blocks(title="MaskGIT inpainting", analytics_enabled=False, delete_cache=(600, KEPT)) as blocks:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(min_width=320):
                input_column(ui, samples)
            with gr.Column(min_width=320):
                options(ui)
                result_column(ui, "Choose a sample, or upload a picture." if samples else "Upload a picture to begin.")
        endpoint(ui)
    return blocks, ui


def input_column(ui: SimpleNamespace, samples: list[str]) -> None:
    ui.photo = gr.State(time_to_live=KEPT)
    ui.samples = gr.Gallery(
        samples, label="Samples", columns=8, height="auto", visible=bool(samples), allow_preview=False, interactive=False,
        buttons=[], elem_id="samples", elem_classes="gallery-box",
    )    # fmt: skip
    with gr.Row(elem_classes="pair"):
        ui.upload = gr.UploadButton("Upload a picture", size="md", elem_id="upload")
        ui.upload_mask = gr.UploadButton("Upload a mask", size="md", elem_id="upload-mask")
    ui.editor = gr.ImageEditor(
        label="Paint the hole", type="numpy", format="png", sources=(), transforms=(), layers=False, buttons=[],
        canvas_size=(CANVAS, CANVAS), height=520, elem_id="editor",
        brush=gr.Brush(default_size=32, colors=[PAINT], color_mode="fixed"), eraser=gr.Eraser(default_size=32),
    )    # fmt: skip
    ui.wipe = gr.Button("Remove the paint", size="md")


def options(ui: SimpleNamespace) -> None:
    with gr.Row():
        ui.count = gr.Slider(1, MAX_COMPLETIONS, 4, step=1, label="Completions", info="side by side")
        ui.seed = gr.Number(0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed", info="same seed, same result")
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        with gr.Row():
            ui.rounds = gr.Slider(0, MAX_ROUNDS, 0, step=1, label="Rounds", info="0: as many as the picture needs")
            ui.sweet_spot = gr.Slider(0, MAX_ROUNDS, 0, step=1, label="Sweet spot", info="0: run all rounds")
        with gr.Row():
            heat, chance = DEFAULTS.temperature, DEFAULTS.choice_temperature
            ui.temperature = gr.Slider(0, 2, heat, step=0.05, label="Temperature", info="0: likeliest, 2: most varied")
            ui.choice = gr.Slider(0, 20, chance, step=0.5, label="Choice temperature", info="chance in the order")
        with gr.Row():
            ui.schedule = gr.Dropdown(list(SCHEDULES), value=DEFAULTS.schedule, label="Schedule")
            ui.decoder = gr.Dropdown(list(DECODERS), value=DEFAULTS.decoder, label="Decoder")
        ui.hole_colour = gr.Radio(COLOURS, value="black", label="Colour of the hole in uploaded masks")


def result_column(ui: SimpleNamespace, hint: str) -> None:
    ui.completions, ui.chosen = gr.State([], time_to_live=KEPT), gr.State(0)
    ui.complete = gr.Button("Complete", variant="primary", elem_id="complete")
    ui.status = gr.HTML(status_html(hint), elem_id="status", padding=False)
    ui.compare = gr.ImageSlider(
        label="Before and after", interactive=False, buttons=["fullscreen"], max_height=520, elem_id="compare"
    )
    ui.gallery = gr.Gallery(
        label="Completions", columns=4, height="auto", allow_preview=False, interactive=False, visible=False, buttons=[],
        elem_id="results", elem_classes="gallery-box",
    )    # fmt: skip
    with gr.Row(elem_classes="pair"):
        ui.download = gr.DownloadButton("Download PNG", interactive=False, size="md", elem_id="download")
        ui.reuse = gr.Button("Use as next input", interactive=False, size="md", elem_id="reuse")
    ui.show_rounds = gr.Button("Show the rounds", interactive=False, size="md", elem_id="show-rounds")
    ui.history = gr.HTML(elem_id="history", padding=False)


def endpoint(ui: SimpleNamespace) -> None:
    """Controls that nobody sees: what programs give and get that call the page's completion (`Page.complete_file`)."""
    with gr.Row(visible=False):
        ui.api = [
            gr.File(label="image"), gr.File(label="mask"), gr.Number(0, label="seed", precision=0),
            gr.Radio(COLOURS, value="white", label="hole"),
            gr.Number(0, label="total_iter", precision=0),
            gr.Number(DEFAULTS.temperature, label="temperature"),
        ]    # fmt: skip
        ui.api_call, ui.api_result = gr.Button(), gr.File(label="completed")
