"""The editor's canvas: shows a picture with its hole as paint, and turns paint into the hole at the picture's own size."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from demo.photos import Photo, to_pil

# Side of the canvas in pixels. It is the same square for every picture: Gradio misplaces paint when the canvas changes.
CANVAS = 1024
PAINT, MARGIN = "#e0218a", "#eef0f3"


def frame(photo: Photo) -> tuple[int, int, int, int]:
    """Where the picture lies on the canvas, as large as possible: left, top, right, bottom."""
    longer = max(photo.size)
    height, width = (max(1, round(side * CANVAS / longer)) for side in photo.size)
    left, top = (CANVAS - width) // 2, (CANVAS - height) // 2
    return left, top, left + width, top + height


def editor_value(photo: Photo) -> dict[str, Any]:
    """What the editor shows: the picture, and its hole as a layer of paint."""
    left, top, right, bottom = frame(photo)
    background = Image.new("RGB", (CANVAS, CANVAS), MARGIN)
    background.paste(to_pil(photo.picture.rgb()).resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
    layers = []
    if photo.hole is not None:
        alpha = Image.new("L", (CANVAS, CANVAS))
        alpha.paste(as_alpha(on_canvas(photo.hole, photo)), (left, top))
        layers = [Image.new("RGBA", (CANVAS, CANVAS), PAINT)]
        layers[0].putalpha(alpha)
    return {"background": background, "layers": layers, "composite": None}


def painted(editor: dict[str, Any] | None, photo: Photo) -> Tensor:
    """What is painted, (1, H, W) bool. Where the paint is as `editor_value` made it, this is the hole that was given."""
    left, top, right, bottom = frame(photo)
    paint = np.zeros((bottom - top, right - left), dtype=bool)
    for layer in (editor or {}).get("layers") or []:
        alpha = Image.fromarray(np.ascontiguousarray(layer[..., 3])).resize((CANVAS, CANVAS), Image.Resampling.NEAREST)
        paint |= np.asarray(alpha)[top:bottom, left:right] >= 128
    if photo.hole is None:
        return from_canvas(paint, photo)
    changed = from_canvas(paint != on_canvas(photo.hole, photo), photo)
    return torch.where(changed, from_canvas(paint, photo), photo.hole)


def on_canvas(hole: Tensor, photo: Photo) -> np.ndarray:
    """A hole (1, H, W) as large as the picture on the canvas, (h, w) bool. Where that is smaller, no thin line is lost."""
    left, top, right, bottom = frame(photo)
    if max(photo.size) >= CANVAS:
        return F.adaptive_max_pool2d(hole.float(), (bottom - top, right - left))[0].numpy() > 0
    return np.asarray(as_alpha(hole[0].numpy()).resize((right - left, bottom - top), Image.Resampling.NEAREST)) > 0


def from_canvas(paint: np.ndarray, photo: Photo) -> Tensor:
    """Paint (h, w) at the picture's own size, (1, H, W): the pixels whose middle is painted."""
    height, width = photo.size
    return torch.from_numpy(np.asarray(as_alpha(paint).resize((width, height), Image.Resampling.NEAREST)) > 0)[None]


def as_alpha(paint: np.ndarray) -> Image.Image:
    return Image.fromarray(paint.astype(np.uint8) * 255)
