"""Draw figures from tables of scores, from training runs and from pictures.

Sweep:      python -m tools.figures sweep results.csv --output docs/figures
Training:   python -m tools.figures curves runs/maskgit runs/other --output curves.png
Schedules:  python -m tools.figures schedules --output schedules.png
Ladder:     python -m tools.figures ladder ladder.csv --score FD-MobileNetV1 --output ladder.png
Pictures:   python -m tools.figures grid --rows originals masked out/images --labels original input ours --output grid.png

results.csv is written by tools.sweep, ladder.csv by tools.ladder. The pictures of a grid are paired by their names; --names
picks some.
"""
import argparse
from pathlib import Path

from utils import Parser, UserError, check_names, count, run_cli


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sweep = commands.add_parser("sweep", help="score over the number of rounds and over the sweet spot")
    sweep.add_argument("csv", type=Path)
    sweep.add_argument("--score", help="column (default: the first Fréchet distance)")
    sweep.add_argument("--output", type=Path, required=True, metavar="DIR")
    curves = commands.add_parser("curves", help="a value over the steps, a line for each run; also as a CSV file beside it")
    curves.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output folders of trainings")
    curves.add_argument("--score", default="val_loss", help="a value of metrics.jsonl (default: %(default)s)")
    gammas = commands.add_parser("schedules", help="the share still masked, for each schedule")
    gammas.add_argument("--mask-func", nargs="+", metavar="NAME", help="schedules (default: all)")
    bars = commands.add_parser("ladder", help="bars of a score, one for each method")
    bars.add_argument("csv", type=Path)
    bars.add_argument("--score", help="column (default: the first Fréchet distance)")
    grid = commands.add_parser("grid", help="pictures of several folders under each other")
    grid.add_argument("--rows", type=Path, nargs="+", required=True, metavar="DIR")
    grid.add_argument("--labels", nargs="+", metavar="TEXT", help="one for each row (default: the folders' names)")
    grid.add_argument("--names", nargs="+", metavar="NAME", help="pictures to show, without suffix (default: the first)")
    grid.add_argument("--count", type=count, default=8, help="how many of the first (default: %(default)s)")
    grid.add_argument("--scale", type=count, default=2, help="pixels drawn for each pixel (default: %(default)s)")
    for command in (curves, gammas, bars, grid):
        command.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    return parser.parse_args(argv)


def draw_grid(args: argparse.Namespace) -> None:
    """A row for each folder, a column for each picture."""
    from evaluation.grids import write_grid
    from pictures.files import find_images, refuse_overwriting
    from pictures.images import read_image

    refuse_overwriting(args.rows, [args.output])
    labels = args.labels or [folder.name for folder in args.rows]
    if len(labels) != len(args.rows):
        raise UserError(f"{len(args.rows)} --rows need as many --labels, got {len(labels)}")
    names = args.names or list(find_images(args.rows[0]))[: args.count]
    rows = []
    for folder in args.rows:
        found = find_images(folder)
        if missing := [name for name in names if name not in found]:
            raise UserError(f"{folder} has no picture named {', '.join(missing[:5])}")
        rows.append([read_image(found[name]) for name in names])
    write_grid(args.output, rows, labels, scale=args.scale)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from evaluation import figures, tables
    from models.schedule import SCHEDULES

    if args.command != "sweep" and args.output.suffix != ".png":
        raise UserError(f"--output {args.output}: figures are PNG files, so its name must end in .png")
    if args.command == "sweep":
        rows = tables.planned(tables.read_csv(args.csv, ("mask_func", "total_iter", "sweet_spot", "seed", *tables.SETTING)))
        if not rows:
            raise UserError(f"{args.csv} has rounds by need alone; a plot needs rows of some --total-iter")
        figures.check_sweep(rows)
        figures.draw_sweep(rows, tables.score_name(rows, args.score), args.output)
    elif args.command == "curves":
        rows = [row for run in args.runs for row in tables.read_metrics(run, args.score)]
        tables.write_csv(args.output.with_suffix(".csv"), ["run", "step", args.score], rows)
        figures.training_curves(rows, args.score, args.output)
    elif args.command == "schedules":
        chosen = args.mask_func or SCHEDULES
        check_names("--mask-func", chosen, SCHEDULES)
        figures.schedule_curves(chosen, args.output)
    elif args.command == "ladder":
        rows = tables.read_csv(args.csv, ("method",))
        figures.ladder(rows, tables.score_name(rows, args.score), args.output)
    else:
        draw_grid(args)
    return 0


if __name__ == "__main__":
    run_cli(main)
