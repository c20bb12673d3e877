"""models/attention.py: the written-out form, the fused kernel and PyTorch's own layer agree."""

import pytest
import torch
from torch import nn

from models.attention import MultiHeadAttention, use_fused_attention


def layer(embed_dim: int = 24, num_heads: int = 4, scale: float = 0.5, **options) -> MultiHeadAttention:
    """A layer with weights large enough that its softmax is far from uniform, and norms that are no identities."""
    attention = MultiHeadAttention(embed_dim, num_heads, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=scale, generator=generator)
    return attention.eval()


def tokens(batch: int = 2, count: int = 9, width: int = 24) -> torch.Tensor:
    return torch.randn(batch, count, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_fused_equals_written_out(qk_norm):
    attention, x = layer(qk_norm=qk_norm), tokens()
    fused = attention(x)
    use_fused_attention(attention, False)
    torch.testing.assert_close(attention(x), fused, rtol=1e-5, atol=1e-5)


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
