"""Shows how a completion came about: its rounds as an animation and as a strip of small pictures."""
from __future__ import annotations

import base64
import html
import io
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps

from demo.photos import to_pil
from models.completion import Snapshot

OPEN, DONE = (224, 33, 138), (226, 232, 240)    # RGB of tokens still to be filled, and of the others
SIDE = 256                                      # longer side of a picture in the animation


class Step(NamedTuple):
    """The state after a round, or before the first round of a level."""

    title: str
    note: str
    picture: Image.Image    # what the model has so far
    tokens: Image.Image     # one pixel for each token


def steps(snapshots: list[Snapshot]) -> list[Step]:
    """One step for each snapshot. A picture of one level is not told about levels."""
    levels = 1 + max(shot.level for shot in snapshots)
    made, first, number = [], 0, 0
    for before, shot in zip([None, *snapshots], snapshots, strict=False):
        left = int(shot.masked.sum())
        if before is None or before.level != shot.level or left > int(before.masked.sum()):    # a level, or a part of it
            first, number = left, 0
        title = f"Round {number}" if number else "Start"
        title = f"Level {shot.level + 1}, {title.lower()}" if levels > 1 else title
        colours = torch.where(shot.masked, torch.tensor(OPEN).view(3, 1, 1), torch.tensor(DONE).view(3, 1, 1))
        tokens = to_pil(colours.to(torch.uint8))
        made.append(Step(title, f"{left} of {first} tokens open", to_pil(shot.picture), tokens))
        number += 1
    return made


def animation(shown: list[Step]) -> str:
    """The rounds one after the other: the picture on the left, its tokens on the right."""
    last = ImageOps.contain(shown[-1].picture, (SIDE, SIDE))
    frames = []
    for step in shown:
        frame = Image.new("RGB", (2 * last.width + 8, last.height), "white")
        frame.paste(step.picture.resize(last.size, Image.Resampling.BICUBIC), (0, 0))
        frame.paste(step.tokens.resize(last.size, Image.Resampling.NEAREST), (last.width + 8, 0))
        frames.append(frame.quantize(256, Image.Quantize.FASTOCTREE))    # thirty times as fast as Pillow's default
    times = [800] + [350] * (len(frames) - 2) + [2000]    # ms
    return data_url("gif", frames, duration=times, loop=0)


def data_url(kind: str, frames: list[Image.Image], **options: Any) -> str:
    """Pictures inside the page itself: no file on the server, nothing to clean up."""
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, **({"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}), **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def rounds_html(snapshots: list[Snapshot], title: str) -> str:
    """Animation and strip, as HTML."""
    shown = steps(snapshots)
    items = "".join(
        f'<li><img src="{data_url("png", [ImageOps.contain(step.picture, (SIDE, SIDE))])}" alt="{step.title}: the picture">'
        f'<img class="tokens" src="{data_url("png", [step.tokens])}" alt="{step.title}: {step.note}">'
        f"<b>{step.title}</b><span>{step.note}</span></li>"
        for step in shown
    )
    return (
        f'<h3>How {html.escape(title)} came about</h3><img class="film" src="{animation(shown)}" '
        f'alt="Animation of the rounds: the picture, and its tokens, the open ones coloured"><ol class="strip">{items}</ol>'
    )
