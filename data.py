"""Pictures and hole masks: reading, pairing, loading a folder, writing, and random holes.

Conventions: pictures are uint8 (3, H, W) RGB at file borders and float [-1, 1] inside; masks are bool (1, H, W) with
True = hole (unknown, to be filled). Mask *files* are 0 (black) = hole and 255 = known.

Check folders for leaks:      python data.py check TRAIN VAL TEST
Split a folder without leaks: python data.py split PICTURES --output DIR --val-share 0.1
Pack a folder into shards:    python data.py shards PICTURES --output DIR/shards-%06d.tar --size 64
"""

from __future__ import annotations

import io
import math
import os
import sys
import tarfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MAX_PIXELS = 100_000_000    # a larger picture is refused before it is decoded: a small file can hold a huge one
MASK_THRESHOLD = 128        # gray levels below it are black
LISTED = 10                 # unreadable pictures that are named, when they are skipped


class DataError(ValueError):
    """The user's pictures, masks or folders are not what was asked for; the message is a sentence for them."""

    user_error = True


# ---- files ----------------------------------------------------------------------------------------------------------

def find_images(path: str | Path) -> dict[str, Path]:
    """List the pictures of a folder (not of its subfolders) by stem, sorted; a file gives itself.

    Raises DataError if the path is missing or has no picture, or if two pictures share a stem (a.jpg and a.png).
    """
    path = Path(path)
    try:
        if path.is_file():
            return {path.stem: path}
        if not path.is_dir():
            raise DataError(f"{path} does not exist; give a picture or a folder of pictures")
        files = sorted(path.iterdir())
    except OSError as error:
        raise DataError(f"cannot list {path}: {error.strerror}") from error
    found: dict[str, Path] = {}
    for file in files:
        if file.suffix.lower() not in IMAGE_SUFFIXES or file.name.startswith(".") or not file.is_file():
            continue
        if file.stem in found:
            raise DataError(f"{found[file.stem].name} and {file.name} in {path} share a name; remove or rename one")
        found[file.stem] = file
    if not found:
        raise DataError(f"no picture in {path}; looked for {', '.join(sorted(IMAGE_SUFFIXES))} (not in subfolders)")
    return dict(sorted(found.items()))


def pair(images: str | Path, masks: str | Path) -> list[tuple[str, Path, Path]]:
    """Pair pictures with masks of the same stem, never by position: [(stem, image file, mask file)], sorted by stem.

    A single mask file serves every picture; a single picture takes its mask from a folder of masks.
    Raises DataError if any picture lacks its mask, or any mask its picture.
    """
    image_files, mask_files = find_images(images), find_images(masks)
    if Path(masks).is_file():
        mask = Path(masks)
        return [(stem, image, mask) for stem, image in image_files.items()]
    if Path(images).is_file():
        mask_files = {stem: mask for stem, mask in mask_files.items() if stem in image_files}
    for have, lack, have_word, lack_word in ((image_files, mask_files, "picture", "mask"),
                                             (mask_files, image_files, "mask", "picture")):
        alone = [stem for stem in have if stem not in lack]
        if alone:
            some = ", ".join(alone[:5]) + (", ..." if len(alone) > 5 else "")
            raise DataError(f"{len(alone)} {have_word}(s) have no {lack_word} of the same name: {some}; "
                            f"looked in {images} and {masks}")
    return [(stem, image, mask_files[stem]) for stem, image in image_files.items()]


