"""Dropout on a CPU, whose random numbers serve four values each, and where it is compiled, by a hash."""

import math

import pytest
import torch

from models.attention import LEVELS, Dropout, dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_is_kept_at_each_of_the_four_places_of_a_number(p):
    """Within five standard deviations of a binomial; a bit that is always 0 would show in one place of four."""
    torch.manual_seed(0)
    count = 200_000
    dropped = dropout(torch.ones(count, 4), p, True) == 0
    bound = 5 * math.sqrt(p * (1 - p) / count)
    assert (dropped.float().mean(0) - p).abs().max() < bound + 0.5 / LEVELS
    together = (dropped[:, :2].all(1).float().mean() - p * p).abs()    # neighbours are independent
    assert together < 5 * math.sqrt(p * p * (1 - p * p) / count) + 1 / LEVELS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 5, 7)])
def test_values_are_zero_or_scaled_and_gradients_alike(dtype, shape):
    torch.manual_seed(0)
    x = (torch.rand(shape, dtype=dtype) + 1).requires_grad_(True)
    y = dropout(x, 0.5, True)
    assert y.shape == x.shape and y.dtype == dtype
    assert torch.equal(y, torch.where(y == 0, 0, x * 2))
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y == 0, 0, 2).to(dtype))


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
def test_nothing_is_dropped(p, training):
    x = torch.rand(4, 5)
    layer = Dropout(p).train(training)
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("p", [1.0, 1 - 1e-9])
def test_all_is_dropped(p):
    assert torch.equal(dropout(torch.rand(4, 5), p, True), torch.zeros(4, 5))


def test_the_generator_decides():
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return dropout(torch.ones(1000), 0.5, True)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def compiled(p: float):
    torch.compiler.reset()
    return torch.compile(lambda x: dropout(x, p, True), backend="eager", fullgraph=True, dynamic=False)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_a_compiled_share_is_kept_over_places_and_over_seeds(p):
    """Within five standard deviations of a binomial, and so are neighbours together."""
    torch.manual_seed(0)
    drop = compiled(p)
    over_seeds = torch.stack([drop(torch.ones(64)) == 0 for _ in range(2000)])                # (draws, places)
    over_places = drop(torch.ones(4000, 64)) == 0
    for dropped in (over_seeds, over_places):
        count = len(dropped)
        assert (dropped.float().mean(0) - p).abs().max() < 5 * math.sqrt(p * (1 - p) / count)
        pairs = (dropped[:, 1:] & dropped[:, :-1]).float().mean(0) - p * p
        assert pairs.abs().max() < 5 * math.sqrt(p * p * (1 - p * p) / count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_values_are_zero_or_scaled_and_gradients_alike(dtype):
    torch.manual_seed(0)
    x = (torch.rand(30, 5, dtype=dtype) + 1).requires_grad_(True)
    y = compiled(0.5)(x)
    assert y.dtype == dtype and 0 < (y == 0).sum() < y.numel()
    assert torch.equal(y, torch.where(y == 0, 0, x * 2))
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y == 0, 0, 2).to(dtype))
    for p in (1.0, 1 - 1e-12):
        assert torch.equal(compiled(p)(x), torch.zeros_like(x))
