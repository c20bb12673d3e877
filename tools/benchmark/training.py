"""Pictures a second of stage 2's training step, and the share of the speed of a matrix product that it reaches."""

import argparse
import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import MaskGIT
from models.attention import use_fused_attention
from models.decoding import masked_positions
from models.maskgit import pixel_to_token_mask
from pictures.holes import random_holes
from tools.benchmark.timing import Case, describe, draw_pictures, load_models, seconds, take_turns
from training.optimization import update_ema
from training.speed import Ahead, Captured, padded_positions, to_device
from utils import seeded


@dataclass
class Plan:
    """One way to train stage 2."""

    name: str
    model: MaskGIT
    batch: int
    cached: bool              # tokens computed once, instead of at every step
    half: bool                # bfloat16
    captured: bool = False    # forward and backward pass as a CUDA graph


def training_step(plan: Plan, device: torch.device, compile: bool = False) -> tuple[MaskGIT, Callable[[], None]]:
    """A copy of the model and an optimizer step on it: draw holes, get tokens, forward, backward, AdamW, EMA.

    As in training_transformer.py, the holes for a GPU are drawn on the CPU during the steps before.
    """
    model, batch = copy.deepcopy(plan.model).train(), plan.batch
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.transformer.parameters(), lr=1e-4, betas=(0.9, 0.96), fused=True)
    if compile:
        model.transformer.compile_blocks()
    image, _ = draw_pictures(batch, model.image_size, device)
    cache, count = model.vqgan.encode(image), itertools.count()

    def draw(step: int) -> tuple[Tensor, ...]:
        mask = random_holes(batch, model.image_size, seeded("benchmark holes", step))
        masked = pixel_to_token_mask(mask, model.vqgan.config.stride)
        return mask, masked, (padded_positions if plan.captured else masked_positions)(masked)

    def gradients(tokens: Tensor, masked: Tensor, pixels: Tensor | None, positions: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.half):
            loss = model(tokens, masked, pixels, positions=positions).mean()
        loss.backward()
        return loss.detach()

    draws = Ahead(draw, threads=8 if device.type == "cuda" else 0)
    run = Captured(gradients, model.transformer.parameters()) if plan.captured else gradients

    def step() -> None:
        mask, masked, positions = (to_device(x, device) for x in draws(next(count)))      # (B, 1, H, W), (B, N), (M,)
        tokens = cache if plan.cached else model.vqgan.encode(image)
        run(tokens, masked, model.pixels_of(image, mask), positions)
        optimizer.step()
        update_ema(average.transformer, model.transformer, 0.999)

    return model, step


def count_flops(call: Callable[[], object], module: nn.Module) -> float:
    """Floating-point operations of a call (a multiply-add is two); with attention written out, which the counter knows."""
    use_fused_attention(module, False)
    with FlopCounterMode(display=False) as counter:
        call()
    use_fused_attention(module, True)
    return float(counter.get_total_flops())


@torch.no_grad()
def matmul_peak(device: torch.device, dtype: torch.dtype, quick: bool) -> float:
    """Operations a second of a large matrix product here: the best of a few."""
    side = 256 if quick else 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    for _ in range(2):
        a @ b
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(3 if quick else 10))


def measure(args: argparse.Namespace, device: torch.device) -> dict:
    model, reference = load_models(args, device)
    B, cuda = args.batch_size, device.type == "cuda"
    R = min(24 if cuda else 4, B)    # 24 is the reference's batch; a CPU would take a minute a step
    plans = [
        Plan("reference, encoded at every step, float32", reference, R, cached=False, half=False),
        Plan("reference, tokens cached, float32", reference, R, cached=True, half=False),
        Plan("reference, tokens cached, bfloat16", reference, B if cuda else R, cached=True, half=True),
        Plan("default, tokens cached, bfloat16", model, B, cached=True, half=True),
    ]
    if cuda:
        plans += [replace(plan, name=f"{plan.name}, captured", captured=True) for plan in plans[2:]]
    peak = {half: matmul_peak(device, torch.bfloat16 if half else torch.float32, args.quick) for half in (False, True)}
    cases, flops = [], []
    for plan in plans:
        counted, few = training_step(replace(plan, batch=4, captured=False), device)
        flops.append(count_flops(few, counted) / 4)    # about: holes differ, and with them the tokens to be predicted
        cases.append(Case(plan.name, plan.batch, training_step(plan, device, args.compile and plan.half)[1]))
    rows = take_turns(cases, args.rounds, device)
    for row, each, plan in zip(rows, flops, plans, strict=True):
        row |= {"GF a picture": each / 1e9, "share of peak": each / row["seconds a picture"] / peak[plan.half]}
    return describe(model, reference, args, device) | {
        "matrix product, float32, TF/s": peak[False] / 1e12, "matrix product, bfloat16, TF/s": peak[True] / 1e12,
        "training": rows,
    }    # fmt: skip
