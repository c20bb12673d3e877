"""Windows: the transformer sees 16x16 tokens at a time; the token grid of a picture may be larger.

Windows overlap, and those of one picture share its tokens. Where several windows see a token, their log-probabilities are
averaged, with weights that fall towards a window's edge, and so are the features that the decoder takes (compare
MultiDiffusion, Bar-Tal et al. 2023, https://arxiv.org/abs/2302.08113). The windows of all pictures are computed together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .decoding import Options, Round, halton_order, iterative_decode
from .kv_cache import KVCache, join_caches

if TYPE_CHECKING:
    from .maskgit import MaskGIT

# Keys and values are kept where a picture has at most so many windows, which bounds the memory: 6 MB a window, in float32.
MOST_KEPT = 4


class Layout(NamedTuple):
    """Which tokens the windows see. A picture's tokens are a list, L long, made up to the longest of the batch."""

    index: Tensor           # (W, N) int64: where each window's tokens lie in (B, L), as b * L + place
    shares: Tensor          # (W, N) each window's weight in the average of a token; a token's weights sum to 1
    lengths: list[int]      # (B,) tokens of each picture
    windows: list[int]      # (B,) windows of each picture
    order: Tensor           # (B, L) when the Halton sequence comes to each token


class Known(NamedTuple):
    """What the known part of the pictures gives: computed once, used in every round and by the decoder."""

    tokens: Tensor             # (B, L) int64, the mask token where the patch touches the hole
    hidden: Tensor             # (B, L) bool, where that is
    pixels: Tensor | None      # (W, N, pixel_dim), where the transformer takes them
    features: Tensor | None    # (W, N, D) the transformer's, window by window, where the decoder takes them
    context: Tensor | None     # (W, N, D) the same, averaged over the windows that see a token
    caches: list[KVCache]      # of each block; windows that are not kept are left out


def place_windows(wanted: Tensor, grid: int, reach: int) -> Tensor:
    """Few windows that show every wanted token with what surrounds it.

    Args:
        wanted: (rows, columns) bool, neither less than `grid`.
        grid: side of a window in tokens.
        reach: side of the window's middle; a wanted token lies in the middle of a window, unless at the picture's edge.
    Returns:
        (W, 2) int64, top and left of each window in tokens.
    """
    by_rows = in_bands(wanted, grid, reach)
    by_columns = in_bands(wanted.T, grid, reach).flip(1)
    return by_columns if len(by_columns) < len(by_rows) else by_rows


