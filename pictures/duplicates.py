"""Finds duplicates among pictures.

Two pictures are *exact* duplicates if their decoded pixels are equal, and *near* duplicates if their gray thumbnails of
16x16 pixels correlate by a threshold or more, as they are or with one mirrored (training flips pictures, so a mirrored copy
leaks as well). That finds re-encoded, resized, brightened and mirrored copies, and neighbours in a burst; it does not find
crops and rotations.
"""
import hashlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pictures.files import find_images
from pictures.folders import LISTED, read_all
from pictures.images import open_rgb
from utils import UserError

THUMB = 16          # pixels a side of the thumbnails compared


class Fingerprint(NamedTuple):
    """What is compared of a picture."""

    folder: Path         # the folder that was read; the file may lie deeper
    file: Path
    digest: str          # of the size and the decoded RGB pixels
    thumb: np.ndarray    # (THUMB, THUMB) float32 gray, mean 0, norm 1 (or all 0, if the picture is flat)


class Group(NamedTuple):
    """Pictures linked by duplication, directly or through others; most groups have one member."""

    pictures: list[Fingerprint]    # sorted by digest, then file
    similarity: float              # the weakest link's correlation; 1.0 without near duplicates
    mirrored: bool                 # whether a link holds for the mirrored picture only

    @property
    def exact(self) -> bool:
        return len({picture.digest for picture in self.pictures}) == 1

    @property
    def folders(self) -> set[Path]:
        return {picture.folder for picture in self.pictures}


def fingerprint(folder: Path, file: Path) -> Fingerprint:
    image = open_rgb(file)
    digest = hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).hexdigest()
    thumb = np.asarray(image.convert("L").resize((THUMB, THUMB), Image.Resampling.BICUBIC), dtype=np.float32)
    thumb = thumb - thumb.mean()
    return Fingerprint(folder, file, digest, thumb / max(float(np.linalg.norm(thumb)), 1e-6))


def fingerprint_folder(folder: Path, leave_out: Iterable[Path] = ()) -> list[Fingerprint]:
    """Fingerprint the pictures of a folder without `leave_out`; a UserError lists those that can't be read."""
    files = find_images(folder, leave_out).values()
    results = read_all(partial(fingerprint, folder), files, "skip", f"reading {folder}")
    bad = [str(result) for result in results if isinstance(result, UserError)]
    if bad:
        lines = "\n  ".join(bad[:LISTED])
        more = f"\n  ... and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        raise UserError(f"{len(bad)} picture(s) in {folder} cannot be read; remove them first:\n  {lines}{more}")
    return results


def near_pairs(thumbs: np.ndarray, threshold: float, rows: int = 256) -> Iterator[tuple[int, int, float, bool]]:
    """Compare all pairs i < j of (n, THUMB, THUMB): yields (i, j, correlation, whether one must be mirrored)."""
    plain = thumbs.reshape(len(thumbs), -1)                                     # (n, THUMB * THUMB)
    mirror = thumbs[:, :, ::-1].reshape(len(thumbs), -1)
    for first in range(0, len(thumbs), rows):                                   # a block of rows bounds the memory
        block = plain[first:first + rows]
        same, flipped = block @ plain[first:].T, block @ mirror[first:].T       # (rows, n - first)
        for i, j in np.argwhere(np.triu(np.maximum(same, flipped), k=1) >= threshold):
            yield first + i, first + j, float(max(same[i, j], flipped[i, j])), bool(flipped[i, j] > same[i, j])


def group_duplicates(pictures: list[Fingerprint], threshold: float) -> list[Group]:
    """Put every picture in exactly one group, so that duplicates share theirs.

    The groups and their order depend on the pixels alone, not on the order or the names of the files.
    """
    copies: dict[str, list[Fingerprint]] = {}
    for picture in sorted(pictures, key=lambda picture: (picture.digest, picture.file)):
        copies.setdefault(picture.digest, []).append(picture)
    distinct = list(copies.values())
    parent = list(range(len(distinct)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    links = list(near_pairs(np.stack([same[0].thumb for same in distinct]), threshold))
    for i, j, _, _ in links:
        low, high = sorted((root(i), root(j)))
        parent[high] = low
    members: dict[int, list[Fingerprint]] = {}
    for i, same in enumerate(distinct):
        members.setdefault(root(i), []).extend(same)
    weakest = dict.fromkeys(members, 1.0)
    mirrored = dict.fromkeys(members, False)
    for i, _, similarity, flipped in links:
        weakest[root(i)] = min(weakest[root(i)], similarity)
        mirrored[root(i)] |= flipped
    return [Group(found, weakest[key], mirrored[key]) for key, found in members.items()]
