"""Iterative decoding (Chang et al. 2022, MaskGIT, section 3.3): fill the masked tokens over a few rounds.

Each round predicts every masked token, keeps the best and masks the rest again; the number left follows the schedule. The
functions know nothing of networks: `tokens_to_logits` may be any callable, a random table in a test.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .schedule import SCHEDULES, gamma, mask_plan

DECODERS = ("maskgit", "halton", "reference")
REFERENCE_ITER = 10    # rounds of the reference

# Nats. So much of a token's entropy is fine texture, of which other tokens hardly tell; what is above depends on them, and
# gets lost when they are sampled at once. Wide holes have more of it than thin ones.
TEXTURE = 2.5

# Known tokens must never be masked again. Noise can push a log-probability above 0, so no finite value is safe.
KNOWN_CONFIDENCE = float("inf")


class Round(NamedTuple):
    tokens: Tensor    # (B, N) int64 in [0, K): every token as predicted in this round, known ones as given
    masked: Tensor    # (B, N) bool: what the next round predicts again


@dataclass(frozen=True)
class Options:
    """How masked tokens are filled.

    Without `total_iter` the number of rounds follows from the picture: a round accepts the surest tokens as long as the
    sum of their entropies stays within a budget, which bounds what is lost by sampling them independently of each other
    (Ben-Hamu et al. 2025, https://arxiv.org/abs/2505.24857). Only what is above `TEXTURE` counts, which is our addition.
    Every picture takes its own number of rounds.

    Args:
        schedule: gamma function, one of `models.schedule.SCHEDULES`; used with `total_iter`.
        total_iter: T, rounds of the schedule. None: as many as the picture needs; for 'reference' 10.
        sweet_spot: stop after this round, 1..T; the schedule still follows T. None runs them all.
        max_iter: without `total_iter`, the last round, which accepts everything.
        entropy_budget: without `total_iter`, nats above `TEXTURE` that a round may accept in a window; where it has a
            guess, `models.completion.GUESSED` times as many.
        decoder: 'maskgit' samples tokens and ranks them by log-probability + noise; 'halton' samples and goes through the
            hole in a low-discrepancy order (Besnier et al. 2025, https://arxiv.org/abs/2503.17076); 'reference' takes the
            likeliest token and ranks by probability + noise, with progress counted from 0.
        temperature: divides the logits before sampling; 0 takes the likeliest token. Not used by 'reference'.
        choice_temperature: scale of the Gumbel noise in the ranking. It falls to 0 over the rounds; without `total_iter`
            only the first round has it, which settles where the filling starts.
    Raises:
        ValueError: an option makes no sense.
    """

    schedule: str = "cosine"
    total_iter: int | None = None
    sweet_spot: int | None = None
    max_iter: int = 8
    entropy_budget: float = 15.0    # thin holes take two to three rounds, large ones four
    decoder: str = "maskgit"
    temperature: float = 1.0
    choice_temperature: float = 4.5

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            raise ValueError(f"unknown decoder {self.decoder!r}; expected one of {', '.join(DECODERS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown mask schedule {self.schedule!r}; expected one of {', '.join(SCHEDULES)}")
        for name in ("total_iter", "max_iter"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.sweet_spot is not None and self.total_iter is None:
            raise ValueError("sweet_spot is a round of total_iter: give total_iter too")
        if self.sweet_spot is not None and not 1 <= self.sweet_spot <= self.total_iter:
            raise ValueError(f"sweet_spot must lie in 1..total_iter ({self.total_iter}), got {self.sweet_spot}")
        for name in ("temperature", "choice_temperature", "entropy_budget"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be 0 or more, got {value}")

    @property
    def planned(self) -> int | None:
        """T, or None where the number of rounds follows from the picture."""
        return self.total_iter or (REFERENCE_ITER if self.decoder == "reference" else None)

    @property
    def rounds(self) -> int:
        """The last round, at most."""
        return self.sweet_spot or self.planned or self.max_iter


@torch.no_grad()
def iterative_decode(
    tokens: Tensor,
    token_mask: Tensor,
    tokens_to_logits: Callable[[Tensor], Tensor],
    *,
    mask_token_id: int,
    generators: Sequence[torch.Generator],
    lengths: Sequence[int] | None = None,
    own_temperature: float = 1.0,
    scale: Sequence[int] | None = None,
    order: Tensor | None = None,
    on_round: Callable[[int], None] | None = None,
    **options: Any,
) -> list[Round]:
    """Fill masked tokens. Known tokens are returned unchanged, and the arguments are not written to.

    Args:
        tokens: (B, N) int64; what stands at masked positions is ignored.
        token_mask: (B, N) bool, True = to be filled; every row has its own count.
        tokens_to_logits: (B, N) tokens -> (M, K) logits of those that are `mask_token_id`, row by row.
        generators: one for each row, so that a row's result doesn't depend on its neighbours in the batch.
        lengths: (B,) tokens of each row that are its own; the others fill it up. Default: N.
        own_temperature: the model's (`TransformerConfig.temperature`), multiplied with the one in `options`.
        scale: (B,) factor of each row's entropy budget. Default: 1.
        order: (B, N) when the halton decoder comes to each token. Default: that of a square grid.
        on_round: called with the number of each finished round, from 1.
        options: see `Options`.
    Returns:
        One `Round` for each round run. The last one's `tokens` are the result.
    """
    o = Options(**options)
    o = replace(o, temperature=o.temperature * own_temperature)
    B, N = tokens.shape
    if token_mask.shape != tokens.shape or token_mask.dtype != torch.bool:
        raise ValueError(f"token_mask must be bool {tuple(tokens.shape)}, got {token_mask.dtype} {tuple(token_mask.shape)}")
    if len(generators) != B:
        raise ValueError(f"{B} rows need as many generators, got {len(generators)}")
    if o.decoder == "halton" and order is None:
        order = halton_order(N).to(tokens.device).expand(B, N)
    plan = _plan(o, token_mask.sum(1)) if o.planned else None                              # (B, T)
    budget = o.entropy_budget * torch.tensor(scale or [1] * B, device=tokens.device)     # (B,)
    masked, rounds = token_mask, []
    for t, noise in enumerate(_noise(generators, o.rounds, lengths or [N] * B, N).to(tokens.device), 1):
        positions = masked_positions(masked)                                               # (M,)
        if len(positions):
            logits = tokens_to_logits(torch.where(masked, mask_token_id, tokens))          # (M, K)
            tokens, score, entropy = _predict(o, logits, tokens, masked, noise[:, 0].flatten()[positions])
            confidence = torch.where(masked, _confidence(o, score, t, noise[:, 1], order), KNOWN_CONFIDENCE)    # (B, N)
            if plan is not None:
                left = plan[:, t - 1]                                                      # (B,)
            else:
                left = _unaffordable(confidence, entropy, masked, budget) * (t < o.max_iter)
            masked = lowest(confidence, left) & masked                                     # (B, N)
        rounds.append(Round(tokens, masked))
        if on_round:
            on_round(t)
        if plan is None and not bool(masked.any()):
            break
    return rounds


def _noise(generators: Sequence[torch.Generator], rounds: int, lengths: Sequence[int], longest: int) -> Tensor:
    """(rounds, B, 2, N) uniform numbers, as many of each generator as its row is long."""
    rows = [torch.rand(rounds, 2, n, generator=g) for g, n in zip(generators, lengths, strict=True)]
    return torch.stack([F.pad(row, (0, longest - row.shape[2]), value=0.5) for row in rows], 1)


def _plan(o: Options, hole: Tensor) -> Tensor:
    """(B, T): how many tokens of each row stay masked after every round."""
    T = o.planned
    if o.decoder != "reference":
        return mask_plan(o.schedule, hole, T)
    # The reference counts progress from 0: its first round keeps nothing, and its last leaves tokens masked.
    ratios = gamma(o.schedule, torch.arange(T, dtype=torch.float64) / T)                   # (T,)
    return (ratios * hole.cpu().unsqueeze(1)).ceil().long().to(hole.device)                # (B, T)


def _predict(o: Options, logits: Tensor, tokens: Tensor, masked: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted tokens (B, N), known ones as given; scores (B, N), log-probabilities, for 'reference' probabilities; and
    entropies (B, N) in nats, 0 for known tokens."""
    if len(logits) != len(uniform):
        raise ValueError(f"tokens_to_logits must give a row for each of {len(uniform)} masked tokens, got {len(logits)}")
    logits = logits.float()                                                                # (M, K)
    log_p = logits.log_softmax(dim=-1)                                                     # (M, K)
    if o.decoder == "reference" or o.temperature == 0:
        picked = log_p.argmax(dim=-1)                                                      # (M,)
    else:
        # Inverse transform: the first code whose cumulative probability exceeds a uniform number.
        cumulative = (logits / o.temperature).softmax(dim=-1).cumsum(dim=-1)                 # (M, K)
        target = uniform.unsqueeze(1) * cumulative[:, -1:]                                 # (M, 1), in [0, total)
        picked = torch.searchsorted(cumulative, target, right=True).squeeze(1)             # (M,)
        picked = picked.clamp_max(logits.shape[1] - 1)
    score = log_p.gather(1, picked.unsqueeze(1)).squeeze(1)                                # (M,)
    if o.decoder == "reference":
        score = score.exp()
    entropy = -(log_p.exp() * log_p).sum(1)                                                # (M,)
    zero = torch.zeros(tokens.shape, device=tokens.device)
    return tokens.masked_scatter(masked, picked), zero.masked_scatter(masked, score), zero.masked_scatter(masked, entropy)


def _confidence(o: Options, score: Tensor, t: int, uniform: Tensor, order: Tensor | None) -> Tensor:
    """(B, N), high = keep."""
    if o.decoder == "halton":
        return -order.float()
    tiny = torch.finfo(uniform.dtype).tiny
    gumbel = -torch.log(-torch.log(uniform.clamp(tiny, 1 - 1e-7)))                         # (B, N)
    if o.planned is None:
        progress = min(t - 1, 1)
    else:
        progress = (t - 1 if o.decoder == "reference" else t) / o.planned
    return score + o.choice_temperature * (1 - progress) * gumbel


def _unaffordable(confidence: Tensor, entropy: Tensor, masked: Tensor, budget: Tensor) -> Tensor:
    """How many tokens stay masked in each row, (B,): all but the surest whose entropies above TEXTURE fit into the budget.

    At least one token of a row is accepted.
    """
    surest_first = confidence.argsort(dim=1, descending=True, stable=True)                 # (B, N), known tokens before all
    spent = (entropy - TEXTURE).clamp_min(0).gather(1, surest_first).cumsum(1)             # (B, N)
    affordable = (spent <= budget.unsqueeze(1)).sum(1) - (~masked).sum(1)                  # (B,)
    return (masked.sum(1) - affordable.clamp_min(1)).clamp_min(0)


def masked_positions(masked: Tensor) -> Tensor:
    """Positions b * N + n of all that is True in (B, N): (M,). A GPU is waited for, to know M."""
    if torch.jit.is_tracing():
        raise ValueError("a trace would hold for one mask only: export the model with `python -m tools.export --onnx DIR`")
    return masked.flatten().nonzero().squeeze(1)


def lowest(confidence: Tensor, count: Tensor) -> Tensor:
    """Mark the `count` least confident tokens of each row, by rank, so that ties can't change the number.

    Args:
        confidence: (B, N).
        count: (B,) in [0, N].
    Returns:
        (B, N) bool.
    """
    rank = confidence.argsort(dim=1, stable=True).argsort(dim=1, stable=True)              # (B, N)
    return rank < count.unsqueeze(1)


@functools.cache
def halton_order(seq_len: int) -> Tensor:
    """When each token of a square grid is visited by the Halton sequence of bases 2 and 3: (N,), a permutation of 0..N-1.

    Neighbours in time are far apart in space, so tokens that are filled together depend little on one another.
    """
    side = math.isqrt(seq_len)
    if side * side != seq_len:
        raise ValueError(f"the halton decoder needs a square grid of tokens, got {seq_len}")
    steps = torch.arange(1, 64 * seq_len + 1)
    cells = (radical_inverse(steps, 2) * side).long() * side + (radical_inverse(steps, 3) * side).long()
    first = torch.full((seq_len,), len(steps)).scatter_reduce(0, cells, steps, "amin")     # first visit of each token
    return first.argsort(stable=True).argsort(stable=True)


def radical_inverse(n: Tensor, base: int) -> Tensor:
    """Digits of n in `base`, mirrored at the point: 6 = 110 in base 2 -> 0.011 = 0.375. Same shape, float64 in [0, 1)."""
    n, out, scale = n.clone(), torch.zeros(n.shape, dtype=torch.float64), 1.0
    while bool((n > 0).any()):
        scale /= base
        out += scale * (n % base)
        n = n // base
    return out
