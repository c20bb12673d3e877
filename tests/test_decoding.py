"""models/decoding.py and models/schedule.py: closed forms, plans, order, randomness, the reference's steps, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_sets import rng
from torch import Tensor

from models.decoding import DECODERS, TEXTURE, Round, halton_order, iterative_decode
from models.schedule import SCHEDULES, gamma, mask_plan

N, K = 36, 40    # a 6x6 grid
MASK = K


def seeds(*numbers: int) -> list[torch.Generator]:
    return [rng(n) for n in numbers]


class Table:
    """A network of two random tables: logits depend on the place and on the row's other tokens, never on other rows."""

    def __init__(self, scale: float = 2.0, length: int = N) -> None:
        self.places = torch.randn(length, K, generator=rng(1)) * scale
        self.context = torch.randn(K + 1, K, generator=rng(2)) * scale
        self.calls = 0

    def every(self, tokens: Tensor) -> Tensor:
        """Logits (B, N, K) of all places."""
        return torch.stack([self.places + self.context[row].mean(0) for row in tokens])

    def __call__(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        return self.every(tokens)[tokens == MASK]


def rows(*holes: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, N) and masks with so many random places to be filled in each row."""
    generator = rng(3)
    tokens = torch.randint(K, (len(holes), N), generator=generator)
    order = torch.rand(len(holes), N, generator=generator).argsort(1).argsort(1)
    return tokens, order < torch.tensor(holes).unsqueeze(1)


def decode(tokens: Tensor, mask: Tensor, table=None, **options) -> list[Round]:
    options.setdefault("generators", seeds(*range(len(tokens))))
    options.setdefault("total_iter", 10)
    return iterative_decode(tokens, mask, table or Table(), mask_token_id=MASK, **options)


def same(a: Round, b: Round) -> bool:
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.masked, b.masked)


# ---- what holds for every decoder ----


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("total_iter", [1, 2, 7, 50, None])
def test_known_and_accepted_tokens_stay_and_no_mask_token_is_left(decoder, total_iter):
    tokens, mask = rows(0, 1, 20, N)
    rounds = decode(tokens, mask, decoder=decoder, total_iter=total_iter, entropy_budget=6.0)
    assert len(rounds) == (total_iter or len(rounds))
    before = Round(tokens, mask)
    for r in rounds:
        assert torch.equal(r.tokens[~before.masked], before.tokens[~before.masked])
        assert ((r.tokens >= 0) & (r.tokens < K)).all()
        assert not (r.masked & ~before.masked).any()
        before = r


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_batch_gives_what_single_rows_give(decoder):
    tokens, mask = rows(0, 2, 20, N)
    batch = decode(tokens, mask, decoder=decoder, total_iter=5, generators=seeds(4, 5, 6, 7))
    for i, seed in enumerate((4, 5, 6, 7)):
        single = decode(tokens[i : i + 1], mask[i : i + 1], decoder=decoder, total_iter=5, generators=seeds(seed))
        assert all(same(a, Round(b.tokens[i : i + 1], b.masked[i : i + 1])) for a, b in zip(single, batch, strict=True))


# ---- rounds by need ----


def flat(tokens: Tensor) -> Tensor:
    """Every code is as likely as every other: an entropy of log K for each token."""
    return torch.zeros(int((tokens == MASK).sum()), K)


def by_need(*holes: int, budget: float, table=flat, **options) -> list[list[int]]:
    """How many tokens of each row are masked after every round."""
    rounds = decode(*rows(*holes), table, total_iter=None, entropy_budget=budget, **options)
    return [[int(r.masked[row].sum()) for r in rounds] for row in range(len(holes))]


@pytest.mark.parametrize("decoder", ["maskgit", "halton"])
def test_a_round_accepts_what_the_budget_pays_for_and_at_least_one_token(decoder):
    ten = 10 * (math.log(K) - TEXTURE) + 0.01
    assert by_need(25, 5, 10, 0, budget=ten, decoder=decoder) == [[15, 5, 0], [0] * 3, [0] * 3, [0] * 3]
    assert by_need(25, budget=ten, scale=[2], decoder=decoder) == [[5, 0]]
    assert by_need(25, budget=1e6, decoder=decoder) == [[0]]
    sure = torch.zeros(K)
    sure[3] = 100.0    # costs nothing
    assert by_need(N, budget=0.01, table=lambda t: sure.expand(int((t == MASK).sum()), K), decoder=decoder) == [[0]]
    few = math.ceil(math.exp(TEXTURE)) - 1    # equally likely codes whose entropy is texture, which costs nothing either
    texture = torch.where(torch.arange(K) < few, 0.0, -100.0)
    assert by_need(N, budget=0.0, table=lambda t: texture.expand(int((t == MASK).sum()), K), decoder=decoder) == [[0]]
    assert by_need(9, 2, budget=0.0, max_iter=4) == [[8, 7, 6, 0], [1, 0, 0, 0]]


def by_need_row(tokens: list[int], hole: list[bool], table: Table, budget: float, scale: float, generator) -> list:
    """The loop for one picture, step by step; every token takes its likeliest code."""
    masked, rounds, noise = list(hole), [], torch.rand(8, 2, N, generator=generator)[:, 1]
    while any(masked):
        given = torch.tensor([[MASK if m else t for t, m in zip(tokens, masked, strict=True)]])
        log_p = table.every(given)[0].log_softmax(-1)
        cost, rank = {}, {}
        for n in [n for n in range(N) if masked[n]]:
            tokens[n] = int(log_p[n].argmax())
            cost[n] = max(0.0, -(log_p[n].exp() * log_p[n]).sum().item() - TEXTURE)
            gumbel = -(-noise[len(rounds)][n].double().log()).log()
            rank[n] = log_p[n, tokens[n]].item() + (scale * gumbel.item() if not rounds else 0.0)    # noise at first alone
        spent, last = 0.0, len(rounds) == 7
        for i, n in enumerate(sorted(rank, key=rank.__getitem__, reverse=True)):
            spent += cost[n]
            masked[n] = i > 0 and spent > budget and not last
        rounds.append((list(tokens), list(masked)))
    return rounds


@pytest.mark.parametrize(("budget", "least"), [(0.0, 8), (5.0, 3), (1e6, 1)])
def test_rounds_by_need_follow_the_loop_written_straight_down(budget, least):
    table, (tokens, mask) = Table(scale=0.7), rows(20, 0, N)
    rounds = decode(tokens, mask, table, total_iter=None, entropy_budget=budget, temperature=0, choice_temperature=2.0)
    for b, generator in enumerate(seeds(0, 1, 2)):
        expected = by_need_row(tokens[b].tolist(), mask[b].tolist(), table, budget, 2.0, generator)
        assert [(r.tokens[b].tolist(), r.masked[b].tolist()) for r in rounds[: len(expected)]] == expected
        assert not any(r.masked[b].any() for r in rounds[len(expected) :])
    assert len(rounds) == len(expected) >= least


# ---- the reference, written straight down ----


def reference_row(tokens: list[int], hole: list[bool], table: Table, T: int, schedule: str, scale: float, generator):
    """The reference's loop for one picture, step by step."""
    masked, rounds = list(hole), []
    for step in range(T):
        ratio = step / T                                                                       # 1. progress from 0
        given = torch.tensor([[MASK if m else t for t, m in zip(tokens, masked, strict=True)]])
        probabilities = table.every(given)[0].softmax(-1)                                      # 2. predict
        noise = torch.rand(2, N, generator=generator)[1]
        confidence = []
        for n in range(N):
            if masked[n]:
                tokens[n] = int(probabilities[n].argmax())                                     # 3. the likeliest token
                gumbel = -(-noise[n].double().log()).log()
                confidence.append(probabilities[n, tokens[n]].item() + scale * (1 - ratio) * gumbel.item())    # 4.
            else:
                confidence.append(math.inf)                                                    # 5. known ones last
        left = math.ceil(gamma(schedule, ratio).item() * sum(hole))                            # 6. how many
        worst = sorted(range(N), key=confidence.__getitem__)[:left]                            # 7. mask again
        masked = [n in worst and math.isfinite(confidence[n]) for n in range(N)]
        rounds.append((list(tokens), masked))
    return rounds


@pytest.mark.parametrize("schedule", ["cosine", "linear", "square"])
@pytest.mark.parametrize("total_iter", [1, 4, 10])
def test_the_reference_decoder_follows_the_reference(schedule, total_iter):
    tokens, mask = rows(3, 20, N)
    ours = decode(tokens, mask, decoder="reference", schedule=schedule, total_iter=total_iter, choice_temperature=4.5)
    for i in range(len(tokens)):
        theirs = reference_row(tokens[i].tolist(), mask[i].tolist(), Table(), total_iter, schedule, 4.5, rng(i))
        assert [(r.tokens[i].tolist(), r.masked[i].tolist()) for r in ours] == theirs


# ---- sampling ----


@pytest.mark.parametrize("decoder", ["maskgit", "halton"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_are_as_frequent_as_the_softmax_says(decoder, temperature):
    draws = 10_000
    logits = torch.randn(K, generator=rng(5))
    logits[4] = -math.inf    # a code that can't occur
    rounds = decode(
        torch.zeros(1, draws, dtype=torch.long), torch.ones(1, draws, dtype=torch.bool), lambda t: logits.expand(draws, K),
        decoder=decoder, total_iter=1, temperature=temperature,
    )    # fmt: skip
    counts = rounds[-1].tokens.flatten().bincount(minlength=K).double()
    expected = (logits.double() / temperature).softmax(0) * draws
    assert counts[4] == 0
    possible = expected > 0
    chi_square = ((counts - expected)[possible].square() / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1    # mean and, halved, variance of the statistic
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("decoder", ["maskgit", "halton"])
def test_temperature_zero_takes_the_likeliest(decoder):
    tokens, mask = rows(20, N)
    table = Table()
    rounds = decode(tokens, mask, table, decoder=decoder, total_iter=3, temperature=0)
    masked = mask
    for r in rounds:
        expected = table.every(torch.where(masked, MASK, tokens)).argmax(-1)
        assert torch.equal(r.tokens[masked], expected[masked])
        tokens, masked = r.tokens, r.masked
    near = decode(*rows(20, N), decoder=decoder, total_iter=3, temperature=1e-4, choice_temperature=0)
    cold = decode(*rows(20, N), decoder=decoder, total_iter=3, temperature=0, choice_temperature=0)
    assert torch.equal(near[-1].tokens, cold[-1].tokens)


# ---- the order ----


def test_without_noise_the_most_confident_are_kept():
    tokens, mask = rows(20, N)
    table = Table()
    first = decode(tokens, mask, table, total_iter=4, choice_temperature=0)[0]
    log_p = table.every(torch.where(mask, MASK, tokens)).log_softmax(-1).gather(2, first.tokens.unsqueeze(2)).squeeze(2)
    for i in range(2):
        kept = mask[i] & ~first.masked[i]
        assert log_p[i][kept].min() >= log_p[i][first.masked[i]].max()


def test_halton_order_visits_all_quadrants_alike_and_no_neighbours_in_turn():
    side = 16
    places = halton_order(side * side).argsort()
    assert torch.equal(places.sort().values, torch.arange(side * side))
    points = torch.stack([places // side, places % side], dim=1)
    visits = torch.nn.functional.one_hot((points // (side // 2) * torch.tensor([2, 1])).sum(1), 4).cumsum(0)
    assert (visits.amax(1) - visits.amin(1)).max() <= 6    # 8 to 20 in random orders
    assert (points[1:64] - points[:63]).double().norm(dim=1).min() > 2
    tokens, mask = rows(20, N)
    order = halton_order(N).expand(2, N)
    for r in decode(tokens, mask, decoder="halton", total_iter=5)[:-1]:
        for i in range(2):
            kept = mask[i] & ~r.masked[i]
            assert order[i][kept].max() < order[i][r.masked[i]].min()


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decoder": "best"}, "decoder"), ({"schedule": "cosin"}, "schedule"),
        ({"total_iter": 0}, "total_iter"), ({"max_iter": 0}, "max_iter"),
        ({"total_iter": None, "sweet_spot": 2}, "total_iter"), ({"total_iter": 5, "sweet_spot": 6}, "sweet_spot"),
        ({"temperature": math.nan}, "temperature"), ({"choice_temperature": math.inf}, "choice_temperature"),
        ({"total_iter": None, "entropy_budget": -1.0}, "entropy_budget"), ({"generators": seeds(1)}, "generators"),
    ],
)
def test_senseless_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        decode(*rows(5, 20), **options)


def test_the_noise_in_the_order_falls_with_the_rounds():
    N, K, T, c = 36, 8, 3, 4.5
    table = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    score = table.log_softmax(-1).amax(-1)                                                # of the likeliest tokens
    rounds = iterative_decode(
        torch.zeros(1, N, dtype=torch.long), torch.ones(1, N, dtype=torch.bool), lambda tokens: table[tokens[0] == K],
        mask_token_id=K, generators=[torch.Generator().manual_seed(0)], total_iter=T, temperature=0, choice_temperature=c,
    )    # fmt: skip
    uniform = torch.rand(T, 2, N, generator=torch.Generator().manual_seed(0))[:, 1]
    masked = torch.ones(N, dtype=torch.bool)
    for t, (noise, left) in enumerate(zip(uniform, mask_plan("cosine", torch.tensor([N]), T)[0], strict=True), 1):
        order = score - c * (1 - t / T) * torch.log(-torch.log(noise))
        least = order.masked_fill(~masked, float("inf")).argsort()[:left]
        masked = torch.zeros(N, dtype=torch.bool).index_fill(0, least, True)
        assert torch.equal(rounds[t - 1].masked[0], masked)


# ---- schedules ----


CLOSED_FORMS = {
    "cosine": {1 / 3: math.sqrt(3) / 2, 0.5: math.sqrt(0.5), 2 / 3: 0.5},
    "linear": {0.25: 0.75, 0.5: 0.5, 0.9: 0.1},
    "square": {0.25: 15 / 16, 0.5: 0.75, 0.9: 0.19},
    "sqrt": {0.04: 0.8, 0.25: 0.5, 0.81: 0.1},
    "cubic": {0.25: 63 / 64, 0.5: 0.875, 0.9: 0.271},
    "arccos": {0.5: 2 / 3, math.sqrt(0.5): 0.5, math.sqrt(3) / 2: 1 / 3},
}
POWER = {"linear": 1, "square": 2, "cubic": 3}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_closed_forms_exact_ends_and_a_fall_between(schedule):
    points = CLOSED_FORMS[schedule]
    r = torch.tensor(list(points), dtype=torch.float64)
    torch.testing.assert_close(gamma(schedule, r), torch.tensor(list(points.values()), dtype=torch.float64))
    assert gamma(schedule, 0.25).item() == gamma(schedule, torch.tensor([[0.25]])).item()
    assert gamma(schedule, torch.zeros(2, 3)).shape == (2, 3) and gamma(schedule, 0).dtype == torch.float64
    ratio = gamma(schedule, torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert ratio[0] == 1 and ratio[-1] == 0
    assert (ratio.diff() < 0).all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(SCHEDULES)), st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(1, 40))
def test_plan_falls_to_zero(schedule, holes, total_iter):
    plan = mask_plan(schedule, torch.tensor(holes), total_iter)
    assert plan.dtype == torch.int64 and plan.shape == (len(holes), total_iter)
    before = torch.cat([torch.tensor(holes).unsqueeze(1), plan[:, :-1]], dim=1)
    assert ((plan < before) | ((before == 0) & (plan == 0))).all()
    assert (plan >= 0).all() and not plan[:, -1].any()
    for row, hole in zip(plan, holes, strict=True):    # each row as if it were alone
        assert torch.equal(row, mask_plan(schedule, torch.tensor([hole]), total_iter)[0])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(POWER)), st.integers(0, 300), st.integers(1, 40))
def test_plan_is_the_floor_of_the_schedule(schedule, hole, total_iter):
    """Against whole-number arithmetic, which has no rounding: floor((1 - (t/T)^p) n) = (T^p - t^p) n // T^p."""
    left, power = hole, POWER[schedule]
    plan = mask_plan(schedule, torch.tensor([hole]), total_iter)[0]
    for t in range(1, total_iter + 1):
        share = (total_iter**power - t**power) * hole // total_iter**power
        left = max(0, min(share, left - 1))
        assert plan[t - 1] == left
