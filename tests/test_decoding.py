"""models/decoding.py and the engine around it: plans, order, randomness, the reference's steps, refusals."""

import math

import pytest
import torch
from small_sets import rng, small_model
from torch import Tensor

from models import MaskGIT
from models.decoding import DECODERS, Round, halton_order, iterative_decode
from models.schedule import SCHEDULES, gamma, mask_plan

N, K = 36, 11    # a 6x6 grid
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


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("decoder", ["maskgit", "halton"])
def test_counts_follow_the_plan_of_each_row(decoder, schedule):
    holes, T = (0, 1, 7, 20, N), 9
    rounds = decode(*rows(*holes), decoder=decoder, total_iter=T, schedule=schedule)
    for row, hole in enumerate(holes):
        counts = [int(r.masked[row].sum()) for r in rounds]
        left, expected = hole, []
        for t in range(1, T + 1):    # at least one token a round while any is left, and none after the last
            left = max(0, min(left - 1, math.floor(gamma(schedule, t / T).item() * hole + 1e-9)))
            expected.append(left)
        assert counts == expected and counts[-1] == 0


@pytest.mark.parametrize("decoder", DECODERS)
def test_ties_do_not_change_the_counts(decoder):
    tokens, mask = rows(20, N)
    flat = decode(tokens, mask, lambda t: torch.zeros(int((t == MASK).sum()), K), decoder=decoder, choice_temperature=0)
    usual = decode(tokens, mask, decoder=decoder)
    assert [r.masked.sum(1).tolist() for r in flat] == [r.masked.sum(1).tolist() for r in usual]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_sweet_spot_is_the_whole_run_cut_short(decoder):
    tokens, mask = rows(5, 20, N)
    whole, table = decode(tokens, mask, decoder=decoder, total_iter=6), Table()
    for t in range(1, 7):
        table.calls = 0
        part = decode(tokens, mask, table, decoder=decoder, total_iter=6, sweet_spot=t)
        assert len(part) == table.calls == t
        assert all(same(a, b) for a, b in zip(part, whole, strict=False))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_batch_gives_what_single_rows_give(decoder):
    tokens, mask = rows(0, 2, 20, N)
    batch = decode(tokens, mask, decoder=decoder, total_iter=5, generators=seeds(4, 5, 6, 7))
    for i, seed in enumerate((4, 5, 6, 7)):
        single = decode(tokens[i : i + 1], mask[i : i + 1], decoder=decoder, total_iter=5, generators=seeds(seed))
        assert all(same(a, Round(b.tokens[i : i + 1], b.masked[i : i + 1])) for a, b in zip(single, batch, strict=True))


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_result_is_a_function_of_the_seeds(decoder):
    tokens, mask = rows(N, N)
    before = torch.get_rng_state()
    first, again, other = (decode(tokens, mask, decoder=decoder, generators=seeds(*s)) for s in ((1, 2), (1, 2), (3, 4)))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[-1].tokens, other[-1].tokens)


@pytest.mark.parametrize("decoder", DECODERS)
def test_arguments_are_not_written_to_and_hidden_tokens_not_read(decoder):
    tokens, mask = rows(5, 20)
    copies = tokens.clone(), mask.clone()
    first = decode(tokens, mask, decoder=decoder)
    assert torch.equal(tokens, copies[0]) and torch.equal(mask, copies[1])
    other = decode(torch.where(mask, (tokens + 1) % K, tokens), mask, decoder=decoder)
    assert all(same(a, b) for a, b in zip(first, other, strict=True))


# ---- rounds by need ----


def flat(tokens: Tensor) -> Tensor:
    """Every code is as likely as every other: an entropy of log K for each token."""
    return torch.zeros(int((tokens == MASK).sum()), K)


def by_need(*holes: int, budget: float, table=flat, **options) -> list[list[int]]:
    """How many tokens of each row are masked after every round."""
    rounds = decode(*rows(*holes), table, total_iter=None, entropy_budget=budget, **options)
    return [[int(r.masked[row].sum()) for r in rounds] for row in range(len(holes))]


