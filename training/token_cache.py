"""A training set's tokens, computed once and then read from disk, so that memory does not grow with the set.

A cache is a folder. about.json says what it was made from: a hash of the tokenizer, a hash of the pictures' names, sizes and
times. The set is cut into pieces, 1024 files of a folder or one shard each. A piece is up to three memory-mapped arrays:

    plain-000000.u16     (n, N) uint16: tokens of each picture as it is
    mirror-000000.u16    (n, N) uint16, where mirror images are trained on: theirs
    pixels-000000.u8     (n, 3, S, S) uint8, where the transformer looks at pixels beside the tokens

An array is written whole or not at all, so an encoding that was killed continues with the pieces that are missing. Of P
processes each makes every P-th piece.
"""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from models.vqgan import VQGAN
from pictures.files import find_images
from pictures.folders import read_all, read_square
from pictures.images import to_float
from pictures.shards import ShardStream, count_pictures, is_shards, shard_urls
from training.pictures_by_step import other_folders, size_and_time
from training.processes import on_main
from utils import UserError, atomic_write, fingerprint, progress, write_text

PIECE = 1024    # files of a folder in a piece; pictures held at a time
BATCH = 128     # pictures encoded at a time


class Piece(NamedTuple):
    """Pictures that are encoded and written together."""

    name: str            # its number, as it stands in file names
    files: list[Path]    # pictures, or a single shard
    shard: str | None    # the shard, as WebDataset opens it


@torch.no_grad()
def encode(vqgan: VQGAN, images: Tensor, device: torch.device, batch_size: int = BATCH) -> Tensor:
    """Tokens of pictures (M, 3, H, W) uint8: (M, N)."""
    with progress(total=len(images), desc="encoding", unit="picture", disable=len(images) <= batch_size) as bar:
        tokens = []
        for part in images.split(batch_size):
            tokens.append(vqgan.encode(to_float(part.to(device))).cpu())
            bar.update(len(part))
    return torch.cat(tokens)


def open_tokens(
    args: argparse.Namespace, vqgan: VQGAN, mirror: bool, pixels: bool, accelerator: Accelerator
) -> "TokenCache":
    """The training set's tokens, from --token-cache. What is missing there is made first, by all processes together."""
    folder, c = Path(args.token_cache or Path(args.output_dir) / "tokens"), vqgan.config
    if c.codebook_size > 65536:
        raise UserError(f"config vqgan.codebook_size ({c.codebook_size}) must be at most 65536, for tokens of 16 bits")
    pieces = list_pieces(args.train_dir, other_folders(args))
    weights = [*vqgan.encoder.state_dict().values(), *vqgan.codebook.state_dict().values()]
    about = {
        "tokenizer": fingerprint(c.encoder, c.image_size, c.stride, c.l2_normalize, *weights),
        # Names, sizes and times of all files. Reading the files would take too long.
        "pictures": fingerprint([[(file.name, *size_and_time(file)) for file in piece.files] for piece in pieces]),
        "pixels": pixels,
    }
    on_main(accelerator, lambda: check_about(folder, about))
    mine = pieces[accelerator.process_index :: accelerator.num_processes]
    build(folder, mine, partial(encode, vqgan, device=accelerator.device), c.image_size, mirror, pixels, args.bad_images)
    accelerator.wait_for_everyone()
    return TokenCache(folder, pieces, c.grid**2, c.image_size, mirror, pixels)


def list_pieces(paths: list[str], leave_out: Iterable[str] = ()) -> list[Piece]:
    """Cut folders of pictures, without the subfolders `leave_out`, and patterns of shards in pieces."""
    parts: list[tuple[list[Path], str | None]] = []
    for path in paths:
        if is_shards(path):
            parts += [([Path(url)], url) for url in shard_urls(path)]
        else:
            files = list(find_images(path, leave_out).values())
            parts += [(files[start : start + PIECE], None) for start in range(0, len(files), PIECE)]
    return [Piece(f"{number:06d}", files, shard) for number, (files, shard) in enumerate(parts)]


def check_about(folder: Path, about: dict[str, Any]) -> None:
    """Begin a cache that does not exist yet; refuse one that was made from something else.

    Args:
        about: everything that the arrays depend on: hashes of the tokenizer and of the pictures, and settings.
    Raises:
        UserError: the cache says otherwise, or what it says can't be read.
    """
    path = folder / "about.json"
    if not path.exists():
        write_text(path, json.dumps(about, indent=1) + "\n")
        return
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"token cache {folder} has a damaged about.json; delete the folder") from error
    words = {"tokenizer": "another VQGAN", "pictures": "other pictures (their names, sizes or times differ)"}
    for key, value in about.items():
        if found.get(key) != value:
            reason = words.get(key, f"{key} = {found.get(key)} instead of {value}")
            raise UserError(
                f"token cache {folder} is stale, it was made with {reason}; delete it or give another --token-cache"
            )


