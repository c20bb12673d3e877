"""Score completions over decoders, schedules, rounds, sweet spots, temperatures and seeds.

As the reference:  python sweep.py --images test/masked --masks test/masks --ground-truth test/originals --output out/sweep
                       --mask-func cosine linear square --total-iter 10 20 30 --sweet-spot all --seeds 0 1 2
To choose a setting: python sweep.py --images val --random-holes 0 --features network.onnx --output out/tune
                       --decoder maskgit halton --temperature 0.7 1 --total-iter 1 4 8

Whatever the pictures hold inside their holes is blanked first, so clean originals may be given as --images; then they are
the ground truth too. One decode of T rounds gives the scores of all its sweet spots. A sweep that was stopped goes on where
it stopped when it is started again with the same --output.

Writes to OUTPUT: results.csv (a row a setting, sweet spot and seed), results.md (tables: mean and standard deviation over
the seeds), and as PNG score_over_total_iter, score_over_sweet_spot (where there are several), schedules and, for each T,
rounds_T: picture and token mask of every round.
"""
import argparse
import csv
import itertools
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from evaluation import figures
from evaluation.features import Features, Statistics, file_sha256, load_features
from evaluation.metrics import (
    RIM,
    Moments,
    Perceptual,
    batch_metrics,
    frechet_distance,
    kernel_distance,
    load_perceptual,
    seam,
)
from models import MaskGIT
from models.decoding import DECODERS, Round
from models.maskgit import pixel_to_token_mask
from models.schedule import SCHEDULES
from pictures.files import find_images, pair
from pictures.holes import random_holes
from pictures.images import read_image, to_float, to_uint8
from pictures.masks import read_mask
from tasks import load_model
from utils import Parser, UserError, atomic_write, fingerprint, pick_device, run_cli, seeded, writable_folder

HERE = Path(__file__).resolve().parent.parent
PAIRED = ("psnr", "ssim", "l1", "hole_psnr", "hole_ssim", "hole_l1", "hole_perceptual", "known_changed")
SHOWN = ("hole_psnr", "hole_ssim", "hole_perceptual", "seam")    # beside the two distances, in results.md
KEY = ("decoder", "mask_func", "total_iter", "sweet_spot", "temperature", "choice_temperature", "seed")
# What a decoder does not use is left blank in the results, and not varied.
UNUSED = {"maskgit": (), "halton": ("choice_temperature",), "reference": ("temperature",)}


@dataclass(frozen=True)
class Setting:
    """Everything that one decode depends on, beside the model and the pictures."""

    decoder: str
    mask_func: str
    total_iter: int
    temperature: float | None           # None where the decoder has no use for it
    choice_temperature: float | None
    seed: int

    def options(self) -> dict:
        """Arguments of `iterative_decode`."""
        options = {"decoder": self.decoder, "schedule": self.mask_func, "total_iter": self.total_iter}
        temperatures = {name: getattr(self, name) for name in ("temperature", "choice_temperature")}
        return options | {name: value for name, value in temperatures.items() if value is not None}

    def columns(self, spot: int) -> dict[str, str]:
        """The results' columns that tell this decode's sweet spot from every other."""
        texts = {name: "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
                 for name, value in (asdict(self) | {"sweet_spot": spot}).items()}    # fmt: skip
        return {name: texts[name] for name in KEY}

    def spots(self, args: argparse.Namespace) -> list[int]:
        """Rounds after which this decode is scored."""
        return [spot for spot in args.spots or [self.total_iter] if spot <= self.total_iter]


class Pictures(NamedTuple):
    """What is completed, and what it should have been. M pictures of the model's size."""

    stems: list[str]
    images: Tensor    # (M, 3, H, W) uint8, blank in the hole
    holes: Tensor     # (M, 1, H, W) bool
    truth: Tensor     # (M, 3, H, W) uint8


@dataclass(frozen=True)
class Judge:
    """What scores are made with."""

    network: Features
    truth: Statistics                # features of the originals
    perceptual: Perceptual | None

    @property
    def columns(self) -> list[str]:
        return [self.network.frechet_name, self.network.kernel_name, *self.paired, "seam"]

    @property
    def paired(self) -> list[str]:
        """Columns that are one number for each picture."""
        return [name for name in PAIRED if name != "hole_perceptual" or self.perceptual]


