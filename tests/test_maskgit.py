"""models/transformer.py, and both stages together: masks, the transformer's two inputs, the frozen VQGAN, what is hidden."""
import pytest
import torch
import torch.nn.functional as F
from small_sets import small_model
from torch import nn

from models.attention import count_parameters
from models.kv_cache import KVCache
from models.local_autoencoder import condition
from models.maskgit import Known, MaskGIT, patch_pixels, pixel_to_token_mask
from models.transformer import BidirectionalTransformer, TransformerConfig
from pictures.holes import random_holes
from training.speed import padded_positions
from training.token_batches import draw_masks
from training.transformer import TrainTransformerConfig, embed_codes


def tiny(context_dim: int = 0, **transformer) -> MaskGIT:
    """In training mode, without dropout."""
    settings = {"depth": 2, "dropout": 0.0, "attention_dropout": 0.0} | transformer
    return small_model(vqgan={"context_dim": context_dim}, **settings).train()


def holes(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    return random_holes(count, size, torch.Generator().manual_seed(seed))


def test_one_hole_pixel_masks_its_token_and_patches_hold_nothing_of_the_hole():
    for y, x in ((0, 0), (3, 4), (15, 15), (7, 8)):
        mask = torch.zeros(1, 1, 16, 16)
        mask[0, 0, y, x] = 1
        assert pixel_to_token_mask(mask, 4).nonzero().tolist() == [[0, y // 4 * 4 + x // 4]]
    image, mask = torch.rand(2, 3, 16, 16) + 1, holes(2)    # no pixel is 0
    got = patch_pixels(image, mask, 4).view(2, 4, 4, 4, 16)    # (B, h, w, RGB + hole, 16)
    for i, j in ((0, 0), (1, 3), (2, 2)):
        known = image[..., 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        hole = mask[..., 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        assert torch.equal(got[:, i, j, :3], (known * ~hole).flatten(2))
        assert torch.equal(got[:, i, j, 3], hole.float().flatten(1))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"codebook_size": 31}, "codebook_size"), ({"seq_len": 15}, "seq_len"), ({"pixel_dim": 63}, "pixel_dim"),
        ({"context_dim": 15}, "context_dim"),
    ],
)    # fmt: skip
def test_configs_that_do_not_fit_together_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        tiny(**change)


def test_the_vqgan_is_frozen_and_stays_in_evaluation_mode():
    model = tiny().train()
    assert model.transformer.training and not any(m.training for m in model.vqgan.modules())
    assert not any(p.requires_grad for p in model.vqgan.parameters())
    assert all(p.requires_grad for p in model.transformer.parameters())
    before = {name: value.clone() for name, value in model.vqgan.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.randint(0, 32, (2, 16)), torch.rand(2, 16) < 0.5, torch.rand(2, 16, 64)).mean().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.vqgan.state_dict().items())
    assert all(p.grad is not None for name, p in model.transformer.named_parameters())


def test_the_loss_is_the_cross_entropy_of_the_hidden_tokens_and_others_cost_nothing():
    model = tiny().eval()
    torch.nn.init.normal_(model.transformer.bias)    # else it would not show which place's it is
    tokens, masked, pixels = torch.randint(0, 32, (3, 16)), torch.rand(3, 16) < 0.5, torch.rand(3, 16, 64)
    log_p = model.transformer(torch.where(masked, 32, tokens), pixels).log_softmax(-1)
    expected = torch.stack([-log_p[b, n, tokens[b, n]] for b, n in masked.nonzero().tolist()])
    torch.testing.assert_close(model(tokens, masked, pixels), expected)
    tokens, masked, pixels = torch.randint(0, 32, (3, 16)), torch.arange(48).view(3, 16) < 31, torch.rand(3, 16, 64)
    losses = model(tokens, masked, pixels)
    padded = model(tokens, masked, pixels, positions=padded_positions(masked))
    assert len(padded) == 33 > len(losses) == 31
    assert torch.equal(padded[len(losses) :], torch.zeros(len(padded) - len(losses)))
    torch.testing.assert_close(padded[: len(losses)], losses)
    found = []
    for loss in (losses.sum(), padded.sum()):
        model.zero_grad()
        loss.backward()
        found.append([p.grad.clone() for p in model.transformer.parameters()])
    torch.testing.assert_close(*found)


def test_codes_are_told_apart_in_float32():
    model = tiny().eval()
    known = model.known(torch.rand(3, 3, 16, 16) * 2 - 1, holes(3))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model.masked_logits(known.tokens, known.pixels)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())    # not rounded to 8 bits, which would tie codes


