"""models/attention.py and models/norms.py: equal to PyTorch's own layers, in mixed precision and compiled too."""

import math

import pytest
import torch
from small_sets import small_model
from torch import nn

from models.attention import LEVELS, MultiHeadAttention, dropout
from models.discriminator import PatchDiscriminator
from models.norms import ChannelNorm, GroupNorm, HeadNorm, LayerNorm

# ---- attention ----


def layer(embed_dim: int = 24, num_heads: int = 4, scale: float = 0.5, **options) -> MultiHeadAttention:
    """A layer with weights large enough that its softmax is far from uniform, and norms that are no identities."""
    attention = MultiHeadAttention(embed_dim, num_heads, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=scale, generator=generator)
    return attention.eval()


def tokens(batch: int = 2, count: int = 9, width: int = 24) -> torch.Tensor:
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fused", [False, True])
def test_equals_pytorchs_layer_with_the_same_weights(fused):
    D, heads = 24, 4
    ours, x = layer(D, heads, fused=fused), tokens()
    theirs = nn.MultiheadAttention(D, heads, batch_first=True).eval()
    by_head = ours.qkv.weight.view(heads, 3, D // heads, D)    # our rows: q, k, v of head 0, then of head 1, ...
    with torch.no_grad():
        theirs.in_proj_weight.copy_(by_head.transpose(0, 1).reshape(3 * D, D))
        theirs.in_proj_bias.copy_(ours.qkv.bias.view(heads, 3, D // heads).transpose(0, 1).reshape(3 * D))
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_dropout_is_on_in_training_only(fused):
    attention, x = layer(dropout=0.5, fused=fused), tokens()
    assert torch.equal(attention(x), attention(x))
    attention.train()
    torch.manual_seed(0)
    assert not torch.allclose(attention(x), attention(x))
    attention.dropout = 0.0
    torch.testing.assert_close(attention(x), attention.eval()(x))


def test_qk_norm_bounds_the_scores():
    """Ten times longer queries and keys change nothing, where without the norm they would sharpen the softmax."""
    x = tokens()
    for qk_norm in (True, False):
        attention = layer(qk_norm=qk_norm)
        before = attention(x)
        with torch.no_grad():
            rows = attention.qkv.weight.view(4, 3, 6, 24)
            rows[:, :2] *= 10
            attention.qkv.bias.view(4, 3, 6)[:, :2] *= 10
        assert torch.allclose(attention(x), before, rtol=1e-4, atol=1e-4) == qk_norm


@pytest.mark.parametrize("qk_norm", [False, True])
def test_mixed_precision_is_close_to_float32(qk_norm):
    """Small numbers: in bfloat16 a norm's epsilon could outweigh them."""
    attention, x = layer(scale=0.02, qk_norm=qk_norm), tokens()
    nn.init.ones_(attention.q_norm.weight) if qk_norm else None
    expected = attention(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.02 * expected.norm()


# ---- dropout ----


def plain(p: float):
    return lambda x: dropout(x, p, True)


def compiled(p: float):
    torch.compiler.reset()
    return torch.compile(lambda x: dropout(x, p, True), backend="eager", fullgraph=True, dynamic=False)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("make", [plain, compiled])
def test_the_share_is_kept_over_places_and_over_seeds(make, p):
    """Within five standard deviations of a binomial, and so are neighbours together: four of them share a random number."""
    torch.manual_seed(0)
    drop = make(p)
    over_seeds = torch.stack([drop(torch.ones(64)) == 0 for _ in range(2000)])                # (draws, places)
    over_places = drop(torch.ones(4000, 64)) == 0
    for dropped in (over_seeds, over_places):
        count = len(dropped)
        assert (dropped.float().mean(0) - p).abs().max() < 5 * math.sqrt(p * (1 - p) / count) + 0.5 / LEVELS
        pairs = (dropped[:, 1:] & dropped[:, :-1]).float().mean(0) - p * p
        assert pairs.abs().max() < 5 * math.sqrt(p * p * (1 - p * p) / count) + 1 / LEVELS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [plain, compiled])
def test_values_are_zero_or_scaled_and_gradients_alike(make, dtype):
    torch.manual_seed(0)
    x = (torch.rand(3, 5, 7, dtype=dtype) + 1).requires_grad_(True)    # 105 values, which no 4 divide
    y = make(0.5)(x)
    assert y.shape == x.shape and y.dtype == dtype and 0 < (y == 0).sum() < y.numel()
    assert torch.equal(y, torch.where(y == 0, 0, x * 2))
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y == 0, 0, 2).to(dtype))
    for p in (1.0, 1 - 1e-12):
        assert torch.equal(make(p)(x), torch.zeros_like(x))


# ---- norms ----


REFERENCE = dict(encoder="reference", encoder_channels=[16, 16, 24], encoder_down=[0, 1], decoder="reference",
                 decoder_channels=[24, 16, 16], decoder_up=[0, 1], attention_size=16)    # fmt: skip


def errors(model: nn.Module, loss, parameters) -> list[float]:
    """Relative errors of gradients under autocast."""
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss(model).backward()
        gradients.append([p.grad.clone() for p in parameters])
    return [float((a - b).norm() / a.norm()) for a, b in zip(*gradients, strict=True)]


@pytest.mark.parametrize("norm", [ChannelNorm, GroupNorm])
def test_gradients_of_scale_and_shift_over_many_rows(norm):
    torch.manual_seed(0)
    x, weight = torch.randn(8, 3, 64, 64), torch.randn(1, 16, 1, 1)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), norm(16), nn.Conv2d(16, 16, 1))
    assert max(errors(model, lambda m: (m(x) * (1 + x[:, :1]) * weight).mean(), list(model[1].parameters()))) < 0.02


@pytest.mark.parametrize("vqgan", [{}, REFERENCE])
def test_every_norm_of_the_networks_is_one_of_these_and_in_float32_pytorchs_layer(vqgan):
    networks = [small_model(vqgan=vqgan, qk_norm=not vqgan, pre_norm=not vqgan), PatchDiscriminator()]
    norms = [m for network in networks for m in network.modules() if "Norm" in type(m).__name__]
    assert norms and all(isinstance(m, LayerNorm | GroupNorm | HeadNorm) for m in norms)
    x = torch.randn(2, 48, 5, 7, generator=torch.Generator().manual_seed(2))
    rows = x.permute(0, 2, 3, 1)
    assert torch.equal(LayerNorm(48)(rows), nn.LayerNorm(48)(rows))
    assert torch.equal(ChannelNorm(48)(x), nn.LayerNorm(48)(rows).permute(0, 3, 1, 2))
    assert torch.equal(GroupNorm(48)(x), nn.GroupNorm(16, 48)(x))
    assert torch.equal(HeadNorm(48)(rows), nn.RMSNorm(48)(rows))
