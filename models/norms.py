"""Normalisation layers in float32, also under autocast.

On CUDA autocast runs norms in float32. On CPUs it leaves them in bfloat16, and PyTorch sums the gradients of scale and shift
over all rows in it: in a batch of 32 these gradients of the decoder were 26 % off (median), at worst four times too short.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) of any precision.  Returns float32 of the same shape."""
        return super().forward(x.float())


class ChannelNorm(LayerNorm):
    """LayerNorm over the channels of each position, blind to the rest of the picture."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W), fastest when channels_last.  Returns the same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GroupNorm(nn.GroupNorm):
    """GroupNorm with 32 groups, or as many as divide the channels."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(math.gcd(32, channels), channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) of any precision.  Returns float32 of the same shape."""
        return super().forward(x.float())


class HeadNorm(nn.RMSNorm):
    """RMS norm over the channels of a head, in the precision of its input: the fast attention kernel takes one precision."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d).  Returns the same shape and precision."""
        if torch.onnx.is_in_onnx_export():    # which has no such operation
            return x * (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt() * self.weight
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
