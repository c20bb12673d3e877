"""Learning rates and averaged weights."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def cosine_rate(step: int, total: float, peak: float, warmup: int) -> float:
    """Learning rate: linear warm-up over `warmup` steps, then half a cosine down to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, parameters only; call after optimizer.step()."""
    averages, parameters = zip(*zip(ema.parameters(), model.parameters(), strict=True), strict=True)
    torch._foreach_lerp_(averages, parameters, 1.0 - decay)    # all at once: hundreds of launches fewer on a GPU


def ema_decay_at(step: int, decay: float) -> float:
    """A short memory at the start, so that the average forgets the random initialisation: min(decay, (1+t)/(10+t))."""
    return min(decay, (1 + step) / (10 + step))


@contextlib.contextmanager
def moved_further(weights: list[Tensor], gain: float) -> Iterator[None]:
    """The optimizer's step inside the block moves these weights `gain` times as far.

    For inputs that were added to a trained network and begin at zero: its learning rate is too low for them.
    """
    before = [weight.clone() for weight in weights] if gain != 1 else []
    yield
    for weight, old in zip(weights, before, strict=False):
        weight.add_(weight - old, alpha=gain - 1)
