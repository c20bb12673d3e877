"""Weights in 8 bits: integers from -127 to 127, with a scale for each row (a row of a matrix, a kernel of a convolution)."""

import torch
from torch import Tensor

LARGEST = 127        # -128 goes unused: a weight and its negative are stored alike
SUFFIX = ".scale"    # a file's tensor NAME in int8 has its scales in NAME.scale
# Smaller scales are so coarse in half precision that a second rounding would change the weights again.
LEAST_SCALE = 2**-17


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round to the nearest step, 127 of which make a row's largest weight. (Clipping outliers gains nothing.)

    Args:
        weight: (R, ...) of any floating type.
    Returns:
        int8 like `weight` and float16 scales (R,); both are 0 for rows that are 0 or round to 0.
    """
    rows = weight.detach().float().flatten(1)                               # (R, n)
    scale = rows.abs().amax(1) / LARGEST                                    # (R,)
    if not bool(scale.half().isfinite().all()):
        raise ValueError("weights that are not finite, or too large for half precision, can't be stored in 8 bits")
    scale = scale.clamp(min=LEAST_SCALE).half()                             # (R,)
    # The stored scale may be smaller than the exact one, hence the clamp.
    values = (rows / scale.float()[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return values.view(weight.shape), scale * values.any(1)


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
