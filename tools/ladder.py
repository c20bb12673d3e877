"""Score every rung between the originals and the mean colour, to see which part of the system limits it.

python ladder.py --originals ORIGINALS --masks MASKS --checkpoint model.safetensors --output out/ladder
                 --features network.onnx --perceptual-weights squeezenet.safetensors

Each rung is made by a command of this project, which the report names. Writes to OUTPUT: a folder of pictures a rung,
ladder.csv, ladder.md (the scores, and the commands that made them) and pictures.png (some pictures of each rung).
"""
import argparse
import csv
import math
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from evaluation import figures
from evaluation.features import Features, Statistics, load_features
from evaluation.metrics import Perceptual, frechet_distance, kernel_distance, load_perceptual, paired_metrics, summarise
from pictures.files import pair
from pictures.images import read_image
from tasks import HERE, read_pair
from utils import Parser, UserError, atomic_write, pick_device, run_cli, writable_folder

REFERENCE = "Navier-Stokes"    # the rung that the ratios are of: the best classic method
# Columns of the scores beside the Fréchet and kernel distances: head of the report's table, format.
PAIRED = {
    "hole_psnr": ("hole PSNR dB", ".2f"),
    "psnr": ("whole PSNR dB", ".2f"),
    "hole_ssim": ("hole SSIM", ".4f"),
    "hole_perceptual": ("hole perceptual", ".4f"),
    "hole_perceptual_ratio": (f"/ {REFERENCE}", ".3f"),
    "perceptual": ("whole perceptual", ".4f"),
    "perceptual_ratio": (f"/ {REFERENCE}", ".3f"),
    "seam": ("seam", ".3f"),
    "known_pixels_changed": ("known pixels changed", ".2%"),
}


@dataclass(frozen=True)
class Rung:
    """One way to get pictures."""

    method: str
    name: str                  # of its folder
    script: str | None         # None: the originals themselves
    flags: tuple[str, ...] = ()


def rungs(seed: int, low_temperature: float) -> list[Rung]:
    seeded = ("--seed", str(seed))
    return [
        Rung("original", "original", None),
        Rung("tokenizer, whole, nothing known", "tokenizer_whole", "reconstruct.py", ("--no-known", "--no-paste")),
        Rung("tokenizer, pasted, true tokens", "tokenizer_pasted", "reconstruct.py"),
        Rung("completed, whole", "completed_whole", "inpainting.py", (*seeded, "--no-paste")),
        Rung("completed, pasted", "completed", "inpainting.py", seeded),
        Rung(f"completed, temperature {low_temperature:g}", "completed_low", "inpainting.py",
             (*seeded, "--temperature", f"{low_temperature:g}")),
        Rung("reference decoder, same weights", "reference_decoder", "inpainting.py", (*seeded, "--decoder", "reference")),
        Rung("Telea", "telea", "baselines.py", ("--method", "telea")),
        Rung(REFERENCE, "navier_stokes", "baselines.py", ("--method", "navier-stokes")),
        Rung("mean colour", "mean", "baselines.py", ("--method", "mean")),
    ]    # fmt: skip


@dataclass(frozen=True)
class Pictures:
    """The originals and their holes. M pictures."""

    stems: list[str]
    truth: Tensor    # (M, 3, H, W) uint8
    holes: Tensor    # (M, 1, H, W) bool


@dataclass(frozen=True)
class Judge:
    """What scores are made with."""

    network: Features
    truth: Statistics                # features of the originals
    perceptual: Perceptual | None

    @property
    def columns(self) -> dict[str, tuple[str, str]]:
        """Of the scores: name -> head of the report's table, format."""
        frechet, kernel = self.network.frechet_name, self.network.kernel_name
        first = {frechet: (frechet, ".2f"), "frechet_ratio": (f"/ {REFERENCE}", ".3f"), kernel: (kernel, ".4f")}
        return first | {name: PAIRED[name] for name in PAIRED if self.perceptual or "perceptual" not in name}

    def score(self, images: Tensor, pictures: Pictures) -> dict[str, float]:
        """images: (M, 3, H, W) uint8.  Returns the columns, without the ratios."""
        features = Statistics.of(self.network, images, pictures.stems)
        scores = {self.network.frechet_name: frechet_distance(self.truth.moments, features.moments)}
        enough = len(images) >= 4    # for different subsets
        kernel = kernel_distance(self.truth.features, features.features)["mean"] if enough else math.nan
        scores[self.network.kernel_name] = kernel
        summary = summarise(paired_metrics(images, pictures.truth, pictures.holes, self.perceptual))
        found = summary | summary["whole"] | {f"hole_{name}": value for name, value in summary["hole"].items()}
        return scores | {name: found[name] for name in self.columns if name in found}


