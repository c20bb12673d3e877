"""Opens what a visitor uploads: pictures and masks. What can't be used is refused in a sentence."""
from __future__ import annotations

import re
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pictures.files import find_images
from pictures.images import open_rgb
from pictures.masks import read_mask
from utils import UserError

MIN_SIDE = 16         # pixels; a smaller picture can't be painted on
KEPT = 3600           # seconds that a file stays on the server
HOLE_COLOURS = ("black", "white")


@dataclass(frozen=True)
class Photo:
    """A picture of any size, and the hole that came with it, if any."""

    image: Tensor                  # (3, H, W) uint8
    name: str                      # without suffix, safe as part of a file name
    hole: Tensor | None = None     # (1, H, W) bool

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.image.shape[1], self.image.shape[2]

    def __str__(self) -> str:
        return f"{self.name}, {self.size[1]} × {self.size[0]} pixels"


def open_photo(path: str | Path, max_pixels: int) -> tuple[Photo, list[str]]:
    """Read an uploaded picture. The notes say what was changed in reading."""
    name = Path(path).name
    notes = check_file(path, name, max_pixels)
    image = torch.from_numpy(np.array(open_rgb(path, name))).permute(2, 0, 1).contiguous()    # (3, H, W)
    height, width = image.shape[1:]
    if min(height, width) < MIN_SIDE:
        raise UserError(f"{name} has {width}x{height} pixels; at least {MIN_SIDE}x{MIN_SIDE} are needed")
    return Photo(image, re.sub(r"[^\w-]+", "_", Path(path).stem)[:60] or "picture"), notes


def check_file(path: str | Path, name: str, max_pixels: int) -> list[str]:
    """Refuse a file that is no picture or too large before it is decoded. Returns notes on what reading will lose."""
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


def open_mask(path: str | Path, photo: Photo, hole_colour: str, max_pixels: int) -> tuple[Photo, list[str]]:
    """Read an uploaded mask of the picture's size. Returns the picture with this hole, and notes."""
    if hole_colour not in HOLE_COLOURS:
        raise UserError(f"the colour of the hole must be black or white, got {hole_colour!r}")
    name = Path(path).name
    check_file(path, name, max_pixels)
    gray = np.asarray(open_rgb(path, name))
    hole = read_mask(path, hole_colour)                                                        # (1, H, W)
    height, width = photo.size
    if hole.shape[1:] != (height, width):
        size = f"{hole.shape[2]}x{hole.shape[1]} pixels, the picture {width}x{height}"
        raise UserError(f"the mask {name} has {size}; they must have the same size")
    share = hole.float().mean().item()
    notes = [f"Its {hole_colour} parts are the hole: {share:.0%} of the picture."]
    if 0.6 < share < 1:
        other = HOLE_COLOURS[hole_colour == HOLE_COLOURS[0]]
        notes.append(f"That is a lot: if its {other} parts are the hole, choose {other} under Advanced and upload it again.")
    if ((gray > 0) & (gray < 255)).any():
        notes.append("Its gray pixels count as black or white, whichever is nearer.")
    return replace(photo, hole=hole), notes


@dataclass(frozen=True)
class Sample:
    """A picture to choose on the page, and its mask (black = hole), if there is one."""

    file: Path
    mask: Path | None

    def open(self, max_pixels: int) -> Photo:
        photo, _ = open_photo(self.file, max_pixels)
        return open_mask(self.mask, photo, "black", max_pixels)[0] if self.mask else photo


def find_samples(folder: Path) -> list[Sample]:
    """The pictures of `folder`/images with the masks of the same name in `folder`/masks. The page works without any, too."""
    if not (folder / "images").is_dir():
        print(f"notice: no samples in {folder / 'images'}; the page starts without samples", file=sys.stderr)
        return []
    masks = find_images(folder / "masks") if (folder / "masks").is_dir() else {}
    return [Sample(path, masks.get(name)) for name, path in find_images(folder / "images").items()]


def write_png(image: Tensor | Image.Image, folder: Path, name: str) -> Path:
    """Write a new file `folder`/RANDOM/`name`.png. Files of more than an hour ago are removed."""
    for old in folder.glob("*/*.png"):
        if time.time() - old.stat().st_mtime > KEPT:
            old.unlink(missing_ok=True)
    path = Path(tempfile.mkdtemp(dir=folder)) / f"{name}.png"
    picture = to_pil(image) if isinstance(image, Tensor) else image
    picture.save(path, compress_level=1)    # large pictures: speed matters more than size
    return path


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 -> RGB picture"""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
