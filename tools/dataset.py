"""The command line of data.py: find duplicates and leaks, split a folder without leaks, draw holes, pack it into shards.

Two pictures are *exact* duplicates if their decoded pixels are equal, and *near* duplicates if their gray thumbnails of
16x16 pixels correlate by `--threshold` or more, as they are or with one mirrored (training flips pictures, so a
mirrored copy leaks as well). That finds re-encoded, resized, brightened and mirrored copies, and neighbours in a burst;
it does not find crops and rotations.
"""
from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from pictures.files import find_images
from pictures.folders import read_square
from pictures.holes import random_holes, random_walks
from pictures.images import open_rgb
from utils import UserError

THUMB = 16          # pixels a side of the thumbnails compared
# On 8,817 aligned cat faces, which are all alike at this size, nearly all pairs above 0.96 are one photo or a burst,
# and below 0.94 most are different cats.
THRESHOLD = 0.96
LISTED = 20         # crossing groups printed at least; --json lists all


# ---- duplicates -----------------------------------------------------------------------------------------------------

class Picture(NamedTuple):
    file: Path
    digest: str          # of the size and the decoded RGB pixels
    thumb: np.ndarray    # (THUMB, THUMB) float32 gray, mean 0, norm 1 (or all 0, if the picture is flat)


class Group(NamedTuple):
    """Pictures linked by duplication, directly or through others; most groups have one member."""

    pictures: list[Picture]    # sorted by digest, then file
    similarity: float          # the weakest link's correlation; 1.0 without near duplicates
    mirrored: bool             # whether a link holds for the mirrored picture only

    @property
    def exact(self) -> bool:
        return len({picture.digest for picture in self.pictures}) == 1

    @property
    def folders(self) -> set[Path]:
        return {picture.file.parent for picture in self.pictures}


def fingerprint(file: Path) -> Picture:
    image = open_rgb(file)
    digest = hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).hexdigest()
    thumb = np.asarray(image.convert("L").resize((THUMB, THUMB), Image.Resampling.BICUBIC), dtype=np.float32)
    thumb = thumb - thumb.mean()
    return Picture(file, digest, thumb / max(float(np.linalg.norm(thumb)), 1e-6))


def fingerprint_folder(folder: Path) -> list[Picture]:
    """Fingerprint every picture of a folder; DataError lists those that cannot be read."""
    def read(file: Path) -> Picture | UserError:
        try:
            return fingerprint(file)
        except UserError as error:
            return error

    files = list(find_images(folder).values())
    with ThreadPoolExecutor() as pool:
        results = list(tqdm(pool.map(read, files), total=len(files), desc=f"reading {folder}", disable=None))
    bad = [str(result) for result in results if isinstance(result, UserError)]
    if bad:
        more = f"\n  ... and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise UserError(f"{len(bad)} picture(s) in {folder} cannot be read; remove them first:\n  "
                        + "\n  ".join(bad[:10]) + more)
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


def group_duplicates(pictures: list[Picture], threshold: float) -> list[Group]:
    """Put every picture in exactly one group, so that duplicates share theirs.

    The groups and their order depend on the pixels alone, not on the order or the names of the files.
    """
    copies: dict[str, list[Picture]] = {}
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
    members: dict[int, list[Picture]] = {}
    for i, same in enumerate(distinct):
        members.setdefault(root(i), []).extend(same)
    weakest = dict.fromkeys(members, 1.0)
    mirrored = dict.fromkeys(members, False)
    for i, _, similarity, flipped in links:
        weakest[root(i)] = min(weakest[root(i)], similarity)
        mirrored[root(i)] |= flipped
    return [Group(found, weakest[key], mirrored[key]) for key, found in members.items()]


# ---- check ----------------------------------------------------------------------------------------------------------

