"""The Python call: `MaskGIT.from_pretrained(...).inpaint(image, mask)`, and models saved and loaded offline."""
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import MaskGIT
from models.convert import to_mask
from utils import load_config

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny.yml"


@pytest.fixture(scope="module")
def model() -> MaskGIT:
    config = load_config(TINY)
    torch.manual_seed(0)
    return MaskGIT(config["vqgan"], config["transformer"]).eval()


def picture(height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def square_hole(height: int = 32, width: int = 32) -> np.ndarray:
    hole = np.zeros((height, width), dtype=bool)
    hole[height // 4 : height // 2, width // 4 : width // 2] = True
    return hole


# ---- every kind of picture ----

KINDS = {
    "PIL": (Image.fromarray, np.asarray),
    "array": (np.copy, np.asarray),
    "uint8 tensor": (lambda a: torch.from_numpy(a).permute(2, 0, 1), lambda x: x.permute(1, 2, 0).numpy()),
    "float32 tensor": (
        lambda a: torch.from_numpy(a).permute(2, 0, 1) / 255,
        lambda x: (x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy(),
    ),
    "float64 tensor": (
        lambda a: torch.from_numpy(a).permute(2, 0, 1).double() / 255,
        lambda x: (x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy(),
    ),
}


def describe(x) -> tuple:
    if isinstance(x, Image.Image):
        return "PIL", x.mode, x.size
    return type(x), x.dtype, tuple(x.shape)


@pytest.mark.parametrize("size", [(32, 32), (20, 28), (61, 90)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gives_back_the_kind_and_size_it_was_given(model, kind, size):
    wrap, unwrap = KINDS[kind]
    array, hole = picture(*size), square_hole(*size)
    given = wrap(array)
    completed = model.inpaint(given, hole, seed=3, total_iter=3)
    assert describe(completed) == describe(given)
    assert np.array_equal(unwrap(completed)[~hole], array[~hole])
    assert np.array_equal(unwrap(completed), model.inpaint(array, hole, seed=3, total_iter=3)), "every kind, one answer"
    assert np.array_equal(unwrap(given), array), "the argument must not be written to"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_known_floats_come_back_bit_for_bit_although_they_are_no_multiples_of_one_255th(model, dtype):
    image = torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    hole = torch.from_numpy(square_hole(40, 48))
    completed = model.inpaint(image, hole, total_iter=2)
    assert completed.dtype == dtype and torch.equal(completed[:, ~hole], image[:, ~hole])
    assert not torch.equal(completed[:, hole], image[:, hole])


def test_gray_pictures_become_rgb(model):
    gray, hole = picture()[..., 0], square_hole()
    expected = model.inpaint(np.stack([gray] * 3, axis=2), hole, total_iter=2)
    assert np.array_equal(model.inpaint(gray, hole, total_iter=2), expected)
    pil = model.inpaint(Image.fromarray(gray), hole, total_iter=2)
    assert pil.mode == "RGB" and np.array_equal(np.asarray(pil), expected)


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "P", "1"])
def test_pil_modes_become_rgb_as_pillow_converts_them(model, mode):
    given, hole = Image.fromarray(picture()).convert(mode), square_hole()
    completed = np.asarray(model.inpaint(given, hole, total_iter=2))
    assert np.array_equal(completed[~hole], np.asarray(given.convert("RGB"))[~hole])


# ---- every kind of mask ----


@pytest.mark.parametrize(
    "wrap",
    [
        lambda h: h,
        lambda h: h[None],
        lambda h: h.astype(np.uint8),
        lambda h: h.astype(np.uint8) * 255,
        lambda h: np.where(h, 200, 100).astype(np.uint8),
        lambda h: h.astype(np.int64),
        lambda h: h.astype(np.float32),
        lambda h: torch.from_numpy(h),
        lambda h: torch.from_numpy(h)[None],
        lambda h: torch.from_numpy(h).to(torch.uint8),
        lambda h: torch.from_numpy(h).half(),
        lambda h: Image.fromarray(h),
        lambda h: Image.fromarray(h.astype(np.uint8) * 255),
        lambda h: Image.fromarray(h.astype(np.uint8) * 255).convert("RGB"),
    ],
)
def test_masks_of_all_kinds_mean_the_same(wrap):
    hole = square_hole(9, 13)
    assert torch.equal(to_mask(wrap(hole), hole.shape), torch.from_numpy(hole)[None])


# ---- what comes out ----


def assert_same_but_for_rounding(one: np.ndarray, two: np.ndarray) -> None:
    """Convolutions of batches of other sizes may differ in the last bit, which may move a pixel to the next gray level."""
    assert np.abs(one.astype(int) - two).max() <= 1 and (one != two).mean() < 0.01


@pytest.mark.parametrize("size", [(32, 32), (50, 44)], ids=str)
def test_nothing_behind_the_hole_matters(model, size):
    array, hole = picture(*size), square_hole(*size)
    other = array.copy()
    other[hole] = 255 - other[hole]
    one, two = model.inpaint(array, hole), model.inpaint(other, hole)
    assert np.array_equal(one, two)
    assert not np.array_equal(one[hole], array[hole]) and not np.array_equal(one[hole], other[hole])


def test_samples_are_those_of_consecutive_seeds_whatever_the_batch(model):
    array, hole = picture(), square_hole()
    samples, rounds = model.inpaint(array, hole, seed=7, num_samples=5, batch_size=2, return_rounds=True)
    assert len({sample.tobytes() for sample in samples}) == len(samples) == 5
    for i, sample in enumerate(samples):
        alone, alone_rounds = model.inpaint(array, hole, seed=7 + i, return_rounds=True)
        for one, two in zip(rounds, alone_rounds, strict=True):
            assert torch.equal(one.tokens[i], two.tokens[0]) and torch.equal(one.masked[i], two.masked[0])
        assert_same_but_for_rounding(sample, alone)


def test_without_paste_the_whole_picture_is_decoded(model):
    array, hole = picture(), square_hole()
    pasted, plain = model.inpaint(array, hole), model.inpaint(array, hole, paste=False)
    assert np.array_equal(pasted[hole], plain[hole])
    assert not np.array_equal(plain[~hole], array[~hole])


def test_a_picture_of_which_nothing_is_known_is_made_up(model):
    made = model.inpaint(picture(), np.ones((32, 32), dtype=bool))
    assert made.shape == (32, 32, 3) and np.array_equal(made, model.inpaint(picture() // 2, np.ones((32, 32), dtype=bool)))


@pytest.mark.parametrize("sweet_spot", [None, 3])
def test_rounds_end_in_the_completion_and_are_counted(model, sweet_spot):
    array, hole, seen = picture(60, 44), square_hole(60, 44), []
    options = dict(num_samples=3, batch_size=2, total_iter=5, sweet_spot=sweet_spot, schedule="linear")
    samples, rounds = model.inpaint(array, hole, return_rounds=True, on_round=seen.append, **options)
    last = sweet_spot or 5
    assert len(rounds) == last and seen == [*range(1, last + 1)] * 2    # two batches
    for before, after in zip(rounds, rounds[1:], strict=False):
        assert after.masked.shape == (3, 64)
        assert (after.masked <= before.masked).all() and (after.masked.sum(1) < before.masked.sum(1)).all()
        kept = ~before.masked
        assert torch.equal(after.tokens[kept], before.tokens[kept])
    for sample, drawn in zip(samples, model.render(rounds[-1].tokens, array, hole), strict=True):
        assert_same_but_for_rounding(sample, drawn)
    plain = model.inpaint(array, hole, **options)
    assert all(np.array_equal(one, two) for one, two in zip(plain, samples, strict=True))


# ---- refusals: a sentence that says what was given and what was expected ----

IMAGE_REFUSALS = {
    "uint8 (H, W, 3) or (H, W), got float32": picture().astype(np.float32),
    "got uint8 (32, 32, 4)": np.zeros((32, 32, 4), dtype=np.uint8),
    "got uint8 (0, 32, 3)": np.zeros((0, 32, 3), dtype=np.uint8),
    "must be (3, H, W), got (32, 32, 3)": torch.zeros(32, 32, 3),
    "must be (3, H, W), got (1, 3, 32, 32)": torch.zeros(1, 3, 32, 32),
    "uint8, or floating point in [0, 1], got torch.int64": torch.zeros(3, 32, 32, dtype=torch.int64),
    "in [0, 1], got values from -1 to 0": torch.zeros(3, 32, 32) - torch.eye(32),
    "in [0, 1], got values from nan": torch.full((3, 32, 32), float("nan")),
    "8 bits a channel, got PIL mode 'I;16'": Image.new("I;16", (32, 32)),
    "8 bits a channel, got PIL mode 'F'": Image.new("F", (32, 32)),
    "a PIL image, an array or a tensor, got str": "cat.png",
}
MASK_REFUSALS = {
    "no hole": np.zeros((32, 32), dtype=bool),
    "the mask's shape is (32, 31), the picture's (H, W) (32, 32)": np.ones((32, 31), dtype=bool),
    "the mask's shape is (32, 32, 3)": np.ones((32, 32, 3), dtype=bool),
    "the mask's shape is (1, 1, 32, 32)": torch.ones(1, 1, 32, 32),
    "the mask's shape is (16, 16)": Image.new("1", (16, 16), 1),
    "this one has values from -1 to 0": 0 - np.eye(32),
    "this one has values from 0 to 256": np.eye(32) * 256,
    "this one has values from nan": np.full((32, 32), np.nan),
    "a PIL image, an array or a tensor of numbers, got list": [[True]],
    "a PIL image, an array or a tensor of numbers, got ndarray": np.full((32, 32), "hole"),
}
OPTION_REFUSALS = {
    "num_samples must be a whole number, 1 or more, got 0": dict(num_samples=0),
    "num_samples must be a whole number, 1 or more, got 2.0": dict(num_samples=2.0),
    "batch_size must be a whole number, 1 or more, got 0": dict(batch_size=0),
    "seed must be a whole number, 0 or more, got -1": dict(seed=-1),
    "seed must be a whole number, 0 or more, got True": dict(seed=True),
    "unknown mask schedule 'cosin'": dict(schedule="cosin"),
    "unknown decoder 'best'": dict(decoder="best"),
    "total_iter must be at least 1, got 0": dict(total_iter=0),
    "sweet_spot must lie in 1..total_iter (4), got 5": dict(total_iter=4, sweet_spot=5),
    "temperature must be 0 or more, got -1": dict(temperature=-1),
    "choice_temperature must be 0 or more, got nan": dict(choice_temperature=float("nan")),
}


@pytest.mark.parametrize("sentence", IMAGE_REFUSALS)
def test_refuses_pictures(model, sentence):
    with pytest.raises(ValueError) as error:
        model.inpaint(IMAGE_REFUSALS[sentence], square_hole())
    assert sentence in str(error.value)


@pytest.mark.parametrize("sentence", MASK_REFUSALS)
def test_refuses_masks(model, sentence):
    with pytest.raises(ValueError) as error:
        model.inpaint(picture(), MASK_REFUSALS[sentence])
    assert sentence in str(error.value)


@pytest.mark.parametrize("sentence", OPTION_REFUSALS)
def test_refuses_options(model, sentence):
    with pytest.raises(ValueError) as error:
        model.inpaint(picture(), square_hole(), **OPTION_REFUSALS[sentence])
    assert sentence in str(error.value)


def test_refuses_misspelt_options(model):
    with pytest.raises(TypeError, match="sweetspot"):
        model.inpaint(picture(), square_hole(), sweetspot=3)


# ---- saved and loaded ----


@pytest.fixture
def offline(monkeypatch):
    """Any attempt to open a connection fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def assert_same_model(one: MaskGIT, two: MaskGIT) -> None:
    assert not two.training and two.configs() == one.configs()
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    array, hole = picture(), square_hole()
    assert np.array_equal(one.inpaint(array, hole), two.inpaint(array, hole))


@pytest.mark.parametrize("as_text", [True, False])
def test_a_folder_of_the_hub_s_layout_brings_the_model_back(model, tmp_path, offline, as_text):
    model.save_pretrained(tmp_path / "cat")
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "cat").iterdir()}
    folder = tmp_path / "cat"
    assert_same_model(model, MaskGIT.from_pretrained(str(folder) if as_text else folder))


@pytest.mark.parametrize("as_text", [True, False])
def test_a_single_file_brings_the_model_back(model, tmp_path, offline, as_text):
    path = tmp_path / "cat.safetensors"
    model.save_file(path, torch.float32)
    assert_same_model(model, MaskGIT.from_pretrained(str(path) if as_text else path))


def test_half_precision_files_hold_the_rounded_weights(model, tmp_path):
    model.save_file(tmp_path / "cat.safetensors")
    loaded = MaskGIT.from_pretrained(tmp_path / "cat.safetensors").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value.half().float())


def test_refuses_files_that_are_not_its_own(model, tmp_path):
    with pytest.raises(ValueError, match="nowhere.safetensors not found; give a .safetensors file"):
        MaskGIT.from_pretrained(tmp_path / "nowhere.safetensors")
    path = tmp_path / "cat.safetensors"
    model.save_file(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        MaskGIT.from_pretrained(path)
