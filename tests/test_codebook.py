"""models/codebook.py: nearest codes, straight-through gradient, losses, restarts."""

import pytest
import torch
import torch.nn.functional as F

from models.codebook import Codebook

K, D = 37, 5
BOTH = pytest.mark.parametrize("l2", [False, True])


def codebook(l2: bool, size: int = K) -> Codebook:
    """Codes far from unit length, so that forgetting to normalise shows."""
    torch.manual_seed(0)
    book = Codebook(size, D, l2_normalize=l2, commitment=0.25)
    book.embedding.weight.data = torch.randn(size, D) * torch.logspace(-1, 1, size).unsqueeze(1)
    return book


def latents(scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(2, D, 4, 6, generator=torch.Generator().manual_seed(1))


def as_rows(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)    # (B h w, d)


@BOTH
def test_a_codes_own_vector_quantizes_to_itself(l2):
    book = codebook(l2)
    indices = torch.arange(K * 2).view(2, 37, 1) % K
    z = book.lookup(indices)
    assert z.shape == (2, D, 37, 1)
    out = book(z)
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.z_q, z)
    torch.testing.assert_close(out.loss, torch.tensor(0.0), rtol=0, atol=1e-12)


@BOTH
def test_nearest_equals_brute_force(l2):
    book, z = codebook(l2), latents()
    rows, codes = as_rows(z), book.embedding.weight
    if l2:
        rows, codes = rows / rows.norm(dim=1, keepdim=True), codes / codes.norm(dim=1, keepdim=True)
    expected = torch.cdist(rows.double(), codes.double()).argmin(1).view(2, 4, 6)
    out = book(z)
    assert out.indices.dtype == torch.int64 and torch.equal(out.indices, expected)
    torch.testing.assert_close(as_rows(out.z_q), codes[expected.flatten()])
    assert len(expected.unique()) > 5


@BOTH
def test_gradient_goes_straight_through(l2):
    book, z, weight = codebook(l2), latents().requires_grad_(), latents(3)
    (grad,) = torch.autograd.grad((book(z).z_q * weight).sum(), z)
    unquantized = F.normalize(z, dim=1) if l2 else z
    (expected,) = torch.autograd.grad((unquantized * weight).sum(), z)
    assert torch.equal(grad, expected)
    assert not book(z).z_q.equal(unquantized)
    assert torch.autograd.grad((book(z).z_q * weight).sum(), book.embedding.weight, allow_unused=True) == (None,)


def test_loss_and_its_gradients():
    """Both terms have the same value, so loss = (1 + commitment) MSE; each pulls one side only."""
    book, z = codebook(False), latents().requires_grad_()
    out = book(z)
    code = book.lookup(out.indices)
    torch.testing.assert_close(out.loss, 1.25 * (z - code).pow(2).mean())
    on_z, on_codes = torch.autograd.grad(out.loss, (z, book.embedding.weight))
    pull = 2 * (z - code) / z.numel()
    torch.testing.assert_close(on_z, 0.25 * pull)
    expected = torch.zeros(K, D).index_add(0, out.indices.flatten(), -as_rows(pull))
    torch.testing.assert_close(on_codes, expected)


@BOTH
def test_autocast_changes_nothing(l2):
    book, z = codebook(l2), latents()
    plain = book(z)
    with torch.autocast("cpu", torch.bfloat16):
        cast = book(z)
        half = book(z.bfloat16())
    assert torch.equal(cast.indices, plain.indices) and torch.equal(cast.z_q, plain.z_q) and cast.loss == plain.loss
    assert half.z_q.dtype == torch.float32


@BOTH
def test_restart_moves_dead_codes_onto_latents_and_no_others(l2):
    book, rows = codebook(l2), 3 * torch.randn(50, D, generator=torch.Generator().manual_seed(2))
    before = book.embedding.weight.detach().clone()
    usage = torch.ones(K)
    dead = torch.tensor([0, 3, 11, K - 1])
    usage[dead] = 0
    assert book.restart_dead(usage, rows, torch.Generator().manual_seed(3)) == 4
    after = book.embedding.weight.detach()
    alive = usage > 0
    assert torch.equal(after[alive], before[alive])
    targets = F.normalize(rows, dim=1) if l2 else rows
    assert (after[dead].unsqueeze(1) - targets).abs().amax(2).amin(1).max() < 1e-6    # each equals one of them
    assert len(after[dead].unique(dim=0)) > 1
    again = codebook(l2)
    again.restart_dead(usage, rows, torch.Generator().manual_seed(3))
    assert torch.equal(again.embedding.weight, after)
    other = codebook(l2)
    other.restart_dead(usage, rows, torch.Generator().manual_seed(4))
    assert not torch.equal(other.embedding.weight, after)


def test_restart_with_nothing_to_do():
    book = codebook(False)
    before = book.embedding.weight.detach().clone()
    assert book.restart_dead(torch.ones(K), torch.randn(5, D)) == 0
    assert book.restart_dead(torch.zeros(K), torch.empty(0, D)) == 0
    assert torch.equal(book.embedding.weight, before)
    assert book.restart_dead(torch.zeros(K), torch.ones(1, D)) == K    # fewer latents than dead codes: they share
    assert (book.embedding.weight == 1).all() and book.embedding.weight.requires_grad
