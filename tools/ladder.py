"""Score every way to complete pictures, between the originals and the mean colour: it shows what limits the system.

python -m tools.ladder --originals ORIGINALS --masks MASKS --reference TRAIN --output out/ladder
                       --features network.onnx --perceptual-weights squeezenet.safetensors

The rungs: the originals; the tokenizer (true tokens, decoded); the model's completions; OpenCV's Telea and Navier-Stokes,
PatchMatch (where patchmatch-cython is installed) and the mean colour. Pictures may be of any size.

Writes to OUTPUT: a folder of pictures for each rung, ladder.csv, ladder.md (the scores) and pictures.png (some pictures of
each rung).
"""
import argparse
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from evaluation.flags import add_score_flags
from utils import (
    Parser,
    amount,
    check_names,
    count,
    pick_device,
    progress,
    run_cli,
    seeded,
    writable_folder,
    write_text,
)

REFERENCE = "Navier-Stokes"    # the rung that the ratios are of: the best classic method
# Columns of the report, beside the distances between sets, and the scores whose ratio to the reference rung is given.
SHOWN = ("hole_perceptual", "hole_psnr", "psnr", "hole_ssim", "seam", "detail", "known_changed")
RATIOS = ("FD-", "FID", "hole_perceptual")
DRAWN = 256    # pixels: the longest side of a picture in the grid


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--originals", type=Path, required=True, metavar="DIR", help="clean pictures")
    parser.add_argument("--masks", type=Path, required=True, metavar="DIR", help="hole masks of the same names, or one")
    parser.add_argument("--mask-hole", choices=("black", "white"), default="black", help="colour of the hole in the masks")
    parser.add_argument("--limit", type=count, metavar="N", help="the first N pictures only")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--checkpoint", metavar="FILE", help="model: a file, a folder, cat64 or photo (default: cat64)")
    parser.add_argument("--total-iter", type=count, metavar="T", help="rounds (default: the model's)")
    parser.add_argument("--low-temperature", type=amount, default=0.3, help="of the safer rung (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=count, default=16, help="pictures completed together (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--rungs", nargs="+", metavar="NAME", help="some, by the names of their folders (default: all)")
    parser.add_argument("--show", nargs="+", metavar="NAME", help="pictures to draw (default: 8, evenly spread)")
    add_score_flags(parser)
    return parser.parse_args(argv)


Rung = Callable[[list], Iterator]    # pictures -> one completion for each, uint8 (3, H, W)


def rungs(model, args: argparse.Namespace, one_size: bool) -> dict[str, Rung]:
    """Ways to get pictures, by name, from the best to the worst; `one_size`: all pictures have the model's size."""
    import torch

    from evaluation import baselines, sets
    from evaluation.reconstruct import reconstruct
    from models.completion import complete_pictures
    from models.convert import resize
    from models.pyramid import Job

    def tokenizer(**options) -> Rung:
        return lambda pictures: (reconstruct(model, x.original, x.hole, **options) for x in pictures)

    def completed(**options) -> Rung:
        """With the seeds of inpainting.py, so that its pictures are the ones that are scored here."""
        options |= {} if args.total_iter is None else {"total_iter": args.total_iter}

        def complete(pictures: list) -> Iterator:
            jobs = (Job(x.original, x.hole, seeded(args.seed, x.name, 0).initial_seed()) for x in pictures)
            return (result.image for result in complete_pictures(model, jobs, batch_size=args.batch_size, **options))

        return complete

    def shrunk(pictures: list) -> Iterator:
        """The whole picture at the model's size, and the hole's content enlarged again."""
        side = [model.image_size] * 2
        small = (sets.Picture(x.name, None, *resize(x.original, x.hole, side)[::-1]) for x in pictures)
        for x, image in zip(pictures, completed()(small), strict=True):
            large, _ = resize(image, torch.zeros(1, *side, dtype=torch.bool), x.hole.shape[1:])
            yield torch.where(x.hole, large, x.original)

    def classic(method: str) -> Rung:
        return lambda pictures: (baselines.complete(x.original, x.hole, method) for x in pictures)

    every: dict[str, Rung] = {
        "original": lambda pictures: (x.original for x in pictures),
        "tokenizer, whole, nothing known": tokenizer(known=False, paste=False),
        "tokenizer, pasted, true tokens": tokenizer(),
        "completed, whole": completed(paste=False),
        "completed, pasted": completed(),
        f"completed, temperature {args.low_temperature:g}": completed(temperature=args.low_temperature),
        "reference decoder, same weights": completed(decoder="reference"),
        "completed, shrunk to the model": shrunk,
        "PatchMatch": classic("patchmatch"),
        "Telea": classic("telea"),
        REFERENCE: classic("navier-stokes"),
        "mean colour": classic("mean"),
    }
    if not baselines.available("patchmatch"):
        del every["PatchMatch"]
    if one_size:
        del every["completed, shrunk to the model"]
    chosen = args.rungs or [folder_name(name) for name in every]
    check_names("--rungs", chosen, [folder_name(name) for name in every])
    return {name: rung for name, rung in every.items() if folder_name(name) in chosen or name == REFERENCE}


def folder_name(rung: str) -> str:
    return rung.replace(",", "").replace(" ", "_").lower()


def climb(rung: Rung, pictures: list, judge, folder: Path, name: str) -> dict[str, float]:
    """Make a rung's pictures, write them, and score them."""
    from pictures.images import write_image

    measured = judge.measurements()
    for picture, completion in zip(progress(pictures, desc=name, unit="picture"), rung(pictures), strict=True):
        write_image(folder / f"{picture.name}.png", completion)
        measured.add(completion, picture.hole, picture.original)
    return judge.scores(measured.columns())


def add_ratios(rows: list[dict], names: list[str]) -> list[str]:
    """To each row its distances over those of the reference rung; returns the columns, spreads and ratios included."""
    [reference] = [row for row in rows if row["method"] == REFERENCE]
    columns = []
    for name in names:
        columns.append(name)
        if f"{name} spread" in reference:
            columns.append(f"{name} spread")
        if any(word in name for word in RATIOS):
            columns.append(f"{name} ratio")
            for row in rows:
                row[f"{name} ratio"] = row[name] / reference[name] if reference[name] else math.nan
    return columns


def report(rows: list[dict], columns: list[str], notes: list[str], command: str) -> str:
    from evaluation.judge import format_score, is_distance
    from evaluation.tables import markdown

    shown = [name for name in columns if is_distance(name) or name.removesuffix(" ratio") in SHOWN]
    heads = [f"/ {REFERENCE}" if name.endswith(" ratio") else name.replace("_", " ") for name in shown]
    cells = [[row["method"], *(format_score(name, row[name], row.get(f"{name} spread")) for name in shown)] for row in rows]
    lines = ["# Ladder", "", f"`{command}`", "", f"{rows[0]['n']} pictures. Distances, L1 and perceptual: lower is better. "
             "Seam and detail: mean gradient across the hole's rim and inside the hole over the originals', 1 is best."]
    return "\n".join([*lines, *(f"- {note}" for note in notes), "", *markdown(["", *heads], cells), ""])


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from evaluation import sets, tables
    from evaluation.baselines import import_module
    from evaluation.grids import write_grid
    from evaluation.judge import load_judge
    from models import MaskGIT
    from pictures.files import refuse_overwriting

    import_module("navier-stokes")    # a missing package is told before the work
    refuse_overwriting(filter(None, (args.originals, args.masks, args.reference)), [args.output])
    judge = load_judge(args)
    model = MaskGIT.from_pretrained(args.checkpoint, device=pick_device(args.device))
    pictures = sets.load_pictures(args.originals, args.masks, args.mask_hole, limit=args.limit)
    shown = sets.choose(pictures, args.show, 8)
    chosen = rungs(model, args, all(x.hole.shape[1:] == (model.image_size, model.image_size) for x in pictures))
    writable_folder(args.output)
    judge = judge.with_originals(sets.measure_originals(judge, pictures))

    names, rows = judge.names(), []
    grid = {"input": [x.original.masked_fill(x.hole, 128) for x in shown]}
    for name, rung in chosen.items():
        folder = args.output / folder_name(name)
        scores = climb(rung, pictures, judge, folder, name)
        rows.append({"method": name} | dict.fromkeys(names, math.nan) | scores | {"n": len(pictures)})
        grid[name] = [sets.read_image(folder / f"{x.name}.png") for x in shown]
    columns = add_ratios(rows, names)
    command = shlex.join(["python", "-m", "tools.ladder", *(sys.argv[1:] if argv is None else argv)])
    text = report(rows, columns, judge.notes(len(pictures)), command)
    tables.write_csv(args.output / "ladder.csv", ["method", *columns, "n"], rows)
    write_text(args.output / "ladder.md", text)
    longest = max(max(x.original.shape[1:]) for x in shown)
    scale = max(1, DRAWN // 2 // longest) if longest <= DRAWN else DRAWN / longest
    write_grid(args.output / "pictures.png", list(grid.values()), list(grid), [x.name for x in shown], scale)
    print(text)
    return 0


if __name__ == "__main__":
    run_cli(main)
