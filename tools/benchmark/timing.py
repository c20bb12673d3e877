"""What both measurements share: clocks, models and pictures."""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models import MaskGIT
from models.attention import count_parameters
from models.transformer import TransformerConfig
from models.vqgan import VQGANConfig
from pictures.holes import random_holes
from utils import build_config, load_config, seeded

ROOT = Path(__file__).resolve().parents[2]
# --quick: what makes each config small and keeps its shape
QUICK = {
    "vqgan": dict(image_size=16, codebook_size=32, codebook_dim=8, encoder_width=16, encoder_depth=1, encoder_down=[0, 1],
                  encoder_channels=[32, 32, 32], decoder_channels=[32, 32, 32], decoder_blocks=[1, 1, 1], decoder_up=[0, 1],
                  attention_size=4),
    "transformer": dict(codebook_size=32, seq_len=16, embed_dim=32, depth=2, num_heads=2, mlp_dim=64),
}    # fmt: skip


@dataclass
class Case:
    """One line of a table."""

    name: str
    pictures: int    # that one call handles
    call: Callable[[], object]


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call, including what it starts on the device."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def say(words: str) -> None:
    """Progress, also where the output is piped."""
    print(words, file=sys.stderr, flush=True)


def take_turns(cases: list[Case], rounds: int, device: torch.device) -> list[dict]:
    """Seconds a picture of each case, and how many times as fast as the first case it is: medians over the rounds."""
    for case in cases:
        taken = seconds(case.call, device)    # warm-up: allocations, choice of kernels, compilation
        say(f"warm-up: {case.name}, {taken:.1f} s")
    times: list[list[float]] = [[] for _ in cases]
    for i in range(rounds):
        for case, list_ in zip(cases, times, strict=True):
            list_.append(seconds(case.call, device) / case.pictures)
        say(f"round {i + 1} of {rounds} done")
    return [
        {
            "case": case.name, "batch": case.pictures, "pictures/s": 1 / statistics.median(mine),
            "seconds a picture": statistics.median(mine),
            "times as fast": statistics.median(first / one for first, one in zip(times[0], mine, strict=True)),
        }
        for case, mine in zip(cases, times, strict=True)
    ]    # fmt: skip


# ---- models and pictures ----


def build(name: str, quick: bool) -> MaskGIT:
    """A model of a config file with random weights, always the same."""
    sections = load_config(ROOT / "configs" / name)
    if quick:
        for section, small in QUICK.items():
            sections[section] |= small
        if sections["transformer"]["pixel_dim"]:
            sections["transformer"]["pixel_dim"] = 4 * sections["vqgan"]["stride"] ** 2
    torch.manual_seed(0)
    return MaskGIT(
        build_config(VQGANConfig, sections["vqgan"], "vqgan"),
        build_config(TransformerConfig, sections["transformer"], "transformer"),
    ).eval()


def load_models(args: argparse.Namespace, device: torch.device) -> tuple[MaskGIT, MaskGIT]:
    """The model to be measured and the reference."""
    model = build("cat64.yml", True) if args.quick else MaskGIT.from_pretrained(args.checkpoint)
    if args.reference_checkpoint:
        reference = MaskGIT.from_pretrained(args.reference_checkpoint)
    else:
        reference = build("maskgit_reference.yml", args.quick)
    return model.to(device), reference.to(device)


def describe(model: MaskGIT, reference: MaskGIT, args: argparse.Namespace, device: torch.device) -> dict[str, str]:
    """What was measured, and where."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    sizes = [f"{count_parameters(x.transformer) / 1e6:.1f} M parameters" for x in (model, reference)]
    return {
        "machine": f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.rounds} rounds"
        + (", tiny models" if args.quick else ""),
        "default": f"{args.checkpoint or 'bundled weights'}, transformer of {sizes[0]}",
        "reference": f"{args.reference_checkpoint or 'random weights'}, transformer of {sizes[1]}",
    }


def draw_pictures(count: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Noise (count, 3, size, size) in [-1, 1] and holes (count, 1, size, size). The content does not change the time."""
    generator = seeded("benchmark", count)
    image = torch.rand(count, 3, size, size, generator=generator) * 2 - 1
    return image.to(device), random_holes(count, size, generator).to(device)
