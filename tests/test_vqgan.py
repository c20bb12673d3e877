"""models/vqgan.py, models/autoencoder.py, models/local_autoencoder.py: what each part may see; models/codebook.py."""
import pytest
import torch
import torch.nn.functional as F
from small_sets import rng
from torch import nn

from models.attention import count_parameters
from models.autoencoder import Downsample, SpatialAttention, Upsample
from models.codebook import Codebook
from models.vqgan import VQGAN, VQGANConfig
from pictures.holes import random_holes

REFERENCE = dict(encoder="reference", decoder="reference", codebook_dim=256, l2_normalize=False,
                 decoder_channels=[512, 256, 256, 128, 128])    # from the codes to the pixels
SMALL_REFERENCE = dict(image_size=32, codebook_size=64, encoder="reference", encoder_channels=[16, 16, 24],
                       encoder_down=[0, 1], decoder="reference", decoder_channels=[24, 16, 16], decoder_up=[0, 1],
                       attention_size=16)


def vqgan(**options) -> VQGAN:
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(**options)).eval()
    for layer in getattr(model.decoder, "stages", nn.ModuleList()).modules():    # blocks start as identities: wake them
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5, generator=rng(1))
    return model


def small(**options) -> VQGAN:
    return vqgan(**(dict(image_size=32, codebook_size=64, encoder_width=16, decoder_channels=[16, 12, 8],
                         decoder_blocks=[1, 1, 1]) | options))


@pytest.fixture(scope="module")
def default() -> VQGAN:
    """The sizes that are trained: exactness must hold for the kernels that these select."""
    return vqgan().requires_grad_(False)


def pictures(count: int, size: int = 64, seed: int = 2) -> torch.Tensor:
    return 2 * torch.rand(count, 3, size, size, generator=rng(seed)) - 1


def touched(hole: torch.Tensor, stride: int) -> torch.Tensor:
    """(B, h, w) bool: tokens whose patch has a hole pixel, counted by reshaping."""
    B, _, H, W = hole.shape
    return hole.view(B, H // stride, stride, W // stride, stride).any(4).any(2)


# ---- size and shapes ----

def test_reference_setting_has_the_published_size():
    with torch.device("meta"):
        assert count_parameters(VQGAN(VQGANConfig(**REFERENCE))) == 70_775_299


@pytest.mark.parametrize("options", [
    dict(),
    dict(stride=8, decoder_channels=[16, 12, 8, 6], decoder_blocks=[1, 0, 1, 1]),
    dict(stride=2, decoder_channels=[12, 8], decoder_blocks=[1, 1]),
    dict(stride=1, decoder_channels=[8], decoder_blocks=[1]),
    SMALL_REFERENCE,
    SMALL_REFERENCE | dict(stride=8, encoder_channels=[16, 16, 16, 16], encoder_down=[0, 1, 2], decoder_up=[0, 1, 2]),
])
def test_shapes(options):
    model, image = small(**options), pictures(2, 32)
    grid = 32 // model.config.stride
    assert model.config.grid == grid
    tokens = model.encode(image)
    assert tokens.shape == (2, grid * grid) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < 64
    assert model.encoder(image).shape == (2, 8, grid, grid)
    assert model.decode(tokens).shape == image.shape
    output, quantized = model(image)
    assert output.shape == image.shape and quantized.indices.shape == (2, grid, grid)


# ---- encoder ----


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_visible_tokens_of_a_masked_picture_are_the_whole_pictures(default, layout):
    default = default.to(memory_format=layout)
    image, hole = pictures(6), random_holes(6, 64, rng(3))
    visible = ~touched(hole, 4)
    assert 0 < visible.sum() < visible.numel()
    tokens, latents = default.encode(image).view(6, 16, 16), default.encoder(image).permute(0, 2, 3, 1)
    for filling in (0.0, 1.0, 100.0):
        masked = image.masked_fill(hole, filling)
        partial = default.encode(masked).view(6, 16, 16)
        assert torch.equal(partial[visible], tokens[visible])
        assert (partial[~visible] != tokens[~visible]).float().mean() > 0.2    # the hole makes a difference in itself
        assert torch.equal(default.encoder(masked).permute(0, 2, 3, 1)[visible], latents[visible])


@pytest.mark.parametrize("options", [{}, SMALL_REFERENCE])
def test_tokens_do_not_depend_on_the_callers_precision_or_batch(options):
    model, image = small(**options), pictures(6, 32)
    tokens = model.encode(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode(image), tokens)
    assert torch.equal(torch.cat([model.encode(x) for x in image.split(1)]), tokens)
    assert torch.equal(model.encode(image.double()), tokens)


# ---- decoder ----

def test_decoder_ignores_what_the_picture_holds_inside_the_hole(default):
    tokens = torch.randint(1024, (2, 256), generator=rng(4))
    image, hole = pictures(2), random_holes(2, 64, rng(5))
    expected = default.decode(tokens, image, hole.float())
    assert expected.isfinite().all()
    for filling in (0.0, -1.0, 1e6, float("nan")):
        assert torch.equal(default.decode(tokens, image.masked_fill(hole, filling), hole.float()), expected)
    assert torch.equal(default.decode(tokens, image, hole), expected)    # a bool mask is the same mask


def test_decoder_uses_known_pixels_at_every_scale_the_mask_and_the_codes(default):
    tokens = torch.randint(1024, (2, 256), generator=rng(4))
    image, hole = pictures(2), random_holes(2, 64, rng(5)).float()
    before = default.decode(tokens, image, hole)
    assert not torch.allclose(default.decode(tokens, -image, hole), before, atol=1e-3)
    assert not torch.allclose(default.decode(tokens.flip(1), image, hole), before, atol=1e-3)
    black = torch.zeros_like(image)    # known and black is not the same as unknown
    known, unknown = (default.decode(tokens, black, torch.full_like(hole, value)) for value in (0, 1))
    assert not torch.allclose(known, unknown, atol=1e-3)
    for scale in default.decoder.condition:
        weight = scale.weight.data.clone()
        scale.weight.data.zero_()
        assert not torch.allclose(default.decode(tokens, image, hole), before, atol=1e-3)
        scale.weight.data.copy_(weight)


def test_without_known_pixels_it_is_a_plain_decoder_as_the_reference_always_is(default):
    tokens = torch.randint(1024, (2, 256), generator=rng(4))
    plain = default.decode(tokens)
    assert torch.equal(plain, default.decode(tokens, pictures(2), torch.ones(2, 1, 64, 64)))
    image = pictures(2)
    output, quantized = default(image)
    assert torch.equal(output, default.decode_latents(quantized.z_q))
    for known, mask in ((image, None), (None, torch.ones(2, 1, 64, 64))):
        with pytest.raises(ValueError, match="give both or neither"):
            default.decode(tokens, known, mask)
    model = small(**SMALL_REFERENCE)
    tokens = torch.randint(64, (2, 64), generator=rng(4))
    assert torch.equal(model.decode(tokens, pictures(2, 32), torch.zeros(2, 1, 32, 32)), model.decode(tokens))


@pytest.mark.parametrize("options", [{}, SMALL_REFERENCE])
def test_training_pass_is_encode_then_decode_and_trains_every_part(options):
    model, image = small(**options), pictures(2, 32)
    hole = random_holes(2, 32, rng(6)).float()
    output, quantized = model(image, hole)
    assert torch.equal(quantized.indices.flatten(1), model.encode(image))
    torch.testing.assert_close(output, model.decode(model.encode(image), image, hole), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantized.loss, model.codebook(model.encoder(image)).loss)
    model, image = small(**options).train(), pictures(2, 32)
    output, quantized = model(image)
    F.mse_loss(output, image).backward(retain_graph=True)
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(("encoder", "decoder"))}
    quantized.loss.backward()
    assert model.codebook.embedding.weight.grad.any()


