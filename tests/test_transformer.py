"""models/transformer.py: size of the reference setting, formulas, both norms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.attention import count_parameters
from models.transformer import BidirectionalTransformer, TransformerConfig

SMALL = dict(codebook_size=11, seq_len=9, embed_dim=16, depth=2, num_heads=2, mlp_dim=32)


def transformer(**options) -> BidirectionalTransformer:
    torch.manual_seed(0)
    return BidirectionalTransformer(TransformerConfig(**(SMALL | options))).eval()


def lively(**options) -> BidirectionalTransformer:
    """Weights so large that everything that can have an effect has a visible one."""
    model = transformer(**options)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def tokens(batch: int = 3, mask_token: bool = True) -> torch.Tensor:
    out = torch.randint(11, (batch, 9), generator=torch.Generator().manual_seed(2))
    if mask_token:
        out[:, ::2] = 11
    return out


def test_reference_setting_has_the_published_size():
    with torch.device("meta"):
        assert count_parameters(BidirectionalTransformer(TransformerConfig())) == 72_745_472


def test_pixels_are_taken_if_and_only_if_the_model_has_them():
    x, pixels = tokens(), torch.randn(3, 9, 4)
    with pytest.raises(ValueError, match="must not be given"):
        transformer()(x, pixels)
    with pytest.raises(ValueError, match="must be given"):
        transformer(pixel_dim=4)(x)
    model = lively(pixel_dim=4)
    seen = torch.autograd.grad(model(x, pixels.requires_grad_())[:, 0].sum(), pixels)[0]
    assert (seen.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("pre_norm", [False, True])
def test_deep_models_stay_finite(pre_norm):
    model, x = transformer(pre_norm=pre_norm, depth=40), tokens()
    logits = model(x)
    F.cross_entropy(logits.flatten(0, 1), x.clamp_max(10).flatten()).backward()
    assert logits.isfinite().all() and logits.abs().max() < 10
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.blocks[0].attention.qkv.weight.grad.abs().max() > 0


def test_a_post_norm_model_goes_on_in_half_precision_in_training_alone():
    seen: list[torch.dtype] = []
    model = transformer(pre_norm=False)
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, x: seen.append(x.dtype))
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            model.train(training)(tokens())
    depth = len(model.blocks)
    assert seen == [torch.bfloat16] * depth + [torch.float32] * depth


def test_initial_weights():
    """BERT's rule; a pre-norm block's two outputs are 1 / sqrt(2 depth) of a post-norm one's, drawn from the same seed."""
    post, pre = transformer(pre_norm=False, depth=8), transformer(pre_norm=True, depth=8)
    state = pre.state_dict()
    for name, value in post.state_dict().items():
        scale = 0.25 if name.endswith(("attention.proj.weight", "mlp.2.weight")) else 1.0
        torch.testing.assert_close(state[name], scale * value)
        if name.endswith(".bias") or name == "bias":
            assert not value.any()
    assert abs(post.blocks[0].mlp[0].weight.std() - 0.02) < 0.002 and abs(post.pos_embed.std() - 0.02) < 0.004


@pytest.mark.parametrize("options", [{}, dict(pre_norm=True, qk_norm=True, pixel_dim=4)])
def test_logits_of_some_positions_are_those_of_all(options):
    model, x = lively(**options), tokens()
    pixels = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(3)) if "pixel_dim" in options else None
    positions = (x == model.mask_token_id).flatten().nonzero().flatten()
    expected = model(x, pixels).flatten(0, 1)[positions]
    torch.testing.assert_close(model(x, pixels, positions), expected, rtol=1e-5, atol=1e-5)
    some = torch.tensor([26, 0, 13])    # any order
    torch.testing.assert_close(model(x, pixels, some), model(x, pixels).flatten(0, 1)[some], rtol=1e-5, atol=1e-5)
    assert model(x, pixels, positions[:0]).shape == (0, 11)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_block_and_head_by_formula(pre_norm):
    """One block: x + attention(x), then x + W2 gelu(W1 x), normalised before or after; the head as in BERT."""
    model = lively(pre_norm=pre_norm, depth=1)
    block, x = model.blocks[0], torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(3))
    (w1, b1), (w2, b2) = ((layer.weight, layer.bias) for layer in (block.mlp[0], block.mlp[2]))

    def mlp(x):
        return F.gelu(x @ w1.T + b1) @ w2.T + b2

    if pre_norm:
        y = x + block.attention(block.norm1(x))
        y = y + mlp(block.norm2(y))
    else:
        y = block.norm1(x + block.attention(x))
        y = block.norm2(y + mlp(y))
    torch.testing.assert_close(block(x), y, rtol=1e-5, atol=1e-5)

    given = model.embed_norm(model.token_embed(tokens()) + model.pos_embed)
    hidden = F.gelu(model.head[0](model.final_norm(block(given))))
    centred = hidden - hidden.mean(-1, keepdim=True)
    hidden = centred / centred.pow(2).mean(-1, keepdim=True).sqrt() * model.head[2].weight + model.head[2].bias
    expected = (hidden @ model.token_embed.weight.T + model.bias)[..., :-1]
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", ["embedding", "attention", "mlp"])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_dropout_is_in_every_place(pre_norm, place):
    model, x = lively(pre_norm=pre_norm, depth=1, dropout=0.5, attention_dropout=0.0).train(), tokens()
    block = model.blocks[0]
    if place == "embedding":
        block.dropout.p = 0.0
    else:
        model.dropout.p = 0.0
        silent = block.mlp[2] if place == "attention" else block.attention.proj
        nn.init.zeros_(silent.weight), nn.init.zeros_(silent.bias)    # nothing to drop there
    torch.manual_seed(0)
    assert not torch.allclose(model(x), model(x))
    model.dropout.p = block.dropout.p = 0.0
    assert torch.allclose(model(x), model(x))


@pytest.mark.parametrize("name, value", [
    ("codebook_size", 0), ("seq_len", 0), ("embed_dim", -1), ("depth", 0), ("num_heads", 0), ("mlp_dim", 0),
    ("dropout", 1.0), ("attention_dropout", -0.1), ("pixel_dim", -1), ("num_heads", 3), ("dropout", float("nan")),
    ("depth", "2"), ("dept", 2),
])
def test_config_refuses_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        TransformerConfig(**(SMALL | {name: value}))
