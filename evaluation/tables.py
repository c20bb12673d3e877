"""Tables of scores: reads and writes them as CSV, and averages over seeds."""
import csv
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from utils import UserError, atomic_write

SETTING = ("decoder", "temperature", "choice_temperature")    # what one panel of a sweep's plots holds fixed

NEED = "need"    # in column total_iter: as many rounds as each picture needs, without schedule and sweet spot

Row = dict[str, str]    # of a CSV file


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


def read_metrics(run: Path, name: str) -> list[dict]:
    """The steps of a training's folder at which a value was logged: rows of run, step and the value."""
    path, rows, known = run / "metrics.jsonl", [], {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            known |= values
            if name in values:
                rows.append({"run": run.name, "step": values["step"], name: values[name]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} can't be read as the log of a training: {error}") from error
    if not rows:
        raise UserError(f"{path} has no {name}; it has {', '.join(known) or 'nothing'}")
    return rows


def write_csv(path: Path, columns: list[str], rows: Iterable[dict]) -> None:
    """Numbers are written with six digits; what a row lacks is left empty."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def markdown(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Lines of a Markdown table; every column but the first is aligned to the right."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]


def score_name(rows: list[Row], chosen: str | None = None) -> str:
    """The column to draw: the chosen one, else the first that is a Fréchet distance, or a distance to the original."""
    if chosen is not None and chosen not in rows[0]:
        raise UserError(f"no column {chosen!r}; there are {', '.join(rows[0])}")
    found = [key for key in rows[0] if key.split()[-1] == "FID" or key.split()[-1].startswith("FD-")]
    found += [key for key in ("hole_perceptual", "hole_l1") if key in rows[0]]
    if not chosen and not found:
        raise UserError("no column FID or FD-...; name the score with --score")
    return chosen or found[0]


def planned(rows: list[Row]) -> list[Row]:
    """The rows whose rounds follow a schedule."""
    return [row for row in rows if row["total_iter"] != NEED]


def number(row: Row, column: str) -> float:
    try:
        return float(row[column])
    except (TypeError, ValueError):
        raise UserError(f"column {column} holds {row[column]!r}, expected a number") from None


def mean_and_spread(rows: Iterable[Row], score: str) -> tuple[float, float]:
    """Mean and sample standard deviation of a score over the seeds (0 of a single one); nan where a seed has none."""
    values = [number(row, score) for row in rows]
    if not all(map(math.isfinite, values)):
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def setting_label(row: Row) -> str:
    """What the rows of a panel have in common, e.g. "maskgit, temperature 1, noise 4.5"."""
    words = {"temperature": "temperature", "choice_temperature": "noise"}
    return ", ".join([row["decoder"], *(f"{word} {row[key]}" for key, word in words.items() if row[key])])


def unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))