# ---- parts ----

def test_spatial_attention_is_permutation_equivariant_and_global():
    torch.manual_seed(0)
    attention, x = SpatialAttention(8), torch.randn(1, 8, 3, 4, generator=rng())
    order = torch.randperm(12, generator=rng())
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(attention(shuffled).flatten(2), attention(x).flatten(2)[..., order], rtol=1e-4, atol=1e-5)
    x.requires_grad_()
    assert torch.autograd.grad(attention(x)[0, :, 0, 0].sum(), x)[0].abs().sum(1).gt(0).all()


def test_sampling_layers():
    """Against the same convolution without the padding or the enlarging."""
    x = torch.randn(1, 4, 6, 6, generator=rng())
    down, up = Downsample(4), Upsample(4)
    padded = torch.zeros(1, 4, 7, 7)
    padded[..., :6, :6] = x
    torch.testing.assert_close(down(x), F.conv2d(padded, down.conv.weight, down.conv.bias, stride=2))
    torch.testing.assert_close(up(x), up.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3)))


# ---- config ----


@pytest.mark.parametrize("options", [
    dict(encoder="lokal"), dict(decoder="plain"), dict(stride=3), dict(stride=0), dict(image_size=66), dict(image_size=0),
    dict(codebook_size=0), dict(codebook_dim=0), dict(encoder_width=0), dict(encoder_depth=0), dict(commitment=-0.1),
    dict(commitment=float("nan")), dict(encoder_channels=[]), dict(decoder_channels=[8, 0, 8]),
    dict(decoder_blocks=[1, -1, 1]), dict(decoder_blocks=[1, 1]), dict(widths=3), dict(context_dim=-1),
    dict(decoder_channels=[8, 8], stride=4), dict(context_dim=8) | SMALL_REFERENCE, dict(guess=True) | SMALL_REFERENCE,
    dict(encoder_down=[2]) | REFERENCE, dict(encoder_down=[2, 5]) | REFERENCE,
    dict(decoder_up=[0, 0]) | REFERENCE, dict(decoder_up=[0, -1]) | REFERENCE,
])
def test_config_refuses_by_key(options):
    with pytest.raises(ValueError, match="guess" if "attention_size" in options else next(iter(options))):
        VQGANConfig(**options)


# ---- codebook ----


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
def test_restart_moves_dead_codes_onto_latents_and_no_others_if_there_are_any(l2):
    book, rows = codebook(l2), 3 * torch.randn(50, D, generator=torch.Generator().manual_seed(2))
    before = book.embedding.weight.detach().clone()
    usage = torch.ones(K)
    dead = torch.tensor([0, 3, 11, K - 1])
    usage[dead] = 0
    book.restart_dead(usage, rows, torch.Generator().manual_seed(3))
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
    book = codebook(False)
    before = book.embedding.weight.detach().clone()
    book.restart_dead(torch.ones(K), torch.randn(5, D), torch.Generator())
    assert torch.equal(book.embedding.weight, before)
    book.restart_dead(torch.zeros(K), torch.ones(1, D), torch.Generator())    # fewer latents than dead codes: they share
    assert (book.embedding.weight == 1).all() and book.embedding.weight.requires_grad
