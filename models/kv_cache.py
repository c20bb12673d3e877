"""Keys and values that are kept from round to round.

The known tokens stay as they are from the first round to the last, and what the blocks make of them changes only a little
with the tokens of the hole. So the first round computes all tokens, and later rounds only those of the hole, which see the
keys and values of the known ones as the first round left them. No score gets worse by it (docs/results.md). Compare
Fast-dLLM (Wu et al. 2025, https://arxiv.org/abs/2505.22618), which keeps those of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 32    # numbers of tokens are rounded up to these: matrix kernels for a few rows round differently


class KVCache:
    """The keys and values of one attention layer.

    Args:
        keys, values: (B, heads, N, d) of all tokens; None before the first round.
        places: (B, Q) int64 in [0, N), the tokens that are computed anew; None computes all.
    """

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None, places: Tensor | None = None) -> None:
        self.keys, self.values, self.places = keys, values, places

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take those of the tokens just computed, (B, heads, Q, d). Returns those of all, (B, heads, N, d)."""
        if self.places is None:
            self.keys, self.values = keys.contiguous(), values.contiguous()    # a view would hold the queries in memory too
        else:
            at = self.places[:, None, :, None].expand_as(keys)
            self.keys.scatter_(2, at, keys)
            self.values.scatter_(2, at, values)
        return self.keys, self.values

    def pick(self, rows: Tensor | slice, places: Tensor | None = None) -> KVCache:
        """Some of the rows, copied unless they are a slice, for a round that computes `places` anew."""
        return KVCache(self.keys[rows], self.values[rows], places)


def join_caches(parts: Sequence[Sequence[KVCache]]) -> list[KVCache]:
    """The caches of every layer, of all parts of a batch together."""
    if len(parts) == 1:
        return list(parts[0])    # without a copy
    return [
        KVCache(torch.cat([c.keys for c in layer]), torch.cat([c.values for c in layer]))
        for layer in zip(*parts, strict=True)
    ]


def hole_places(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tokens of the hole lie.

    Args:
        hidden: (B, N) bool, at least one True in each row.
    Returns:
        (B, Q) int64 places, in order, filled up with the row's first; and (B, Q) bool, which are no filling.
    """
    count = hidden.sum(1, keepdim=True)                                        # (B, 1)
    most = int(count.max())                                                    # a GPU is waited for, once
    Q = min(most + -most % ROWS, hidden.shape[1])
    places = hidden.byte().argsort(dim=1, descending=True, stable=True)[:, :Q]
    own = torch.arange(Q, device=hidden.device) < count                        # (B, Q)
    return torch.where(own, places, places[:, :1]), own


def filled_up(positions: Tensor, multiple: int) -> Tensor:
    """(M,) positions made up to a multiple with position 0."""
    return F.pad(positions, (0, -len(positions) % multiple))
