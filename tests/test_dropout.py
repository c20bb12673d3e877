"""Dropout on a CPU, whose random numbers serve four values each."""

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


def test_the_mean_stays():
    torch.manual_seed(0)
    y = dropout(torch.ones(1_000_000, dtype=torch.float64), 0.3, True)
    assert y.mean().item() == pytest.approx(1, abs=5 * math.sqrt(0.3 / 0.7 / 1e6))
    assert y.max().item() == pytest.approx(1 / (1 - round(0.3 * LEVELS) / LEVELS), rel=1e-6)


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
