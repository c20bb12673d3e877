"""What the demo does behind the page: reading, painting, completing, refusing. The page itself: tests/browser."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops
from small_sets import small_model

from demo.__main__ import main
from demo.completing import complete
from demo.painting import CANVAS, MARGIN, editor_value, frame, painted
from demo.photos import Photo, find_samples, new_file, open_mask, open_photo
from models import MaskGIT
from pictures.images import Picture
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
MAX_PIXELS = 1_000_000


@pytest.fixture(scope="module")
def model() -> MaskGIT:
    return small_model(32)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photo(height: int = 32, width: int = 32) -> Photo:
    return Photo(Picture(noise(height, width), {}, []), "cat")


def black(height: int, width: int, hole: torch.Tensor | None = None) -> Photo:
    return Photo(Picture(np.zeros((height, width, 3), dtype=np.uint8), {}, []), "cat", hole)


def box(height: int = 32, width: int = 32) -> torch.Tensor:
    hole = torch.zeros(1, height, width, dtype=torch.bool)
    hole[:, height // 4 : height // 2, width // 4 : width // 2 + 3] = True
    return hole


def as_editor(value: dict) -> dict:
    """What the browser sends back for what the page has sent."""
    return {"layers": [np.array(layer) for layer in value["layers"]]}


def saved(folder: Path, name: str, image: Image.Image, **options) -> str:
    image.save(folder / name, **options)
    return str(folder / name)


# ---- files ----


def test_a_picture_is_opened_as_it_is_and_named_safely_and_alone(tmp_path):
    opened, notes = open_photo(saved(tmp_path, "<b>a cat (1).png", Image.fromarray(noise(30, 50))), MAX_PIXELS)
    assert np.array_equal(opened.picture.pixels, noise(30, 50)) and opened.size == (30, 50)
    assert opened.name == "_b_a_cat_1_" and notes == [] and opened.hole is None
    first, second = (new_file(tmp_path, "cat-seed3") for _ in range(2))
    first.touch()
    second.touch()
    assert first.name == second.name == "cat-seed3.png" and first != second
    os.utime(first, (0, 0))
    new_file(tmp_path, "other")
    assert not first.exists() and second.exists()


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize(
    ("name", "word"),
    [("text.png", "not a picture"), ("cut.png", "cannot read"), ("huge.png", "1,000,000"), ("large.png", "1,000,000"),
     ("small.png", "at least 16x16"), ("none.png", "not a picture")],
)    # fmt: skip
def test_refused_files_are_named_without_the_servers_path(tmp_path, name, word):
    (tmp_path / "text.png").write_text("not a picture")
    whole = Path(saved(tmp_path, "cut.png", Image.fromarray(noise(64, 64))))
    whole.write_bytes(whole.read_bytes()[:3000])
    for other, size in (("huge.png", (10_000, 10_000)), ("large.png", (1001, 1000)), ("small.png", (100, 15))):
        saved(tmp_path, other, Image.new("1", size))
    with pytest.raises(UserError, match=word) as error:
        open_photo(tmp_path / name, MAX_PIXELS)
    assert name in str(error.value) and str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("colour", ["black", "white"])
def test_a_mask_gives_the_hole(tmp_path, colour):
    hole = box(40, 60)
    gray = np.where(hole[0].numpy() == (colour == "white"), 255, 0).astype(np.uint8)
    path = saved(tmp_path, "mask.png", Image.fromarray(gray))
    opened, notes = open_mask(path, photo(40, 60), colour, MAX_PIXELS)
    assert torch.equal(opened.hole, hole) and f"{hole.float().mean():.0%}" in notes[0] and len(notes) == 1
    _, notes = open_mask(path, photo(40, 60), {"black": "white", "white": "black"}[colour], MAX_PIXELS)
    assert f"choose {colour}" in notes[1]
    with pytest.raises(UserError, match="same size"):
        open_mask(path, photo(60, 40), colour, MAX_PIXELS)


def test_samples_are_paired_by_name_and_may_be_missing(tmp_path, capsys):
    assert find_samples(tmp_path) == [] and "no samples" in capsys.readouterr().err
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for name in ("b", "a"):
        Image.fromarray(noise(32, 32)).save(tmp_path / "images" / f"{name}.png")
    Image.new("L", (32, 32)).save(tmp_path / "masks" / "b.png")
    without, with_mask = find_samples(tmp_path)
    assert without.file.name == "a.png" and without.open(MAX_PIXELS).hole is None
    assert with_mask.file.name == "b.png" and with_mask.open(MAX_PIXELS).hole.all()


# ---- paint ----


@settings(max_examples=15, deadline=None)
@given(st.integers(16, 1500), st.integers(16, 1500), st.integers(0, 2**32 - 1))
def test_a_hole_survives_the_way_through_the_editor(height, width, seed):
    hole = torch.from_numpy(np.random.default_rng(seed).random((1, height, width)) < 0.3)
    shown = as_editor(editor_value(black(height, width, hole)))
    assert torch.equal(painted(shown, black(height, width, hole)), hole)
    if max(height, width) <= CANVAS:
        assert torch.equal(painted(shown, black(height, width)), hole)


def test_a_thin_line_in_a_picture_larger_than_the_canvas_is_kept_exactly():
    hole = torch.zeros(1, 1000, 4000, dtype=torch.bool)
    hole[:, 501, 200:3900] = True
    wide = black(1000, 4000, hole)
    left, top, right, bottom = frame(wide)
    shown = as_editor(editor_value(wide))
    assert torch.equal(painted(shown, wide), hole)
    shown["layers"][0][:, : CANVAS // 2, 3] = 0                            # the eraser
    shown["layers"][0][top + 10 : top + 20, 700:800, 3] = 255              # the brush
    shown["layers"][0][: top - 5, :, 3] = 255                              # beside the picture
    changed = painted(shown, wide)
    assert not changed[:, :, :1990].any() and torch.equal(changed[:, 100:, 2010:], hole[:, 100:, 2010:])
    assert changed[:, 42:76, 2740:3120].all() and changed[:, :100].sum() < 44 * 410


@pytest.mark.parametrize(
    ("size", "box"),
    [((64, 64), (0, 0, 1024, 1024)), ((600, 800), (0, 128, 1024, 896)), ((3000, 1500), (256, 0, 768, 1024)),
     ((16, 512), (0, 496, 1024, 528))],
)    # fmt: skip
def test_the_picture_fills_the_canvas_and_keeps_its_shape(size, box):
    shown = editor_value(photo(*size))["background"]
    assert frame(photo(*size)) == box == ImageChops.difference(shown, Image.new("RGB", shown.size, MARGIN)).getbbox()


@pytest.mark.parametrize("nothing", [None, {}, {"layers": []}, {"layers": None}, as_editor(editor_value(photo()))])
def test_no_paint_is_no_hole(nothing):
    assert not painted(nothing, photo()).any()


# ---- completing ----


@pytest.mark.parametrize("size", [(32, 32), (70, 90)])
def test_completions_keep_every_known_pixel_and_follow_their_seeds(model, tmp_path, size):
    whole, hole = photo(*size), box(*size)
    made = complete(model, whole, hole, 5, 3, tmp_path, total_iter=4)
    assert [one.seed for one in made] == [5, 6, 7] and made[1].file.name == "cat-seed6.png"
    pictures = [np.asarray(Image.open(one.file)) for one in made]
    known, given_pixels = ~hole[0].numpy(), noise(*size)
    for i, picture in enumerate(pictures):
        assert np.array_equal(picture[known], given_pixels[known])
        assert not np.array_equal(picture[~known], given_pixels[~known])
        assert np.array_equal(picture, model.inpaint(given_pixels, hole, seed=5 + i, total_iter=4))
    assert len({picture.tobytes() for picture in pictures}) == 3


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"photo": None}, "no picture"),
        ({"hole": torch.zeros(1, 32, 32, dtype=torch.bool)}, "Nothing is painted"),
        ({"hole": torch.ones(1, 32, 32, dtype=torch.bool)}, "whole picture"),
        ({"seed": None}, "seed"),
        ({"count": 9}, "8 completions"),
        ({"total_iter": 31}, "30 rounds"),
    ],
)
def test_what_cannot_be_completed_is_refused(model, tmp_path, changes, word):
    arguments = {"photo": photo(), "hole": box(), "seed": 0, "count": 1, "folder": tmp_path, "total_iter": 8} | changes
    with pytest.raises(ValueError, match=word):
        complete(model, **arguments)


# ---- the command ----


@pytest.mark.parametrize(
    ("flags", "word"),
    [("--port 0", "--port"), ("--max-pixels 0", "--max-pixels"), ("--root-path inpainting", "begin with /")],
)    # fmt: skip
def test_flags_that_cannot_work_are_refused(flags, word):
    with pytest.raises(UserError, match=word):
        main(flags.split())


def test_without_gradio_it_says_how_to_get_it(tmp_path):
    """And the help does not need it."""
    (tmp_path / "gradio.py").write_text("raise ModuleNotFoundError('none', name='gradio')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for flags, code, word in (([], 2, "pip install -r requirements-demo.txt"), (["--help"], 0, "--checkpoint")):
        command = [sys.executable, "-m", "demo", *flags]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == code and word in run.stdout + run.stderr and "Traceback" not in run.stderr
