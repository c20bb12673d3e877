"""What demo.py does behind the page: reading, placing, painting, completing, texts. The page itself: tests/browser."""
import argparse
import asyncio
import base64
import hashlib
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence

from demo import page as demo
from models import MaskGIT
from utils import UserError, load_config

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny.yml"
MAX_PIXELS = 1_000_000


@pytest.fixture(scope="module")
def model() -> MaskGIT:
    config = load_config(TINY)
    torch.manual_seed(0)
    return MaskGIT(config["vqgan"], config["transformer"]).eval()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(height: int = 32, width: int = 32, box: tuple[int, int, int] | None = None) -> demo.Picture:
    return demo.Picture(noise(height, width), "cat", box or (0, 0, min(height, width)))


def hole(side: int = 32) -> np.ndarray:
    made = np.zeros((side, side), dtype=bool)
    made[side // 4 : side // 2, side // 4 : side // 2 + 3] = True
    return made


def as_editor(value: dict) -> dict:
    """What the browser sends back for what the page has sent."""
    return {"layers": [np.asarray(layer) for layer in value["layers"]]}


# ---- the square ----


@given(st.integers(16, 90), st.integers(16, 90), *[st.integers(-50, 150)] * 3)
def test_a_placed_square_lies_inside(height, width, left, top, side):
    placed = picture(height, width).placed(left, top, side)
    left, top, side = placed.box
    assert side >= demo.MIN_SIDE and left >= 0 and top >= 0 and left + side <= width and top + side <= height
    assert placed.crop.shape == (side, side, 3)
    assert placed.placed(*placed.box) == placed


def test_a_square_that_fits_stays_where_it_was_put():
    assert picture(50, 80).placed(13, 7, 40).box == (13, 7, 40)


def test_only_the_square_changes_and_only_in_the_copy():
    whole = picture(40, 60, (11, 3, 20))
    before = whole.pixels.copy()
    changed = whole.with_crop(255 - whole.crop)
    assert np.array_equal(whole.pixels, before)
    assert np.array_equal(changed.crop, 255 - before[3:23, 11:31])
    changed.crop[:] = whole.crop
    assert np.array_equal(changed.pixels, before)


@pytest.mark.parametrize("size", [(30, 30), (30, 50), (50, 30)])
def test_an_opened_picture_begins_with_its_middle_square(tmp_path, size):
    Image.fromarray(noise(*size)).save(tmp_path / "a cat (1).png")
    opened, notes = demo.open_picture(str(tmp_path / "a cat (1).png"), MAX_PIXELS)
    assert np.array_equal(opened.pixels, noise(*size)) and notes == [] and opened.name == "a_cat_1_"
    left, top, side = opened.box
    assert side == 30 and abs(2 * left + side - size[1]) <= 1 and abs(2 * top + side - size[0]) <= 1


# ---- what is said about files ----


def saved(folder: Path, name: str, image: Image.Image, **options) -> str:
    image.save(folder / name, **options)
    return str(folder / name)


def test_notes_say_what_reading_changes(tmp_path):
    rgb = Image.fromarray(noise(20, 20))
    frames = [Image.fromarray(noise(20, 20)[::step]).resize((20, 20)) for step in (1, 2, 4)]
    moving = {"save_all": True, "append_images": frames[1:]}
    for name, image, options, note in (
        ("cmyk.jpg", rgb.convert("CMYK"), {}, "Its CMYK colours were converted to RGB."),
        ("moving.gif", frames[0], moving, "It has 3 frames; the first one is used."),
        ("clear.png", rgb.convert("RGBA"), {}, "Its transparent parts were put on white."),
    ):
        opened, notes = demo.open_picture(saved(tmp_path, name, image, **options), MAX_PIXELS)
        assert notes == [note] and opened.pixels.shape == (20, 20, 3)


@pytest.mark.filterwarnings("ignore:Image size")
def test_refused_files_are_named_without_the_server_s_path(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    saved(tmp_path, "cut.png", Image.fromarray(noise(64, 64)))
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    saved(tmp_path, "huge.png", Image.new("1", (10_000, 10_000)))
    saved(tmp_path, "large.png", Image.new("L", (1001, 1000)))
    saved(tmp_path, "small.png", Image.new("L", (100, 15)))
    for name, sentence in (
        ("text.png", "text.png is not a picture that can be read; use PNG, JPEG or WebP"),
        ("cut.png", "cannot read cut.png as a picture"),
        ("huge.png", "huge.png has 10000x10000 pixels, more than the 1,000,000 allowed"),
        ("large.png", "large.png has 1001x1000 pixels, more than the 1,000,000 allowed"),
        ("small.png", "small.png has 100x15 pixels; at least 16x16 are needed"),
        ("none.png", "none.png is not a picture that can be read"),
    ):
        with pytest.raises(UserError) as error:
            demo.open_picture(str(tmp_path / name), MAX_PIXELS)
        assert sentence in str(error.value) and str(tmp_path) not in str(error.value)


@pytest.mark.filterwarnings("ignore:Image size")
def test_pillow_s_own_guard_gets_a_sentence_too(tmp_path, monkeypatch):
    path = saved(tmp_path, "bomb.png", Image.new("1", (300, 300)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="bomb.png has far more pixels than the 1,000,000 allowed"):
        demo.open_picture(path, MAX_PIXELS)


# ---- masks and paint ----


@pytest.mark.parametrize("colour", ["black", "white"])
def test_an_uploaded_mask_gives_the_square_s_hole(tmp_path, colour):
    whole = np.zeros((40, 60), dtype=bool)
    whole[5:20, 20:45] = True
    gray = np.where(whole == (colour == "white"), 255, 0).astype(np.uint8)
    path = saved(tmp_path, "mask.png", Image.fromarray(gray))
    inside, notes = demo.open_mask(path, picture(40, 60, (10, 0, 40)), colour, MAX_PIXELS)
    assert np.array_equal(inside, whole[:, 10:50])
    assert notes == [f"Its {colour} parts are the hole: {inside.mean():.0%} of the square."]
    cut, notes = demo.open_mask(path, picture(40, 60, (30, 0, 20)), colour, MAX_PIXELS)
    assert np.array_equal(cut, whole[:20, 30:50]) and "outside the square" in notes[1]


@pytest.mark.filterwarnings("ignore:mask .* has gray levels")
def test_a_soft_mask_is_cut_and_said_so(tmp_path):
    gray = np.full((32, 32), 250, dtype=np.uint8)
    gray[4:8], gray[20:24] = 100, 3
    inside, notes = demo.open_mask(saved(tmp_path, "soft.png", Image.fromarray(gray)), picture(), "black", MAX_PIXELS)
    assert np.array_equal(inside, gray < 128)
    assert notes[1:] == ["Its grays were taken for black or white, whichever is nearer."]


def test_a_mask_of_another_size_is_refused(tmp_path):
    path = saved(tmp_path, "mask.png", Image.new("L", (30, 40)))
    with pytest.raises(UserError, match="the mask mask.png has 30x40 pixels, the picture 60x40; they must agree"):
        demo.open_mask(path, picture(40, 60), "black", MAX_PIXELS)


@settings(max_examples=10, deadline=None)
@given(st.integers(16, 1024), st.integers(0, 2**32 - 1))
def test_a_hole_survives_the_way_through_the_editor(side, seed):
    made = np.random.default_rng(seed).random((side, side)) < 0.3
    value = demo.editor_value(demo.Picture(np.zeros((side, side, 3), dtype=np.uint8), "cat", (0, 0, side)), made)
    assert np.array_equal(demo.painted(as_editor(value), side), made)


def test_paint_of_all_layers_counts_and_none_is_no_hole():
    whole = picture(64, 64)
    one, two = np.zeros((64, 64), dtype=bool), np.zeros((64, 64), dtype=bool)
    one[3:9], two[40:50, 5:9] = True, True
    layers = [as_editor(demo.editor_value(whole, made))["layers"][0] for made in (one, two)]
    assert np.array_equal(demo.painted({"layers": layers}, 64), one | two)
    for nothing in (None, {}, {"layers": []}, {"layers": None}, as_editor(demo.editor_value(whole))):
        assert not demo.painted(nothing, 64).any()


def test_the_canvas_holds_each_picture_in_comfort():
    assert [demo.canvas_side(side) for side in (16, 512, 700, 1024, 4000)] == [512, 512, 700, 1024, 1024]
    assert demo.editor_value(picture(700, 800, (50, 0, 700)))["background"].size == (700, 700)


def test_the_outline_is_where_the_square_is():
    whole = demo.Picture(np.full((400, 800, 3), 200, dtype=np.uint8), "cat", (0, 0, 400))
    shown = np.asarray(demo.outlined(whole, (100, 50, 200)))                # halved: 320 x 640
    assert shown.shape == (320, 640, 3)
    bright = (shown == 200).all(2)
    ys, xs = np.nonzero(bright)
    assert (xs.min() - 3, ys.min() - 3, xs.max() + 4, ys.max() + 4) == (80, 40, 240, 200)    # 3 pixels of outline


# ---- completing ----


def test_completions_keep_every_known_pixel_of_the_whole_picture(model):
    whole, made = picture(70, 90, (20, 10, 48)), hole(48)
    result = demo.complete(model, whole, made, 5, 3, 4)
    assert result.seeds == [5, 6, 7] and result.seconds > 0
    known = np.ones((70, 90), dtype=bool)
    known[10:58, 20:68] = ~made
    for i in range(3):
        completed = result.whole(i).pixels
        assert np.array_equal(completed[known], whole.pixels[known])
        assert not np.array_equal(completed[~known], whole.pixels[~known])
        assert np.array_equal(result.whole(i).crop, model.inpaint(whole.crop, made, seed=5 + i, total_iter=4))
    assert len({crop.tobytes() for crop in result.crops}) == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"picture": None}, "There is no picture yet: take a sample or upload one."),
        ({"hole": np.zeros((32, 32), dtype=bool)}, "Nothing is painted yet"),
        ({"hole": np.ones((32, 32), dtype=bool)}, "The whole square is painted"),
        ({"seed": None}, "The seed is empty"),
        ({"seed": -1}, "seed must be a whole number, 0 or more, got -1"),
        ({"num_samples": 9}, "At most 8 completions and 30 rounds"),
        ({"total_iter": 31}, "At most 8 completions and 30 rounds"),
        ({"sweet_spot": 9}, "sweet_spot must lie in 1..total_iter (8), got 9"),
        ({"schedule": "steep"}, "unknown mask schedule 'steep'"),
    ],
)
def test_what_cannot_be_completed_gets_a_sentence(model, changes, sentence):
    arguments = {"picture": picture(), "hole": hole(), "seed": 0, "num_samples": 1, "total_iter": 8} | changes
    with pytest.raises(ValueError) as error:
        demo.complete(model, **arguments)
    assert sentence in str(error.value)