@pytest.mark.parametrize("decoder", ["maskgit", "halton"])
def test_a_round_accepts_what_the_budget_pays_for(decoder):
    ten = 10 * math.log(K) + 0.01
    assert by_need(25, 5, 10, 0, budget=ten, decoder=decoder) == [[15, 5, 0], [0] * 3, [0] * 3, [0] * 3]
    assert by_need(25, budget=ten, scale=[2], decoder=decoder) == [[5, 0]]
    assert by_need(25, budget=1e6, decoder=decoder) == [[0]]


def test_at_least_one_token_a_round_and_all_in_the_last():
    assert by_need(9, 2, budget=0.0, max_iter=4) == [[8, 7, 6, 0], [1, 0, 0, 0]]


def test_sure_tokens_cost_nothing():
    sure = torch.zeros(K)
    sure[3] = 100.0
    assert by_need(N, budget=0.01, table=lambda t: sure.expand(int((t == MASK).sum()), K)) == [[0]]


def test_a_smaller_budget_takes_more_rounds_and_rows_stay_apart():
    counts = [len(by_need(N, budget=b, table=Table())[0]) for b in (1e6, 30.0, 10.0, 3.0)]
    assert counts == sorted(counts) and counts[0] == 1 < counts[-1]
    tokens, mask = rows(4, 20, N)
    options = dict(total_iter=None, entropy_budget=8.0)
    batch = decode(tokens, mask, generators=seeds(4, 5, 6), **options)[-1]
    for i in range(3):
        single = decode(tokens[i : i + 1], mask[i : i + 1], generators=seeds(4 + i), **options)[-1]
        assert torch.equal(single.tokens[0], batch.tokens[i])


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


@pytest.mark.parametrize("side", [1, 2, 6, 8, 16, 32])
def test_halton_order_is_a_permutation(side):
    order = halton_order(side * side)
    assert torch.equal(order.sort().values, torch.arange(side * side))


def test_halton_order_visits_all_quadrants_alike_and_no_neighbours_in_turn():
    side = 16
    places = halton_order(side * side).argsort()
    points = torch.stack([places // side, places % side], dim=1)
    visits = torch.nn.functional.one_hot((points // (side // 2) * torch.tensor([2, 1])).sum(1), 4).cumsum(0)
    assert (visits.amax(1) - visits.amin(1)).max() <= 6    # 8 to 20 in random orders
    assert (points[1:64] - points[:63]).double().norm(dim=1).min() > 2


def test_halton_fills_the_hole_in_its_order():
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


# ---- the engine: MaskGIT.complete ----


@pytest.fixture(scope="module")
def model() -> MaskGIT:
    """Its predictions are far from uniform."""
    model = small_model(32, dict(codebook_size=64), embed_dim=32, depth=2, mlp_dim=64)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.mul_(3)
    return model


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """Pictures in [-1, 1], each with a box of its own to be filled: row i has i + 1 tokens' height."""
    image = torch.rand(count, 3, 32, 32, generator=rng()) * 2 - 1
    mask = torch.zeros(count, 1, 32, 32)
    for i in range(count):
        mask[i, :, 4 : 8 + 4 * i, 5:27] = 1
    return image, mask


def test_codes_are_told_apart_in_float32(model):
    image, mask = pictures(4)
    tokens, pixels = torch.full((4, 64), model.mask_token_id), model.pixels_of(image, mask)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model.masked_logits(tokens, pixels)
    assert half.dtype == torch.float32
    assert not torch.equal(half, half.bfloat16().float())    # not rounded to 8 bits, which would tie codes
    full = model.masked_logits(tokens, pixels)
    assert (half.argmax(-1) == full.argmax(-1)).float().mean() > 0.97


def test_precision_is_an_option(model):
    image, mask = pictures(3)
    seeds, options = range(3), dict(total_iter=1, temperature=0)
    plain = model.complete(image, mask, seeds, **options)
    single = model.complete(image, mask, seeds, precision="fp32", **options)
    half = model.complete(image, mask, seeds, precision="bf16", **options)
    with torch.autocast("cpu", torch.bfloat16):
        around = model.complete(image, mask, seeds, **options)
        inside = model.complete(image, mask, seeds, precision="fp32", **options)
    assert torch.equal(single.images, plain.images) and torch.equal(inside.images, plain.images)
    assert torch.equal(around.images, half.images) and not torch.equal(half.images, plain.images)
    assert half.images.dtype == torch.float32
    assert (half.rounds[0].tokens == plain.rounds[0].tokens).float().mean() > 0.9


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
