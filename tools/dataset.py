"""Look after sets of pictures: find duplicates and leaks, split a folder without leaks, draw holes, pack shards.

    python -m tools.dataset check train val test
    python -m tools.dataset split pictures --output data
    python -m tools.dataset holes data/test --output data/masks
    python -m tools.dataset shards data/train --output shards/train-%06d.tar --size 64

What counts as a duplicate: see `pictures/duplicates.py`. Subfolders are read too.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from utils import Parser, UserError, atomic_write, count, progress, run_cli, seeded, write_text

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pictures.duplicates import Fingerprint, Group

# Of near duplicates: on 8,817 aligned cat faces, which are all alike at this size, nearly all pairs above 0.96 are one photo
# or a burst, and below 0.94 most are different cats.
THRESHOLD = 0.96
LISTED = 20         # crossing groups printed at least; --json lists all


# ---- check ----


def check(args: argparse.Namespace) -> int:
    """Report duplicates inside and across folders; 1 if any crosses two folders."""
    from pictures.duplicates import fingerprint_folder, group_duplicates
    from pictures.files import refuse_overwriting

    folders = [Path(folder) for folder in args.folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a folder is given twice; give each once")
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give folders of pictures")
    pictures = [picture for folder in folders for picture in fingerprint_folder(folder, leave_out=folders)]
    groups = [group for group in group_duplicates(pictures, args.threshold) if len(group.pictures) > 1]
    print(f"{len(pictures):,} pictures in {len(folders)} folder(s); near = correlation of {args.threshold} or more")
    for folder in folders:
        inside = [group for group in groups if group.folders == {folder}]
        total = sum(picture.folder == folder for picture in pictures)
        print(f"  {folder}: {total:,} pictures; groups of duplicates inside: {_count(inside)}")
        _print_groups(inside, args.list)
    crossing = [group for group in groups if len(group.folders) > 1]
    print(f"across folders: {_count(crossing)}" + (" (a leak)" if crossing else ""))
    _print_groups(crossing, max(args.list, LISTED))
    if args.json:
        refuse_overwriting([picture.file for picture in pictures], [args.json])
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
    write_text(path, json.dumps(report, indent=1) + "\n")


# ---- split ----


def check_new(output: Path, source: str) -> None:
    """Refuse an output folder that holds something, or lies in the folder that is read."""
    from pictures.files import refuse_overwriting

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty; give a new folder")
    refuse_overwriting([source], [output])


def assign(groups: list[Group], val_share: float, test_share: float, seed: int) -> dict[str, list[Fingerprint]]:
    """Deal whole groups to train, val and test: the pictures' hashes and the seed decide, not names or order.

    In the order of their seeded hash, groups go to val while they fit in its share, then to test, the rest to train.
    """
    total = sum(len(group.pictures) for group in groups)
    room = {name: max(1, round(share * total)) for name, share in (("val", val_share), ("test", test_share)) if share}
    parts: dict[str, list[Fingerprint]] = {"train": [], **{name: [] for name in room}}
    for group in sorted(groups, key=lambda group: _seeded(group.pictures[0].digest, seed)):
        part = next((name for name in room if len(parts[name]) + len(group.pictures) <= room[name]), "train")
        parts[part] += group.pictures
    for name, pictures in parts.items():
        if not pictures:
            raise UserError(f"no picture is left for {name}: the {total} picture(s) form {len(groups)} group(s) of "
                            "duplicates, which stay together; give more pictures or other shares")
    return parts


def _seeded(key: str, seed: int) -> str:
    return hashlib.blake2b(f"{seed} {key}".encode(), digest_size=16).hexdigest()


def split(args: argparse.Namespace) -> int:
    """Copy a folder's pictures to OUTPUT/train, OUTPUT/val (and OUTPUT/test)."""
    from pictures.duplicates import fingerprint_folder, group_duplicates

    output = Path(args.output)
    if not (args.val_share >= 0 and args.test_share >= 0 and 0 < args.val_share + args.test_share < 1):
        raise UserError(f"--val-share ({args.val_share}) and --test-share ({args.test_share}) must not be negative, "
                        "and their sum must lie between 0 and 1")
    if not Path(args.source).is_dir():
        raise UserError(f"{args.source} is not a folder; give a folder of pictures")
    check_new(output, args.source)
    groups = group_duplicates(fingerprint_folder(Path(args.source)), args.threshold)
    if args.distinct:
        groups = [group._replace(pictures=list({p.digest: p for p in reversed(group.pictures)}.values())[::-1])
                  for group in groups]
    parts = assign(groups, args.val_share, args.test_share, args.seed)
    with atomic_write(output) as folder:
        for name, pictures in parts.items():
            for picture in progress(pictures, desc=f"copying to {name}", unit="picture"):
                copy = folder / name / picture.file.relative_to(args.source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(picture.file, copy)
    for name, pictures in parts.items():
        print(f"{output / name}: {len(pictures):,} pictures")
    return 0


# ---- holes ----


def hole_generator(stem: str, seed: int) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(int(_seeded(stem, seed)[:15], 16))


def draw_hole(args: argparse.Namespace, name: str, width: int, height: int) -> np.ndarray:
    """A hole for a picture, bool (height, width); it depends on the kind, the seed, the picture's name and size alone."""
    import numpy as np
    from PIL import Image

    from pictures.hard_holes import hard_hole
    from pictures.holes import random_holes, random_walks

    if args.kind == "hard":
        return hard_hole(height, width, seeded(args.seed, "hard hole", name))[0].numpy()
    draw = random_walks if args.kind == "walks" else random_holes
    hole = draw(1, args.size, hole_generator(name, args.seed))[0, 0]                          # (size, size)
    return np.asarray(Image.fromarray(hole.numpy()).resize((width, height), Image.Resampling.NEAREST))


def holes(args: argparse.Namespace) -> int:
    """Draw a hole for every picture, of its size and name, black on white."""
    import numpy as np
    from PIL import Image

    from pictures.files import find_images
    from pictures.images import open_rgb

    output = Path(args.output)
    if args.size < 2:
        raise UserError(f"--size ({args.size}) must be at least 2, so that a mask has a hole and a known pixel")
    check_new(output, args.source)
    shares = []
    with atomic_write(output) as folder:
        for name, file in progress(find_images(args.source).items(), desc=f"drawing for {args.source}", unit="picture"):
            hole = draw_hole(args, name, *open_rgb(file).size)                                # (H, W)
            if hole.all() or not hole.any():
                raise UserError(f"{file} is too small for a hole that was drawn on {args.size}x{args.size}; lower --size")
            path = folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(~hole).convert("L").save(path)
            shares.append(hole.mean())
    print(f"{output}: {len(shares):,} holes of {np.mean(shares):.1%} of their pictures on average")
    return 0


# ---- shards ----


def shards(args: argparse.Namespace) -> int:
    """Write a folder's pictures, cut and resized as load_folder does, as PNG into WebDataset tar files."""
    from pictures.files import find_images
    from pictures.shards import write_shards

    output = Path(args.output)
    try:
        distinct = output.name % 0 != output.name % 1
    except (TypeError, ValueError):
        distinct = False
    if not distinct or output.suffix != ".tar":
        raise UserError(f"--output {output} must number the shards, such as shards-%06d.tar")
    files = list(find_images(args.source).values())
    names = [output.name % i for i in range(-(-len(files) // args.shard_size))]
    if existing := [name for name in names if (output.parent / name).exists()]:
        raise UserError(f"{output.parent / existing[0]} exists; remove the old shards or give another --output")
    write_shards(files, output.parent, names, args.size, args.shard_size, args.seed)
    print(f"{len(files):,} pictures in {len(names):,} shard(s): {output.parent / names[0]} ...")
    return 0


# ---- command line ----


def _parser() -> Parser:
    parser = Parser(prog="python -m tools.dataset", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="check|split|holes|shards")
    command = commands.add_parser("check", help="report duplicates; exit code 1 if any crosses two folders")
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
    command.add_argument("--kind", choices=("walks", "all", "hard"), default="walks",
                         help="walks: random walks, as in the usual test set; all: as in training; hard: half of the "
                              "picture and more (%(default)s)")
    command.add_argument("--size", type=count, default=64, help="pixels a side that walks are drawn on (%(default)s)")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=holes)

    command = commands.add_parser("shards", help="pack a folder into WebDataset tar files")
    command.add_argument("source", metavar="SRC", help="folder of pictures")
    command.add_argument("--output", required=True, metavar="PATTERN", help="such as DIR/shards-%%06d.tar")
    command.add_argument("--size", type=count, required=True, help="pixels a side")
    command.add_argument("--shard-size", type=count, default=1000, help="pictures a shard (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of the order in the shards")
    command.set_defaults(run=shards)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if not 0 < getattr(args, "threshold", THRESHOLD) <= 1:
        raise UserError(f"--threshold ({args.threshold}) must lie in (0, 1]")
    return args.run(args)


if __name__ == "__main__":
    run_cli(main)