@pytest.mark.parametrize("box", [(0, 0, 32), (5, 9, 55)])
def test_steps_lead_from_the_hole_to_the_completion(model, box):
    whole, made = picture(64, 64, box), hole(box[2])
    result = demo.complete(model, whole, made, 0, 2, 6, sweet_spot=5)
    shown = demo.steps(model, result, 1)
    assert [step.title for step in shown] == ["Start"] + [f"Round {t}" for t in range(1, 6)]
    opened = [(np.asarray(step.tokens) == demo.OPEN).all(2) for step in shown]
    counts = [int(grid.sum()) for grid in opened]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 6 and counts[-1] > 0    # stopped a round early
    assert [step.note for step in shown] == [f"{count} of {counts[0]} tokens open" for count in counts]
    for before, after in zip(opened, opened[1:], strict=False):
        assert (before | ~after).all()
    if box[2] == 32:    # the model's own size: the last step is the completion, but for rounding
        last = np.asarray(shown[-1].image).astype(int)
        assert np.abs(last - result.crops[1]).max() <= 1
        assert np.array_equal(opened[0], made.reshape(8, 4, 8, 4).any((1, 3)))
        assert (np.asarray(shown[0].image)[made] == demo.OPEN).all()


def test_the_last_step_of_a_whole_decoding_has_no_open_token(model):
    shown = demo.steps(model, demo.complete(model, picture(), hole(), 0, 1, 3), 0)
    assert shown[-1].note.startswith("0 of")


