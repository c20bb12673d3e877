"""Reads and writes pictures: what the model sees of a file, and what the file holds beside it."""

import math
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from pictures.exif import upright
from pictures.files import picture_formats
from utils import UserError, atomic_write

MAX_PIXELS = 100_000_000    # a larger picture is refused before it is decoded: a small file can hold a huge one
COMPRESSION = 3             # of PNG files: a fourth of the time that Pillow's default takes, 8 % larger
# Colour profiles and comments as large as cameras and editors write them. Pillow's limit of 1 MB refuses good files.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20, 256 << 20
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)    # MAX_PIXELS is our limit

# What turns the pixels (H, W, C) of each EXIF orientation upright.
TURNS = {
    2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1], 5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].swapaxes(0, 1), 8: lambda x: np.rot90(x),
}    # fmt: skip
LUMA = (0.299, 0.587, 0.114)    # weights of red, green and blue in gray (ITU-R BT.601)


class Picture(NamedTuple):
    """A picture file, upright."""

    pixels: np.ndarray    # (H, W, C) uint8 or uint16; C is 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGB, alpha)
    extras: dict[str, Any]    # what else a PNG file can keep, as options of Pillow: icc_profile, exif, dpi
    lost: list[str]    # what the file holds and is not kept

    def rgb(self) -> Tensor:
        """What the model sees: uint8 (3, H, W), on white where the picture is transparent."""
        plain = self.pixels.dtype == np.uint8 and self.pixels.shape[2] == 3
        pixels = self.pixels if plain else np.array(eight_bits(self.pixels))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()           # (3, H, W)


def read_image(path: str | Path) -> Tensor:
    """Read a picture as uint8 (3, H, W) RGB.

    Any mode that Pillow reads: gray, palette, alpha (composited on white), CMYK, 16-bit (scaled, not clipped); turned
    as its EXIF tag says; of an animation the first frame. Raises UserError naming the file.
    """
    return read_picture(path).rgb()


def read_picture(source: str | Path | BinaryIO, name: str | None = None) -> Picture:
    """Read a file, or an open one that errors shall call `name`, with its depth, its alpha channel and its metadata."""
    name = name or str(source)
    with _opened(source, name) as image:
        pixels = _read_pixels(image, source, name)
        turn = TURNS.get(_orientation(image))
        if turn is not None:
            pixels = np.ascontiguousarray(turn(pixels))
        return Picture(pixels, *_metadata(image, pixels))


def open_rgb(source: str | Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Like `read_picture`, as a Pillow picture of mode RGB."""
    return eight_bits(read_picture(source, name).pixels)


def read_size(path: str | Path) -> tuple[int, int]:
    """(width, height) from the beginning of a file, before it is turned upright."""
    with _opened(path, str(path)) as image:
        return image.size


@contextmanager
def _opened(source: str | Path | BinaryIO, name: str) -> Iterator[Image.Image]:
    try:
        with Image.open(source, formats=picture_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{name} has {image.width}x{image.height} pixels, more than the {MAX_PIXELS:,} allowed")
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name} does not exist; give the path of a picture") from None
    except Exception as error:    # a broken file makes decoders raise anything: OSError, SyntaxError, struct.error...
        raise UserError(f"cannot read {name} as a picture: {error}") from error


# ---- pixels ----


def _read_pixels(image: Image.Image, source: str | Path | BinaryIO, name: str) -> np.ndarray:
    """(H, W, C) as in the file, not turned yet."""
    mode = image.mode
    if mode == "F":
        raise UserError(f"{name} holds floating-point pixels, whose range is not defined; save it as 8 or 16 bit")
    if mode.startswith("I"):    # 16 bit; Pillow's own conversion would clip at 255
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise UserError(f"{name} holds 32-bit pixels, whose range is not defined; save it as 8 or 16 bit")
        white_is_zero = _tiff_tag(image, 262) == 0    # Pillow inverts 8 bits alone
        return _with_key((65535 - gray if white_is_zero else gray).astype(np.uint16)[:, :, None], image)
    if _deep_mode(image):
        return _with_key(_read_deep(image, source), image)
    if image.has_transparency_data:
        image = image.convert("LA" if mode in ("L", "LA", "La") else "RGBA")
    elif mode == "1":
        image = image.convert("L")
    elif mode not in ("L", "RGB"):
        image = image.convert("RGB")
    pixels = np.array(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _with_key(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """16-bit pixels with an alpha channel, if the file names a colour that is transparent."""
    key = image.info.get("transparency")
    if key is None:
        return pixels
    alpha = (pixels != np.array(key, np.uint16)).any(2, keepdims=True) * np.uint16(65535)
    return np.concatenate([pixels, alpha], axis=2)


def _tiff_tag(image: Image.Image, tag: int) -> Any:
    return image.tag_v2.get(tag) if image.format == "TIFF" else None


def _deep_mode(image: Image.Image) -> str:
    """Pillow's raw mode of a 16-bit colour picture, of which it would keep the high bytes alone; else nothing."""
    args = image.tile[0].args if image.tile else ""
    raw = args if isinstance(args, str) else (args or ("",))[0]
    return raw if isinstance(raw, str) and raw.startswith(("RGB;16", "RGBA;16", "LA;16")) else ""


def _read_deep(image: Image.Image, source: str | Path | BinaryIO) -> np.ndarray:
    """16-bit colours (H, W, C) uint16: decoded as if the bytes came in the other order, the low bytes are the high ones."""
    raw = _deep_mode(image)
    if raw.startswith("LA"):    # four bytes a pixel
        four = _decode_as(image, source, "RGBA", "RGBA").astype(np.uint16)
        return four[:, :, ::2] << 8 | four[:, :, 1::2]
    native, other = ("B", "L") if sys.byteorder == "big" else ("L", "B")
    swapped = raw[:-1] + {"B": "L", "L": "B", "N": other}[raw[-1]]
    low = _decode_as(image, source, image.mode, swapped)
    return np.asarray(image).astype(np.uint16) << 8 | low


def _decode_as(image: Image.Image, source: str | Path | BinaryIO, mode: str, raw: str) -> np.ndarray:
    if hasattr(source, "seek"):
        source.seek(0)
    with Image.open(source, formats=[image.format]) as again:
        again._mode = mode
        again.tile = [tile._replace(args=raw if tile.codec_name == "zip" else (raw, *tile.args[1:])) for tile in again.tile]
        return np.array(again)


def eight_bits(pixels: np.ndarray) -> Image.Image:
    """(H, W, C) as a Pillow picture of mode RGB, on white where it is transparent."""
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)    # 65535 = 255 * 257
    channels = pixels.shape[2]
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    if channels in (2, 4):
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def to_float(image: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1], any shape."""
    return image.float() / 127.5 - 1


# ---- metadata ----


def _orientation(image: Image.Image) -> int:
    """Asked for after the pixels are decoded: some formats of Pillow turn them themselves."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:    # whatever is wrong with the other entries, the pixels are fine
        return 1