# ---- arguments ----


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = HERE / "checkpoints/cat64.safetensors"
    parser.add_argument("--originals", type=Path, required=True, metavar="DIR", help="clean pictures, all of one size")
    parser.add_argument("--masks", type=Path, required=True, metavar="DIR", help="hole masks of the same names, or one")
    parser.add_argument("--mask-hole", choices=("black", "white"), default="black", help="its colour in the masks")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--checkpoint", type=Path, default=bundled, metavar="FILE", help="model (default: the bundled one)")
    parser.add_argument("--low-temperature", type=float, default=0.3, help="of the safer rung (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--features", default="inception", metavar="inception|FILE.onnx", help="network of FID and KID")
    parser.add_argument("--features-name", metavar="NAME", help="name of an ONNX network that carries none")
    parser.add_argument("--inception-weights", type=Path, metavar="FILE", help="instead of the download")
    parser.add_argument("--perceptual-weights", type=Path, metavar="FILE.safetensors", help="SqueezeNet 1.1 features")
    parser.add_argument("--show", nargs="+", metavar="NAME", help="pictures to draw (default: 8, evenly spread)")
    return parser.parse_args(argv)


def load(args: argparse.Namespace) -> tuple[Pictures, Judge]:
    """Pictures and networks: whatever is missing or wrong is told before the first rung is made."""
    if not args.checkpoint.is_file():
        raise UserError(f"checkpoint {args.checkpoint} not found; give a .safetensors file")
    if args.features == "none":
        raise UserError("--features must be inception or an ONNX file: a ladder compares Fréchet distances")
    device = pick_device(args.device)
    network = load_features(args.features, inception_weights=args.inception_weights, name=args.features_name, device=device)
    perceptual = load_perceptual(args.perceptual_weights, device) if args.perceptual_weights else None
    pairs = pair(args.originals, args.masks)
    read = [read_pair(image, mask, args.mask_hole) for _, image, mask in pairs]
    if odd := next((path for (_, path, _), (x, _) in zip(pairs, read, strict=True) if x.shape != read[0][0].shape), None):
        raise UserError(f"{odd} is not of the size of {pairs[0][1]}: a ladder needs pictures of one size")
    images, holes = map(torch.stack, zip(*read, strict=True))
    pictures = Pictures([stem for stem, _, _ in pairs], images, holes)
    if unknown := sorted(set(args.show or ()) - set(pictures.stems)):
        raise UserError(f"--show {unknown[0]}: not among the pictures, which begin with {', '.join(pictures.stems[:3])}")
    return pictures, Judge(network, Statistics.of(network, images, pictures.stems, "features of originals"), perceptual)


# ---- making a rung ----


def command(rung: Rung, args: argparse.Namespace) -> list[str]:
    """The words of the command that makes a rung, after `python`; none for the originals."""
    if rung.script is None:
        return []
    words = [rung.script, "--images", str(args.originals), "--masks", str(args.masks)]
    words += ["--output", str(args.output / rung.name)]
    words += ["--mask-hole", args.mask_hole] if args.mask_hole != "black" else []
    if rung.script != "baselines.py":
        words += ["--checkpoint", str(args.checkpoint)]
        words += ["--device", args.device] if args.device != "auto" else []
    return [*words, *rung.flags]


def run(words: list[str]) -> None:
    """Run one of the project's scripts as its reader would, in a Python of its own."""
    done = subprocess.run([sys.executable, str(HERE / words[0]), *words[1:]], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"python {shlex.join(words)} failed: {last.removeprefix('error: ')}")


