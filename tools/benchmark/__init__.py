"""Measure speed here: completing pictures compared with the reference's loop, photographs, and training steps of stage 2.

Completion:   python -m tools.benchmark inpaint
Photographs:  python -m tools.benchmark photos
Training:     python -m tools.benchmark train
A first try:  python -m tools.benchmark inpaint --quick     (tiny models, to see that it runs)

The cases of a table take turns, round after round, so that a busy moment of the machine meets all of them. Times are medians
over the rounds, ratios are medians of the rounds' ratios. The reference is configs/maskgit_reference.yml with random weights
(as fast as trained ones), computed as its authors do: float32, one picture at a time, every round decoded.
"""

import argparse
import json
from pathlib import Path

from utils import Parser, UserError, count, writable_folder, write_text


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m tools.benchmark", description=__doc__)
    parser.add_argument("what", choices=("inpaint", "photos", "train"))
    parser.add_argument("--checkpoint", metavar="FILE", help="model (default: the bundled weights)")
    parser.add_argument("--reference-checkpoint", metavar="FILE", help="trained weights of the reference")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=count, help="how often each case is timed (default: 5, with --quick 2)")
    parser.add_argument("--batch-size", type=count, help="default: 16 on a CPU, 256 on CUDA, with --quick 4")
    parser.add_argument("--total-iter", type=count, nargs="+", metavar="T",
                        help="rounds of the model; the reference takes the first (default: 10, with --quick 2)")
    parser.add_argument("--compile", action="store_true", help="also measure compiled blocks in bfloat16 (torch.compile)")
    parser.add_argument("--quick", action="store_true", help="tiny models: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to a file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from tools.benchmark import completion, photos, training  # torch is slow to import
    from utils import pick_device

    device = pick_device(args.device)
    defaults = {"rounds": 2 if args.quick else 5, "total_iter": [2] if args.quick else [10],
                "batch_size": 4 if args.quick else 256 if device.type == "cuda" else 16}    # fmt: skip
    for name, value in defaults.items():
        setattr(args, name, getattr(args, name) or value)
    if args.quick and (args.checkpoint or args.reference_checkpoint):
        raise UserError("--quick makes tiny models of its own: leave the checkpoints out")
    if args.json is not None:
        writable_folder(args.json.parent)
    report = {"inpaint": completion, "photos": photos, "train": training}[args.what].measure(args, device)
    print(markdown(report))
    if args.json is not None:
        write_text(args.json, json.dumps(report, indent=2) + "\n")
    return 0


def markdown(report: dict) -> str:
    """Lists of rows as tables, everything else as lines."""
    lines = []
    for key, value in report.items():
        if isinstance(value, list):
            head = list(value[0])
            lines += ["", f"**{key}**", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
            lines += [f"| {' | '.join(text(row[name]) for name in head)} |" for row in value]
        else:
            lines.append(f"{key}: {text(value)}")
    return "\n".join(lines)


def text(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