def _metadata(image: Image.Image, pixels: np.ndarray) -> tuple[dict[str, Any], list[str]]:
    """What a PNG file of these pixels can keep, and what is lost."""
    extras, lost = {}, []
    if profile := image.info.get("icc_profile"):
        if profile[16:20] == (b"GRAY" if pixels.shape[2] < 3 else b"RGB "):
            extras["icc_profile"] = profile
        else:
            lost.append("its colour profile, which is for other channels than the written file has")
    if exif := image.info.get("exif"):
        kept = upright(exif)
        if kept is None:
            lost.append("its EXIF data, which can't be read")
        else:
            extras["exif"] = kept
    dpi = image.info.get("dpi")
    if isinstance(dpi, tuple) and all(0 < float(value) < 1e6 for value in dpi):    # so written, it leaves out nan
        extras["dpi"] = tuple(map(float, dpi))
    elif _tiff_tag(image, 0x8769):
        lost.append("the EXIF data of a TIFF file")
    if pixels.dtype == np.uint8 and max(_tiff_tag(image, 258) or (8,)) > 8:
        lost.append("all but 8 bits of each channel")
    if image.mode in ("CMYK", "LAB"):
        lost.append(f"{image.mode} colours (they are written as RGB)")
    if getattr(image, "is_animated", False):
        lost.append("all frames but the first")
    return extras, lost


# ---- writing ----


def write_image(path: str | Path, image: Tensor) -> None:
    """Write a uint8 (3, H, W) picture as PNG; it appears under its name only when complete."""
    write_pixels(path, image.permute(1, 2, 0).contiguous().cpu().numpy())


def write_completed(path: str | Path, picture: Picture, completed: Tensor, new: Tensor) -> None:
    """Write a picture whose hole was completed: outside the hole the file says what the picture's own file says.

    Args:
        completed: uint8 (3, H, W).
        new: bool (1, H, W), the pixels to be taken from it.
    """
    pixels, hole = picture.pixels.copy(), new[0].numpy()                        # (H, W, C), (H, W)
    colours = completed[:, new[0]].numpy().T                                    # (M, 3)
    channels = pixels.shape[2] - (pixels.shape[2] + 1) % 2                      # without alpha: 1 or 3
    if channels == 1:
        colours = np.rint(colours @ LUMA)[:, None]
    scale = 257 if pixels.dtype == np.uint16 else 1
    pixels[hole, :channels] = colours.astype(pixels.dtype) * scale
    if channels < pixels.shape[2] and not pixels[hole, channels].any():         # an erased hole would stay invisible
        pixels[hole, channels] = 255 * scale
    write_pixels(path, pixels, **picture.extras)


def write_pixels(path: str | Path, pixels: np.ndarray, **extras: Any) -> None:
    """Write (H, W, C) uint8 or uint16 as PNG; `extras` as in `Picture`."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"pictures are written as PNG (lossless), so {path.name} must end in .png")
    with atomic_write(path) as temporary:
        if pixels.dtype == np.uint16:
            temporary.write_bytes(_png16(pixels, **extras))
        else:
            image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
            image.save(temporary, format="PNG", compress_level=COMPRESSION, **extras)


def _png16(
    pixels: np.ndarray, icc_profile: bytes = b"", exif: bytes = b"", dpi: tuple[float, float] | None = None
) -> bytes:
    """A PNG file of 16 bits a channel, which Pillow writes of gray pictures alone."""
    height, width, channels = pixels.shape
    rows = pixels.astype(">u2").view(np.uint8).reshape(height, -1)
    rows = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))               # filter 2: less the row above, modulo 256
    lines = np.concatenate([np.full((height, 1), 2, np.uint8), rows], axis=1)
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))]
    if icc_profile:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc_profile)))
    if dpi:
        chunks.append((b"pHYs", struct.pack(">IIB", *(math.floor(value / 0.0254 + 0.5) for value in dpi), 1)))
    if exif:
        chunks.append((b"eXIf", exif))
    chunks += [(b"IDAT", zlib.compress(lines.tobytes(), COMPRESSION)), (b"IEND", b"")]
    body = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)
