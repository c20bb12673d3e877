"""Opens what a visitor uploads: pictures and masks. What can't be used is refused in a sentence."""
from __future__ import annotations

import re
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from pictures.files import find_images
from pictures.images import Picture, read_picture
from pictures.masks import COLOURS, LARGE, read_mask
from utils import UserError, notice

MIN_SIDE = 16    # pixels; a smaller picture can't be painted on
KEPT = 3600      # seconds that a file stays on the server
MOST_SAMPLES = 16


@dataclass(frozen=True)
class Photo:
    """A picture of any size, and the hole that came with it, if any."""

    picture: Picture
    name: str                      # without suffix, safe as part of a file name
    hole: Tensor | None = None     # (1, H, W) bool

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.picture.pixels.shape[:2]

    def __str__(self) -> str:
        return f"{self.name}, {self.size[1]} × {self.size[0]} pixels"


def open_photo(path: str | Path, max_pixels: int) -> tuple[Photo, list[str]]:
    """Read an uploaded picture. The notes say what the completed file can't keep."""
    name = Path(path).name
    check_size(path, name, max_pixels)
    photo = Photo(read_picture(path, name), re.sub(r"[^\w-]+", "_", Path(path).stem)[:60] or "picture")
    height, width = photo.size
    if min(height, width) < MIN_SIDE:
        raise UserError(f"{name} has {width}x{height} pixels; at least {MIN_SIDE}x{MIN_SIDE} are needed")
    return photo, [f"Not kept: {', '.join(photo.picture.lost)}."] if photo.picture.lost else []


def check_size(path: str | Path, name: str, max_pixels: int) -> None:
    """Refuse a file that is no picture, or too large a one, before it is decoded."""
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height
    except Image.DecompressionBombError:
        pixels = max_pixels + 1
    except Exception as error:    # a broken file makes decoders raise anything
        raise UserError(f"{name} is not a picture that can be read; use PNG, JPEG or WebP") from error
    if pixels > max_pixels:
        raise UserError(f"{name} has more than the {max_pixels:,} pixels allowed; make it smaller")


def open_mask(path: str | Path, photo: Photo, colour: str, max_pixels: int) -> tuple[Photo, list[str]]:
    """Read an uploaded mask of the picture's size, whose hole has a colour. Returns the picture with its hole, and notes."""
    name = Path(path).name
    check_size(path, name, max_pixels)
    try:
        hole = read_mask(path, colour)                                                         # (1, H, W)
    except UserError as error:    # which shall not name the folders of the server
        raise UserError(str(error).replace(str(path), name)) from error
    height, width = photo.size
    if hole.shape[1:] != (height, width):
        size = f"{hole.shape[2]}x{hole.shape[1]} pixels, the picture {width}x{height}"
        raise UserError(f"the mask {name} has {size}; they must have the same size")
    share = hole.float().mean().item()
    notes = [f"The hole is {share:.0%} of the picture."]
    if share > LARGE:
        other = COLOURS[1 - COLOURS.index(colour)]
        notes.append(f"If its {other} parts are the hole, choose {other} under Advanced and upload it again.")
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
    """The pictures in images/ and photo/ with the masks of the same names in masks/ and photo_masks/."""
    samples = []
    for images, masks in (("photo", "photo_masks"), ("images", "masks")):
        if (folder / images).is_dir():
            found = find_images(folder / masks) if (folder / masks).is_dir() else {}
            samples += [Sample(path, found.get(name)) for name, path in find_images(folder / images).items()]
    if not samples:
        notice(f"no samples in {folder}; the page starts without them")
    return samples[:MOST_SAMPLES]


def new_file(folder: Path, name: str) -> Path:
    """A new path `folder`/RANDOM/`name`.png. Files of more than an hour ago are removed."""
    for old in folder.glob("*/*.png"):
        if time.time() - old.stat().st_mtime > KEPT:
            old.unlink(missing_ok=True)
    return Path(tempfile.mkdtemp(dir=folder)) / f"{name}.png"


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 -> RGB picture"""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
