"""Tables and figures of a sweep's results."""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation import figures, tables
from evaluation.grids import write_grid
from evaluation.judge import Judge, format_score, is_distance
from evaluation.sets import Picture
from evaluation.sweeps import KEY, all_settings, complete
from models import MaskGIT
from models.pyramid import Snapshot

SHOWN = ("hole_psnr", "hole_ssim", "hole_perceptual", "seam")    # beside the distances, in the table of the best
BEST = 10       # rows of that table
PER_ROW = 10    # rounds drawn side by side


def report(rows: list[tables.Row], args, judge: Judge, command: str) -> str:
    """The results as Markdown: a table of t = T for each setting, as the reference has it, and the best of all rows."""
    score, count = judge.names(svm=False)[0], int(rows[0]["n"])
    seeds, known = ", ".join(tables.unique(row["seed"] for row in rows)), "put back" if args.paste else "as decoded"
    lines = [f"# {score} (lower is better)", "", f"`{command}`", ""]
    lines.append(f"{count} pictures, known pixels {known}; mean ± standard deviation over the seeds {seeds}.")
    lines += [f"- {note}" for note in judge.notes(count)]
    for label in tables.unique(map(tables.setting_label, rows)):
        mine = [row for row in rows if tables.setting_label(row) == label]
        whole = [row for row in mine if row["total_iter"] in (row["sweet_spot"], tables.NEED)]
        if whole:
            lines += ["", f"## {label}", "", *by_rounds(whole, score)]
    return "\n".join([*lines, "", "## The best", "", *best(rows, judge), ""])


def by_rounds(rows: list[tables.Row], score: str) -> list[str]:
    """A row for each t = T, a column for each schedule; a row for the rounds by need, which have no schedule."""
    planned, by_need = tables.planned(rows), [row for row in rows if row["total_iter"] == tables.NEED]
    schedules = tables.unique(row["mask_func"] for row in planned) or ["no schedule"]
    lines = []
    for total in sorted({int(row["total_iter"]) for row in planned}):
        same = [row for row in planned if row["total_iter"] == str(total)]
        cells = [[row for row in same if row["mask_func"] == name] for name in schedules]
        lines.append([str(total), *(mean(cell, score) if cell else "" for cell in cells)])
    if by_need:
        taken = tables.mean_and_spread(by_need, "rounds")[0]
        lines.append([f"by need: {taken:.1f} rounds", mean(by_need, score), *[""] * (len(schedules) - 1)])
    return tables.markdown(["t = T", *schedules], lines)


def best(rows: list[tables.Row], judge: Judge) -> list[str]:
    """The settings and sweet spots with the lowest mean score."""
    names = [name for name in KEY if name != "seed"]
    groups: dict[tuple, list[tables.Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    every = judge.names(svm=False)
    scores = tables.unique([every[0], *(name for name in every if is_distance(name) or name in SHOWN)])
    ranked = sorted(groups.items(), key=lambda item: tables.mean_and_spread(item[1], scores[0])[0])[:BEST]
    lines = []
    for group, members in ranked:
        rounds = tables.mean_and_spread(members, "rounds")[0]
        lines.append([*group, str(len(members)), f"{rounds:.1f}", *(mean(members, name) for name in scores)])
    return tables.markdown([*names, "seeds", "rounds", *scores], lines)


def mean(rows: list[tables.Row], score: str) -> str:
    """Mean ± standard deviation over the seeds; a single one has no deviation."""
    value, spread = tables.mean_and_spread(rows, score)
    return format_score(score, value, spread if len(rows) > 1 else None)


# ---- figures ----


def draw(model: MaskGIT, picture: Picture, rows: list[tables.Row], judge: Judge, args) -> None:
    """All figures of a sweep, the rounds those of one picture."""
    if planned := tables.planned(rows):
        figures.draw_sweep(planned, judge.names(svm=False)[0], args.output)
    figures.schedule_curves(args.mask_func, args.output / "schedules.png")
    for total in args.total_iter:
        strips = {}
        for setting in all_settings(args):
            if setting.total_iter == total and setting.mask_func not in strips:    # the first decoder, temperature, seed
                [result] = complete(model, [picture], setting, args, total, keep_rounds=True)
                strips[setting.mask_func] = result.rounds
        if strips:
            draw_rounds(picture, strips, args.output / f"rounds_{total or tables.NEED}.png")


def draw_rounds(picture: Picture, strips: dict[str | None, list[Snapshot]], path: Path) -> None:
    """Picture and token mask before the first and after every round, wrapped, one block for each schedule."""
    rows = [[picture.original, picture.image.masked_fill(picture.hole, 128)]]
    labels = ["original, input"]
    for name, rounds in strips.items():
        for start in range(0, len(rounds), PER_ROW):
            part = rounds[start : start + PER_ROW]
            rows += [[x.picture for x in part], [mask_picture(x) for x in part]]
            labels += [f"{name or 'by need'}, rounds {start}-{start + len(part) - 1}", "still masked"]
    write_grid(path, rows, labels)


def mask_picture(snapshot: Snapshot) -> Tensor:
    """The token mask as a picture (3, H, W) of the snapshot's size: white = masked, dark gray = known."""
    gray = torch.where(snapshot.masked, 255.0, 60.0)[None, None]
    return F.interpolate(gray, size=snapshot.picture.shape[1:])[0].to(torch.uint8).expand(3, -1, -1)
