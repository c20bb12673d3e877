"""Score a folder of completed pictures.

Against other pictures:   python evaluate.py --predicted out/images --reference train
Against the originals:    python evaluate.py --predicted out/images --reference train --ground-truth originals --masks masks
Another feature network:  python evaluate.py ... --features network.onnx
Keep the statistics:      python evaluate.py ... --save-statistics train.npz, and then --reference train.npz

Distances to other pictures (FID, KID, U-IDS) say how real the completions look; the originals' own distances are the floor.
Paired scores say how close each completion is to its original. Completions, originals and masks are paired by their names.
"""
import argparse
import json
import math
import platform
import shlex
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from evaluation.flags import add_score_flags
from utils import Parser, UserError, count, notice, progress, run_cli, writable_folder, write_text

PACKAGES = ("torch", "torchvision", "numpy", "torchmetrics", "pytorch-fid", "onnxruntime", "pillow", "scikit-learn")
PAIRED = {"psnr": "PSNR dB", "ssim": "SSIM", "l1": "L1", "perceptual": "perceptual"}    # columns of the table of pairs


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--predicted", type=Path, required=True, metavar="DIR", help="completed pictures")
    parser.add_argument("--ground-truth", type=Path, metavar="DIR", help="their originals: adds the paired scores")
    parser.add_argument("--masks", type=Path, metavar="DIR", help="hole masks: adds the metrics of each pair")
    parser.add_argument("--mask-hole", choices=("black", "white"), default="black", help="colour of the hole in the masks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, each picture's metrics included")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    group = add_score_flags(parser)
    group.add_argument("--save-statistics", type=Path, metavar="FILE.npz", help="keep the statistics of --reference DIR")
    group.add_argument("--svm", action=argparse.BooleanOptionalAction, default=True, help="P-IDS and U-IDS")
    group.add_argument("--kid-subsets", type=count, default=100, metavar="N", help="random subsets of KID (default 100)")
    group.add_argument("--kid-subset-size", type=count, metavar="N", help="default 1000, at most half of the smaller set")
    group.add_argument("--seed", type=int, default=0, help="of KID's subsets and the folds of P-IDS and U-IDS")
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before any work. A folder of inpainting.py is replaced by its images/."""
    from pictures.files import refuse_overwriting

    if (args.predicted / "images").is_dir():
        args.predicted /= "images"
        notice(f"scoring the pictures in {args.predicted}")
    if args.ground_truth is None and args.reference is None:
        raise UserError("nothing to compare with: give --reference (other pictures) or --ground-truth (the originals)")
    if args.masks is not None and args.ground_truth is None:
        raise UserError("--masks is for the metrics of pairs: give --ground-truth too")
    if args.perceptual_weights is not None and args.masks is None:
        raise UserError("--perceptual-weights is for the metrics of pairs: give --masks too")
    if args.features == "none" and args.masks is None:
        raise UserError("--features none leaves only the metrics of pairs: give --ground-truth and --masks")
    if args.save_statistics is not None and (args.reference is None or args.reference.suffix == ".npz"):
        raise UserError("--save-statistics keeps the statistics of a folder: give it as --reference DIR")
    outputs = [path for path in (args.json, args.save_statistics) if path is not None]
    refuse_overwriting(filter(None, (args.predicted, args.ground_truth, args.masks, args.reference)), outputs)
    for path in outputs:
        writable_folder(path.parent)


def find_files(args: argparse.Namespace) -> list[tuple[str, Path, Path | None, Path | None]]:
    """(name, completion, original, mask) of every picture; what a flag leaves out is None."""
    from pictures.files import find_images, match_names, pair

    predicted = find_images(args.predicted)
    if args.ground_truth is None:
        return [(name, path, None, None) for name, path in predicted.items()]
    originals = find_images(args.ground_truth)
    partner = match_names(predicted, originals, ("completion", "original"))
    masks = {} if args.masks is None else {name: mask for name, _, mask in pair(args.ground_truth, args.masks)}
    return [(name, path, originals[partner[name]], masks.get(partner[name])) for name, path in predicted.items()]


def measure(args: argparse.Namespace, judge, files: list) -> tuple:
    """The judge, who now knows the originals; what was measured on the completions, and on the originals (or None)."""
    from evaluation.judge import check_pair
    from pictures.images import read_image
    from pictures.masks import check_hole, read_mask

    completed, originals = judge.measurements(), judge.measurements()
    for _, path, original_path, mask_path in progress(files, desc="measuring", unit="picture"):
        picture, original, hole = read_image(path), None, None
        if original_path is not None:
            original = read_image(original_path)
            check_pair(path, picture, original)
        if mask_path is not None:
            hole = read_mask(mask_path, args.mask_hole)
            if hole.shape[1:] != picture.shape[1:]:
                check_hole(hole, mask_path, args.mask_hole, picture.shape[1:], path.name)
        completed.add(picture, hole, original)
        if original is not None:
            originals.add(original, hole)
    return completed.columns(), originals.columns()


def make_report(args: argparse.Namespace, argv: list[str]) -> dict:
    """Everything that is known: scores, notes, and what they were made with."""
    from evaluation.judge import load_judge

    files = find_files(args)
    judge = replace(
        load_judge(args), kernel_subsets=args.kid_subsets, kernel_subset_size=args.kid_subset_size, seed=args.seed
    )
    if args.save_statistics is not None:
        judge.reference.save(args.save_statistics)
    completed, originals = measure(args, judge, files)
    report = {
        "command": shlex.join(["python", "evaluate.py", *argv]), "versions": package_versions(), "n": len(files),
        "features": None, "scores": {}, "originals": {},
    }    # fmt: skip
    if (network := judge.network) is not None:
        report["features"] = {"name": network.name, "dims": network.dims, "sha256": network.sha256}
    if judge.reference is not None:
        report["n_reference"] = judge.reference.moments.count
        report["originals"] = judge.scores(originals, args.svm) if originals else {}
    judge = judge.with_originals(originals)
    report["scores"], report["notes"] = judge.scores(completed, args.svm), judge.notes(len(files))
    if args.masks is not None:
        report |= details(args, files, completed, report["notes"])
    return report


def details(args: argparse.Namespace, files: list, completed: dict, notes: list[str]) -> dict:
    """The metrics of pairs by the hole's area and by picture; `notes` gains what belongs beside them."""
    from evaluation.metrics import by_hole_area

    if args.perceptual_weights is None:
        notes.append("no perceptual distance: give --perceptual-weights FILE.safetensors (SqueezeNet 1.1 features)")
    if whole := int((completed["hole_area"] == 0).sum()):
        notes.append(f"{whole} picture(s) have no hole and no part in the hole's means")
    columns = {name: values.tolist() for name, values in completed.items() if name not in ("features", "crops")}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {
        "pictures_with_known_pixels_changed": int((completed["known_changed"] > 0).sum()),
        "by_hole_area": by_hole_area(completed),
        "per_picture": {name: row for (name, *_), row in zip(files, rows, strict=True)},
    }


