"""Both stages together: masks, the transformer's two inputs, the frozen VQGAN, what training hides."""
import pytest
import torch
from small_sets import small_model

from models.local_autoencoder import condition
from models.maskgit import MaskGIT, patch_pixels, pixel_to_token_mask
from pictures.holes import random_holes
from training.speed import padded_positions
from training.token_batches import draw_masks
from training.transformer import TrainTransformerConfig


def tiny(context_dim: int = 0, **transformer) -> MaskGIT:
    """In training mode, without dropout."""
    settings = {"depth": 2, "dropout": 0.0, "attention_dropout": 0.0} | transformer
    return small_model(vqgan={"context_dim": context_dim}, **settings).train()


def holes(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    return random_holes(count, size, torch.Generator().manual_seed(seed))


def test_one_hole_pixel_masks_its_token_and_no_other():
    for y, x in ((0, 0), (3, 4), (15, 15), (7, 8)):
        mask = torch.zeros(1, 1, 16, 16)
        mask[0, 0, y, x] = 1
        assert pixel_to_token_mask(mask, 4).nonzero().tolist() == [[0, y // 4 * 4 + x // 4]]


def test_patch_pixels_holds_each_patch_and_nothing_of_the_hole():
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


def test_the_loss_is_the_cross_entropy_of_the_hidden_tokens():
    model = tiny().eval()
    tokens, masked, pixels = torch.randint(0, 32, (3, 16)), torch.rand(3, 16) < 0.5, torch.rand(3, 16, 64)
    log_p = model.transformer(torch.where(masked, 32, tokens), pixels).log_softmax(-1)
    expected = torch.stack([-log_p[b, n, tokens[b, n]] for b, n in masked.nonzero().tolist()])
    torch.testing.assert_close(model(tokens, masked, pixels), expected)


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


def test_places_that_are_not_masked_cost_nothing():
    model = tiny().train()
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


# ---- what training hides ----


def masks(**shares):
    config = TrainTransformerConfig(**shares)
    drawn, masked = draw_masks(400, 16, 4, config, torch.Generator().manual_seed(1))
    return drawn, masked, pixel_to_token_mask(drawn, 4)


@pytest.mark.parametrize("shares", [{}, {"hole_share": 0.0, "full_share": 0.0}, {"hole_share": 0.0, "full_share": 1.0}])
def test_hidden_tokens_lie_inside_the_hole_and_are_never_none(shares):
    _, masked, inside = masks(**shares)
    assert (masked & ~inside).sum() == 0 and masked.any(1).all()


def test_the_reference_hides_a_uniform_number_of_tokens_anywhere():
    drawn, masked, inside = masks(hole_share=0.0, full_share=0.0)
    assert torch.equal(masked, inside)    # hidden tokens show no pixel either, and nothing else is a hole
    assert torch.equal(drawn, masked.view(-1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3))
    counts = torch.bincount(masked.sum(1), minlength=17)
    assert counts[0] == 0 and (counts[1:] > 5).all()    # 25 each on average
    assert (masked.float().mean(0) - 17 / 32).abs().max() < 0.08    # every place alike


def test_an_unknown_picture_hides_a_share_gamma_of_its_tokens():
    drawn, masked, _ = masks(hole_share=0.0, full_share=1.0, mask_schedule="linear")
    assert drawn.all()
    # gamma(r) = 1 - r with r uniform: ceil(share * 16) is uniform on 1..16
    counts = torch.bincount(masked.sum(1), minlength=17)
    assert counts[0] == 0 and (counts[1:] > 5).all()


def test_tokens_that_look_alike_start_alike():
    model = tiny()
    before = model.transformer.token_embed.weight.detach().clone()
    model.embed_codes(torch.Generator().manual_seed(0))
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


def test_the_context_is_the_transformers_view_with_the_whole_hole_masked():
    model, image, mask = listening(), torch.rand(3, 3, 16, 16) * 2 - 1, holes(3)
    known = model.known(image, mask)
    assert torch.equal(known.hidden, pixel_to_token_mask(mask, 4))
    assert torch.equal(known.tokens, torch.where(known.hidden, 32, model.vqgan.encode(image)))
    logits = model.transformer(known.tokens, known.pixels)
    torch.testing.assert_close(model.transformer.logits(known.context), logits)
    torch.testing.assert_close(model.masked_logits(known.tokens, known.pixels, known.context), logits[known.hidden])
    assert tiny().eval().known(image, mask).context is None


def test_the_context_matters_and_hides_what_the_hole_hides():
    model, image, mask = listening(), torch.rand(2, 3, 16, 16) * 2 - 1, holes(2)
    tokens = model.vqgan.encode(image)
    decoded = model.decode(tokens, image, mask)
    assert not torch.allclose(decoded, model.vqgan.decode(tokens, image, mask).clamp(-1, 1))
    for hidden in (7.0, float("nan")):
        assert torch.equal(model.decode(tokens, image.masked_fill(mask, hidden), mask), decoded)


def test_where_nothing_is_known_there_is_no_context():
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
