"""Score a folder of completed pictures against their originals.

FID and KID:            python evaluate.py --predicted out --ground-truth originals
And picture by picture: python evaluate.py --predicted out --ground-truth originals --masks masks
Another network:        python evaluate.py --predicted out --ground-truth originals --features network.onnx
Statistics once:        python evaluate.py ... --save-statistics originals.npz, then --ground-truth originals.npz

Pictures are paired by their names without suffix, and both folders must hold the same ones.
"""
import argparse
import json
import math
import platform
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.features import Features, Statistics, load_features
from evaluation.metrics import (
    INSIDE,
    RIM,
    Perceptual,
    frechet_distance,
    kernel_distance,
    load_perceptual,
    paired_metrics,
    summarise,
)
from pictures.files import find_images, pair
from pictures.images import read_image
from pictures.masks import read_mask
from utils import Parser, UserError, atomic_write, pick_device, run_cli, writable_folder

PACKAGES = ("torch", "torchvision", "numpy", "torchmetrics", "pytorch-fid", "onnxruntime", "pillow")
# Head and format of the table's columns.
COLUMNS = {
    "psnr": ("PSNR dB", ".2f"), "ssim": ("SSIM", ".4f"), "l1": ("L1", ".4f"), "perceptual": ("perceptual", ".4f"),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predicted", type=Path, required=True, metavar="DIR", help="completed pictures")
    parser.add_argument("--ground-truth", type=Path, required=True, metavar="DIR|FILE.npz",
                        help="originals, or their statistics saved before")
    parser.add_argument("--masks", type=Path, metavar="DIR", help="hole masks: adds the metrics of picture pairs")
    parser.add_argument("--mask-hole", choices=("black", "white"), default="black", help="its colour in the masks")
    parser.add_argument("--unpaired", action="store_true", help="two sets of different pictures: FID and KID only")
    group = parser.add_argument_group("feature network of FID and KID")
    group.add_argument("--features", default="inception", metavar="inception|none|FILE.onnx",
                       help="ONNX: images (B, 3, H, W) in [0, 1] -> features (B, D); the scores take its name")
    group.add_argument("--features-name", metavar="NAME", help="name of an ONNX network that carries none")
    group.add_argument("--inception-weights", type=Path, metavar="FILE", help="instead of the download")
    group.add_argument("--save-statistics", type=Path, metavar="FILE.npz", help="keep the originals' statistics")
    group.add_argument("--kid-subsets", type=int, default=100, metavar="N", help="random subsets of KID (default 100)")
    group.add_argument("--kid-subset-size", type=int, metavar="N", help="default 1000, at most half of the smaller set")
    group.add_argument("--seed", type=int, default=0, help="of KID's subsets")
    parser.add_argument("--perceptual-weights", type=Path, metavar="FILE.safetensors", help="SqueezeNet 1.1 features")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, each picture's metrics included")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_flags(args)
    device = pick_device(args.device)
    predicted, truth = find_sets(args)
    notes: list[str] = []
    network = None
    if args.features != "none":    # before any picture is read: a missing weight file is told at once
        network = load_features(args.features, inception_weights=args.inception_weights, name=args.features_name,
                                device=device)
    perceptual = load_perceptual(args.perceptual_weights, device) if args.perceptual_weights else None
    pred_images, stems = read_images(predicted, "predicted"), list(predicted)
    truth_images = None if truth is None else read_images(truth, "originals", size=pred_images.shape[2:])
    report = {
        "command": shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)]),
        "versions": package_versions(),
        "n": len(stems),
        "size": list(pred_images.shape[2:]),
    }
    if network is not None:
        report |= distribution_scores(args, network, pred_images, stems, truth_images, list(truth or ()), notes)
    if args.masks is not None:
        report |= paired_scores(args, pred_images, truth_images, truth, perceptual, notes)
    report["notes"] = notes
    print(table(report))
    if args.json is not None:
        with atomic_write(args.json) as temporary:
            Path(temporary).write_text(json.dumps(finite(report), indent=2) + "\n", encoding="utf-8")
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before any work."""
    saved = args.ground_truth.suffix == ".npz"
    if args.masks is not None and (saved or args.unpaired):
        raise UserError(
            f"--masks compares picture by picture, which {'saved statistics' if saved else '--unpaired'} cannot: "
            "give the folder of originals, or leave --masks out"
        )
    if args.perceptual_weights is not None and args.masks is None:
        raise UserError("--perceptual-weights is for the metrics of picture pairs: give --masks too")
    if args.features == "none" and (args.masks is None or saved or args.save_statistics):
        raise UserError("--features none leaves only the metrics of picture pairs: give --masks and two folders")
    if saved and args.save_statistics is not None:
        raise UserError(f"--save-statistics: {args.ground_truth} is already saved statistics")
    if args.kid_subsets < 1:
        raise UserError(f"--kid-subsets must be at least 1, got {args.kid_subsets}")
    for path in filter(None, (args.json, args.save_statistics)):
        writable_folder(path.parent)


# Pictures


def find_sets(args: argparse.Namespace) -> tuple[dict[str, Path], dict[str, Path] | None]:
    """Files of both sets by stem; None for originals that are saved statistics."""
    predicted = find_images(args.predicted)
    if args.ground_truth.suffix == ".npz":
        if not args.ground_truth.is_file():
            raise UserError(f"--ground-truth {args.ground_truth}: there is no such file")
        return predicted, None
    truth = find_images(args.ground_truth)
    if not args.unpaired:
        check_same_pictures(args, predicted, truth)
    return predicted, truth


def check_same_pictures(args: argparse.Namespace, predicted: Iterable[str], truth: Iterable[str]) -> None:
    """Refuse stems that differ: a stale or missing file would be scored in silence."""
    for names, holder, other in (
        (set(truth) - set(predicted), args.ground_truth, args.predicted),
        (set(predicted) - set(truth), args.predicted, args.ground_truth),
    ):
        if names:
            raise UserError(
                f"{len(names)} picture(s) of {holder} are not in {other}, such as {', '.join(sorted(names)[:3])}: both "
                "must hold the same pictures, so remove stale files or complete the rest (or give --unpaired to "
                "compare two sets of different pictures)"
            )


def read_images(files: dict[str, Path], what: str, size: tuple[int, int] | None = None) -> Tensor:
    """uint8 (N, 3, H, W); every picture must have the given size, or the first one's."""
    images = []
    for path in tqdm(files.values(), desc=f"reading {what}", unit="picture", disable=None):
        image = read_image(path)                     # (3, H, W)
        size = image.shape[1:] if size is None else size
        check_size(path, image, size)
        images.append(image)
    return torch.stack(images)


