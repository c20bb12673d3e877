"""Muon: what orthogonalising keeps and changes, the size of a step, and AdamW for the rest."""


import pytest
import torch
from torch import nn

from training.muon import Muon, orthogonalize


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_singular_values_become_about_one_and_singular_vectors_stay():
    for shape in ((16, 64), (64, 16), (24, 24)):
        u, _, vt = torch.linalg.svd(normal(*shape), full_matrices=False)
        values = torch.linspace(0.3, 1, min(shape))
        inner = u.mT @ orthogonalize(((u * values) @ vt)[None])[0] @ vt.mT    # diagonal
        assert inner.diag().min() > 0.6 and inner.diag().max() < 1.3
        assert (inner - inner.diag().diag()).abs().max() < 0.05


def test_scale_and_neighbours_do_not_matter():
    x = normal(3, 8, 20)
    together = orthogonalize(x)
    torch.testing.assert_close(orthogonalize(x * 2.0**10), together, atol=1e-5, rtol=0)
    torch.testing.assert_close(orthogonalize(x[1:2])[0], together[1], atol=1e-4, rtol=0)
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs the Muon of torch 2.9")
def test_the_step_is_that_of_torch_up_to_rounding():
    """Nesterov momentum, weight decay and size of the step; torch's orthogonalising rounds to bfloat16."""
    for shape in ((32, 32), (16, 64), (64, 16)):
        p = nn.Parameter(normal(*shape))
        twin, before = nn.Parameter(p.detach().clone()), p.detach().clone()
        mine = Muon([p], [], lr=0.1, weight_decay=0.03)
        theirs = torch.optim.Muon([twin], lr=0.1, weight_decay=0.03, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        for step in range(3):
            p.grad = normal(*shape, seed=step)
            twin.grad = p.grad.clone()
            mine.step()
            theirs.step()
        assert (p - twin).norm() < 0.02 * (p - before).norm()


def test_others_learn_as_with_adamw_and_gradients_are_left_alone():
    p, q, idle = nn.Parameter(normal(4, 4)), nn.Parameter(normal(6, seed=1)), nn.Parameter(torch.ones(2, 2))
    twin = nn.Parameter(q.detach().clone())
    muon = Muon([p, idle], [q], lr=0.05, betas=(0.8, 0.9), weight_decay=0.1)
    adamw = torch.optim.AdamW([twin], lr=0.05, betas=(0.8, 0.9), weight_decay=0.1)
    for step in range(4):
        p.grad, q.grad = normal(4, 4, seed=10 + step), normal(6, seed=20 + step)
        twin.grad, given = q.grad.clone(), p.grad.clone()
        muon.step()
        adamw.step()
        assert torch.equal(p.grad, given)
    assert torch.equal(q, twin) and torch.equal(idle, torch.ones(2, 2))
