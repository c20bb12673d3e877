"""Weights in 8 bits, for files of little more than half the size: whole numbers from -127 to 127 and one scale for each row.

A row is what makes one output: a row of a matrix, or one kernel of a convolution. Rows differ in size, so each has a scale.
"""

import torch
from torch import Tensor

LARGEST = 127        # -128 goes unused: a weight and its negative are stored alike
SUFFIX = ".scale"    # a file's tensor NAME in int8 has its scales in NAME.scale
# Of a row's largest weight, what still has to fit: clipping the few largest makes the steps finer for all others. 1 comes
# first and must be beaten, so that nothing changes when weights are stored that were read from 8 bits.
CLIPS = (1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.825, 0.8)
# Below it half precision is so coarse that a row's largest weight is no longer stored as 127, and its scale would be another
# one the second time.
LEAST_SCALE = 2**-17


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of the scales that `CLIPS` allows, the one of least squared error for each row.

    Args:
        weight: (R, ...) of any floating type.
    Returns:
        int8 like `weight` and float16 scales (R,); both are 0 for rows that are 0, or so small that they become 0.
    """
    rows = weight.detach().float().flatten(1)                               # (R, n)
    top = rows.abs().amax(1)                                                # (R,)
    if not bool((top / LARGEST).half().isfinite().all()):
        raise ValueError("weights that are not finite, or too large for half precision, can't be stored in 8 bits")
    least = torch.full_like(top, torch.inf)                                 # (R,)
    best = torch.zeros_like(top, dtype=torch.float16)                       # (R,)
    for clip in CLIPS:
        scale = (clip * top / LARGEST).clamp(min=LEAST_SCALE).half()        # (R,)
        error = dequantize(nearest(rows, scale), scale) - rows              # (R, n)
        error = error.square().sum(1)                                       # (R,)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    values = nearest(rows, best)                                            # (R, n)
    return values.view(weight.shape), best * values.any(1)


def nearest(rows: Tensor, scale: Tensor) -> Tensor:
    """rows: (R, n) float32; scale: (R,) float16 as it is stored, not 0.  Returns (R, n) int8."""
    return (rows / scale.float()[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """values: (R, ...) int8; scale: (R,) float16.  Returns their products, float32 like `values` and exact."""
    return values.float() * scale.float().view(-1, *[1] * (values.dim() - 1))


def dequantize_all(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors as float32 weights: those in int8 times their scales, the others as they are."""
    state = dict(stored)
    for name in [name for name, value in stored.items() if value.dtype == torch.int8]:
        values, scale = state[name], state.pop(name + SUFFIX, torch.empty(0))
        if scale.dtype != torch.float16 or scale.shape != values.shape[:1]:
            raise ValueError(f"{name} is stored in 8 bits, but {name}{SUFFIX} is not a half-precision scale for each row")
        state[name] = dequantize(values, scale)
    return {name: value.float() for name, value in state.items()}
