"""The Python call, `MaskGIT.inpaint`: kinds of pictures and masks, what comes back, what is refused."""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import small_model

from models import MaskGIT
from models.convert import to_mask


@pytest.fixture(scope="module")
def model() -> MaskGIT:
    return small_model(32)


def picture(height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def square_hole(height: int = 32, width: int = 32) -> np.ndarray:
    hole = np.zeros((height, width), dtype=bool)
    hole[height // 4 : height // 2, width // 4 : width // 2] = True
    return hole


# ---- every kind of picture ----


def from_floats(x: torch.Tensor) -> np.ndarray:
    return (x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


KINDS = {
    "PIL": (Image.fromarray, np.asarray),
    "array": (lambda a: a, lambda x: x),
    "uint8 tensor": (lambda a: torch.from_numpy(a).permute(2, 0, 1), lambda x: x.permute(1, 2, 0).numpy()),
    "float32 tensor": (lambda a: torch.from_numpy(a).permute(2, 0, 1) / 255, from_floats),
    "float64 tensor": (lambda a: torch.from_numpy(a).permute(2, 0, 1).double() / 255, from_floats),
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


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_pil_modes_become_rgb_as_pillow_converts_them(model, mode):
    given, hole = Image.fromarray(picture()).convert(mode), square_hole()
    completed = model.inpaint(given, hole, total_iter=2)
    assert completed.mode == "RGB"
    assert np.array_equal(np.asarray(completed)[~hole], np.asarray(given.convert("RGB"))[~hole])
    if mode == "L":
        assert np.array_equal(model.inpaint(np.asarray(given), hole, total_iter=2), np.asarray(completed))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_photograph_on_its_side_is_turned_upright(model, tmp_path, orientation):
    upright, hole = Image.fromarray(picture(24, 40)), square_hole(24, 40)
    turned = upright.rotate({3: 180, 6: 90, 8: 270}[orientation], expand=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned.save(tmp_path / "turned.png", exif=exif)
    completed = model.inpaint(Image.open(tmp_path / "turned.png"), hole, total_iter=2)
    assert np.array_equal(np.asarray(completed), np.asarray(model.inpaint(upright, hole, total_iter=2)))


# ---- every kind of mask ----


MASKS = [
    lambda h: h,
    lambda h: h[None],
    lambda h: h.astype(np.uint8),
    lambda h: np.where(h, 200, 100).astype(np.uint8),
    lambda h: h.astype(np.float32),
    lambda h: h.astype(np.uint16) * 65535,
    lambda h: torch.from_numpy(h)[None],
    lambda h: Image.fromarray(h),
    lambda h: Image.fromarray(h.astype(np.uint8) * 255).convert("RGB"),
    lambda h: Image.fromarray(h.astype(np.uint16) * 65535),
    lambda h: Image.fromarray(np.dstack([np.zeros((*h.shape, 3)), np.where(h, 0, 255)]).astype(np.uint8)),      # cut out
    lambda h: Image.fromarray(np.dstack([np.where(h, 255, 0)] * 4).astype(np.uint8)),                 # white paint on clear
    lambda h: Image.fromarray(np.dstack([picture(*h.shape), np.where(h, 0, 255).astype(np.uint8)])),  # of a photograph
]


@pytest.mark.parametrize("number", range(len(MASKS)))
def test_masks_of_all_kinds_mean_the_same(number):
    hole = square_hole(9, 13)
    assert torch.equal(to_mask(MASKS[number](hole), hole.shape), torch.from_numpy(hole)[None])


# ---- what comes out ----


def test_samples_and_lists_have_consecutive_seeds_whatever_the_batch(model):
    array, hole = picture(), square_hole()
    samples, rounds = model.inpaint(array, hole, seed=7, num_samples=5, batch_size=2, return_rounds=True)
    assert len({sample.tobytes() for sample in samples}) == len(samples) == 5
    for i, sample in enumerate(samples):
        alone, alone_rounds = model.inpaint(array, hole, seed=7 + i, return_rounds=True)
        assert np.array_equal(sample, alone)
        assert all(torch.equal(a.masked, b.masked) for a, b in zip(rounds[i], alone_rounds, strict=True))
    arrays, holes = [picture(32, 32), picture(40, 25)], [square_hole(32, 32), square_hole(40, 25)]
    for i, done in enumerate(model.inpaint(arrays, holes, seed=3)):
        assert np.array_equal(done, model.inpaint(arrays[i], holes[i], seed=3 + i))
    batch = torch.stack([torch.from_numpy(picture()).permute(2, 0, 1)] * 2)
    done = model.inpaint(batch, np.stack([square_hole()] * 2), seed=3)
    assert done.shape == batch.shape
    assert torch.equal(done[1], model.inpaint(batch[1], square_hole(), seed=4))
    with pytest.raises(ValueError, match="2 pictures need as many masks"):
        model.inpaint(arrays, holes[:1])
    with pytest.raises(ValueError, match="num_samples"):
        model.inpaint(arrays, holes, num_samples=2)


def test_a_picture_of_which_little_is_known_is_made_up_or_warned_of(model):
    made = model.inpaint(picture(), np.ones((32, 32), dtype=bool))
    assert made.shape == (32, 32, 3) and np.array_equal(made, model.inpaint(picture() // 2, np.ones((32, 32), dtype=bool)))
    with pytest.warns(UserWarning, match="white is the hole"):
        model.inpaint(picture(), ~square_hole(), total_iter=1)


@pytest.mark.parametrize("sweet_spot", [None, 3])
def test_rounds_end_in_the_completion_and_are_counted(model, sweet_spot):
    array, hole, seen = picture(), square_hole(), []
    options = dict(num_samples=3, batch_size=2, total_iter=5, sweet_spot=sweet_spot, schedule="linear")
    samples, rounds = model.inpaint(array, hole, return_rounds=True, on_progress=seen.append, **options)
    last = sweet_spot or 5
    assert [(p.level, p.levels, p.round, p.rounds) for p in seen] == [(1, 1, t, last) for t in range(1, last + 1)] * 2
    for sample, mine in zip(samples, rounds, strict=True):
        left = [int(r.masked.sum()) for r in mine]
        assert len(mine) == last + 1 and left == sorted(left, reverse=True)
        assert np.array_equal(mine[-1].picture.permute(1, 2, 0).numpy(), sample)
    plain = model.inpaint(array, hole, **options)
    assert all(np.array_equal(one, two) for one, two in zip(plain, samples, strict=True))


# ---- inside another program ----


def test_the_seed_decides_and_neither_global_random_numbers_nor_threads(model):
    torch.manual_seed(1)
    first = model.inpaint(picture(), square_hole(), seed=3)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert drawn == torch.rand(1)    # and they are left as they were
    assert np.array_equal(model.inpaint(picture(), square_hole(), seed=3), first)
    assert not np.array_equal(model.inpaint(picture(), square_hole(), seed=4), first)
    def complete(seed: int) -> np.ndarray:
        return model.inpaint(picture(), square_hole(), seed=seed, precision=("fp32", "bf16")[seed % 2], total_iter=4)

    alone = [complete(seed) for seed in range(8)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(complete, range(8)))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_is_refused_with_the_way_to_go(model):
    class Completion(torch.nn.Module):
        def forward(self, image, mask):
            return model.complete(image, mask, [0], total_iter=2).images

    mask = torch.from_numpy(square_hole()).float()[None, None]
    with pytest.raises(ValueError, match="--onnx"):
        torch.jit.trace(Completion(), (torch.zeros(1, 3, 32, 32), mask))


# ---- refusals: a sentence that says what was given ----

REFUSALS = {
    "float32": dict(image=picture().astype(np.float32)),
    "uint8 (32, 32, 4)": dict(image=np.zeros((32, 32, 4), dtype=np.uint8)),
    "(3, H, W)": dict(image=torch.zeros(32, 32, 3)),
    "torch.int64": dict(image=torch.zeros(3, 32, 32, dtype=torch.int64)),
    "from -1 to 0": dict(image=torch.zeros(3, 32, 32) - torch.eye(32)),
    "from nan": dict(image=torch.full((3, 32, 32), float("nan"))),
    "I;16": dict(image=Image.new("I;16", (32, 32))),
    "got str": dict(image="cat.png"),
    "no hole": dict(mask=np.zeros((32, 32), dtype=bool)),
    "(32, 31)": dict(mask=np.ones((32, 31), dtype=bool)),
    "values from 0 to 256": dict(mask=np.eye(32) * 256),
    "values from nan": dict(mask=np.full((32, 32), np.nan)),
    "got list": dict(mask=[[True]]),
    "of numbers": dict(mask=np.full((32, 32), "hole")),
    "swapped": dict(mask=picture()),
    "num_samples": dict(num_samples=2.0),
    "batch_size": dict(batch_size=0),
    "seed": dict(seed=-1),
    "sweetspot": dict(sweetspot=3),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refuses_what_makes_no_sense(model, words):
    with pytest.raises((ValueError, TypeError)) as error:
        model.inpaint(**dict(image=picture(), mask=square_hole()) | REFUSALS[words])
    assert words in str(error.value)