def pictures_of(rung: Rung, args: argparse.Namespace, pictures: Pictures, run: Callable[[list[str]], None]) -> Tensor:
    """Make a rung's pictures and read them: (M, 3, H, W) uint8."""
    if rung.script is None:
        return pictures.truth
    run(command(rung, args))
    folder = args.output / rung.name / ("" if rung.script == "baselines.py" else "images")
    return torch.stack([read_image(folder / f"{stem}.png") for stem in pictures.stems])


# ---- report ----


def add_ratios(rows: list[dict], judge: Judge) -> None:
    """To each row, its Fréchet and perceptual distances over those of the reference rung."""
    [reference] = [row for row in rows if row["method"] == REFERENCE]
    ratios = {"frechet_ratio": judge.network.frechet_name, "perceptual_ratio": "perceptual",
              "hole_perceptual_ratio": "hole_perceptual"}    # fmt: skip
    for row in rows:
        for ratio, name in ratios.items():
            if ratio in judge.columns:
                row[ratio] = row[name] / reference[name] if reference[name] else math.nan


def write_csv(rows: list[dict], judge: Judge, path: Path) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["method", *judge.columns, "n", "command"], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def report(rows: list[dict], judge: Judge, own_command: str) -> str:
    """Markdown: a table of the scores and one of the commands."""
    network, count, heads = judge.network, rows[0]["n"], judge.columns
    lines = ["# Ladder", "", f"`{own_command}`", ""]
    lines.append(f"{count} pictures. {network.frechet_name} ({network.dims} features), {network.kernel_name}, perceptual: "
                 "lower is better. Seam: gradient across the hole's rim over the originals', 1 is best.")    # fmt: skip
    if count < network.dims:
        lines.append(f"{count} pictures are fewer than the features, so {network.frechet_name} is biased upwards: "
                     "compare it only with scores of as many pictures.")    # fmt: skip
    lines += [network.note] if network.note else []
    lines += ["", f"| | {' | '.join(head for head, _ in heads.values())} |", "|---" + "|---:" * len(heads) + "|"]
    for row in rows:
        lines.append(f"| {row['method']} | {' | '.join(f'{row[name]:{form}}' for name, (_, form) in heads.items())} |")
    lines += ["", "| | made by |", "|---|---|"]
    lines += [f"| {row['method']} | {'`' + row['command'] + '`' if row['command'] else ''} |" for row in rows]
    return "\n".join([*lines, ""])


def shown(args: argparse.Namespace, pictures: Pictures, count: int = 8) -> list[int]:
    """Which pictures to draw."""
    if args.show:
        return [pictures.stems.index(stem) for stem in args.show]
    last = len(pictures.stems) - 1
    return sorted({round(i * last / (count - 1)) for i in range(count)})


def cells(images: Tensor) -> list:
    return list(images.permute(0, 2, 3, 1).contiguous().numpy())    # of (H, W, 3)


# ---- all of it ----


def main(argv: list[str] | None = None, run: Callable[[list[str]], None] = run) -> int:
    args = parse_args(argv)
    figures.new_figure(1, 1)    # told before the work, should matplotlib be missing
    pictures, judge = load(args)
    writable_folder(args.output)
    columns = shown(args, pictures)
    masked = pictures.truth[columns].masked_fill(pictures.holes[columns], 128)
    rows, table = [], {"input": cells(masked)}
    for rung in tqdm(rungs(args.seed, args.low_temperature), unit="rung", disable=None):
        images = pictures_of(rung, args, pictures, run)
        words = command(rung, args)
        rows.append({"method": rung.method} | judge.score(images, pictures)
                    | {"n": len(images), "command": f"python {shlex.join(words)}" if words else ""})    # fmt: skip
        table[rung.method] = cells(images[columns])
    add_ratios(rows, judge)
    text = report(rows, judge, shlex.join(["python", "ladder.py", *(sys.argv[1:] if argv is None else argv)]))
    write_csv(rows, judge, args.output / "ladder.csv")
    with atomic_write(args.output / "ladder.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    figures.picture_table(list(table.values()), list(table), [pictures.stems[i] for i in columns],
                          args.output / "pictures.png", scale=max(1, 128 // pictures.truth.shape[2]))    # fmt: skip
    print(text)
    return 0


if __name__ == "__main__":
    run_cli(main)
