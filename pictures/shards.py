"""Streams pictures from WebDataset shards in a seeded order."""

import io
import os
import re
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pictures.files import SUFFIXES
from pictures.folders import LISTED, read_square
from utils import UserError, progress

BUFFER = 4096    # undecoded samples held, and shuffled among each other; `write_shards` shuffles too, so few suffice


@dataclass
class ShardStream(IterableDataset):
    """One epoch of pictures from WebDataset shards: yields uint8 (3, size, size), cut as in load_folder.

    The order is a function of (seed, epoch) alone, and rank r takes samples r, r + world_size, ...: batch k of a rank
    is a function of (seed, epoch, k, rank), the union of the ranks' batches does not depend on their number, and every
    rank gives equally many (up to world_size - 1 samples at the end are left out). For that every rank reads all
    shards and decodes its own samples only. In a DataLoader with workers, give both the same `batch_size`: then any
    number of workers gives the batches that none gives.

    Args:
        pattern: see `shard_urls`.
        seed: None keeps the order of the files.
        start: samples of this rank to skip; batch k begins at start = k * batch_size. They are read, not decoded.
        bad_images: "skip" puts another picture of the buffer in the place of one that can't be read, and says so.
    """

    pattern: str
    size: int
    batch_size: int = 1
    seed: int | None = 0
    epoch: int = 0
    rank: int = 0
    world_size: int = 1
    start: int = 0
    bad_images: str = "error"

    def __post_init__(self) -> None:
        self.urls = shard_urls(self.pattern)

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        bad: list[UserError] = []
        for position, candidates in self._shuffled(self.start * self.world_size):
            index, rank = divmod(position, self.world_size)
            if rank == self.rank:
                mine = candidates
            turn = (index - self.start) // self.batch_size % workers
            if rank == self.world_size - 1 and turn == worker:    # now every rank has one: all give equally many
                yield self._first_good(mine, bad)

    def _first_good(self, candidates: Iterator[dict], bad: list[UserError]) -> Tensor:
        for sample in candidates:
            try:
                return self._decode(sample)
            except UserError as error:
                if self.bad_images == "error":
                    raise
                bad.append(error)
                if len(bad) <= LISTED:
                    more = ", further ones are skipped in silence" if len(bad) == LISTED else ""
                    print(f"skipped: {error}; another picture takes its place{more}", file=sys.stderr, flush=True)
        raise UserError(f"none of {BUFFER} pictures in a row can be read; the last: {bad[-1]}")

    def _shuffled(self, first: int) -> Iterator[tuple[int, Iterator[dict]]]:
        """The epoch's samples from position `first` on, all ranks together: (position, undecoded sample and who takes its
        place if it can't be read: those that follow it in its buffer, which all ranks see alike).

        Shards come in the order of (seed, epoch); inside, each run of `BUFFER` samples is permuted by itself, so that
        an earlier run need not be replayed and no more than `BUFFER` samples are held.
        """
        urls = self.urls
        if self.seed is not None:
            urls = [urls[i] for i in np.random.default_rng((self.seed, self.epoch)).permutation(len(urls))]
        samples = _read_shards(urls)
        block, offset = divmod(first, BUFFER)
        next(islice(samples, block * BUFFER, block * BUFFER), None)    # read over them, decode nothing
        while chunk := list(islice(samples, BUFFER)):
            order = np.arange(len(chunk))
            if self.seed is not None:
                order = np.random.default_rng((self.seed, self.epoch, block + 1)).permutation(len(chunk))
            for i in range(offset, len(chunk)):
                yield block * BUFFER + i, _cycle(chunk, order, i)
            block, offset = block + 1, 0

    def _decode(self, sample: dict) -> Tensor:
        key, shard = sample["__key__"], sample["__url__"]
        fields = sorted(name for name in sample if not name.startswith("_"))
        return read_square(io.BytesIO(sample[picture_field(key, fields, shard)]), self.size, f"{key} of {shard}")


