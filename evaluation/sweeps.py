"""Completes a set of pictures with many settings of the decoding, and scores each; what `python -m tools.sweep` does."""
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from evaluation import tables
from evaluation.judge import Judge, Measurements
from evaluation.sets import Picture
from models import MaskGIT
from models.completion import complete_pictures
from models.pyramid import Job, Result
from utils import UserError, fingerprint, seeded, write_text

KEY = ("decoder", "mask_func", "total_iter", "sweet_spot", "temperature", "choice_temperature", "seed")
# What a decoder does not use is left blank in the results, and not varied.
UNUSED = {"halton": ("choice_temperature",), "reference": ("temperature",)}


@dataclass(frozen=True)
class Setting:
    """Everything that one decode depends on, beside the model and the pictures."""

    decoder: str
    mask_func: str | None               # None where the rounds follow from the picture
    total_iter: int | None              # the same
    temperature: float | None           # None where the decoder has no use for it
    choice_temperature: float | None
    seed: int

    def options(self) -> dict:
        """Arguments of `iterative_decode`."""
        values = asdict(self) | {"schedule": self.mask_func}
        return {name: value for name, value in values.items() if value is not None and name not in ("mask_func", "seed")}

    def columns(self, spot: int | None) -> dict[str, str]:
        """The results' columns that tell this decode, stopped after round `spot`, from every other."""
        values = asdict(self) | {"sweet_spot": spot, "total_iter": self.total_iter or tables.NEED}
        return {name: "" if values[name] is None else f"{values[name]:g}" if isinstance(values[name], float)
                else str(values[name]) for name in KEY}    # fmt: skip


def all_settings(args) -> list[Setting]:
    """Every decode to make, once. The seeds change fastest, so that the first means are there early."""
    every = itertools.product(
        args.decoder, args.temperature, args.choice_temperature, args.total_iter, args.mask_func, args.seeds
    )
    found = []
    for decoder, temperature, choice_temperature, total_iter, mask_func, seed in every:
        unused = UNUSED.get(decoder, ())
        temperature = None if "temperature" in unused else temperature
        choice_temperature = None if "choice_temperature" in unused else choice_temperature
        mask_func = mask_func if total_iter else None
        found.append(Setting(decoder, mask_func, total_iter, temperature, choice_temperature, seed))
    return [setting for setting in tables.unique(found) if spots_of(setting, args)]


def spots_of(setting: Setting, args) -> list[int | None]:
    """Rounds after which a decode is scored; None: after the last that each picture needs."""
    if setting.total_iter is None:
        return [None]
    return [spot for spot in args.spots or [setting.total_iter] if spot <= setting.total_iter]


# ---- decoding and scoring ----


def complete(
    model: MaskGIT, pictures: list[Picture], setting: Setting, args, spot: int | None, **options
) -> Iterator[Result]:
    """Complete pictures up to round `spot`, as inpainting.py does: with the same seeds."""
    jobs = (Job(x.image, x.hole, seeded(setting.seed, x.name, 0).initial_seed()) for x in pictures)
    return complete_pictures(
        model, jobs, batch_size=args.batch_size, precision=args.precision, paste=args.paste, sweet_spot=spot,
        **setting.options(), **options,
    )    # fmt: skip


def completions(model: MaskGIT, pictures: list[Picture], setting: Setting, args) -> Iterator[tuple]:
    """(picture, sweet spot, completion, rounds) for every picture and sweet spot of a setting.

    Where all pictures have the model's size, one decode gives all sweet spots. Larger pictures are completed at several
    sizes one after the other, each up to the sweet spot, so there each sweet spot takes a decode of its own.
    """
    spots, size = spots_of(setting, args), (model.image_size, model.image_size)
    if len(spots) > 1 and all(picture.image.shape[1:] == size for picture in pictures):
        results = complete(model, pictures, setting, args, max(spots), keep_rounds=True)
        for picture, result in zip(pictures, results, strict=True):
            yield from ((picture, spot, result.rounds[spot].picture, spot) for spot in spots)    # rounds[0] is the input
    else:
        for spot in spots:
            for picture, result in zip(pictures, complete(model, pictures, setting, args, spot), strict=True):
                yield picture, spot, result.image, result.steps


def score(model: MaskGIT, pictures: list[Picture], setting: Setting, judge: Judge, args, tick) -> list[dict]:
    """The results' rows of one setting, one for each sweet spot. `tick` is called after every completion."""
    measured: dict[int | None, Measurements] = {spot: judge.measurements() for spot in spots_of(setting, args)}
    rounds = dict.fromkeys(measured, 0)
    for picture, spot, completion, steps in completions(model, pictures, setting, args):
        measured[spot].add(completion, picture.hole, picture.original)
        rounds[spot] += steps
        tick()
    rows = []
    for spot, measurements in measured.items():
        scores = judge.scores(measurements.columns(), svm=False)
        rows.append(setting.columns(spot) | {"n": str(len(pictures)), "rounds": f"{rounds[spot] / len(pictures):.6g}"}
                    | {name: f"{scores.get(name, float('nan')):.6g}" for name in judge.names(svm=False)})    # fmt: skip
    return rows


# ---- the results' file ----


def key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def facts(model: MaskGIT, pictures: list[Picture], judge: Judge, args) -> dict:
    """What all rows of a results file have in common."""
    return {
        "checkpoint": fingerprint(*model.state_dict().values()),
        "pictures": fingerprint(*(x.image.masked_fill(x.hole, 0) for x in pictures)),
        "holes": fingerprint(*(x.hole for x in pictures)),
        "ground truth": fingerprint(*(x.original for x in pictures)),
        "feature network": judge.network and judge.network.sha256,
        "reference": judge.reference and fingerprint(judge.reference.moments.mean),
        "perceptual distance": judge.perceptual is not None,
        "paste": args.paste, "precision": args.precision,
    }    # fmt: skip


def load_results(output: Path, expected: dict, header: list[str]) -> list[dict[str, str]]:
    """Rows of an earlier sweep in the same folder, which must have had the same model, pictures and scores."""
    results, about = output / "results.csv", output / "sweep.json"
    if not results.exists():
        write_text(about, json.dumps(expected, indent=2) + "\n")
        return []
    try:
        before = json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{about} cannot be read, so it is unknown what {results} is of: give another --output") from error
    if differing := [name for name in expected if before.get(name) != expected[name]]:
        raise UserError(f"{results} was made with other {', '.join(differing)}: give another --output, or remove it")
    return [{name: row[name] for name in header} for row in tables.read_csv(results, header)]
