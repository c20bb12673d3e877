"""Mask schedules gamma(r) of MaskGIT (Chang et al. 2022, section 3.3 and figure 8, https://arxiv.org/abs/2202.04200).

A schedule maps progress r in [0, 1] to the share of tokens that is still masked: gamma(0) = 1, falling to gamma(1) = 0.
"""

import math

import torch
from torch import Tensor

SCHEDULES = {
    "cosine": lambda r: torch.cos(r * math.pi / 2).where(r < 1, 0),    # cos(pi / 2) is 6e-17 in floating point
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "sqrt": lambda r: 1 - r.sqrt(),
    "cubic": lambda r: 1 - r**3,
    "arccos": lambda r: 2 * torch.arccos(r) / math.pi,
}


def gamma(schedule: str, r: Tensor | float) -> Tensor:
    """Mask ratio at progress r.

    Args:
        schedule: one of `SCHEDULES`.
        r: progress, any shape, in [0, 1].
    Returns:
        float64 tensor like r, in [0, 1].
    Raises:
        ValueError: progress outside [0, 1].
    """
    r = torch.as_tensor(r, dtype=torch.float64)
    if not bool(((r >= 0) & (r <= 1)).all()):    # so written, it refuses NaN too
        raise ValueError(f"progress must lie in [0, 1], got values from {r.min().item()} to {r.max().item()}")
    return SCHEDULES[schedule](r)


def mask_plan(schedule: str, num_masked: Tensor, total_iter: int) -> Tensor:
    """How many tokens of each hole are still masked after every round.

    Args:
        num_masked: (B,) integers, tokens in the hole of each image.
        total_iter: T >= 1 rounds.
    Returns:
        (B, T) int64. Round t (from 1) leaves floor(gamma(t / T) * num_masked), but at least one token fewer than before
        while any is left, and 0 after round T. The released MaskGIT code rounds down too; the paper writes a ceiling.
    """
    ratios = gamma(schedule, torch.arange(1, total_iter + 1, dtype=torch.float64) / total_iter)    # (T,)
    # 1 - 0.9 is a little less than 0.1 in floating point: without the margin, whole numbers would be rounded down.
    wanted = (ratios * num_masked.cpu().unsqueeze(1) + 1e-9).floor().long()                        # (B, T)
    left, plan = num_masked.cpu().long(), []
    for t in range(total_iter):
        left = torch.minimum(wanted[:, t], left - 1).clamp_min(0)                                  # (B,)
        plan.append(left)
    return torch.stack(plan, dim=1).to(num_masked.device)                                          # (B, T)
