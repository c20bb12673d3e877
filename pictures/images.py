"""Reads and writes pictures and masks."""

import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from utils import UserError

MAX_PIXELS = 100_000_000    # a larger picture is refused before it is decoded: a small file can hold a huge one


MASK_THRESHOLD = 128        # gray levels below it are black


def read_image(path: str | Path) -> Tensor:
    """Read a picture as uint8 (3, H, W) RGB.

    Any mode that Pillow reads: gray, palette, alpha (composited on white), CMYK, 16-bit (scaled, not clipped); turned
    as its EXIF tag says; of an animation the first frame. Raises DataError naming the file.
    """
    return _to_tensor(open_rgb(path))


def read_mask(path: str | Path, hole: str = "black") -> Tensor:
    """Read a mask as bool (1, H, W), True = hole. `hole` says which colour marks it in the file: black or white.

    Gray levels in between (a mask saved as JPEG, or resized) are cut at 128, with a warning.
    """
    if hole not in ("black", "white"):
        raise UserError(f"unknown hole colour {hole!r}; expected 'black' or 'white'")
    rgb = read_image(path).int()                                                # (3, H, W)
    soft = ((rgb != 0) & (rgb != 255)).any(0).float().mean().item()
    if soft > 0:
        warnings.warn(f"mask {path} has gray levels between 0 and 255 in {soft:.1%} of its pixels; "
                      f"those below {MASK_THRESHOLD} count as black", stacklevel=2)
    black = rgb.sum(0, keepdim=True) < 3 * MASK_THRESHOLD                       # (1, H, W)
    return black if hole == "black" else ~black


def to_float(image: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1], any shape."""
    return image.float() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """float [-1, 1] (clamped) -> uint8 [0, 255], rounded; the exact inverse of `to_float`."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def write_image(path: str | Path, image: Tensor) -> None:
    """Write a uint8 (3, H, W) picture as PNG; it appears under its name only when complete."""
    path = Path(path)
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"write_image takes uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}")
    if path.suffix.lower() != ".png":
        raise UserError(f"pictures are written as PNG (lossless), so {path.name} must end in .png")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(temporary, format="PNG")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def open_rgb(source: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Decode a file, or an open one that DataError shall call `name`, to a Pillow picture of mode RGB (see read_image).
    """
    name = name or str(source)
    try:
        with Image.open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{name} has {image.width}x{image.height} pixels, more than the {MAX_PIXELS:,} allowed")
            return _to_rgb(ImageOps.exif_transpose(image), name)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name} does not exist; give the path of a picture") from None
    except Exception as error:    # a broken file makes decoders raise anything: OSError, SyntaxError, struct.error...
        raise UserError(f"cannot read {name} as a picture: {error}") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise UserError(f"{name} holds floating-point pixels, whose range is not defined; save it as 8 or 16 bit")
    if image.mode.startswith("I"):    # 16 bit; Pillow's own conversion would clip at 255
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise UserError(f"{name} holds 32-bit pixels, whose range is not defined; save it as 8 or 16 bit")
        return Image.fromarray(((gray + 128) // 257).astype(np.uint8)).convert("RGB")    # 65535 = 255 * 257
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()      # (3, H, W)
