"""models/vqgan.py, models/autoencoder.py, models/local_autoencoder.py: what each part may see, and that it sees it."""
import pytest
import torch
import torch.nn.functional as F
from small_sets import rng
from torch import nn

from models.attention import count_parameters
from models.autoencoder import Downsample, SpatialAttention, Upsample
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

@pytest.mark.parametrize("channels_last", [False, True])
def test_a_patch_changes_its_own_token_and_no_other(default, channels_last):
    image = pictures(1)
    model = default.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    before = model.encoder(image)
    for row, column in ((0, 0), (5, 9), (15, 15)):
        changed = image.clone()
        changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] *= -1
        elsewhere = torch.ones(16, 16, dtype=torch.bool)
        elsewhere[row, column] = False
        after = model.encoder(changed)
        assert torch.equal(after[..., elsewhere], before[..., elsewhere])
        assert not torch.equal(after[..., row, column], before[..., row, column])


def test_every_pixel_of_a_patch_counts(default):
    image = pictures(1).requires_grad_()
    latent = default.encoder(image)[0, :, 3, 7].sum()
    seen = torch.autograd.grad(latent, image)[0].abs().sum(1)[0] > 0
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[12:16, 28:32] = True
    assert torch.equal(seen, expected)


def test_visible_tokens_of_a_masked_picture_are_the_whole_pictures(default):
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


def test_decoder_uses_known_pixels_the_mask_and_the_codes(default):
    tokens = torch.randint(1024, (2, 256), generator=rng(4))
    image, hole = pictures(2), random_holes(2, 64, rng(5)).float()
    before = default.decode(tokens, image, hole)
    assert not torch.allclose(default.decode(tokens, -image, hole), before, atol=1e-3)
    assert not torch.allclose(default.decode(tokens.flip(1), image, hole), before, atol=1e-3)
    black = torch.zeros_like(image)    # known and black is not the same as unknown
    known, unknown = (default.decode(tokens, black, torch.full_like(hole, value)) for value in (0, 1))
    assert not torch.allclose(known, unknown, atol=1e-3)


def test_every_scale_sees_the_known_pixels(default):
    tokens = torch.randint(1024, (1, 256), generator=rng(4))
    image, hole = pictures(1), random_holes(1, 64, rng(5)).float()
    before = default.decode(tokens, image, hole)
    for scale in default.decoder.condition:
        weight = scale.weight.data.clone()
        scale.weight.data.zero_()
        assert not torch.allclose(default.decode(tokens, image, hole), before, atol=1e-3)
        scale.weight.data.copy_(weight)


def test_without_known_pixels_it_is_a_plain_decoder(default):
    tokens = torch.randint(1024, (2, 256), generator=rng(4))
    plain = default.decode(tokens)
    assert torch.equal(plain, default.decode(tokens, pictures(2), torch.ones(2, 1, 64, 64)))
    image = pictures(2)
    output, quantized = default(image)
    assert torch.equal(output, default.decode_latents(quantized.z_q))
    for known, mask in ((image, None), (None, torch.ones(2, 1, 64, 64))):
        with pytest.raises(ValueError, match="give both or neither"):
            default.decode(tokens, known, mask)


def test_reference_decoder_has_no_use_for_known_pixels():
    model = small(**SMALL_REFERENCE)
    tokens = torch.randint(64, (2, 64), generator=rng(4))
    assert torch.equal(model.decode(tokens, pictures(2, 32), torch.zeros(2, 1, 32, 32)), model.decode(tokens))


@pytest.mark.parametrize("options", [{}, SMALL_REFERENCE])
def test_training_pass_is_encode_then_decode(options):
    model, image = small(**options), pictures(2, 32)
    hole = random_holes(2, 32, rng(6)).float()
    output, quantized = model(image, hole)
    assert torch.equal(quantized.indices.flatten(1), model.encode(image))
    torch.testing.assert_close(output, model.decode(model.encode(image), image, hole), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantized.loss, model.codebook(model.encoder(image)).loss)


@pytest.mark.parametrize("options", [{}, SMALL_REFERENCE])
def test_reconstruction_trains_encoder_and_decoder_and_the_loss_the_codebook(options):
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

def test_config_reaches_the_codebook():
    for l2 in (False, True):
        book = vqgan(image_size=8, codebook_size=5, codebook_dim=3, l2_normalize=l2, commitment=0.5).codebook
        assert (book.codebook_size, book.codebook_dim, book.l2_normalize, book.commitment) == (5, 3, l2, 0.5)


@pytest.mark.parametrize("options", [
    dict(encoder="lokal"), dict(decoder="plain"), dict(stride=3), dict(stride=0), dict(image_size=66), dict(image_size=0),
    dict(codebook_size=0), dict(codebook_dim=0), dict(encoder_width=0), dict(encoder_depth=0), dict(commitment=-0.1),
    dict(commitment=float("nan")), dict(encoder_channels=[]), dict(decoder_channels=[8, 0, 8]),
    dict(decoder_blocks=[1, -1, 1]), dict(decoder_blocks=[1, 1]), dict(widths=3), dict(context_dim=-1),
    dict(decoder_channels=[8, 8], stride=4), dict(context_dim=8) | SMALL_REFERENCE, dict(guess=True) | SMALL_REFERENCE,
])
def test_config_refuses_by_key(options):
    with pytest.raises(ValueError, match="context_dim or a guess" if "encoder_down" in options else next(iter(options))):
        VQGANConfig(**options)


@pytest.mark.parametrize("key, stages", [
    ("encoder_down", [2]), ("encoder_down", [2, 5]), ("decoder_up", [0, 0]), ("decoder_up", [0, -1])
])
def test_a_reference_setting_names_as_many_stages_as_the_stride_needs(key, stages):
    with pytest.raises(ValueError, match=f"{key} must name 2 of the 5 stages"):
        VQGANConfig(**REFERENCE | {key: stages})


def test_config_leaves_the_parts_alone_that_are_not_used():
    VQGANConfig(encoder_down=[])
    VQGANConfig(decoder="reference", decoder_blocks=[], decoder_up=[0, 2])