# ---- texts ----


def embedded(page: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'data:image/\w+;base64,([^"]+)"', page)]


def test_the_rounds_are_shown_as_strip_and_animation(model):
    shown = demo.steps(model, demo.complete(model, picture(), hole(), 0, 1, 3), 0)
    page = demo.rounds_html(shown, "<seed>")
    film, *strip = embedded(page)
    assert film.format == "GIF" and film.n_frames == 4 and film.info["loop"] == 0
    for frame, step in zip(ImageSequence.Iterator(film), shown, strict=True):
        right = frame.convert("RGB").crop((264, 0, 520, 256)).resize((8, 8), Image.Resampling.NEAREST)
        assert np.abs(np.asarray(right).astype(int) - np.asarray(step.tokens)).max() < 60    # colours of a palette
    assert len(strip) == 8
    for i, step in enumerate(shown):
        assert np.array_equal(np.asarray(strip[2 * i]), np.asarray(step.image))
        assert np.array_equal(np.asarray(strip[2 * i + 1]), np.asarray(step.tokens))
    assert "<seed>" not in page and "&lt;seed&gt;" in page
    assert page.count("alt=") == page.count("<img") == 9


def test_names_of_files_cannot_become_code_of_the_page(tmp_path):
    text = demo.status_html("<script>alert(1)</script> is not a picture", ["& so on"], error=True)
    assert "<script" not in text and "&lt;script&gt;" in text and "&amp; so on" in text and 'role="alert"' in text
    Image.fromarray(noise(20, 20)).save(tmp_path / "<b>..&.png")
    assert demo.open_picture(str(tmp_path / "<b>..&.png"), MAX_PIXELS)[0].name == "_b_"