def read_masks(truth: dict[str, Path], args: argparse.Namespace, size: tuple[int, int]) -> Tensor:
    """bool (N, 1, H, W), True = hole, in the originals' order; one mask file may serve all."""
    pairs = pair(args.ground_truth, args.masks)
    by_stem = {stem: mask for stem, _, mask in pairs}
    masks = []
    for stem in tqdm(truth, desc="reading masks", unit="mask", disable=None):
        mask = read_mask(by_stem[stem], args.mask_hole)
        check_size(by_stem[stem], mask, size)
        masks.append(mask)
    return torch.stack(masks)


def check_size(path: Path, image: Tensor, size: tuple[int, int]) -> None:
    if image.shape[1:] != size:
        (H, W), (height, width) = image.shape[1:], size
        raise UserError(f"{path} is {W}x{H}, the pictures before it are {width}x{height}: all must have one size")


# Scores


def distribution_scores(
    args: argparse.Namespace, network: Features, pred_images: Tensor, stems: list[str],
    truth_images: Tensor | None, truth_stems: list[str], notes: list[str],
) -> dict:
    """Fréchet and kernel distance of the two sets, for the report; notes gains what a reader must know beside them."""
    if truth_images is None:
        truth = Statistics.load(args.ground_truth, network)
        if not args.unpaired:
            check_same_pictures(args, stems, truth.stems)
    else:
        truth = Statistics.of(network, truth_images, truth_stems, "features of originals")
    if args.save_statistics is not None:
        truth.save(args.save_statistics)
    predicted = Statistics.of(network, pred_images, stems, "features of predicted")
    counts = [predicted.moments.count, truth.moments.count]
    if network.note:
        notes.append(network.note)
    if min(counts) < network.dims:
        notes.append(
            f"{network.frechet_name}: {min(counts)} pictures are fewer than the {network.dims} features, so the score "
            "is biased upwards; compare it only with scores of as many pictures"
        )
    if counts[0] != counts[1]:
        notes.append(f"{counts[0]} predicted and {counts[1]} original pictures: the score depends on both numbers")
    scores = {
        "features": {"name": network.name, "dims": network.dims, "sha256": network.sha256},
        "n_ground_truth": counts[1],
        "frechet": {"name": network.frechet_name, "value": frechet_distance(truth.moments, predicted.moments)},
    }
    if truth.features is None:
        notes.append(f"{network.kernel_name}: {args.ground_truth} holds no features, only their mean and covariance")
    elif min(counts) < 4:
        notes.append(f"{network.kernel_name}: {min(counts)} pictures are too few for different subsets of 2 or more")
    else:
        kernel = kernel_distance(truth.features, predicted.features, args.kid_subsets, args.kid_subset_size, args.seed)
        scores["kernel"] = {"name": network.kernel_name} | kernel
    return scores


