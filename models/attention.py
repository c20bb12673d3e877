"""Multi-head self-attention, written out (Vaswani et al. 2017, section 3.2, https://arxiv.org/abs/1706.03762)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kv_cache import KVCache
from .norms import HeadNorm

LEVELS = 2**16    # on a CPU `dropout` rounds the share to 1 / LEVELS
MURMUR = (0x85EBCA6B, 0xC2B2AE35)    # multipliers of MurmurHash3's finalizer


class MultiHeadAttention(nn.Module):
    """Bidirectional self-attention: every token sees every token.

    Args:
        embed_dim: D, the width of a token; must be divisible by `num_heads`.
        num_heads: heads of D / num_heads channels each.
        dropout: probability of dropping an attention weight, in training only.
        qk_norm: normalise queries and keys per head (Dehghani et al. 2023, section 2), which keeps the logits bounded.
        fused: use PyTorch's fused kernel; False computes the same thing line by line.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.1, qk_norm: bool = False, fused: bool = True
    ) -> None:
        super().__init__()
        if embed_dim % num_heads != 0:
            raise ValueError(f"embed_dim ({embed_dim}) must be divisible by num_heads ({num_heads})")
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.fused = fused
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.q_norm = HeadNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(self.head_dim) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """x: (B, N, D).  Returns (B, N, D). With a cache x may be some of the tokens, which then see all of them."""
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, self.num_heads, 3 * self.head_dim)    # (B, N, heads, 3 d)
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=-1)                     # each (B, heads, N, d)
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            k, v = cache.update(k, v)
        # On a CPU the fused kernel is slower where it drops weights, and in bfloat16 takes twice the time.
        slow = q.device.type == "cpu" and (q.dtype == torch.bfloat16 or (self.training and self.dropout > 0))
        attend = self._fused if self.fused and not slow else self._explicit
        out = attend(q, k, v)                                              # (B, heads, N, d)
        return self.proj(out.transpose(1, 2).reshape(B, N, D))             # heads side by side again

    def _fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)           # (B, heads, N, N)
        weights = dropout(scores.softmax(dim=-1), self.dropout, self.training)
        return weights @ v                                                 # (B, heads, N, d)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Set a random share of the values to 0 and scale up the others (Srivastava et al. 2014, JMLR 15), in training only.

    PyTorch's dropout draws one random number for each value. On a CPU that was 3/8 of a training step of the 72.7 M
    transformer: here one number of 64 bits serves four values. In a compiled kernel on a GPU drawing the numbers took longer
    than reading and writing the values: there they come from a hash, see `hashed`.

    Args:
        x: any shape, floating point.
        p: share to drop, in [0, 1]; on a CPU rounded to 1 / 65,536.
    """
    if not training or p == 0:
        return x
    if torch.compiler.is_compiling():
        dropped = round(p * 2**32)
        if dropped == 2**32:
            return x * 0
        seeds = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=x.device)
        return torch.where(hashed(x.shape, seeds) >= dropped - 2**31, x / (1 - p), 0.0)
    if x.device.type != "cpu":
        return F.dropout(x, p)
    dropped = round(p * LEVELS)
    if dropped == LEVELS:
        return x * 0
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)    # all 64 bits are random
    kept = words.view(torch.int16)[: x.numel()] >= dropped - LEVELS // 2                  # (numel,)
    return x * kept.view(x.shape).to(x.dtype).mul_(LEVELS / (LEVELS - dropped))


def hashed(shape: torch.Size, seeds: Tensor) -> Tensor:
    """Random int32 numbers of a shape: each is a hash of its position and the seeds (2,) int32.

    MurmurHash3's finalizer (Appleby 2011) without its last shift, which changes low bits only. The compiler fuses it with
    what uses the numbers, and computes them again in the backward pass instead of storing them.
    """
    x = torch.arange(shape.numel(), dtype=torch.int32, device=seeds.device).view(shape)
    for seed, multiplier, shift in zip(seeds, MURMUR, (16, 13), strict=True):
        x = x ^ seed
        x = (x ^ (x >> shift & 2 ** (32 - shift) - 1)) * (multiplier - 2**32)             # logical shift, wrapping product
    return x                                                                              # same shape


class Dropout(nn.Dropout):
    """`dropout` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


def count_parameters(module: nn.Module) -> int:
    """Number of learned values in a module."""
    return sum(p.numel() for p in module.parameters())


def use_fused_attention(module: nn.Module, fused: bool) -> None:
    """Switch every attention layer below `module` to the fused kernel or to the written-out form."""
    for layer in module.modules():
        if isinstance(layer, MultiHeadAttention):
            layer.fused = fused
