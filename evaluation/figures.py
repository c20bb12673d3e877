"""Draw the figures from results and pictures that are on disk.

Sweep:      python figures.py sweep results.csv --output docs/figures
Schedules:  python figures.py schedules --output schedules.png
Ladder:     python figures.py ladder ladder.csv --score FD-MobileNetV1 --output ladder.png
Pictures:   python figures.py grid --rows originals masked out/images --labels original input ours --output grid.png

A sweep's results.csv has a row a setting, round and seed (see sweep.py), a ladder's CSV a row a method, named in its column
`method`.
Pictures of a grid are paired by their names; --names picks some.
"""
import argparse
import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from models.schedule import SCHEDULES, gamma
from pictures.files import find_images
from pictures.images import read_image
from utils import Parser, UserError, atomic_write, run_cli

# Okabe & Ito's colours, which colour-blind readers can tell apart too, one for each schedule wherever it is drawn.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DPI = 150
SETTING = ("decoder", "temperature", "choice_temperature")    # what one panel of a sweep's plots holds fixed

Row = dict[str, str]    # of a results CSV


# ---- tables ----


def read_csv(path: str | Path, columns: Iterable[str]) -> list[Row]:
    """Rows of a CSV file that must have the given columns and at least one row."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            names, rows = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV file: {error}") from error
    if missing := [name for name in columns if name not in names]:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(names) or 'none'}")
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def score_name(rows: list[Row], wanted: str | None = None) -> str:
    """The column to draw: the wanted one, else the Fréchet distance, whatever its network."""
    if wanted is not None and wanted not in rows[0]:
        raise UserError(f"no column {wanted!r}; there are {', '.join(rows[0])}")
    name = wanted or next((key for key in rows[0] if key == "FID" or key.startswith("FD-")), None)
    if name is None:
        raise UserError("no column FID or FD-...; name the score with --score")
    return name


def number(row: Row, column: str) -> float:
    try:
        return float(row[column])
    except (TypeError, ValueError):
        raise UserError(f"column {column} holds {row[column]!r}, expected a number") from None


def check_sweep(rows: list[Row]) -> None:
    """Refuse rows that no sweep could have written."""
    for row in rows:
        if row["mask_func"] not in SCHEDULES:
            raise UserError(f"unknown mask_func {row['mask_func']!r}; expected one of {', '.join(SCHEDULES)}")
        for column in ("total_iter", "sweet_spot"):
            if not number(row, column).is_integer():
                raise UserError(f"column {column} holds {row[column]!r}, expected a whole number")


def mean_and_spread(rows: Iterable[Row], score: str) -> tuple[float, float]:
    """Mean and sample standard deviation of a score over the seeds (0 of a single one)."""
    values = [number(row, score) for row in rows]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def setting_label(row: Row) -> str:
    """What the rows of a panel have in common, e.g. "maskgit, temperature 1, noise 4.5"."""
    words = {"temperature": "temperature", "choice_temperature": "noise"}
    return ", ".join([row["decoder"], *(f"{word} {row[key]}" for key, word in words.items() if row[key])])


def unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))


# ---- canvas ----


def new_figure(width: float, height: float):
    """A matplotlib figure of so many inches that needs no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), dpi=DPI)


def save(figure, path: str | Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})