def paired_scores(
    args: argparse.Namespace, pred_images: Tensor, truth_images: Tensor, truth: dict[str, Path],
    perceptual: Perceptual | None, notes: list[str],
) -> dict:
    """Metrics of the picture pairs, for the report: means, and each picture's own."""
    masks = read_masks(truth, args, truth_images.shape[2:])
    columns = paired_metrics(pred_images, truth_images, masks, perceptual)
    if perceptual is None:
        notes.append("no perceptual distance: give --perceptual-weights FILE.safetensors (SqueezeNet 1.1 features)")
    if whole := int((columns["hole_area"] == 0).sum()):
        notes.append(f"{whole} picture(s) have no hole and no part in the hole's means")
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    per_picture = {stem: dict(zip(columns, row, strict=True)) for stem, row in zip(truth, rows, strict=True)}
    return {"paired": summarise(columns), "per_picture": per_picture}


# Report


def table(report: dict) -> str:
    """The report as lines to read; the JSON file has all of it."""
    height, width = report["size"]
    lines = [f"{report['n']} pictures of {width}x{height}"]
    if "frechet" in report:
        names = [report[key]["name"] for key in ("frechet", "kernel") if key in report]
        space = max(map(len, names)) + 2
        dims = report["features"]["dims"]
        lines += ["", f"{names[0]:<{space}}{report['frechet']['value']:.3f}   (N = {report['n']}, D = {dims})"]
        if kernel := report.get("kernel"):
            spread = f"{kernel['mean']:.5f} +- {kernel['std']:.5f}"
            lines.append(f"{names[1]:<{space}}{spread}   ({kernel['subsets']} subsets of {kernel['subset_size']})")
    if paired := report.get("paired"):
        keys = list(paired["whole"])
        lines += ["", " " * 24 + "n" + "".join(f"{COLUMNS[key][0]:>12}" for key in keys)]
        lines.append(row("whole picture", paired["n"], paired["whole"]))
        lines.append(row("hole only", paired["n"], paired["hole"]))
        for part in ("whole", "hole"):
            lines += [row(f"  {part}, area {bin['from']:.0%}-{bin['to']:.0%}", bin["n"], bin[part])
                      for bin in paired["by_hole_area"]]
        share, pictures = paired["known_pixels_changed"], paired["pictures_with_known_pixels_changed"]
        lines.append(f"hole: {paired['hole_area']:.1%} of the picture on average")
        lines.append(f"known pixels changed: {share:.4%}, in {pictures} of {paired['n']} pictures")
        for name, where, keys in (("seam", "across the hole's rim", RIM), ("detail", "inside the hole", INSIDE)):
            ours, truth = (f"{paired[key]:.4f}" for key in keys)
            lines.append(f"{name}: {paired[name]:.3f} (gradient {where} {ours}, of the originals {truth})")
    return "\n".join(lines + [f"note: {note}" for note in report["notes"]])


def row(label: str, count: int, values: dict[str, float]) -> str:
    return f"{label:<21}{count:>4}" + "".join(f"{values[key]:>12{COLUMNS[key][1]}}" for key in values)


def package_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that the numbers depend on; None where one is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def finite(value):
    """JSON knows no infinity and no nan: equal pictures' PSNR becomes "inf", what is undefined becomes null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


if __name__ == "__main__":
    run_cli(main)