def build(
    folder: Path, pieces: list[Piece], encode: Callable[[Tensor], Tensor], size: int,
    mirror: bool, pixels: bool, bad_images: str,
) -> None:    # fmt: skip
    """Write the pieces that are missing. `encode`: (n, 3, size, size) uint8 -> (n, N) tokens below 65536."""
    missing = [piece for piece in pieces if not all(path.exists() for path in _paths(folder, piece, mirror, pixels))]
    bad: list[UserError] = []
    count = sum(map(_count, missing)) or None
    with progress(total=count, desc="encoding the training set", unit="picture", disable=not missing) as bar:
        for piece in missing:
            with contextlib.ExitStack() as stack:
                written = [stack.enter_context(atomic_write(path)) for path in _paths(folder, piece, mirror, pixels)]
                outputs = [stack.enter_context(open(path, "wb")) for path in written]
                for images in (part for whole in _read(piece, size, bad_images, bad) for part in whole.split(BATCH)):
                    sides = [images, images.flip(3)] if mirror else [images]
                    arrays = [encode(side).numpy().astype(np.uint16) for side in sides] + [images.numpy()] * pixels
                    for file, array in zip(outputs, arrays, strict=True):
                        file.write(array.tobytes())
                    bar.update(len(images))
    if bad:
        print(f"skipped {len(bad)} pictures:", *bad[:10], *["..."] * (len(bad) > 10), sep="\n  ", file=sys.stderr)


def _count(piece: Piece) -> int:
    """Pictures in a piece; 0 where they can't be counted."""
    try:
        return len(piece.files) if piece.shard is None else count_pictures(piece.shard)
    except UserError:    # a shard on another machine, or a broken one, which reading it will say
        return 0


def _paths(folder: Path, piece: Piece, mirror: bool, pixels: bool) -> list[Path]:
    names = {"plain-{}.u16": True, "mirror-{}.u16": mirror, "pixels-{}.u8": pixels}
    return [folder / name.format(piece.name) for name, present in names.items() if present]


def _read(piece: Piece, size: int, bad_images: str, bad: list[UserError]) -> Iterator[Tensor]:
    """A piece's pictures, (n, 3, size, size) uint8 at a time. Errors of pictures that are skipped go to `bad`."""
    if piece.shard is not None:
        stream = iter(ShardStream(piece.shard, size, seed=None, bad_images=bad_images))
        while images := list(islice(stream, PIECE)):
            yield torch.stack(images)
        return
    found = read_all(partial(read_square, size=size), piece.files, bad_images)
    bad += [error for error in found if isinstance(error, UserError)]
    if images := [image for image in found if isinstance(image, Tensor)]:
        yield torch.stack(images)


class TokenCache:
    """Reads a complete cache."""

    def __init__(self, folder: Path, pieces: list[Piece], seq_len: int, size: int, mirror: bool, pixels: bool) -> None:
        kinds = [(np.uint16, (seq_len,))] * (1 + mirror) + [(np.uint8, (3, size, size))] * pixels
        arrays = []
        for paths in (_paths(folder, piece, mirror, pixels) for piece in pieces):
            arrays.append([_map(path, *kind) for path, kind in zip(paths, kinds, strict=True)])
            if len({len(array) for array in arrays[-1]}) > 1:
                names = " and ".join(path.name for path in paths)
                raise UserError(f"{names} in {folder} differ in length; delete them, and they are made anew")
        self.tokens = [piece[: 1 + mirror] for piece in arrays]                     # 1 or 2, each (n, N)
        self.pixels = [piece[-1] for piece in arrays] if pixels else None           # each (n, 3, S, S)
        self.ends = np.cumsum([len(piece[0]) for piece in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def rows(self, chosen: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pictures by number. chosen: (B,) int64; mirrored: (B,) bool, all False where the cache has no mirror images.

        Returns tokens (B, N) int64, and pixels (B, 3, S, S) uint8, not mirrored, or None where the cache has none.
        """
        chosen, mirrored = chosen.numpy(), mirrored.numpy().astype(np.int64)
        piece = np.searchsorted(self.ends, chosen, side="right")                                 # (B,)
        tokens = np.empty((len(chosen), self.tokens[0][0].shape[1]), np.int64)                   # (B, N)
        pixels = np.empty((len(chosen), *self.pixels[0].shape[1:]), np.uint8) if self.pixels else None
        for p, side in set(zip(piece.tolist(), mirrored.tolist(), strict=True)):
            here = (piece == p) & (mirrored == side)
            row = chosen[here] - self.ends[p] + len(self.tokens[p][side])
            tokens[here] = self.tokens[p][side][row]
            if pixels is not None:
                pixels[here] = self.pixels[p][row]
        return torch.from_numpy(tokens), None if pixels is None else torch.from_numpy(pixels)


def _map(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """(n, *shape), read from disk as it is used."""
    try:
        n, rest = divmod(path.stat().st_size, np.dtype(dtype).itemsize * math.prod(shape))
        if rest:
            raise ValueError("its length is wrong")
        return np.memmap(path, dtype, "r", shape=(n, *shape)) if n else np.empty((0, *shape), dtype)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"token cache file {path} can't be used ({reason}); delete it, and it is made anew") from error
