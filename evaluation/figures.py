"""Draws the figures of tables of scores, and of the schedules, with matplotlib."""
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from evaluation.tables import SETTING, Row, mean_and_spread, number, setting_label, unique
from models.schedule import SCHEDULES, gamma
from utils import UserError, atomic_write

# Okabe & Ito's colours, which colour-blind readers can tell apart too, one for each schedule wherever it is drawn.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DPI = 150


def check_sweep(rows: list[Row]) -> None:
    """Refuse rows that no sweep could have written."""
    for row in rows:
        if row["mask_func"] not in SCHEDULES:
            raise UserError(f"unknown mask_func {row['mask_func']!r}; expected one of {', '.join(SCHEDULES)}")
        for column in ("total_iter", "sweet_spot"):
            if not number(row, column).is_integer():
                raise UserError(f"column {column} holds {row[column]!r}, expected a whole number")


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
        i = list(SCHEDULES).index(schedule)
        axis.fill_between(places, mean - spread, mean + spread, color=COLOURS[i], alpha=0.15, linewidth=0)
        axis.plot(places, mean, label=schedule, color=COLOURS[i], marker=MARKERS[i], markersize=3.5, linewidth=1.2)


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
    save_scores(figure, axes, score, path)


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
    save_scores(figure, axes, score, path)


def save_scores(figure, axes, score: str, path: str | Path) -> None:
    for axis in axes[:, 0]:
        axis.set_ylabel(score, fontsize=9)
    axes[0, -1].legend(frameon=False, fontsize=8)
    save(figure, path)


def training_curves(rows: list[dict], score: str, path: str | Path) -> None:
    """A value over the optimizer steps, a line for each run."""
    figure, axes = panels(1, 1, 4.4, 3.0)
    for i, run in enumerate(unique(row["run"] for row in rows)):
        points = [(row["step"], row[score]) for row in rows if row["run"] == run]
        axes[0, 0].plot(*zip(*points, strict=True), label=run, color=COLOURS[i % len(COLOURS)], marker="o", markersize=2.5)
    axes[0, 0].set_xlabel("steps", fontsize=9)
    save_scores(figure, axes, score, path)


def schedule_curves(schedules: Sequence[str], path: str | Path) -> None:
    """gamma(r) of every schedule: the share of the hole that is still masked."""
    figure, axes = panels(1, 1, 3.6, 3.0)
    axis, r = axes[0, 0], torch.linspace(0, 1, 201, dtype=torch.float64)
    for schedule in schedules:
        axis.plot(r, gamma(schedule, r), label=schedule, color=COLOURS[list(SCHEDULES).index(schedule)], linewidth=1.5)
    axis.set_xlabel("progress r = t / T", fontsize=9)
    axis.set_ylabel("share still masked", fontsize=9)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.legend(frameon=False, fontsize=8)
    save(figure, path)


def ladder(rows: list[Row], score: str, path: str | Path) -> None:
    """Horizontal bars, one for each method that has the score, in the file's order, each with its number."""
    rows = [row for row in rows if row[score]]
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
