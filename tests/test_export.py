"""tools/export: a model from the parts of several trainings, and ONNX files that compute the same without PyTorch."""

import importlib.util
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_sets import assert_equal_in_half, refusal, small_model

from models import MaskGIT
from tools import export
from training.checkpoints import save_checkpoint
from training.weights import tokenizer_difference

SIZE, K = 16, 32


def lively(seed: int = 0, vqgan: dict | None = None, **transformer) -> MaskGIT:
    """A model of large random weights, so that everything that can have an effect has a visible one."""
    codes = dict(decoder_channels=[32, 16, 8]) | (vqgan or {})
    model = small_model(SIZE, codes, seed, **dict(embed_dim=48, depth=2, mlp_dim=96) | transformer)
    for parameter in [*model.transformer.parameters(), *model.vqgan.decoder.parameters()]:
        torch.nn.init.normal_(parameter, std=0.1)
    return model


# ---- one file ----


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A stage-2 checkpoint, and model files with another decoder, another transformer and other tokens."""
    folder = tmp_path_factory.mktemp("parts")
    model = lively()
    state = {"kind": "transformer-training", "step": 1, "config": model.configs() | {"train_transformer": {}},
             "ema": model.transformer.state_dict(), "vqgan": model.vqgan.state_dict()}    # fmt: skip
    save_checkpoint(folder / "transformer.pt", state)
    other = lively(1, dict(context_dim=48))
    for name in ("encoder", "codebook"):
        getattr(other.vqgan, name).load_state_dict(getattr(model.vqgan, name).state_dict())
    other.save_file(folder / "other.safetensors")
    vqgan = {"kind": "vqgan-training", "step": 1, "config": {"vqgan": asdict(model.vqgan.config)},
             "ema": model.vqgan.state_dict() | {"decoder.from_code.bias": torch.full((32,), 0.5)}}    # fmt: skip
    save_checkpoint(folder / "vqgan.pt", vqgan)
    lively(2).save_file(folder / "foreign.safetensors")
    return folder


def written(parts: Path, output: Path, *flags: str) -> MaskGIT:
    argv = ["--transformer", parts / "transformer.pt", "--output", output, *flags]
    assert export.main([str(x) for x in argv]) == 0
    return MaskGIT.from_pretrained(output)


def test_a_temperature_of_1_stands_for_the_models_own(parts, tmp_path):
    plain, safer = (written(parts, tmp_path / f"{x}.safetensors", *flags) for x, flags in
                    (("a", ()), ("b", ("--temperature", "0.5"))))    # fmt: skip
    picture, hole = np.full((SIZE, SIZE, 3), 90, np.uint8), np.ones((SIZE, SIZE), bool)
    hole[:4] = False
    made = {(name, heat): model.inpaint(picture, hole, temperature=heat, total_iter=2)
            for name, model in (("plain", plain), ("safer", safer)) for heat in (0.5, 1.0)}    # fmt: skip
    assert np.array_equal(made["safer", 1.0], made["plain", 0.5])
    assert not np.array_equal(made["safer", 1.0], made["plain", 1.0])
    with pytest.raises(ValueError, match="--temperature"):
        written(parts, tmp_path / "c.safetensors", "--temperature", "0")


def test_it_takes_the_transformer_of_one_and_the_decoder_of_another(parts, tmp_path):
    mine, other = lively(), MaskGIT.from_pretrained(parts / "other.safetensors")
    assert_equal_in_half(written(parts, tmp_path / "a.safetensors", "--note", "seed=0").state_dict(), mine.state_dict())
    model = written(parts, tmp_path / "b.safetensors", "--vqgan", parts / "other.safetensors")
    assert_equal_in_half(model.transformer.state_dict(), mine.transformer.state_dict())
    assert_equal_in_half(model.vqgan.state_dict(), other.vqgan.state_dict())
    model = written(parts, tmp_path / "c.safetensors", "--vqgan", parts / "vqgan.pt")
    assert bool((model.vqgan.decoder.from_code.bias == 0.5).all())


def test_it_averages_transformers_and_decoders_and_eight_bits_keep_the_tokens(parts, tmp_path):
    flag, other = str(parts / "other.safetensors"), MaskGIT.from_pretrained(parts / "other.safetensors")
    model = written(parts, tmp_path / "a.safetensors", "--average", flag, "--vqgan", flag, "--average-decoder", flag)
    for name, value in lively().transformer.state_dict().items():
        expected = (value + other.transformer.state_dict()[name]) / 2
        assert torch.equal(model.transformer.state_dict()[name], expected.half().float())
    assert_equal_in_half(model.vqgan.state_dict(), other.vqgan.state_dict())    # the mean of two that are equal
    half, small = (written(parts, tmp_path / f"{i}.safetensors", *flags) for i, flags in enumerate(([], ["--eight-bit"])))
    assert (tmp_path / "1.safetensors").stat().st_size < (tmp_path / "0.safetensors").stat().st_size
    assert tokenizer_difference(small.vqgan.state_dict(), half.vqgan.state_dict()) is None
    assert any(value.dtype == torch.int8 for value in load_file(tmp_path / "1.safetensors").values())


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--output x.safetensors", "--transformer"),
        ("--transformer transformer.pt --output x.pt", ".safetensors"),
        ("--transformer transformer.pt --output x.safetensors --note config=3", "KEY=VALUE"),
        ("--transformer transformer.pt --output x.safetensors --vqgan foreign.safetensors", "other tokens"),
        ("--transformer transformer.pt --output x.safetensors --average foreign.safetensors", "other tokens"),
        ("--transformer transformer.pt --output x.safetensors --average-decoder other.safetensors", "VQGAN"),
        ("--onnx onnx --checkpoint none.safetensors", "not found"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(parts, flags, word, monkeypatch):
    monkeypatch.chdir(parts)
    assert word in refusal(export.main, *flags.split())
    assert not (parts / "x.safetensors").exists() and not (parts / "onnx").exists()


# ---- ONNX ----

CASES = {
    "default": lively(vqgan=dict(context_dim=48)),
    "guess": lively(vqgan=dict(guess=True), pixel_dim=128),
    "tokens only": lively(vqgan=dict(decoder="reference", decoder_channels=[16, 8], decoder_up=[0, 1], attention_size=4),
                          pixel_dim=0, pre_norm=False, qk_norm=False),
}    # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory) -> tuple[MaskGIT, Path]:
    """A model that was in a file in 8 bits, and its ONNX files."""
    pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("onnx")
    CASES[request.param].save_file(folder / "model.safetensors", eight_bit=True)
    assert export.main(["--checkpoint", str(folder / "model.safetensors"), "--onnx", str(folder / "onnx")]) == 0
    return MaskGIT.from_pretrained(folder / "model.safetensors"), folder / "onnx"


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("onnxruntime")
    path = Path(__file__).resolve().parents[1] / "docs/onnx_example.py"
    spec = importlib.util.spec_from_file_location("onnx_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_completes_as_the_model_does(exported, example):
    model, folder = exported
    rng = np.random.default_rng(0)
    for top, rounds in ((3, 1), (0, 5)):
        pixels, hole = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8), np.zeros((SIZE, SIZE), bool)
        hole[top : top + 9, 4:11] = True
        expected = model.inpaint(pixels, hole, temperature=0.0, choice_temperature=0.0, total_iter=rounds)
        completed = example.complete(str(folder), pixels, hole, rounds)
        assert np.abs(completed.astype(int) - expected).max() <= 1 and (completed[~hole] == pixels[~hole]).all()
        assert completed[hole].std() > 1


@torch.no_grad()
def test_tokens_and_logits_are_the_models_for_any_batch(exported):
    import onnxruntime

    model, folder = exported
    sessions = [onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "transformer")]
    for batch in (1, 3):
        image, mask = 2 * torch.rand(batch, 3, SIZE, SIZE) - 1, torch.zeros(batch, 1, SIZE, SIZE)
        mask[:, :, 2:9, 3:12] = 1
        (tokens,) = sessions[0].run(None, {"image": image.numpy()})
        assert np.array_equal(tokens.reshape(batch, -1), model.vqgan.encode(image).numpy())
        known = model.known(image, mask)
        given = {"tokens": known.tokens, "image": image, "mask": mask, "guess": torch.zeros(batch, 4, SIZE, SIZE)}
        logits, _ = sessions[1].run(None, {x.name: given[x.name].numpy() for x in sessions[1].get_inputs()})
        expected = model.transformer(known.tokens, known.pixels)
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


def test_encoder_and_decoder_take_any_size_and_weights_stay_in_8_bits(exported):
    import onnxruntime

    _, folder = exported
    encoder, decoder = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "decoder"))
    image = np.random.default_rng(0).random((2, 3, 24, 40), dtype=np.float32)
    (tokens,) = encoder.run(None, {"image": image})
    assert tokens.shape == (2, 6, 10)
    given = {"tokens": tokens, "image": image, "mask": np.ones((2, 1, 24, 40), np.float32),
             "features": np.zeros((2, 60, 48), np.float32), "guess": np.zeros((2, 4, 24, 40), np.float32)}    # fmt: skip
    (picture,) = decoder.run(None, {x.name: given[x.name] for x in decoder.get_inputs()})
    assert picture.shape == image.shape
    import onnx

    _, folder = exported
    weights = [onnx.numpy_helper.to_array(x) for x in onnx.load(folder / "transformer.onnx").graph.initializer]
    large = [x.dtype for x in weights if x.shape[:1] in ((48,), (96,)) and x.size >= 4096]
    assert large and set(large) == {np.dtype(np.int8)}
    assert np.load(folder / "codebook.npy").shape == (K, 4)