def in_bands(wanted: Tensor, grid: int, reach: int) -> Tensor:
    """The windows of `place_windows`, placed in bands of `reach` rows from the top, in a band from the left."""
    left_over, corners = wanted.numpy().copy(), {}
    while left_over.any():
        top = int(left_over.any(1).argmax())
        band = left_over[top : top + reach]                                     # a view: what is seen is struck out
        while band.any():
            left = int(band.any(0).argmax())
            y, x = band[:, left : left + reach].nonzero()
            y, x = top + (y.min() + y.max() + 1) // 2, left + (x.min() + x.max() + 1) // 2      # their middle
            corner = (min(max(int(m) - grid // 2, 0), n - grid) for m, n in zip((y, x), wanted.shape, strict=True))
            corners[tuple(corner)] = None
            band[:, left : left + reach] = False
    return torch.tensor(list(corners), dtype=torch.int64).view(-1, 2)


def ramp(length: int) -> Tensor:
    """Weights over a window, (length, length): 1 at its middle, falling to almost 0 at its edge."""
    side = torch.arange(length)
    side = (torch.minimum(side, length - 1 - side) + 1) / ((length + 1) // 2)
    return side[:, None] * side


def make_layout(corners: Sequence[Tensor], columns: Sequence[int], grid: int) -> Layout:
    """The layout of a batch.

    Args:
        corners: for each picture the (W_b, 2) of `place_windows`.
        columns: the width of each picture's grid in tokens.
        grid: side of a window in tokens.
    """
    inside = torch.arange(grid)
    halton = halton_order(grid * grid)
    lists, places = [], []
    for corner, width in zip(corners, columns, strict=True):
        rows, across = (corner[:, i, None] + inside for i in (0, 1))             # (W_b, grid)
        flat = (rows[:, :, None] * width + across[:, None, :]).flatten(1)        # (W_b, N)
        seen, place = flat.unique(return_inverse=True)                           # (L_b,), (W_b, N)
        lists.append(halton[seen // width % grid * grid + seen % width % grid])
        places.append(place)
    length = max(map(len, lists))
    index = torch.cat([b * length + place for b, place in enumerate(places)])    # (W, N)
    weights = ramp(grid).flatten().expand(index.shape)                           # (W, N)
    sums = torch.zeros(len(lists) * length).index_add_(0, index.flatten(), weights.flatten())
    return Layout(
        index, weights / sums[index], [len(x) for x in lists], [len(x) for x in places],
        torch.nn.utils.rnn.pad_sequence(lists, batch_first=True),
    )    # fmt: skip


def single_windows(count: int, grid: int) -> Layout:
    """The layout of some pictures of the model's own size."""
    return make_layout([torch.zeros(1, 2, dtype=torch.int64)] * count, [grid] * count, grid)


class WindowedModel:
    """A model and the windows of a batch of pictures.

    Args:
        image: (W, 3, S, S) in [-1, 1]; what it holds inside the hole is ignored.
        mask: (W, 1, S, S), 1 = hole.
        guess: (W, 4, S, S), see `models.local_autoencoder.condition`, or None.
        batch_size: windows computed together.
    """

    def __init__(
        self, model: MaskGIT, layout: Layout, image: Tensor, mask: Tensor, guess: Tensor | None, batch_size: int
    ) -> None:
        self.model, self.layout, self.image, self.mask, self.guess = model, layout, image, mask, guess
        self.index, self.shares = layout.index.to(image.device), layout.shares.to(image.device)
        self.alone = self.shares == 1                                            # (W, N) seen by this window only
        self.batch_size = batch_size
        few = torch.tensor([n <= MOST_KEPT for n in layout.windows for _ in range(n)], device=image.device)
        self.kept = few & (model.vqgan.config.context_dim > 0)                   # (W,) whose keys and values are kept
        self.cache_row = self.kept.cumsum(0) - 1                                 # (W,) where in the caches

    def parts(self, windows: Tensor | None = None) -> Sequence[Tensor]:
        """Numbers of windows, so many together as `batch_size` says."""
        windows = torch.arange(len(self.index), device=self.index.device) if windows is None else windows
        return [part for part in windows.split(self.batch_size) if len(part)]

    def paired(self, part: Tensor, always: bool = False) -> Tensor:
        """A single window twice, where the kernels for one picture round differently: in half precision, or always."""
        single = len(part) == 1 and (always or torch.is_autocast_enabled(part.device.type))
        return part.repeat(2) if single else part

    def known(self, keep: bool = False) -> Known:
        """The known part of the pictures. With `keep`, keys and values of the windows that are `kept` are kept."""
        shape = len(self.layout.lengths), self.layout.order.shape[1]
        kept = self.kept & keep
        parts = [*self.parts(torch.where(kept)[0]), *self.parts(torch.where(~kept)[0])]
        seen, caches = [], []
        for part in parts:
            p = self.paired(part)
            mine = [KVCache() for _ in self.model.transformer.blocks] if kept[part[0]] else None
            found = self.model.known(self.image[p], self.mask[p], pick(self.guess, p), mine)
            seen.append([None if x is None else x[: len(part)] for x in found])
            if mine:
                caches.append([cache.pick(slice(len(part))) for cache in mine])
        back = torch.cat(parts).argsort()
        tokens, hidden, pixels, features = (pick(join(values), back) for values in zip(*seen, strict=True))
        context = features
        if features is not None and not bool(self.alone.all()):
            total = torch.zeros(shape[0] * shape[1], features.shape[2], device=features.device)     # (B L, D)
            for p in self.parts():
                total.index_add_(0, self.index[p].flatten(), (features[p] * self.shares[p, :, None]).flatten(0, 1))
            context = total[self.index]
        flat = torch.zeros(shape[0] * shape[1], dtype=torch.int64, device=tokens.device)
        return Known(
            flat.index_put((self.index,), tokens).view(shape), flat.bool().index_put((self.index,), hidden).view(shape),
            pixels, features, context, join_caches(caches),
        )    # fmt: skip

    def logits(self, tokens: Tensor, known: Known, first: bool) -> Tensor:
        """(M, K) for the M of the tokens (B, L) that are the mask token: logits, or averaged log-probabilities."""
        flat = tokens.flatten()
        masked = flat == self.model.mask_token_id                                # (B L,)
        row = masked.cumsum(0) - 1                                               # (B L,) of the result
        given = flat[self.index]                                                 # (W, N)
        open_ = masked[self.index]                                               # (W, N)
        hidden = known.hidden.flatten()[self.index]                              # (W, N)
        kept = self.kept if known.caches and not first else torch.zeros_like(self.kept)
        by_size = hidden.sum(1).argsort(stable=True)                             # windows with holes of one size together
        needed = open_.any(1)                                                    # (W,)
        parts = [*self.parts(torch.where(needed & ~kept)[0]), *self.parts(by_size[(needed & kept)[by_size]])]
        out = None
        for p in parts:
            wanted, q = open_[p], self.paired(p)
            pixels = pick(known.pixels, q)
            if kept[p[0]]:
                logits = self.model.later_logits(given[q], pixels, hidden[q], known.caches, self.cache_row[q])
            else:
                logits = self.model.masked_logits(given[q], pixels, pick(known.features, q) if first else None)
            logits = logits[: wanted.sum()]                                      # (m, K)
            share = self.shares[p][wanted].unsqueeze(1)                          # (m, 1)
            logits = torch.where(share == 1, logits, logits.log_softmax(-1) * share)
            if out is None:
                out = logits.new_zeros(int(row[-1]) + 1, logits.shape[1])
            out.index_add_(0, row[self.index[p][wanted]], logits)
        return out

    def complete(
        self, generators: Sequence[torch.Generator], scale: Sequence[int] | None = None,
        on_round: Callable[[int], None] | None = None, **options: Any,
    ) -> tuple[list[Round], Known]:    # fmt: skip
        """All rounds, without the pictures; options as in `models.decoding.iterative_decode`.

        Where the number of rounds follows from the picture, rounds after the first compute the hole alone, see
        `models.kv_cache`.
        """
        known = self.known(keep=Options(**options).planned is None)
        rounds = 0

        def logits(tokens: Tensor) -> Tensor:
            nonlocal rounds
            rounds += 1
            return self.logits(tokens, known, first=rounds == 1)

        done = iterative_decode(
            known.tokens, known.hidden, logits, mask_token_id=self.model.mask_token_id, generators=generators,
            own_temperature=self.model.transformer.config.temperature, lengths=self.layout.lengths,
            order=self.layout.order.to(known.tokens.device), scale=scale, on_round=on_round, **options,
        )    # fmt: skip
        return done, known

    def decode(self, tokens: Tensor, known: Known) -> Tensor:
        """Tokens (B, L) to windows (W, 3, S, S) in [-1, 1]."""
        tokens, decoded = tokens.flatten()[self.index], []                       # (W, N)
        for part in self.parts():
            p = self.paired(part, always=True)
            pixels = self.model.decode(tokens[p], self.image[p], self.mask[p], pick(known.context, p), pick(self.guess, p))
            decoded.append(pixels[: len(part)])
        return torch.cat(decoded)


def pick(values: Tensor | None, which: Tensor) -> Tensor | None:
    return None if values is None else values[which]


def join(values: Sequence[Tensor | None]) -> Tensor | None:
    return None if values[0] is None else torch.cat(values)