def test_files_to_download_are_whole_and_old_ones_go(tmp_path):
    path = Path(demo.write_png(picture(40, 60), tmp_path, "cat-seed3"))
    assert path.name == "cat-seed3.png" and np.array_equal(np.asarray(Image.open(path)), noise(40, 60))
    second = Path(demo.write_png(picture(40, 60), tmp_path, "cat-seed3"))
    assert path.exists() and second != path
    os.utime(path, (0, 0))
    demo.write_png(picture(), tmp_path, "other")
    assert not path.exists() and second.exists()


def test_a_picture_shown_again_is_not_written_over_while_it_is_loaded(tmp_path):
    def as_gradio_does(image: Image.Image, cache_dir: str, name: str = "image", format: str = "webp") -> str:
        image.save(buffer := io.BytesIO(), format)
        path = Path(cache_dir) / hashlib.sha256(buffer.getvalue()).hexdigest() / f"{name}.{format}"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(buffer.getvalue())
        return str(path.resolve())

    save = demo.save_whole(as_gradio_does)
    one, other = (Image.fromarray(pixels) for pixels in (noise(20, 20), noise(20, 30)))
    path = save(one, str(tmp_path / "cache"), format="png")
    with open(path, "rb") as loading:
        assert save(one, cache_dir=str(tmp_path / "cache"), format="png") == path != save(other, str(tmp_path / "cache"))
        assert os.fstat(loading.fileno()).st_ino != os.stat(path).st_ino    # another file has taken its place
    assert np.array_equal(np.asarray(Image.open(path)), noise(20, 20))
    assert len(list((tmp_path / "cache").rglob("*.*"))) == 2                 # nothing else is left


# ---- the script ----


def test_samples_are_paired_by_name_and_may_be_missing(tmp_path, capsys):
    assert demo.find_samples(tmp_path) == [] and "no samples in" in capsys.readouterr().err
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for name in ("b", "a"):
        Image.fromarray(noise(32, 32)).save(tmp_path / "images" / f"{name}.png")
    Image.new("L", (32, 32)).save(tmp_path / "masks" / "b.png")
    found = [(name, path.name, mask and mask.name) for name, path, mask in demo.find_samples(tmp_path)]
    assert found == [("a", "a.png", None), ("b", "b.png", "b.png")]


def namespace(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(demo.parse_args([])), **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"port": 0}, "--port must lie in 1..65535, got 0"),
        ({"max_pixels": 0}, "--max-pixels must be at least 1, got 0"),
        ({"max_megabytes": -1}, "--max-megabytes must be at least 1, got -1"),
    ],
)
def test_flags_that_cannot_work_are_refused(monkeypatch, changes, sentence):
    monkeypatch.setattr(demo, "gr", object())
    with pytest.raises(UserError, match=re.escape(sentence)):
        demo.check_args(namespace(**changes))


def test_without_gradio_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(demo, "gr", None)
    with pytest.raises(UserError, match="needs the package gradio; .*: pip install -r requirements-demo.txt"):
        demo.main([])


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2"])
def test_another_host_than_loopback_is_explained(monkeypatch, capsys, host):
    monkeypatch.setattr(demo, "gr", object())
    demo.check_args(namespace(host=host))
    assert f"--host {host} lets everybody who reaches port 7860" in capsys.readouterr().err
    demo.check_args(namespace())
    assert capsys.readouterr().err == "" and namespace().host == "127.0.0.1"


def test_a_missing_checkpoint_is_one_sentence(monkeypatch):
    monkeypatch.setattr(demo, "gr", object())
    with pytest.raises(UserError, match="nowhere.safetensors not found"):
        demo.main(["--checkpoint", "nowhere.safetensors"])


# ---- nothing from elsewhere ----


def ask(path: str) -> list[dict]:
    """What the middleware sends for a request, in front of an app that answers 200."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
        await send({"type": "http.response.body", "body": b"from the app"})

    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(demo.OnlyFromHere(app)({"type": "http", "path": path}, None, send))
    return sent


@pytest.mark.parametrize("path", ["/gradio_api/file=http://a.b/c", "/file=https://a.b", "/gradio_api/proxy=https://a.b/x"])
def test_addresses_are_not_fetched(path):
    assert [message.get("status", message.get("body")) for message in ask(path)] == [403, b"Addresses are not fetched here."]


def test_every_answer_forbids_the_browser_to_load_from_elsewhere():
    for path in ("/", "/gradio_api/file=/tmp/x/image.png", "/gradio_api/file=https://a.b"):
        headers = dict(ask(path)[0]["headers"])
        assert headers[b"content-security-policy"].startswith(b"default-src 'self' ")
    assert ask("/")[0]["status"] == 200 and dict(ask("/")[0]["headers"])[b"x"] == b"y"