def test_a_compiled_loss_is_the_same_and_traced_once(traced):
    plain, fast = (tiny().train() for _ in range(2))
    fast.transformer.compile_blocks()
    graphs = []
    for count in (9, 4, 21):
        tokens, masked = torch.randint(0, 32, (3, 16)), torch.arange(48).view(3, 16) < count
        pixels = torch.rand(3, 16, 64)
        losses = [model(tokens, masked, pixels, label_smoothing=0.1) for model in (plain, fast)]
        torch.testing.assert_close(*losses)
        for model, loss in zip((plain, fast), losses, strict=True):
            model.zero_grad()
            loss.mean().backward()
        for a, b in zip(plain.transformer.parameters(), fast.transformer.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2] > 0 and MaskGIT.losses in traced


# ---- what training hides ----


def masks(**shares):
    config = TrainTransformerConfig(**shares)
    drawn, masked = draw_masks(400, 16, 4, config, torch.Generator().manual_seed(1))
    return drawn, masked, pixel_to_token_mask(drawn, 4)


@pytest.mark.parametrize("shares", [{}, {"hole_share": 0.0, "full_share": 0.0}, {"hole_share": 0.0, "full_share": 1.0}])
def test_hidden_tokens_lie_inside_the_hole_and_are_never_none(shares):
    _, masked, inside = masks(**shares)
    assert (masked & ~inside).sum() == 0 and masked.any(1).all()


def test_how_many_tokens_are_hidden_anywhere_and_of_an_unknown_picture():
    drawn, masked, inside = masks(hole_share=0.0, full_share=0.0)
    assert torch.equal(masked, inside)    # hidden tokens show no pixel either, and nothing else is a hole
    assert torch.equal(drawn, masked.view(-1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3))
    counts = torch.bincount(masked.sum(1), minlength=17)
    assert counts[0] == 0 and (counts[1:] > 5).all()    # 25 each on average
    assert (masked.float().mean(0) - 17 / 32).abs().max() < 0.08    # every place alike
    drawn, masked, _ = masks(hole_share=0.0, full_share=1.0, mask_schedule="linear")
    assert drawn.all()
    # gamma(r) = 1 - r with r uniform: ceil(share * 16) is uniform on 1..16
    counts = torch.bincount(masked.sum(1), minlength=17)
    assert counts[0] == 0 and (counts[1:] > 5).all()


def test_tokens_that_look_alike_start_alike():
    model = tiny()
    before = model.transformer.token_embed.weight.detach().clone()
    embed_codes(model, torch.Generator().manual_seed(0))
    after = model.transformer.token_embed.weight.detach()
    assert torch.equal(after[-1], before[-1])    # the mask token has no code
    codes = torch.cdist(*[model.vqgan.codebook.codes()] * 2).flatten()

    def agreement(embedding: torch.Tensor) -> float:
        return torch.corrcoef(torch.stack([codes, torch.cdist(embedding[:-1], embedding[:-1]).flatten()]))[0, 1].item()

    assert agreement(after) > agreement(before) + 0.2


# ---- the context: a decoder that sees what the transformer makes of the known part ----


def listening() -> MaskGIT:
    """A model with a context that its decoder takes into account."""
    model = tiny(context_dim=16).eval()
    torch.nn.init.normal_(model.vqgan.decoder.from_context.weight, generator=torch.Generator().manual_seed(1))
    return model


def later_round(B: int = 3) -> tuple[MaskGIT, Known, list[KVCache], torch.Tensor]:
    """A model, what it knows of some pictures, what it keeps of the first pass, and tokens with half of the hole filled."""
    model, image, mask = listening(), torch.rand(B, 3, 16, 16) * 2 - 1, holes(B)
    caches = [KVCache() for _ in model.transformer.blocks]
    known = model.known(image, mask, caches=caches)
    filled = known.hidden & (torch.rand(B, 16) < 0.5)
    return model, known, caches, torch.where(filled, torch.randint(0, 32, (B, 16)), known.tokens)


def frozen_logits(model: MaskGIT, known: Known, tokens: torch.Tensor) -> torch.Tensor:
    """What a later round should give, written out: before each block the known tokens are put back as they were at first."""
    net = model.transformer
    first, x = net.embed(known.tokens, known.pixels), net.embed(tokens, known.pixels)
    for block in net.blocks:
        x = torch.where(known.hidden.unsqueeze(-1), x, first)
        first, x = block(first), block(x)
    return net.predict(x)[tokens == model.mask_token_id]