# ---- arguments ----


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    switch = argparse.BooleanOptionalAction
    bundled = HERE / "checkpoints/cat64.safetensors"
    parser.add_argument("--checkpoint", type=Path, default=bundled, metavar="FILE", help="model (default: the bundled one)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--figures", action=switch, default=True, help="draw the results (matplotlib)")
    parser.add_argument("--show", metavar="NAME", help="the picture of the rounds' figures (default: the first)")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures completed together (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group = parser.add_argument_group("pictures")
    group.add_argument("--images", type=Path, required=True, metavar="DIR", help="to be completed, of the model's size")
    group.add_argument("--masks", type=Path, metavar="DIR", help="hole masks of the same names, or one for all")
    group.add_argument("--mask-hole", choices=("black", "white"), default="black", help="colour of the hole in mask files")
    group.add_argument("--random-holes", type=int, metavar="SEED", help="draw the holes instead of reading masks")
    group.add_argument("--ground-truth", type=Path, metavar="DIR", help="originals (default: --images, if they are clean)")
    group.add_argument("--limit", type=int, metavar="N", help="the first N pictures only")
    group = parser.add_argument_group("what is varied")
    group.add_argument("--decoder", nargs="+", default=["maskgit"], metavar="NAME", help=", ".join(DECODERS))
    group.add_argument("--mask-func", nargs="+", default=["cosine", "linear", "square"], metavar="NAME",
                       help=f"schedules: {', '.join(SCHEDULES)} (default: the first, second and third)")
    group.add_argument("--total-iter", nargs="+", type=int, default=[10, 20, 30], metavar="T", help="rounds of the schedule")
    group.add_argument("--sweet-spot", nargs="+", metavar="t", help="rounds to stop after, or all (default: T)")
    group.add_argument("--temperature", nargs="+", type=float, default=[1.0], metavar="X")
    group.add_argument("--choice-temperature", nargs="+", type=float, default=[4.5], metavar="X")
    group.add_argument("--known", action=switch, default=True, help="show the decoder the known pixels")
    group.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    group = parser.add_argument_group("scores")
    group.add_argument("--features", default="inception", metavar="inception|FILE.onnx", help="network of FID and KID")
    group.add_argument("--features-name", metavar="NAME", help="name of an ONNX network that carries none")
    group.add_argument("--inception-weights", type=Path, metavar="FILE", help="instead of the download")
    group.add_argument("--perceptual-weights", type=Path, metavar="FILE.safetensors", help="SqueezeNet 1.1 features")
    group.add_argument("--paste", action=switch, default=True, help="put the known pixels back before scoring")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can't work before anything is read or written."""
    for flag, given, known in (("mask-func", args.mask_func, SCHEDULES), ("decoder", args.decoder, DECODERS)):
        if unknown := [name for name in given if name not in known]:
            raise UserError(f"unknown --{flag} {', '.join(unknown)}; expected some of {', '.join(known)}")
    limit = [] if args.limit is None else [args.limit]
    for flag, values in (("total-iter", args.total_iter), ("batch-size", [args.batch_size]), ("limit", limit)):
        if values and min(values) < 1:
            raise UserError(f"--{flag} must be at least 1, got {min(values)}")
    for flag in ("temperature", "choice_temperature"):
        if bad := [value for value in getattr(args, flag) if not 0 <= value < math.inf]:
            raise UserError(f"--{flag.replace('_', '-')} must be 0 or more, got {bad[0]}")
    if (args.masks is None) == (args.random_holes is None):
        raise UserError("the holes are missing: give --masks DIR or --random-holes SEED, and not both")
    if args.masks is None and args.ground_truth is not None:
        raise UserError("--random-holes are cut out of clean --images, so --ground-truth has no use: leave it out")
    if args.features == "none":
        raise UserError("--features must be inception or an ONNX file: a sweep compares Fréchet distances")
    args.spots = sweet_spots(args.sweet_spot, max(args.total_iter))


def sweet_spots(given: list[str] | None, last: int) -> list[int] | None:
    """Rounds after which scores are taken, where a decode has so many; None: after the last."""
    if given is None:
        return None
    if given == ["all"]:
        return list(range(1, last + 1))
    if not all(spot.isdecimal() and 1 <= int(spot) <= last for spot in given):
        raise UserError(f"--sweet-spot must be all or rounds in 1..{last} (the largest --total-iter), got {' '.join(given)}")
    return sorted({int(spot) for spot in given})


def settings(args: argparse.Namespace) -> list[Setting]:
    """Every decode to make, once; the seeds change fastest, so that the first means are there early."""
    every = itertools.product(
        args.decoder, args.temperature, args.choice_temperature, args.total_iter, args.mask_func, args.seeds
    )
    found = figures.unique(
        Setting(
            decoder, mask_func, total_iter, None if "temperature" in UNUSED[decoder] else temperature,
            None if "choice_temperature" in UNUSED[decoder] else choice, seed,
        )
        for decoder, temperature, choice, total_iter, mask_func, seed in every
    )    # fmt: skip
    return [setting for setting in found if setting.spots(args)]


# ---- pictures ----


def load_pictures(args: argparse.Namespace, size: int) -> Pictures:
    """Pictures, holes and originals, paired by name, all of the model's size."""
    if args.masks is None:
        files = list(find_images(args.images).items())[: args.limit]
        images = read_all([path for _, path in files], read_image, size)                   # (M, 3, H, W)
        # Drawn one by one: a picture's hole does not depend on --limit.
        holes = [random_holes(1, size, seeded(args.random_holes, "hole", stem)) for stem, _ in files]
        pictures = Pictures([stem for stem, _ in files], images, torch.cat(holes), images)
    else:
        pairs = pair(args.images, args.masks)
        stems = [stem for stem, _, _ in pairs][: args.limit]
        images = read_all([image for _, image, _ in pairs][: args.limit], read_image, size)
        holes = read_all([mask for *_, mask in pairs][: args.limit], lambda path: read_mask(path, args.mask_hole), size)
        truth = images if args.ground_truth is None else read_truth(args, [stem for stem, _, _ in pairs], size)
        pictures = Pictures(stems, images, holes, truth)
    if len(pictures.stems) < 2:
        raise UserError(f"{args.images}: a Fréchet distance needs at least 2 pictures")
    if not bool(pictures.holes.any()):
        raise UserError(f"no mask in {args.masks} has a hole: there is nothing to complete (see --mask-hole)")
    if args.ground_truth is None and blank_holes(pictures):
        raise UserError(f"all pictures in {args.images} are blank in their holes: name their originals with --ground-truth")
    return Pictures(pictures.stems, pictures.images.masked_fill(pictures.holes, 0), pictures.holes, pictures.truth)


def read_all(paths: list[Path], read, size: int) -> Tensor:
    """(M, C, size, size) of what `read` makes of the files."""
    out = []
    for path in tqdm(paths, desc="reading", unit="file", leave=False, disable=None):
        out.append(read(path))
        H, W = out[-1].shape[1:]
        if (H, W) != (size, size):
            raise UserError(f"{path} is {W}x{H}; a sweep needs pictures and masks of the model's size, {size}x{size}")
    return torch.stack(out)


def read_truth(args: argparse.Namespace, stems: list[str], size: int) -> Tensor:
    """The originals in the order of the pictures."""
    files = find_images(args.ground_truth)
    if odd := sorted(set(files) ^ set(stems)):
        raise UserError(f"{args.images} and {args.ground_truth} must hold the same names; {len(odd)} differ, e.g. {odd[0]}")
    return read_all([files[stem] for stem in stems[: args.limit]], read_image, size)


def blank_holes(pictures: Pictures) -> bool:
    """Whether every picture has one colour inside its hole: then it is no original."""
    return all(
        bool((image[:, hole[0]] == image[:, hole[0]][:, :1]).all())
        for image, hole in zip(pictures.images, pictures.holes, strict=True) if hole.any()
    )


# ---- one decode ----


def half_precision(model: MaskGIT, args: argparse.Namespace):
    """Around the model alone: the scores' networks stay in float32."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=args.precision == "bf16")


def complete_batch(
    model: MaskGIT, pictures: Pictures, batch: slice, setting: Setting, spots: Sequence[int], args: argparse.Namespace
) -> tuple[list[Tensor], list[Round]]:
    """Some pictures completed: uint8 (B, 3, H, W) on the CPU after each of the rounds `spots`, and all rounds."""
    image, hole = pictures.images[batch], pictures.holes[batch]
    x, mask = to_float(image).to(model.device), hole.to(model.device)
    # inpainting.py's seeds, so that its pictures are the ones that are scored here
    seeds = [seeded(setting.seed, stem, 0).initial_seed() for stem in pictures.stems[batch]]
    shown = (x, mask) if args.known else (torch.zeros_like(x), torch.ones_like(mask))
    with half_precision(model, args):
        known = model.known(x, mask)
        rounds = model.complete_tokens(known, seeds, sweet_spot=max(spots), **setting.options())
        decoded = [model.decode(rounds[spot - 1].tokens, *shown, known.context) for spot in spots]
    done = [to_uint8(x.cpu()).contiguous() for x in decoded]    # the decoder may give channels_last
    return [torch.where(hole, x, image) if args.paste else x for x in done], rounds


def measure(done: Tensor, pictures: Pictures, batch: slice, judge: Judge) -> dict[str, Tensor]:
    """Features (B, D) and paired metrics (B,) of completed pictures."""
    rows = [judge.network.network(x.float() / 255).cpu().float() for x in done.split(judge.network.batch_size)]
    paired = batch_metrics(done, pictures.truth[batch], pictures.holes[batch], judge.perceptual)
    return {"features": torch.cat(rows)} | {name: paired[name].double().cpu() for name in (*judge.paired, *RIM)}


def summarise(measured: dict[str, Tensor], judge: Judge) -> dict[str, str]:
    """A row's scores of what was measured on all M pictures."""
    features = measured["features"].double()                                                    # (M, D)
    enough = len(features) >= 4    # for different subsets
    scores = {
        judge.network.frechet_name: frechet_distance(judge.truth.moments, Moments.of_features(features)),
        judge.network.kernel_name: kernel_distance(judge.truth.features, features)["mean"] if enough else math.nan,
    }
    for name in judge.paired:
        values = measured[name]                                                                 # (M,)
        scores[name] = values.sum().item() if name == "known_changed" else values.nanmean().item()
    scores["seam"] = seam(measured)
    return {name: f"{value:.6g}" for name, value in scores.items()}


@torch.no_grad()
def run(model: MaskGIT, pictures: Pictures, setting: Setting, judge: Judge, args: argparse.Namespace, tick) -> list[dict]:
    """The results' rows of one decode, one a sweet spot.

    Goes batch by batch; only the features and numbers of all pictures are kept.
    """
    spots, M = setting.spots(args), len(pictures.stems)
    parts: dict[int, list[dict[str, Tensor]]] = {spot: [] for spot in spots}
    for start in range(0, M, args.batch_size):
        batch = slice(start, start + args.batch_size)
        completed, _ = complete_batch(model, pictures, batch, setting, spots, args)
        for spot, done in zip(spots, completed, strict=True):
            parts[spot].append(measure(done, pictures, batch, judge))
        tick(len(completed[0]))
    measured = {spot: {name: torch.cat([part[name] for part in mine]) for name in mine[0]} for spot, mine in parts.items()}
    return [setting.columns(spot) | {"n": str(M)} | summarise(measured[spot], judge) for spot in spots]


# ---- results ----


def key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def facts(args: argparse.Namespace, pictures: Pictures, judge: Judge) -> dict:
    """What all rows of a results file have in common."""
    weights = args.perceptual_weights
    return {
        "checkpoint": file_sha256(args.checkpoint),
        "pictures": fingerprint(pictures.images), "holes": fingerprint(pictures.holes),
        "ground truth": fingerprint(pictures.truth), "feature network": judge.network.sha256,
        "perceptual network": file_sha256(weights) if weights else None,
        "paste": args.paste, "precision": args.precision,
    }    # fmt: skip


def load_results(output: Path, expected: dict, header: list[str]) -> list[dict[str, str]]:
    """Rows of an earlier sweep in the same folder, which must have had the same model, pictures and scores."""
    results, about = output / "results.csv", output / "sweep.json"
    if not results.exists():
        with atomic_write(about) as temporary:
            temporary.write_text(json.dumps(expected, indent=2) + "\n", encoding="utf-8")
        return []
    try:
        before = json.loads(about.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{about} cannot be read, so nobody knows what {results} is of: give another --output") from error
    if differing := [name for name in expected if before.get(name) != expected[name]]:
        raise UserError(f"{results} was made with other {', '.join(differing)}: give another --output, or remove it")
    return [{name: row[name] for name in header} for row in figures.read_csv(results, header)]


def write_results(output: Path, header: list[str], rows: list[dict[str, str]]) -> None:
    with atomic_write(output / "results.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def report(rows: list[dict[str, str]], args: argparse.Namespace, judge: Judge, command: str) -> str:
    """The results as Markdown: a table of t = T for each setting, as the reference has it, and the best of all rows."""
    score, count = judge.network.frechet_name, int(rows[0]["n"])
    lines = [f"# {score} (lower is better)", "", f"`{command}`", ""]
    seeds = ", ".join(figures.unique(row["seed"] for row in rows))
    known = "put back" if args.paste else "as decoded"
    lines.append(f"{count} pictures, known pixels {known}; mean ± standard deviation over the seeds {seeds}.")
    lines += [judge.network.note] if judge.network.note else []
    if count < judge.network.dims:
        lines.append(f"{count} pictures are fewer than the {judge.network.dims} features, so the scores are biased upwards: "
                     "compare them only with scores of as many pictures.")
    for label in figures.unique(map(figures.setting_label, rows)):
        whole = [row for row in rows if figures.setting_label(row) == label and row["sweet_spot"] == row["total_iter"]]
        if whole:
            lines += ["", f"## {label}", "", *table(whole, score)]
    return "\n".join([*lines, "", "## The best", "", *best(rows, judge), ""])


def table(rows: list[dict[str, str]], score: str) -> list[str]:
    """Rows t = T, columns schedules."""
    schedules = figures.unique(row["mask_func"] for row in rows)
    lines = [f"| t = T | {' | '.join(schedules)} |", "|---" * (1 + len(schedules)) + "|"]
    for total in sorted({int(row["total_iter"]) for row in rows}):
        cells = [[row for row in rows if row["mask_func"] == name and int(row["total_iter"]) == total] for name in schedules]
        lines.append(f"| {total} | {' | '.join(spread(cell, score) if cell else '' for cell in cells)} |")
    return lines


def best(rows: list[dict[str, str]], judge: Judge, count: int = 10) -> list[str]:
    """The settings and sweet spots with the lowest mean score."""
    names = [name for name in KEY if name != "seed"]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    scores = [*judge.columns[:2], *(name for name in judge.columns if name in SHOWN)]
    ranked = sorted(groups.items(), key=lambda item: figures.mean_and_spread(item[1], scores[0])[0])[:count]
    lines = [f"| {' | '.join([*names, 'seeds', *scores])} |", "|---" * (len(names) + 1 + len(scores)) + "|"]
    for group, members in ranked:
        lines.append(f"| {' | '.join([*group, str(len(members)), *(spread(members, name) for name in scores)])} |")
    return lines


def spread(rows: list[dict[str, str]], score: str) -> str:
    """Mean ± standard deviation, which a single row has not."""
    mean, deviation = figures.mean_and_spread(rows, score)
    digits = 2 if abs(mean) >= 1 else 4
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(rows) > 1 else "")


# ---- figures ----


def draw(model: MaskGIT, pictures: Pictures, rows: list[dict[str, str]], args: argparse.Namespace, judge: Judge) -> None:
    score = judge.network.frechet_name
    figures.draw_sweep(rows, score, args.output)
    figures.schedule_curves(args.mask_func, args.output / "schedules.png")
    shown = pictures.stems.index(args.show) if args.show else 0
    one = Pictures(pictures.stems[shown : shown + 1], *(x[shown : shown + 1] for x in pictures[1:]))
    for total in args.total_iter:
        strips = {name: rounds_of(model, one, first_setting(args, name, total), args) for name in args.mask_func}
        start = pixel_to_token_mask(one.holes, model.vqgan.config.stride)
        gray = one.images[0].masked_fill(one.holes[0], 128)
        head = [to_array(one.truth[0]), to_array(gray), mask_picture(start[0], one.holes.shape[-1])]
        figures.rounds_table(head, strips, args.output / f"rounds_{total}.png")


def first_setting(args: argparse.Namespace, mask_func: str, total: int) -> Setting:
    return next(x for x in settings(args) if (x.mask_func, x.total_iter) == (mask_func, total))


@torch.no_grad()
def rounds_of(model: MaskGIT, one: Pictures, setting: Setting, args: argparse.Namespace):
    """Pictures and token masks of every round, as arrays (H, W, 3)."""
    size, spots = one.images.shape[-1], range(1, setting.total_iter + 1)
    done, rounds = complete_batch(model, one, slice(1), setting, spots, args)
    return [to_array(x[0]) for x in done], [mask_picture(r.masked[0], size) for r in rounds]


def mask_picture(masked: Tensor, size: int):
    """(N,) bool to a picture (size, size, 3): white = masked, dark gray = known."""
    side = math.isqrt(len(masked))
    gray = torch.where(masked.cpu(), 255, 60).view(1, 1, side, side).float()
    return to_array(F.interpolate(gray, size=(size, size)).to(torch.uint8)[0].expand(3, -1, -1))


def to_array(image: Tensor):
    return image.permute(1, 2, 0).contiguous().numpy()    # (H, W, 3)


# ---- all of it ----


def load(args: argparse.Namespace) -> tuple[MaskGIT, Pictures, Judge]:
    """Model, pictures and networks: whatever is missing or wrong is told before the first decode."""
    device = pick_device(args.device)
    network = load_features(
        args.features, inception_weights=args.inception_weights, name=args.features_name, device=device
    )
    perceptual = load_perceptual(args.perceptual_weights, device) if args.perceptual_weights else None
    model = load_model(args.checkpoint, device)
    pictures = load_pictures(args, model.image_size)
    if args.show and args.show not in pictures.stems:
        raise UserError(f"--show {args.show}: not among the pictures, which begin with {', '.join(pictures.stems[:3])}")
    truth = Statistics.of(network, pictures.truth, pictures.stems, "features of originals")
    return model, pictures, Judge(network, truth, perceptual)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_args(args)
    writable_folder(args.output)
    if args.figures:
        figures.new_figure(1, 1)    # told before the work, should matplotlib be missing
    model, pictures, judge = load(args)
    header = [*KEY, "n", *judge.columns]
    rows = load_results(args.output, facts(args, pictures, judge), header)
    done = set(map(key, rows))
    left = [x for x in settings(args) if any(key(x.columns(spot)) not in done for spot in x.spots(args))]
    if rows:
        print(f"{len(rows)} rows are there already; {len(left)} of {len(settings(args))} decodes are left", file=sys.stderr)
    with tqdm(total=len(left) * len(pictures.stems), unit="picture", disable=None) as progress:
        for setting in left:
            fresh = run(model, pictures, setting, judge, args, progress.update)
            rows = list({key(row): row for row in rows + fresh}.values())
            write_results(args.output, header, rows)
    text = report(rows, args, judge, shlex.join(["python", "sweep.py", *(sys.argv[1:] if argv is None else argv)]))
    with atomic_write(args.output / "results.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    if args.figures:
        draw(model, pictures, rows, args, judge)
    print(text)
    return 0


if __name__ == "__main__":
    run_cli(main)
