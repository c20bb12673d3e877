"""Loads a folder of pictures as squares of one size."""

from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pictures.files import find_images
from pictures.images import open_rgb
from utils import UserError, notice, progress

LISTED = 10    # unreadable pictures that are named
T, U = TypeVar("T"), TypeVar("U")


def read_square(source: str | Path | BinaryIO, size: int, name: str | None = None) -> Tensor:
    """Read a picture, cut the largest centred square, resize it (antialiased) if needed: uint8 (3, size, size)."""
    image = open_rgb(source, name)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()      # (3, size, size)


def read_all(
    read: Callable[[T], U], items: Collection[T], bad_images: str, show: str | None = None
) -> list[U | UserError]:
    """Call `read` for each item, in threads, as decoders release Python's lock. Returns the results in the items' order.

    Args:
        bad_images: "error" raises the first user error, "skip" puts each in the place of its result.
        show: the words of a progress bar; None: without one.
    """

    def one(item: T) -> U | UserError:
        try:
            return read(item)
        except UserError as error:
            if bad_images == "error":
                raise
            return error

    with ThreadPoolExecutor() as pool:
        return list(progress(pool.map(one, items), total=len(items), desc=show, unit="picture", disable=show is None))


def load_folder(
    path: str | Path, size: int, bad_images: str = "error", leave_out: Iterable[str | Path] = ()
) -> Tensor:
    """Read every picture of a folder, sorted by name, as uint8 (M, 3, size, size), each cut to its centred square.

    Args:
        bad_images: "error" stops at a file that cannot be read, "skip" leaves it out and says so at the end.
        leave_out: subfolders that are not read, such as the folder of the validation pictures.
    Raises:
        UserError: there is no (readable) picture.
    """
    files = list(find_images(path, leave_out).values())
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)

    def load(index: int) -> None:
        images[index] = read_square(files[index], size)

    errors = read_all(load, range(len(files)), bad_images, f"reading {path}")
    bad = [error for error in errors if error is not None]
    if len(bad) == len(files):
        raise UserError(f"none of the {len(files)} picture(s) in {path} can be read; the first: {bad[0]}")
    if bad:
        images = images[torch.tensor([error is None for error in errors])]
        more = [f"... and {len(bad) - LISTED} more"] if len(bad) > LISTED else []
        notice("\n  ".join([f"skipped {len(bad)} of {len(files)} pictures in {path}:", *map(str, bad[:LISTED]), *more]))
    return images