def picture_field(key: str, fields: list[str], shard: str) -> str:
    """The field of a sample that holds its picture. A sample is the files that share a name up to its first dot."""
    found = [field for field in fields if f".{field.lower()}".endswith(tuple(SUFFIXES))]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"sample {key} of {shard} holds no picture; its fields are {', '.join(fields)}")
    files = " and ".join(f"{key}.{field}" for field in found[:2])
    if all("." in field for field in found):
        problem = f"share the name {key} up to its first dot, which makes them one sample: rename them"
    else:
        problem = f"are pictures of one sample, {key}, and which one to train on is not said: leave one"
    raise UserError(f"{files} in {shard} {problem}, or pack the pictures with python -m tools.dataset shards")


def shard_urls(pattern: str) -> list[str]:
    """The shards of a pattern: file name with braces, such as "cats-{000000..000009}.tar", or what else WebDataset opens."""
    try:
        import webdataset
    except ImportError as error:
        raise UserError("reading shards needs the package webdataset: pip install webdataset") from error

    urls = webdataset.shardlists.expand_urls(str(pattern))
    missing = [url for url in urls if ":" not in url and not Path(url).is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(urls)} shard(s) of {pattern} do not exist; the first: {missing[0]}")
    return urls


def _cycle(chunk: list[dict], order: np.ndarray, first: int) -> Iterator[dict]:
    for i in range(len(chunk)):
        yield chunk[order[(first + i) % len(chunk)]]


def _read_shards(urls: list[str]) -> Iterator[dict]:
    """Undecoded samples, file by file: {"__key__": ..., "__url__": ..., "png": bytes}."""
    import webdataset

    try:
        yield from webdataset.DataPipeline(webdataset.SimpleShardList(urls), webdataset.tarfile_to_samples())
    except (OSError, ValueError, tarfile.TarError) as error:
        raise UserError(f"cannot read the shards: {error}") from error


def write_shards(files: list[Path], folder: Path, names: list[str], size: int, shard_size: int, seed: int) -> None:
    """Pack pictures, cut and resized as in `read_square`, as PNG into WebDataset tar files; all appear, or none.

    Their order is random, once, so that the reader shuffles well with a small buffer.
    """
    import webdataset

    order = np.random.default_rng(seed).permutation(len(files))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".shards-", dir=folder) as staging:
            indices = iter(progress(range(len(files)), desc="packing", unit="picture"))
            for name in names:
                with webdataset.TarWriter(f"{staging}/{name}", mtime=0) as writer:
                    for i in islice(indices, shard_size):
                        buffer = io.BytesIO()
                        pixels = read_square(files[order[i]], size).permute(1, 2, 0).numpy()
                        Image.fromarray(pixels).save(buffer, format="PNG")
                        writer.write({"__key__": f"{i:09d}", "png": buffer.getvalue()})
            for name in names:
                os.replace(f"{staging}/{name}", folder / name)
    except OSError as error:
        raise UserError(f"can't write shards into {folder}: {error.strerror or error}") from error


def is_shards(path: str) -> bool:
    """Whether --train-dir names WebDataset shards rather than a folder."""
    return bool(re.search(r"\.(tar(\.\w+)?|tgz)$", path)) or path.startswith("pipe:") or "://" in path


def count_pictures(shard: str) -> int:
    """Samples in a tar file, from its headers alone: consecutive files that share a name up to the first dot."""
    if shard.startswith("pipe:") or "://" in shard:
        raise UserError(f"the pictures in {shard} can't be counted here; give their number with --train-pictures")
    try:
        with tarfile.open(shard) as file:
            names = [re.match(r"((?:.*/|)[^.]+)[.]([^/]*)$", member.name) for member in file if member.isfile()]
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"shard {shard} can't be read: {error}") from error
    count = 0
    for key, files in groupby(filter(None, names), key=lambda name: name[1]):
        picture_field(key, [name[2] for name in files], shard)
        count += 1
    return count
