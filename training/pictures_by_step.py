"""The training pictures of each step, from a folder in memory or from shards."""

import atexit
import functools
import signal
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pictures.files import find_images
from pictures.folders import load_folder
from pictures.shards import ShardStream, count_pictures, is_shards, shard_urls
from training.processes import on_main
from utils import UserError, fingerprint, seeded


@dataclass
class FolderPictures:
    """A training set in memory."""

    images: Tensor    # (M, 3, size, size) uint8
    batch_size: int
    seed: int
    rank: int
    processes: int

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, step: int) -> Tensor:
        """This process's pictures of a step's batch: positions rank, rank + P, ... of (B, 3, size, size)."""
        epoch, k = divmod(step, len(self) // self.batch_size)
        order = epoch_order(len(self), self.seed, epoch)
        return self.images[order[k * self.batch_size : (k + 1) * self.batch_size][self.rank :: self.processes]]


@dataclass
class ShardPictures:
    """A training set larger than memory, streamed. Steps are asked for in order; after a gap the stream is opened anew."""

    pattern: str
    count: int        # pictures in all shards
    size: int
    batch_size: int
    seed: int
    rank: int
    processes: int
    workers: int      # processes that decode ahead; 0: none, decode when asked
    bad_images: str   # error or skip
    next_step: int = -1
    stream: Iterator[Tensor] = iter(())

    def __post_init__(self) -> None:
        atexit.register(self.close)

    def close(self) -> None:
        """End the workers. At the end of Python they would be sent SIGTERM, which they ignore, and waited for forever."""
        self.stream = iter(())

    def __len__(self) -> int:
        return self.count

    def batch(self, step: int) -> Tensor:
        """This process's pictures of a step's batch, (B / P, 3, size, size)."""
        epoch, k = divmod(step, self.count // self.batch_size)
        if step != self.next_step or k == 0:
            mine = self.batch_size // self.processes
            shards = ShardStream(self.pattern, self.size, mine, self.seed, epoch, self.rank, self.processes, k * mine,
                                 self.bad_images)    # fmt: skip
            # A generator of its own: the loader would draw from the global one, which dropout draws from as well.
            self.stream = iter(DataLoader(shards, mine, num_workers=self.workers, drop_last=True,
                                          worker_init_fn=_ignore_signals, generator=torch.Generator()))    # fmt: skip
        self.next_step = step + 1
        try:
            return next(self.stream)
        except StopIteration:
            raise UserError(f"{self.pattern} holds fewer pictures than the {self.count} of --train-pictures") from None


def _ignore_signals(worker: int) -> None:
    """A stop request reaches the whole process group; the training process decides when its workers end."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def open_pictures(args: Any, size: int, c: Any, accelerator: Any) -> FolderPictures | ShardPictures:
    """The training pictures that --train-dir names."""
    paths = args.train_dir
    place = {"seed": c.seed, "rank": accelerator.process_index, "processes": accelerator.num_processes}
    if args.workers < 0 or (args.train_pictures is not None and args.train_pictures < 1):
        raise UserError("--workers must be 0 or more and --train-pictures at least 1")
    if not any(is_shards(path) for path in paths):
        images = torch.cat([load_folder(path, size, args.bad_images, other_folders(args)) for path in paths])
        return FolderPictures(images, c.batch_size, **place)
    if len(paths) > 1:
        raise UserError("--train-dir takes folders, or one quoted pattern of shards such as 'cats-{0000..0099}.tar'")
    shards = shard_urls(paths[0])
    count = args.train_pictures or on_main(accelerator, lambda: sum(map(count_pictures, shards)))
    return ShardPictures(paths[0], count, size, c.batch_size, **place, workers=args.workers, bad_images=args.bad_images)


def input_pictures(args: Any, pictures: Sized, val_images: Tensor) -> dict[str, str]:
    """What the training and validation pictures are: how many, and a hash of their files' names and sizes."""

    def sizes(paths: Iterable[str], leave_out: Iterable[str] = ()) -> str:
        files = (file for path in paths for file in picture_files(path, leave_out))
        return fingerprint([(file.name, size_and_time(file)[0]) for file in files])

    def masks(path: str | None) -> str:
        return sizes([path]) if path else "drawn at random"

    return {
        "training masks": masks(args.train_masks), "validation masks": masks(args.val_masks),
        "training pictures": f"{len(pictures)} ({sizes(args.train_dir, other_folders(args))})",
        "validation pictures": f"{len(val_images)} ({fingerprint(val_images)})",
    }


def other_folders(args: Any) -> list[str]:
    """All folders of a run. A subfolder that is one of them does not belong to the folder that it lies in."""
    folders = [*args.train_dir, args.val_dir, args.output_dir, args.train_masks, args.val_masks]
    return [path for path in (*folders, getattr(args, "token_cache", None)) if path]


def picture_files(path: str, leave_out: Iterable[str] = ()) -> list[Path]:
    """The pictures of a folder, or the shards of a pattern."""
    if is_shards(path):
        return [Path(url) for url in shard_urls(path)]
    return list(find_images(path, leave_out).values())


def size_and_time(file: Path) -> tuple[int, int]:
    """Bytes, and nanoseconds of the last change; zeros of a shard on another machine."""
    try:
        status = file.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=1)    # asked for at every step, new once an epoch
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits `count` samples: (count,) int64, not to be changed in place."""
    return torch.randperm(count, generator=seeded(seed, "order", epoch))