def check(args: argparse.Namespace) -> int:
    """Report duplicates inside and across folders; 1 if any crosses two folders."""
    folders = [Path(folder) for folder in args.folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a folder is given twice; give each once")
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give folders of pictures")
    pictures = [picture for folder in folders for picture in fingerprint_folder(folder)]
    groups = [group for group in group_duplicates(pictures, args.threshold) if len(group.pictures) > 1]
    print(f"{len(pictures):,} pictures in {len(folders)} folder(s); near = correlation of {args.threshold} or more")
    for folder in folders:
        inside = [group for group in groups if group.folders == {folder}]
        count = sum(picture.file.parent == folder for picture in pictures)
        print(f"  {folder}: {count:,} pictures; groups of duplicates inside: {_count(inside)}")
        _print_groups(inside, args.list)
    crossing = [group for group in groups if len(group.folders) > 1]
    print(f"across folders: {_count(crossing)}" + (" (a leak)" if crossing else ""))
    _print_groups(crossing, max(args.list, LISTED))
    if args.json:
        _write_json(Path(args.json), folders, groups)
    return 1 if crossing else 0


def _count(groups: list[Group]) -> str:
    exact = sum(group.exact for group in groups)
    return f"{exact:,} exact, {len(groups) - exact:,} near"


def _print_groups(groups: list[Group], limit: int) -> None:
    for group in groups[:limit]:
        kind = "exact" if group.exact else f"near {group.similarity:.3f}" + (" mirrored" * group.mirrored)
        print(f"    {kind}: " + ", ".join(str(picture.file) for picture in group.pictures))
    if 0 < limit < len(groups):
        print(f"    ... and {len(groups) - limit:,} more (--json FILE lists all)")


def _write_json(path: Path, folders: list[Path], groups: list[Group]) -> None:
    report = {
        "folders": [str(folder) for folder in folders],
        "leak": any(len(group.folders) > 1 for group in groups),
        "groups": [{"kind": "exact" if group.exact else "near", "similarity": round(group.similarity, 4),
                    "mirrored": group.mirrored, "crossing": len(group.folders) > 1,
                    "files": [str(picture.file) for picture in group.pictures]} for group in groups],
    }
    with _staging(path) as staging:
        (staging / "report").write_text(json.dumps(report, indent=1) + "\n")
        os.replace(staging / "report", path)


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` to fill and to move from, so that nothing half-written gets its final name."""
    path = path.absolute()
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; give a new folder")


def move_folder(filled: Path, output: Path) -> None:
    """To where nothing is yet, or an empty folder."""
    if output.exists():
        output.rmdir()
    os.replace(filled, output)


# ---- split ----------------------------------------------------------------------------------------------------------

def assign(groups: list[Group], val_share: float, test_share: float, seed: int) -> dict[str, list[Picture]]:
    """Deal whole groups to train, val and test: the pictures' hashes and the seed decide, not names or order.

    In the order of their seeded hash, groups go to val while they fit in its share, then to test, the rest to train.
    """
    count = sum(len(group.pictures) for group in groups)
    room = {name: max(1, round(share * count)) for name, share in (("val", val_share), ("test", test_share)) if share}
    parts: dict[str, list[Picture]] = {"train": [], **{name: [] for name in room}}
    for group in sorted(groups, key=lambda group: _seeded(group.pictures[0].digest, seed)):
        part = next((name for name in room if len(parts[name]) + len(group.pictures) <= room[name]), "train")
        parts[part] += group.pictures
    for name, pictures in parts.items():
        if not pictures:
            raise UserError(f"no picture is left for {name}: the {count} picture(s) form {len(groups)} group(s) of "
                            "duplicates, which stay together; give more pictures or other shares")
    return parts


def _seeded(key: str, seed: int) -> str:
    return hashlib.blake2b(f"{seed} {key}".encode(), digest_size=16).hexdigest()


def split(args: argparse.Namespace) -> int:
    """Copy a folder's pictures to OUTPUT/train, OUTPUT/val (and OUTPUT/test)."""
    output = Path(args.output)
    if not (args.val_share >= 0 and args.test_share >= 0 and 0 < args.val_share + args.test_share < 1):
        raise UserError(f"--val-share ({args.val_share}) and --test-share ({args.test_share}) must not be negative, "
                        "and their sum must lie between 0 and 1")
    check_new(output)
    groups = group_duplicates(fingerprint_folder(Path(args.source)), args.threshold)
    if args.distinct:
        groups = [group._replace(pictures=list({p.digest: p for p in reversed(group.pictures)}.values())[::-1])
                  for group in groups]
    parts = assign(groups, args.val_share, args.test_share, args.seed)
    with _staging(output) as staging:
        for name, pictures in parts.items():
            (staging / "all" / name).mkdir(parents=True)
            for picture in pictures:
                shutil.copy(picture.file, staging / "all" / name)
        move_folder(staging / "all", output)
    for name, pictures in parts.items():
        print(f"{output / name}: {len(pictures):,} pictures")
    return 0


# ---- holes ----------------------------------------------------------------------------------------------------------

def hole_generator(stem: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(_seeded(stem, seed)[:15], 16))


def holes(args: argparse.Namespace) -> int:
    """Draw a hole for every picture, of its size and name, black on white. A hole depends on the seed and the name alone."""
    output = Path(args.output)
    if args.size < 2:
        raise UserError(f"--size ({args.size}) must be at least 2, so that a mask has a hole and a known pixel")
    check_new(output)
    draw = random_walks if args.kind == "walks" else random_holes
    shares = []
    with _staging(output) as staging:
        (staging / "all").mkdir()
        for stem, file in tqdm(find_images(args.source).items(), desc=f"drawing for {args.source}", disable=None):
            hole = draw(1, args.size, hole_generator(stem, args.seed))[0, 0]                  # (size, size)
            mask = Image.fromarray(~hole.numpy()).convert("L").resize(open_rgb(file).size, Image.Resampling.NEAREST)
            share = np.mean(np.asarray(mask) == 0)
            if share in (0, 1):
                raise UserError(f"{file} is too small for a hole that was drawn on {args.size}x{args.size}; lower --size")
            mask.save(staging / "all" / f"{stem}.png")
            shares.append(share)
        move_folder(staging / "all", output)
    print(f"{output}: {len(shares):,} holes of {np.mean(shares):.1%} of their pictures on average")
    return 0


# ---- shards ---------------------------------------------------------------------------------------------------------

def shards(args: argparse.Namespace) -> int:
    """Write a folder's pictures, cut and resized as load_folder does, as PNG into WebDataset tar files."""
    import webdataset

    output = Path(args.output)
    try:
        distinct = output.name % 0 != output.name % 1
    except (TypeError, ValueError):
        distinct = False
    if not distinct or output.suffix != ".tar":
        raise UserError(f"--output {output} must number the shards, such as shards-%06d.tar")
    if min(args.size, args.shard_size) < 1:
        raise UserError(f"--size ({args.size}) and --shard-size ({args.shard_size}) must be at least 1")
    files = list(find_images(args.source).values())
    total = -(-len(files) // args.shard_size)
    existing = [name for name in (output.name % i for i in range(total)) if (output.parent / name).exists()]
    if existing:
        raise UserError(f"{output.parent / existing[0]} exists; remove the old shards or give another --output")
    # A random order on disk, once, lets the reader shuffle well with a small buffer.
    order = np.random.default_rng(args.seed).permutation(len(files))
    with _staging(output) as staging:
        pattern = f"{staging}".replace("%", "%%") + f"/{output.name}"
        with webdataset.ShardWriter(pattern, maxcount=args.shard_size, verbose=0, mtime=0) as writer:
            for index, i in enumerate(tqdm(order, desc=f"packing {args.source}", disable=None)):
                image = read_square(files[i], args.size)
                writer.write({"__key__": f"{index:09d}", "png": _png(image.permute(1, 2, 0).numpy())})
        for file in staging.iterdir():
            os.replace(file, output.parent / file.name)
    print(f"{len(files):,} pictures in {total:,} shard(s): {output.parent / (output.name % 0)} ...")
    return 0


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


# ---- command line ---------------------------------------------------------------------------------------------------

class _Parser(argparse.ArgumentParser):
    """Errors are one sentence, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _parser() -> _Parser:
    parser = _Parser(prog="data.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="check|split|holes|shards")
    command = commands.add_parser("check", help="report duplicates; exit 1 if any crosses two folders")
    command.add_argument("folders", nargs="+", metavar="DIR", help="folders of pictures, such as train, val and test")
    command.add_argument("--threshold", type=float, default=THRESHOLD, help="of near duplicates (%(default)s)")
    command.add_argument("--list", type=int, default=0, metavar="N", help="list N groups inside each folder")
    command.add_argument("--json", metavar="FILE", help="write every group to FILE")
    command.set_defaults(run=check)

    command = commands.add_parser("split", help="copy a folder into train, val and test, near duplicates together")
    command.add_argument("source", metavar="SRC", help="folder of pictures")
    command.add_argument("--output", required=True, metavar="DIR", help="new or empty folder")
    command.add_argument("--val-share", type=float, default=0.1, help="share of the pictures (%(default)s)")
    command.add_argument("--test-share", type=float, default=0.0, help="share of the pictures (%(default)s)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--threshold", type=float, default=THRESHOLD, help="of near duplicates (%(default)s)")
    command.add_argument("--distinct", action="store_true", help="of exact duplicates copy one only")
    command.set_defaults(run=split)

    command = commands.add_parser("holes", help="draw a hole mask for every picture of a folder, black = hole")
    command.add_argument("source", metavar="SRC", help="folder of pictures")
    command.add_argument("--output", required=True, metavar="DIR", help="new or empty folder")
    command.add_argument("--kind", choices=("walks", "all"), default="walks",
                         help="walks: random walks, as in the usual test set; all: as in training (%(default)s)")
    command.add_argument("--size", type=int, default=64, help="pixels a side that they are drawn on (%(default)s)")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=holes)

    command = commands.add_parser("shards", help="pack a folder into WebDataset tar files")
    command.add_argument("source", metavar="SRC", help="folder of pictures")
    command.add_argument("--output", required=True, metavar="PATTERN", help="such as DIR/shards-%%06d.tar")
    command.add_argument("--size", type=int, required=True, help="pixels a side")
    command.add_argument("--shard-size", type=int, default=1000, help="pictures a shard (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the order in the shards")
    command.set_defaults(run=shards)
    return parser


def main(argv: list[str] | None = None) -> int:
    try:
        args = _parser().parse_args(argv)
        if not 0 < getattr(args, "threshold", THRESHOLD) <= 1:
            raise UserError(f"--threshold ({args.threshold}) must lie in (0, 1]")
        return args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
