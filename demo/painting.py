"""The editor's canvas: shows a picture with its hole as paint, and turns paint into the hole at the picture's own size."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from demo.photos import Photo, to_pil

CANVAS = (512, 1536)     # least and largest longer side of the canvas, in pixels
PAINT = "#e0218a"


def canvas_size(photo: Photo) -> tuple[int, int]:
    """(width, height) of the canvas: the picture's own size, or scaled where that is too small or too large to paint on."""
    height, width = photo.size
    longer = max(height, width)
    scale = min(max(longer, CANVAS[0]), CANVAS[1]) / longer
    return max(1, round(width * scale)), max(1, round(height * scale))


def editor_value(photo: Photo) -> dict[str, Any]:
    """What the editor shows: the picture, and its hole as a layer of paint."""
    size = canvas_size(photo)
    layers = []
    if photo.hole is not None:
        paint = Image.new("RGBA", size, PAINT)
        paint.putalpha(as_alpha(on_canvas(photo.hole, size)))
        layers = [paint]
    background = to_pil(photo.picture.rgb()).resize(size, Image.Resampling.BICUBIC)
    return {"background": background, "layers": layers, "composite": None}


def painted(editor: dict[str, Any] | None, photo: Photo) -> Tensor:
    """What is painted, (1, H, W) bool. Where the paint is as `editor_value` made it, this is the hole that was given."""
    size = canvas_size(photo)
    paint = np.zeros(size[::-1], dtype=bool)
    for layer in (editor or {}).get("layers") or []:
        alpha = Image.fromarray(np.ascontiguousarray(layer[..., 3]))
        paint |= np.asarray(alpha.resize(size, Image.Resampling.NEAREST)) >= 128
    hole = resized(paint, photo)
    if photo.hole is None:
        return hole
    changed = resized(paint != on_canvas(photo.hole, size), photo)
    return torch.where(changed, hole, photo.hole)


def on_canvas(hole: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A hole (1, H, W) at the canvas's size; where that is smaller, no thin line is lost. Returns (height, width) bool."""
    width, height = size
    if height <= hole.shape[1] and width <= hole.shape[2]:
        return F.adaptive_max_pool2d(hole.float(), (height, width))[0].numpy() > 0
    return np.asarray(as_alpha(hole[0].numpy()).resize(size, Image.Resampling.NEAREST)) > 0


def resized(paint: np.ndarray, photo: Photo) -> Tensor:
    """Paint (height, width) on the canvas at the picture's size, (1, H, W): the pixels whose middle is painted."""
    height, width = photo.size
    alpha = as_alpha(paint).resize((width, height), Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(alpha) > 0)[None]


def as_alpha(paint: np.ndarray) -> Image.Image:
    return Image.fromarray(paint.astype(np.uint8) * 255)