def table(report: dict) -> str:
    """The report as lines to read; the JSON file has all of it."""
    from evaluation.judge import format_score, is_distance

    scores, floor = report["scores"], report["originals"]
    lines = [f"{report['n']} pictures" + (f", {report['n_reference']} in the reference" if "n_reference" in report else "")]
    if any(map(is_distance, scores)):
        lines += ["", " " * 28 + f"{'completions':>18}" + (f"{'originals':>18}" if floor else "")]
    for name in filter(is_distance, scores):
        cells = [format_score(name, x[name], x.get(f"{name} spread")) for x in (scores, floor) if name in x]
        lines.append(f"{name:<28}" + "".join(f"{cell:>18}" for cell in cells))
    if "by_hole_area" in report:
        lines += pairs_table(report)
    return "\n".join(lines + [f"note: {note}" for note in report["notes"]])


def pairs_table(report: dict) -> list[str]:
    from evaluation.judge import format_score

    scores, n = report["scores"], report["n"]
    keys = [key for key in PAIRED if key in scores]

    def row(label: str, count: int, values: dict[str, float], prefix: str) -> str:
        return f"{label:<24}{count:>5}" + "".join(f"{format_score(key, values[prefix + key]):>12}" for key in keys)

    lines = ["", f"{'paired':<24}{'n':>5}" + "".join(f"{PAIRED[key]:>12}" for key in keys)]
    lines += [row("whole picture", n, scores, ""), row("hole only", n, scores, "hole_")]
    for label, prefix in (("whole", ""), ("hole", "hole_")):
        lines += [row(f"  {label}, area {bin['from']:.0%}-{bin['to']:.0%}", bin["n"], bin, prefix)
                  for bin in report["by_hole_area"]]
    changed = report["pictures_with_known_pixels_changed"]
    return [
        *lines,
        f"hole: {scores['hole_area']:.1%} of the picture on average",
        f"known pixels changed: {scores['known_changed']:.4%}, in {changed} of {n} pictures",
        f"seam: {scores['seam']:.3f}, mean gradient across the hole's rim over that of the originals",
        f"detail: {scores['detail']:.3f}, mean gradient inside the hole over that of the originals",
    ]


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


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_flags(args)
    report = make_report(args, sys.argv[1:] if argv is None else argv)
    print(table(report))
    if args.json is not None:
        write_text(args.json, json.dumps(finite(report), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run_cli(main)