@torch.no_grad()
def test_a_later_round_computes_the_hole_alone_and_sees_the_known_tokens_as_the_first_round_left_them():
    model, known, caches, tokens = later_round()
    got = model.later_logits(tokens, known.pixels, known.hidden, caches, torch.arange(3))
    torch.testing.assert_close(got, frozen_logits(model, known, tokens))
    assert not torch.allclose(got, model.masked_logits(tokens, known.pixels))         # known tokens would change a little
    again = model.later_logits(tokens, known.pixels, known.hidden, caches, torch.arange(3))
    assert torch.equal(got, again)                                                       # what is kept was not written to
    some = torch.tensor([2, 0])
    part = model.later_logits(tokens[some], known.pixels[some], known.hidden[some], caches, some)
    counts = (tokens == 32).sum(1).tolist()
    torch.testing.assert_close(part, torch.cat([got.split(counts)[i] for i in (2, 0)]))
    nothing_filled = model.later_logits(known.tokens, known.pixels, known.hidden, caches, torch.arange(3))
    torch.testing.assert_close(nothing_filled, model.masked_logits(known.tokens, known.pixels))


@torch.no_grad()
def test_where_all_is_hole_a_later_round_computes_all():
    model, image, mask = listening(), torch.zeros(2, 3, 16, 16), torch.ones(2, 1, 16, 16)
    caches = [KVCache() for _ in model.transformer.blocks]
    known = model.known(image, mask, caches=caches)
    tokens = torch.where(torch.rand(2, 16) < 0.5, torch.randint(0, 32, (2, 16)), known.tokens)
    got = model.later_logits(tokens, known.pixels, known.hidden, caches, torch.arange(2))
    torch.testing.assert_close(got, model.masked_logits(tokens, known.pixels))


def test_the_context_is_the_transformers_view_and_hides_what_the_hole_hides():
    model, image, mask = listening(), torch.rand(3, 3, 16, 16) * 2 - 1, holes(3)
    known = model.known(image, mask)
    assert torch.equal(known.hidden, pixel_to_token_mask(mask, 4))
    assert torch.equal(known.tokens, torch.where(known.hidden, 32, model.vqgan.encode(image)))
    logits = model.transformer(known.tokens, known.pixels)
    torch.testing.assert_close(model.transformer.logits(known.context), logits)
    torch.testing.assert_close(model.masked_logits(known.tokens, known.pixels, known.context), logits[known.hidden])
    assert tiny().eval().known(image, mask).context is None
    model, image, mask = listening(), torch.rand(2, 3, 16, 16) * 2 - 1, holes(2)
    tokens = model.vqgan.encode(image)
    decoded = model.decode(tokens, image, mask)
    assert not torch.allclose(decoded, model.vqgan.decode(tokens, image, mask).clamp(-1, 1))
    for hidden in (7.0, float("nan")):
        assert torch.equal(model.decode(tokens, image.masked_fill(mask, hidden), mask), decoded)
    model, image, mask = listening(), torch.rand(2, 3, 16, 16) * 2 - 1, holes(2)
    mask[0] = True
    tokens = model.vqgan.encode(image)
    decoded, plain = model.decode(tokens, image, mask), model.vqgan.decode(tokens).clamp(-1, 1)
    torch.testing.assert_close(decoded[0], plain[0])
    assert not torch.allclose(decoded[1], plain[1])


def test_a_guess_counts_in_the_hole_alone_and_where_it_is_one():
    g = torch.Generator().manual_seed(0)
    image, colours = torch.rand(2, 3, 8, 8, generator=g), torch.rand(2, 3, 8, 8, generator=g)
    hole = torch.zeros(2, 1, 8, 8)
    hole[:, :, 2:6, 1:7] = 1
    given = torch.zeros(2, 1, 8, 8)
    given[:, :, :4] = 1
    seen = condition(image, hole, True, torch.cat([colours, given], 1))                # (2, 8, 8, 8)
    guessed = (hole * given).bool()
    assert torch.equal(seen[:, 7:].bool(), guessed) and torch.equal(seen[:, 4:7], colours.masked_fill(~guessed, 0))
    assert torch.equal(seen[:, :4], condition(image, hole, False))    # known colours and hole as without one
    assert not condition(image, hole, True)[:, 4:].any()
    with pytest.raises(ValueError, match="guess"):
        condition(image, hole, False, torch.cat([colours, given], 1))


# ---- the transformer ----


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