def panels(rows: int, columns: int, width: float, height: float):
    """A figure and its (rows, columns) axes, which share their scores' scale."""
    figure = new_figure(0.6 + width * columns, 0.5 + height * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
    figure.set_layout_engine("constrained")
    return figure, axes


def draw_schedules(axis, rows: list[Row], x: str, score: str) -> None:
    """A line a schedule: the score's mean over seeds, in a band of one standard deviation, over column `x`."""
    for schedule in unique(row["mask_func"] for row in rows):
        mine = [row for row in rows if row["mask_func"] == schedule]
        places = sorted({int(row[x]) for row in mine})
        points = [mean_and_spread((row for row in mine if int(row[x]) == place), score) for place in places]
        mean, spread = np.array(points).T
        i = SCHEDULES.index(schedule)
        axis.fill_between(places, mean - spread, mean + spread, color=COLOURS[i], alpha=0.15, linewidth=0)
        axis.plot(places, mean, label=schedule, color=COLOURS[i], marker=MARKERS[i], markersize=3.5, linewidth=1.2)


# ---- sweep ----


def draw_sweep(rows: list[Row], score: str, folder: Path) -> None:
    """Into `folder`: the score over T, and over the sweet spot where there are several to compare."""
    decode = (*SETTING, "mask_func", "total_iter")
    decodes, points = ({tuple(row[key] for key in keys) for row in rows} for keys in (decode, (*decode, "sweet_spot")))
    whole = any(row["sweet_spot"] == row["total_iter"] for row in rows)
    if whole:
        score_over_total_iter(rows, score, folder / "score_over_total_iter.png")
    if len(points) > len(decodes) or not whole:
        score_over_sweet_spot(rows, score, folder / "score_over_sweet_spot.png")


def score_over_total_iter(rows: list[Row], score: str, path: str | Path) -> None:
    """The score of whole runs (t = T) over T: a panel a setting, a line a schedule."""
    whole = [row for row in rows if row["sweet_spot"] == row["total_iter"]]
    settings = unique(tuple(row[key] for key in SETTING) for row in whole)
    columns = min(3, len(settings))
    lines = math.ceil(len(settings) / columns)
    figure, axes = panels(lines, columns, 3.2, 2.5)
    for axis, setting in zip(axes.flat, settings, strict=False):
        mine = [row for row in whole if tuple(row[key] for key in SETTING) == setting]
        draw_schedules(axis, mine, "total_iter", score)
        axis.set_xticks(sorted({int(row["total_iter"]) for row in whole}))
        axis.set_xlabel("rounds T", fontsize=9)
        axis.set_title(setting_label(mine[0]), fontsize=9)
    for axis in axes.flat[len(settings) :]:
        axis.set_axis_off()
    finish_scores(figure, axes, score, path)


def score_over_sweet_spot(rows: list[Row], score: str, path: str | Path) -> None:
    """The score of runs stopped after round t over t: a row of panels a setting, a column a T, a line a schedule."""
    settings = unique(tuple(row[key] for key in SETTING) for row in rows)
    totals = sorted({int(row["total_iter"]) for row in rows})
    figure, axes = panels(len(settings), len(totals), 3.2, 2.5)
    for line, setting in zip(axes, settings, strict=True):
        for axis, total in zip(line, totals, strict=True):
            mine = [r for r in rows if tuple(r[key] for key in SETTING) == setting and int(r["total_iter"]) == total]
            axis.set_xlabel("stopped after round t", fontsize=9)
            axis.xaxis.get_major_locator().set_params(integer=True)
            if mine:
                draw_schedules(axis, mine, "sweet_spot", score)
                axis.set_title(f"T = {total}" + (f"\n{setting_label(mine[0])}" if len(settings) > 1 else ""), fontsize=9)
    finish_scores(figure, axes, score, path)


def finish_scores(figure, axes, score: str, path: str | Path) -> None:
    for axis in axes[:, 0]:
        axis.set_ylabel(score, fontsize=9)
    axes[0, -1].legend(frameon=False, fontsize=8)
    save(figure, path)


def schedule_curves(schedules: Sequence[str], path: str | Path) -> None:
    """gamma(r) of every schedule: the share of the hole that is still masked."""
    figure, axes = panels(1, 1, 3.6, 3.0)
    axis, r = axes[0, 0], torch.linspace(0, 1, 201, dtype=torch.float64)
    for schedule in schedules:
        axis.plot(r, gamma(schedule, r), label=schedule, color=COLOURS[SCHEDULES.index(schedule)], linewidth=1.5)
    axis.set_xlabel("progress r = t / T", fontsize=9)
    axis.set_ylabel("share still masked", fontsize=9)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.legend(frameon=False, fontsize=8)
    save(figure, path)


# ---- ladder ----


def ladder(rows: list[Row], score: str, path: str | Path) -> None:
    """Horizontal bars, one a method in the file's order, each with its number."""
    values = [number(row, score) for row in rows]
    figure, axes = panels(1, 1, 5.6, 0.28 * len(rows) + 0.2)
    axis, places = axes[0, 0], range(len(rows))
    bars = axis.barh(places, values, color=COLOURS[0], height=0.7)
    axis.bar_label(bars, [f"{value:.4g}" for value in values], fontsize=8, padding=3)
    axis.set_yticks(places, [row["method"] for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.grid(visible=False)
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(bottom=False, labelbottom=False, left=False)
    axis.set_title(f"{score} (lower is better)", fontsize=9, loc="left")
    axis.margins(x=0.1)
    save(figure, path)


# ---- pictures ----


def picture_table(
    cells: list[list[np.ndarray]], row_labels: list[str], column_labels: list[str], path: str | Path, scale: int = 1
) -> None:
    """Pictures in rows and columns, pixel by pixel, with labels on the left and on top.

    Args:
        cells: rows of uint8 (H, W, 3) pictures, all of one size; a row may be shorter than the others.
        scale: pixels of the figure a pixel of a picture.
    """
    gap, left, top = 3, 12 + 8 * max(map(len, row_labels)), 22 if any(column_labels) else 3
    H, W = (side * scale for side in cells[0][0].shape[:2])
    columns = max(map(len, cells))
    canvas = np.full((top + len(cells) * (H + gap), left + columns * (W + gap), 3), 255, dtype=np.uint8)
    for i, row in enumerate(cells):
        for j, picture in enumerate(row):
            y, x = top + i * (H + gap), left + j * (W + gap)
            canvas[y : y + H, x : x + W] = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    figure = new_figure(canvas.shape[1] / DPI, canvas.shape[0] / DPI)
    figure.figimage(canvas)
    size = {"fontsize": 6.5, "color": "black"}
    for i, label in enumerate(row_labels):
        y = 1 - (top + i * (H + gap) + H / 2) / canvas.shape[0]
        figure.text((left - 6) / canvas.shape[1], y, label, ha="right", va="center", **size)
    for j, label in enumerate(column_labels):
        x = (left + j * (W + gap) + W / 2) / canvas.shape[1]
        figure.text(x, 1 - top / 2 / canvas.shape[0], label, ha="center", va="center", **size)
    save(figure, path)


def rounds_table(
    head: list[np.ndarray], strips: dict[str, tuple[list[np.ndarray], list[np.ndarray]]], path: str | Path, per_row: int = 10
) -> None:
    """Picture and token mask of every round, wrapped after `per_row` rounds, one block a label.

    Args:
        head: original, picture with its hole, its token mask.
        strips: label -> pictures and masks of the rounds 1..T. All pictures uint8 (H, W, 3).
    """
    cells, labels = [head], ["original, input, mask"]
    for label, (pictures, masks) in strips.items():
        for start in range(0, len(pictures), per_row):
            part = slice(start, start + per_row)
            cells += [pictures[part], masks[part]]
            labels += [f"{label}, rounds {start + 1}-{min(start + per_row, len(pictures))}", "still masked"]
    picture_table(cells, labels, [], path)


def folder_grid(folders: list[Path], labels: list[str], names: list[str], path: str | Path, scale: int) -> None:
    """A row a folder, a column a picture, paired by name."""
    cells = []
    for folder in folders:
        found = find_images(folder)
        if missing := [name for name in names if name not in found]:
            raise UserError(f"{folder} has no picture named {', '.join(missing[:5])}")
        cells.append([read_image(found[name]).permute(1, 2, 0).numpy() for name in names])
    if len({picture.shape for row in cells for picture in row}) > 1:
        raise UserError("the pictures of a grid must all have one size")
    picture_table(cells, labels, [], path, scale)


# ---- command line ----


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sweep = commands.add_parser("sweep", help="score over T and over the sweet spot")
    sweep.add_argument("csv", type=Path)
    sweep.add_argument("--score", help="column (default: the Fréchet distance)")
    sweep.add_argument("--output", type=Path, required=True, metavar="DIR")
    curves = commands.add_parser("schedules", help="the gamma curves")
    curves.add_argument("--mask-func", nargs="+", default=list(SCHEDULES), metavar="NAME")
    bars = commands.add_parser("ladder", help="bars of a score, one a method")
    bars.add_argument("csv", type=Path)
    bars.add_argument("--score", help="column (default: the Fréchet distance)")
    grid = commands.add_parser("grid", help="pictures of several folders under each other")
    grid.add_argument("--rows", type=Path, nargs="+", required=True, metavar="DIR")
    grid.add_argument("--labels", nargs="+", metavar="TEXT", help="one a row (default: the folders' names)")
    grid.add_argument("--names", nargs="+", metavar="NAME", help="pictures to show, without suffix (default: the first)")
    grid.add_argument("--count", type=int, default=8, help="how many of the first (default: %(default)s)")
    grid.add_argument("--scale", type=int, default=2, help="pixels drawn a pixel (default: %(default)s)")
    for command in (curves, bars, grid):
        command.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.command != "sweep" and args.output.suffix != ".png":
        raise UserError(f"--output {args.output}: figures are PNG files, so its name must end in .png")
    if args.command == "sweep":
        rows = read_csv(args.csv, ("mask_func", "total_iter", "sweet_spot", "seed", *SETTING))
        check_sweep(rows)
        draw_sweep(rows, score_name(rows, args.score), args.output)
    elif args.command == "schedules":
        if unknown := set(args.mask_func) - set(SCHEDULES):
            raise UserError(f"unknown --mask-func {', '.join(sorted(unknown))}; expected some of {', '.join(SCHEDULES)}")
        schedule_curves(args.mask_func, args.output)
    elif args.command == "ladder":
        rows = read_csv(args.csv, ("method",))
        ladder(rows, score_name(rows, args.score), args.output)
    else:
        labels = args.labels or [folder.name for folder in args.rows]
        if len(labels) != len(args.rows):
            raise UserError(f"{len(args.rows)} --rows need as many --labels, got {len(labels)}")
        if args.count < 1 or args.scale < 1:
            raise UserError("--count and --scale must be at least 1")
        names = args.names or list(find_images(args.rows[0]))[: args.count]
        folder_grid(args.rows, labels, names, args.output, args.scale)
    return 0


if __name__ == "__main__":
    run_cli(main)
