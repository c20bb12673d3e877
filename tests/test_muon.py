"""Muon: what orthogonalising keeps and changes, the size of a step, and AdamW for the rest."""
import copy

import pytest
import torch
from torch import nn

from training.muon import Muon, orthogonalize


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 64), (2, 64, 16)])
def test_singular_values_become_about_one(shape):
    x = normal(*shape)
    assert torch.linalg.svdvals(x).max() > 4
    values = torch.linalg.svdvals(orthogonalize(x, rounds=6))
    assert values.min() > 0.5 and values.max() < 1.3


def test_singular_vectors_stay():
    """Of a matrix whose singular values are known: U V' comes out, up to the spread that the coefficients allow."""
    u, _, vt = torch.linalg.svd(normal(12, 30), full_matrices=False)
    values = torch.linspace(0.3, 1, 12)
    inner = u.mT @ orthogonalize(((u * values) @ vt)[None])[0] @ vt.mT    # (12, 12), diagonal
    assert inner.diag().min() > 0.6 and inner.diag().max() < 1.3
    assert (inner - inner.diag().diag()).abs().max() < 0.05               # bfloat16


def test_scale_of_the_gradient_does_not_matter():
    x = normal(1, 8, 8)
    assert torch.equal(orthogonalize(x), orthogonalize(x * 2.0**10))
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


def test_matrices_of_a_batch_are_independent_and_tall_is_wide_transposed():
    x = normal(3, 8, 20)
    together = orthogonalize(x)
    for i in range(3):
        torch.testing.assert_close(orthogonalize(x[i : i + 1])[0], together[i], atol=0.02, rtol=0)
    torch.testing.assert_close(orthogonalize(x.mT), together.mT, atol=0.02, rtol=0)


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_step_has_the_size_of_adamws(shape):
    """Root mean square 0.2 lr, whatever the shape: an orthogonal r x s matrix has mean square 1 / max(r, s)."""
    p = nn.Parameter(normal(*shape))
    before, p.grad = p.detach().clone(), normal(*shape, seed=1)
    Muon([p], [], lr=0.1, weight_decay=0.0).step()
    rms = (p - before).pow(2).mean().sqrt().item()
    assert 0.2 * 0.1 * 0.75 < rms < 0.2 * 0.1 * 1.2
    assert ((p - before) * p.grad).sum() < 0


def test_others_learn_as_with_adamw_and_gradients_are_left_alone():
    p, q = nn.Parameter(normal(4, 4)), nn.Parameter(normal(6, seed=1))
    twin = nn.Parameter(q.detach().clone())
    muon = Muon([p], [q], lr=0.05, betas=(0.8, 0.9), weight_decay=0.1)
    adamw = torch.optim.AdamW([twin], lr=0.05, betas=(0.8, 0.9), weight_decay=0.1)
    for step in range(4):
        p.grad, q.grad = normal(4, 4, seed=10 + step), normal(6, seed=20 + step)
        twin.grad, given = q.grad.clone(), p.grad.clone()
        muon.step()
        adamw.step()
        assert torch.equal(p.grad, given)
    assert torch.equal(q, twin)


def test_weight_decay_alone_shrinks():
    p = nn.Parameter(torch.ones(3, 5))
    p.grad = torch.zeros(3, 5)
    Muon([p], [], lr=0.5, weight_decay=0.1).step()
    assert torch.equal(p, torch.full((3, 5), 1 - 0.5 * 0.1))


def test_parameters_without_gradient_stay():
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    p.grad = torch.eye(2)
    Muon([p, q], [], lr=0.5).step()
    assert torch.equal(q, torch.ones(2, 2)) and not torch.equal(p, torch.ones(2, 2))


def test_state_continues_exactly():
    def run(model: nn.Linear, optimizer: Muon, steps: range) -> None:
        for step in steps:
            model.weight.grad, model.bias.grad = normal(5, 7, seed=step), normal(5, seed=100 + step)
            optimizer.step()

    def fresh(model: nn.Linear) -> Muon:
        return Muon([model.weight], [model.bias], lr=0.1)

    model = nn.Linear(7, 5)
    optimizer = fresh(model)
    run(model, optimizer, range(3))
    other = copy.deepcopy(model)
    resumed = fresh(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(model, optimizer, range(3, 6))
    run(other, resumed, range(3, 6))
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


def test_closure_is_called_with_gradients_on():
    p = nn.Parameter(torch.eye(2))

    def closure() -> torch.Tensor:
        p.grad = None
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert Muon([p], [], lr=0.1, weight_decay=0.0).step(closure) == 2
    assert (p**2).sum() < 2


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"2 dimensions, got a parameter of shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))], [], lr=0.1)
