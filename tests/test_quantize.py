"""Weights in 8 bits: what rounding keeps, the choice of scales, and files that hold such weights."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_sets import small_model

from models.maskgit import MaskGIT
from models.quantize import LEAST_SCALE, SUFFIX, dequantize, quantize

SHAPES = [(48, 64), (16, 3, 3, 3), (5, 1), (1, 4096)]
MATRIX = "transformer.blocks.0.attention.qkv.weight"


def weights(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Normal numbers with outliers; the rows' sizes range from 1e-7 to 1e4."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-7, 4, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return size * torch.randn(shape, generator=generator) ** 3


# ---- tensors ----


def test_the_second_time_changes_nothing_for_any_size_of_a_row():
    size = torch.logspace(-9, 6, 20_000)[:, None]
    values, scale = quantize(size * torch.tensor([1.0, -0.7, 0.3, 0.01]))
    again, same_scale = quantize(dequantize(values, scale))
    assert torch.equal(again, values) and torch.equal(same_scale, scale)
    assert bool((scale == 0).any()) and bool((scale == LEAST_SCALE).any())    # the smallest rows are among them


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_off_by_half_a_step_at_most(shape):
    weight = weights(shape)
    values, scale = quantize(weight)
    off = (dequantize(values, scale) - weight).abs().flatten(1) / scale.float().clamp(min=LEAST_SCALE)[:, None]
    assert bool((off <= 0.5 + 1e-4).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e8])
def test_refuses_what_8_bits_can_not_hold(bad):
    weight = torch.ones(3, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="8 bits"):
        quantize(weight)


# ---- files ----


@pytest.fixture(scope="module")
def model() -> MaskGIT:
    codes = dict(codebook_size=64, codebook_dim=64, encoder_width=64, decoder_channels=[32, 16, 8], context_dim=64)
    model = small_model(vqgan=codes, embed_dim=64, mlp_dim=64, depth=2)
    for parameter in model.parameters():    # none is 0 or 1, which every type holds exactly
        parameter.data += 0.01 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    model.save_file(path, eight_bit=True, seed="0")
    return path


def test_a_file_in_8_bits_brings_the_rounded_weights_back(model, path):
    loaded, stored = MaskGIT.from_pretrained(path), load_file(path)
    small = {name.split(".")[1] for name, value in stored.items() if value.dtype == torch.int8}
    assert small == {"blocks", "head", "decoder"}    # not what makes or embeds tokens
    assert not loaded.training and loaded.configs() == model.configs()
    for name, value in model.state_dict().items():
        if stored[name].dtype == torch.int8:
            assert torch.equal(loaded.state_dict()[name], dequantize(*quantize(value)))
        else:
            assert torch.equal(loaded.state_dict()[name], value.half().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_reading_and_writing_again_changes_nothing(model, tmp_path, dtype):
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    model.save_file(once, dtype, eight_bit=True)
    MaskGIT.from_pretrained(once).save_file(twice, dtype, eight_bit=True)
    one, two = load_file(once), load_file(twice)
    assert one.keys() == two.keys()
    assert all(one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda stored: stored.pop(MATRIX + SUFFIX), "scale"),
        (lambda stored: stored.update({MATRIX + SUFFIX: torch.ones(7).half()}), "scale"),
        (lambda stored: stored.update({MATRIX: stored[MATRIX].half()}), "Unexpected key"),
    ],
)
def test_files_whose_scales_do_not_fit_are_refused(path, tmp_path, change, word):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"]) and metadata["seed"] == "0"
    stored = load_file(path)
    change(stored)
    save_file(stored, tmp_path / "odd.safetensors", metadata)
    with pytest.raises(ValueError, match=f"odd.safetensors .*{word}"):
        MaskGIT.from_pretrained(tmp_path / "odd.safetensors")
