"""Seconds for a photograph at its own size: 512x512 with holes of several sizes, and 24 megapixels with a scratch."""

import argparse
import functools
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from models.completion import Job
from models.precision import pick_precision
from tools.benchmark.completion import complete
from tools.benchmark.timing import describe, load_models, say, seconds
from utils import seeded


def photograph(height: int, width: int) -> Tensor:
    """(3, height, width) uint8 with structures of all sizes."""
    generator, picture = seeded("photograph", height, width), torch.zeros(1, 3, height, width)
    for cells in (3, 12, 48, 192):
        coarse = torch.rand(1, 3, cells, cells * width // height, generator=generator) - 0.5
        picture += F.interpolate(coarse, size=(height, width), mode="bilinear") / cells**0.5
    return ((picture[0] / picture.abs().max() + 1) * 127.5).to(torch.uint8)


def square_hole(size: int, share: float) -> Tensor:
    """(1, size, size) bool: a square in the middle that covers the share."""
    side, hole = round(size * share**0.5), torch.zeros(1, size, size, dtype=torch.bool)
    first = (size - side) // 2
    hole[:, first : first + side, first : first + side] = True
    return hole


def scratch(height: int, width: int, thickness: int = 12) -> Tensor:
    """(1, height, width) bool: a line from one corner to the other."""
    row, column = torch.arange(height).unsqueeze(1), torch.arange(width)
    return ((row / height - column / width).abs() < thickness / 2 / height).unsqueeze(0)


def measure(args: argparse.Namespace, device: torch.device) -> dict:
    model, reference = load_models(args, device)
    size, (height, width) = (64, (96, 128)) if args.quick else (512, (4000, 6000))
    cases = {f"{size}x{size}, hole of {share:.0%}": (photograph(size, size), square_hole(size, share))
             for share in (0.01, 0.05, 0.1, 0.2)}    # fmt: skip
    cases[f"{width}x{height}, a scratch"] = photograph(height, width), scratch(height, width)
    precision, rows = pick_precision("auto", device), []
    for name, (image, hole) in cases.items():
        call = functools.partial(complete, model, [Job(image, hole, seed=0)], args.batch_size, precision=precision)
        steps = call()    # warm-up
        taken = statistics.median(seconds(call, device) for _ in range(args.rounds))
        say(f"{name}: {taken:.2f} s")
        rows.append({"photograph": name, "hole, pixels": int(hole.sum()), "rounds": steps, "seconds": taken})
    return describe(model, reference, args, device) | {"precision": precision, "photographs": rows}