# ---- pixels ---------------------------------------------------------------------------------------------------------

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
        raise DataError(f"unknown hole colour {hole!r}; expected 'black' or 'white'")
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
        raise DataError(f"pictures are written as PNG (lossless), so {path.name} must end in .png")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()).save(temporary, format="PNG")
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
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
                raise DataError(f"{name} has {image.width}x{image.height} pixels, more than the {MAX_PIXELS:,} allowed")
            return _to_rgb(ImageOps.exif_transpose(image), name)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{name} does not exist; give the path of a picture") from None
    except Exception as error:    # a broken file makes decoders raise anything: OSError, SyntaxError, struct.error...
        raise DataError(f"cannot read {name} as a picture: {error}") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise DataError(f"{name} holds floating-point pixels, whose range is not defined; save it as 8 or 16 bit")
    if image.mode.startswith("I"):    # 16 bit; Pillow's own conversion would clip at 255
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise DataError(f"{name} holds 32-bit pixels, whose range is not defined; save it as 8 or 16 bit")
        return Image.fromarray(((gray + 128) // 257).astype(np.uint8)).convert("RGB")    # 65535 = 255 * 257
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()      # (3, H, W)


# ---- folders --------------------------------------------------------------------------------------------------------

def read_square(source: str | Path | BinaryIO, size: int, name: str | None = None) -> Tensor:
    """Read a picture, cut the largest centred square, resize it (antialiased) if needed: uint8 (3, size, size)."""
    image = open_rgb(source, name)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return _to_tensor(image)


def load_folder(path: str | Path, size: int, bad_images: str = "error") -> Tensor:
    """Read every picture of a folder, sorted by stem, as uint8 (M, 3, size, size), each cut to its centred square.

    `bad_images`: "error" stops at a file that cannot be read, "skip" leaves it out and says so at the end.
    Raises DataError if there is no (readable) picture.
    """
    if bad_images not in ("error", "skip"):
        raise DataError(f"unknown bad_images {bad_images!r}; expected 'error' or 'skip'")
    files = list(find_images(path).values())
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)

    def load(index: int) -> DataError | None:
        try:
            images[index] = read_square(files[index], size)
        except DataError as error:
            if bad_images == "error":
                raise
            return error
        return None

    with ThreadPoolExecutor() as pool:    # decoders release the interpreter lock
        results = pool.map(load, range(len(files)))
        errors = list(tqdm(results, total=len(files), desc=f"reading {path}", unit="picture", disable=None))
    bad = [error for error in errors if error is not None]
    if len(bad) == len(files):
        raise DataError(f"none of the {len(files)} picture(s) in {path} can be read; the first: {bad[0]}")
    if bad:
        images = images[torch.tensor([error is None for error in errors])]
        print(f"skipped {len(bad)} of {len(files)} pictures in {path}:", *bad[:LISTED], sep="\n  ", file=sys.stderr)
        if len(bad) > LISTED:
            print(f"  ... and {len(bad) - LISTED} more", file=sys.stderr)
    return images


# ---- shards ---------------------------------------------------------------------------------------------------------

@dataclass
class ShardStream(IterableDataset):
    """One epoch of a rank's pictures from WebDataset shards: yields uint8 (3, size, size). Made by `open_shards`."""

    urls: list[str]
    size: int
    batch_size: int
    seed: int | None
    epoch: int
    rank: int
    world_size: int
    start: int
    buffer: int
    bad_images: str = "error"

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        bad: list[DataError] = []
        for position, candidates in self._shuffled(self.start * self.world_size):
            index, rank = divmod(position, self.world_size)
            if rank == self.rank:
                mine = candidates
            turn = (index - self.start) // self.batch_size % workers
            if rank == self.world_size - 1 and turn == worker:    # now every rank has one: all give equally many
                yield self._first_good(mine, bad)

    def _first_good(self, candidates: Iterator[dict], bad: list[DataError]) -> Tensor:
        for sample in candidates:
            try:
                return self._decode(sample)
            except DataError as error:
                if self.bad_images == "error":
                    raise
                bad.append(error)
                if len(bad) <= LISTED:
                    more = ", further ones are skipped in silence" if len(bad) == LISTED else ""
                    print(f"skipped: {error}; another picture takes its place{more}", file=sys.stderr, flush=True)
        raise DataError(f"none of {self.buffer} pictures in a row can be read; the last: {bad[-1]}")

    def _shuffled(self, first: int) -> Iterator[tuple[int, Iterator[dict]]]:
        """The epoch's samples from position `first` on, all ranks together: (position, undecoded sample and who takes its
        place if it can't be read: those that follow it in its buffer, which all ranks see alike).

        Shards come in the order of (seed, epoch); inside, each run of `buffer` samples is permuted by itself, so that
        an earlier run need not be replayed and no more than `buffer` samples are held.
        """
        urls = self.urls
        if self.seed is not None:
            urls = [urls[i] for i in np.random.default_rng((self.seed, self.epoch)).permutation(len(urls))]
        samples = _read_shards(urls)
        block, offset = divmod(first, self.buffer)
        next(islice(samples, block * self.buffer, block * self.buffer), None)    # read over them, decode nothing
        while chunk := list(islice(samples, self.buffer)):
            order = np.arange(len(chunk))
            if self.seed is not None:
                order = np.random.default_rng((self.seed, self.epoch, block + 1)).permutation(len(chunk))
            for i in range(offset, len(chunk)):
                yield block * self.buffer + i, _cycle(chunk, order, i)
            block, offset = block + 1, 0

    def _decode(self, sample: dict) -> Tensor:
        name = f"{sample['__key__']} of {sample['__url__']}"
        data = next((value for key, value in sample.items() if f".{key}" in IMAGE_SUFFIXES), None)
        if data is None:
            fields = sorted(key for key in sample if not key.startswith("_"))
            raise DataError(f"sample {name} holds no picture; its fields are {', '.join(fields)}")
        return read_square(io.BytesIO(data), self.size, name)


def open_shards(pattern: str, size: int, *, batch_size: int = 1, seed: int | None = 0, epoch: int = 0, rank: int = 0,
                world_size: int = 1, start: int = 0, buffer: int = 4096, bad_images: str = "error") -> ShardStream:
    """Stream one epoch of pictures from WebDataset shards: an iterable of uint8 (3, size, size), cut as in load_folder.

    The order is a function of (seed, epoch) alone, and rank r takes samples r, r + world_size, ...: batch k of a rank
    is a function of (seed, epoch, k, rank), the union of the ranks' batches does not depend on their number, and every
    rank gives equally many (up to world_size - 1 samples at the end are left out). For that every rank reads all
    shards and decodes its own samples only. In a DataLoader with workers, give both the same `batch_size`: then any
    number of workers gives the batches that none gives.

    Args:
        pattern: file name with braces, such as "cats-{000000..000009}.tar", or anything else WebDataset opens.
        seed: None keeps the order of the files.
        start: samples of this rank to skip; batch k begins at start = k * batch_size. They are read, not decoded.
        buffer: undecoded samples held, and shuffled among each other. `shards` writes in random order, so that a
            buffer smaller than the set suffices.
        bad_images: "skip" puts another picture of the buffer in the place of one that can't be read, and says so.
    """
    try:
        import webdataset
    except ImportError as error:
        raise DataError("reading shards needs the package webdataset: pip install webdataset") from error

    if not 0 <= rank < world_size or start < 0 or epoch < 0 or min(size, batch_size, buffer) < 1 or (seed or 0) < 0:
        raise ValueError(f"open_shards needs 0 <= rank ({rank}) < world_size ({world_size}), start ({start}), epoch "
                         f"({epoch}) and seed ({seed}) >= 0, size ({size}), batch_size ({batch_size}) and buffer "
                         f"({buffer}) >= 1")
    urls = webdataset.shardlists.expand_urls(str(pattern))
    missing = [url for url in urls if ":" not in url and not Path(url).is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(urls)} shard(s) of {pattern} do not exist; the first: {missing[0]}")
    return ShardStream(urls, size, batch_size, seed, epoch, rank, world_size, start, buffer, bad_images)


def _cycle(chunk: list[dict], order: np.ndarray, first: int) -> Iterator[dict]:
    for i in range(len(chunk)):
        yield chunk[order[(first + i) % len(chunk)]]


def _read_shards(urls: list[str]) -> Iterator[dict]:
    """Undecoded samples, file by file: {"__key__": ..., "__url__": ..., "png": bytes}."""
    import webdataset

    try:
        yield from webdataset.DataPipeline(webdataset.SimpleShardList(urls), webdataset.tarfile_to_samples())
    except (OSError, ValueError, tarfile.TarError) as error:
        raise DataError(f"cannot read the shards: {error}") from error


# ---- random holes ---------------------------------------------------------------------------------------------------

# Share of each family, and what it is for: walks are the shape of the test set's holes; strokes and boxes, of 5 to
# 60 % of the picture, keep a model trained on them useful for hand-drawn holes.
STROKE_SHARE, BOX_SHARE = 0.15, 0.10
WALK_STEPS = 0.8    # steps per pixel of the picture; gives the test masks' 20.8 % hole at 64x64


def random_holes(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw hole masks like the test set's: bool (count, 1, size, size) on the generator's device, True = hole.

    Three quarters are random walks, the rest brush strokes and boxes. Every mask has a hole and a known pixel, since a
    walk has fewer steps than there are pixels. The result depends on the arguments and the generator's state alone.
    """
    kind = torch.rand(count, generator=generator, device=generator.device)
    stroke, box = kind < STROKE_SHARE, kind > 1 - BOX_SHARE
    holes = torch.empty(count, size * size, dtype=torch.bool, device=generator.device)
    walk = ~(stroke | box)
    holes[walk] = random_walks(int(walk.sum()), size, generator).flatten(1)
    holes[stroke] = _nearest(_distance_to_polyline(int(stroke.sum()), size, generator), generator)
    holes[box] = _nearest(_distance_to_box_centre(int(box.sum()), size, generator), generator)
    return holes.view(count, 1, size, size)


def random_walks(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Holes of the first kind alone: the pixels visited by a lattice walk from a random start, which stays in place when
    it would leave the picture. Arguments and result as in `random_holes`.

    Such a walk is, in law, a free walk folded back at the borders: -1 -> 0, -2 -> 1, ...; so a cumulative sum and a
    remainder replace the loop over steps.
    """
    if size < 2:
        raise ValueError(f"size ({size}) must be at least 2, so that a mask has a hole and a known pixel")
    steps = max(1, round(WALK_STEPS * size * size))
    options = {"generator": generator, "device": generator.device, "dtype": torch.int32}
    direction = torch.randint(4, (count, steps), **options)                     # bit 0: sign, bit 1: axis
    sign, vertical = 1 - 2 * (direction & 1), direction >> 1
    cell = torch.zeros(count, steps, dtype=torch.int32, device=generator.device)
    for move in (sign * vertical, sign * (1 - vertical)):                       # rows, then columns
        start = torch.randint(size, (count, 1), **options)
        free = (start + move.cumsum(1, dtype=torch.int32)).remainder(2 * size)  # (count, steps) in [0, 2 * size)
        cell = cell * size + torch.minimum(free, 2 * size - 1 - free)
    holes = torch.zeros(count, size * size, dtype=torch.bool, device=generator.device)
    return holes.scatter_(1, cell.long(), True).view(count, 1, size, size)


def _nearest(distance: Tensor, generator: torch.Generator) -> Tensor:
    """Mark the nearest pixels, a share of 5 to 60 % (small ones more often). distance (n, P) -> bool (n, P)."""
    n, pixels = distance.shape
    share = 0.05 + 0.55 * torch.rand(n, 1, generator=generator, device=distance.device) ** 2
    last = (share * pixels).long().clamp(min=1) - 1                             # (n, 1) index of the last one marked
    return distance <= distance.sort(1).values.gather(1, last)


def _pixel_grid(size: int, device: torch.device) -> Tensor:
    """Pixel centres in [0, 1], row by row: (size * size, 2) as (y, x)."""
    centres = (torch.arange(size, device=device) + 0.5) / size
    return torch.cartesian_prod(centres, centres)


def _distance_to_polyline(count: int, size: int, generator: torch.Generator, corners: int = 4) -> Tensor:
    """Euclidean distance of each pixel to a random polyline: (count, size * size)."""
    points = torch.rand(count, corners, 1, 2, generator=generator, device=generator.device)
    start, along = points[:, :-1], points.diff(dim=1)                           # (count, corners - 1, 1, 2)
    offset = _pixel_grid(size, generator.device) - start                        # (count, corners - 1, P, 2)
    t = ((offset * along).sum(-1, keepdim=True) / along.square().sum(-1, keepdim=True).clamp(min=1e-12)).clamp(0, 1)
    return (offset - t * along).square().sum(-1).amin(1).sqrt()                 # (count, P)


def _distance_to_box_centre(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Chebyshev distance of each pixel to a random point, stretched by an aspect of 1/2 to 2: (count, size * size).

    The pixels nearest to the point in this distance form a box.
    """
    centre = torch.rand(count, 1, 2, generator=generator, device=generator.device)
    stretch = 2 ** (torch.rand(count, 1, 1, generator=generator, device=generator.device) - 0.5)
    offset = (_pixel_grid(size, generator.device) - centre).abs()               # (count, P, 2)
    return torch.maximum(offset[..., :1] * stretch, offset[..., 1:] / stretch).squeeze(-1)


# ---- views ----------------------------------------------------------------------------------------------------------

MAX_TURN = 6              # degrees to either side
ZOOM = (0.92, 1.12)       # below 1 the borders are mirrored in
MAX_MOVE = 0.06           # of the picture's side, in either direction
COLOUR = (0.1, 0.15, 0.3)    # brightness (white is 1, black -1), contrast and saturation: how far from unchanged


class Views(NamedTuple):
    """How pictures are seen: a little turned, zoomed, moved and recoloured, or as they are."""

    changed: Tensor    # (B,) bool
    place: Tensor      # (B, 2, 3) affine map from the new picture's coordinates to the old one's, both in [-1, 1]
    colour: Tensor     # (B, 3) brightness to add, contrast and saturation to multiply by


def random_views(count: int, share: float, generator: torch.Generator) -> Views:
    """Draw views, of which a `share` is changed."""
    changed = torch.rand(count, generator=generator) < share
    unit = torch.rand(count, 7, generator=generator) * 2 - 1                    # (B, 7) in [-1, 1)
    angle = unit[:, 0] * math.radians(MAX_TURN)
    low, high = math.log(ZOOM[0]), math.log(ZOOM[1])
    size = (-(low + high) / 2 - unit[:, 1] * (high - low) / 2).exp()            # zoomed in: a smaller part is seen
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    place = torch.cat([turn * size.view(-1, 1, 1), 2 * MAX_MOVE * unit[:, 2:4, None]], 2)
    return Views(changed, place, unit[:, 4:] * torch.tensor(COLOUR) + torch.tensor([0.0, 1.0, 1.0]))


def take_views(image: Tensor, views: Views) -> Tensor:
    """image: (B, 3, H, W) in [-1, 1].  Returns the same; pictures whose view is not `changed` come back bit for bit."""
    grid = F.affine_grid(views.place, list(image.shape), align_corners=False)
    seen = F.grid_sample(image, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    brightness, contrast, saturation = views.colour.view(-1, 3, 1, 1, 1).unbind(1)
    mean = seen.mean((1, 2, 3), keepdim=True)
    seen = (seen - mean) * contrast + mean + brightness
    gray = seen.mean(1, keepdim=True)
    seen = (gray + (seen - gray) * saturation).clamp(-1, 1)
    return torch.where(views.changed.view(-1, 1, 1, 1), seen, image)


def main(argv: list[str] | None = None) -> int:
    """Run `check`, `split`, `holes` or `shards` (see dataset_tools.py)."""
    import dataset_tools  # here, because it imports this module

    return dataset_tools.main(argv)


if __name__ == "__main__":
    sys.exit(main())
