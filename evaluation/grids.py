"""Writes pictures in rows and columns, with labels, as one PNG."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pictures.images import write_image

GAP = 3               # pixels between pictures
LETTERS = 14          # height of the labels in pixels


def write_grid(
    path: str | Path, rows: Sequence[Sequence[Tensor]], row_labels: Sequence[str] = (), column_labels: Sequence[str] = (),
    scale: float = 1,
) -> None:
    """Write a grid of pictures.

    Args:
        rows: of uint8 (3, H, W) pictures of any size; a row may be shorter than the others.
        row_labels, column_labels: written on the left and on top.
        scale: above 1 a whole number, pixels drawn for each pixel of a picture; below 1 the pictures are made smaller.
    """
    pictures = [[resize(picture, scale) for picture in row] for row in rows]
    heights = [max(picture.shape[0] for picture in row) + GAP for row in pictures]
    columns = max(map(len, pictures))
    widths = [max(row[j].shape[1] for row in pictures if j < len(row)) + GAP for j in range(columns)]
    font = ImageFont.load_default(LETTERS - 2)
    left = GAP + max((round(font.getlength(label)) + 6 for label in row_labels), default=0)
    top = GAP + (LETTERS + 4 if any(column_labels) else 0)

    canvas = np.full((top + sum(heights), left + sum(widths), 3), 255, dtype=np.uint8)
    for i, row in enumerate(pictures):
        for j, picture in enumerate(row):
            y, x = top + sum(heights[:i]), left + sum(widths[:j])
            canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    drawing = Image.fromarray(canvas)
    draw = ImageDraw.Draw(drawing)
    for i, label in enumerate(row_labels):
        draw.text((left - 6, top + sum(heights[:i]) + heights[i] / 2), label, "black", font, anchor="rm")
    for j, label in enumerate(column_labels):
        draw.text((left + sum(widths[:j]) + widths[j] / 2, top / 2), label, "black", font, anchor="mm")
    write_image(path, torch.from_numpy(np.array(drawing)).permute(2, 0, 1))


def resize(picture: Tensor, scale: float) -> np.ndarray:
    """uint8 (3, H, W) to (scale * H, scale * W, 3)."""
    pixels = picture.permute(1, 2, 0).contiguous().numpy()
    if scale < 1:
        smaller = [max(1, round(side * scale)) for side in (pixels.shape[1], pixels.shape[0])]
        return np.asarray(Image.fromarray(pixels).resize(smaller, Image.Resampling.LANCZOS))
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)
