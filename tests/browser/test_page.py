"""What a visitor does, in a real headless Chromium: mouse, files, phone and keyboard."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.browser

BRUSH = 32 / 512    # radius of the brush, as a share of the square's side


def decoded(data_url: str) -> io.BytesIO:
    return io.BytesIO(base64.b64decode(data_url.partition(",")[2]))


def far_and_near(height: int, width: int, box: tuple[int, int, int], stroke: list[tuple[float, float]]):
    """Pixels that a horizontal stroke surely left alone, and those in its core: two (H, W) bool."""
    left, top, side = box
    y, x = np.mgrid[0:height, 0:width] + 0.5
    x, y = (x - left) / side, (y - top) / side                       # as shares of the square
    (x0, y0), (x1, y1) = stroke
    assert y0 == y1
    distance = np.hypot(np.maximum(np.maximum(x0 - x, x - x1), 0), y - y0)
    return distance > 1.35 * BRUSH + 1 / side, distance < 0.6 * BRUSH


def test_paint_a_hole_into_an_upload_and_download_the_completion(visit, pictures):
    seen, upload = visit(), pictures.noise(200, 260, 7)
    seen.upload("my cat.png", pictures.png(upload))
    assert "my cat, 260 × 200 pixels" in seen.status("Opened").replace("_", " ")
    stroke = [(0.25, 0.5), (0.7, 0.5)]
    seen.paint(*stroke)
    assert re.match(r"4 completions in \d+\.\d\d s", seen.complete(seed=11))
    name, completed = seen.download()
    assert name == "my_cat-seed11.png" and completed.shape == upload.shape
    far, near = far_and_near(200, 260, (30, 0, 200), stroke)
    assert far.mean() > 0.7 and near.mean() > 0.02
    assert np.array_equal(completed[far], upload[far]), "known pixels come back bit for bit"
    assert (completed[near] != upload[near]).any(1).mean() > 0.9, "the hole is filled anew"


def test_a_sample_brings_its_hole_and_four_completions_differ(visit, server):
    seen = visit()
    seen.page.get_by_label("Thumbnail 3 of 3").click()
    seen.status("Sample cat2, 32 × 32 pixels")
    seen.complete(seed=3)
    sample = np.asarray(Image.open(server.folder / "images/cat2.png"))
    hole = np.asarray(Image.open(server.folder / "masks/cat2.png")) == 0
    completions = seen.pictures("#results")
    assert len(completions) == 4 and len({one[hole].tobytes() for one in completions}) == 4
    for i, completion in enumerate(completions):
        assert np.array_equal(completion[~hole], sample[~hole])
        seen.page.locator("#results button.thumbnail-item").nth(i).click()
        seen.page.locator("#download", has_text=f"(seed {3 + i})").wait_for()
        name, downloaded = seen.download()
        assert name == f"cat2-seed{3 + i}.png" and np.array_equal(downloaded, completion)


def test_the_rounds_are_shown_for_the_chosen_completion(visit):
    seen = visit()
    seen.page.get_by_label("Thumbnail 1 of 3").click()    # of several quick choices the last one counts
    seen.page.get_by_label("Thumbnail 2 of 3").click()
    seen.status("Sample cat1")
    seen.page.get_by_role("button", name="Advanced").click()
    seen.page.get_by_label("number input for Rounds").fill("6")
    seen.page.get_by_label("number input for Rounds").blur()
    spot = seen.page.get_by_label("number input for Sweet spot")
    seen.page.wait_for_function("spot => spot.value === '6' && spot.max === '6'", arg=spot.element_handle())
    spot.fill("4")
    spot.blur()
    seen.complete(seed=21)
    strip = seen.page.locator("#history ol.strip li")
    assert strip.count() == 5
    texts = strip.all_inner_texts()
    counts = [int(re.search(r"(\d+) of \d+ tokens open", text)[1]) for text in texts]
    assert texts[0].startswith("Start") and texts[4].startswith("Round 4")
    assert counts == sorted(counts, reverse=True) and counts[-1] > 0
    sources = seen.page.locator("#history ol.strip img.tokens").evaluate_all("images => images.map(image => image.src)")
    for tokens, count in zip([np.asarray(Image.open(decoded(source))) for source in sources], counts, strict=True):
        assert tokens.shape == (8, 8, 3) and (tokens == (224, 33, 138)).all(2).sum() == count
    film = seen.page.locator("#history img.film").get_attribute("src")
    assert Image.open(decoded(film)).n_frames == 5
    seen.page.locator("#results button.thumbnail-item").nth(1).click()
    seen.page.locator("#results button.thumbnail-item").nth(2).click()
    seen.page.locator("#history h3", has_text="seed 23").wait_for()


def test_an_uploaded_mask_is_followed_to_the_pixel(visit, pictures):
    seen, upload = visit(), pictures.noise(90, 70, 1)
    hole = np.zeros((90, 70), dtype=bool)
    hole[30:50, 10:41] = True
    hole[33, 20] = False
    seen.upload("cat.png", pictures.png(upload))
    seen.status("Opened cat, 70 × 90 pixels")
    seen.upload("mask.png", pictures.png(np.where(hole, 0, 255).astype(np.uint8)), "Upload a mask")
    assert f"{hole[10:80].mean():.0%} of the square" in seen.status("Took the mask")
    seen.complete(seed=5)
    _, completed = seen.download()
    assert np.array_equal(completed[~hole], upload[~hole])
    assert (completed[hole] != upload[hole]).any(1).mean() > 0.9


def test_the_square_can_be_placed_anywhere_on_a_large_picture(visit, pictures):
    seen, upload = visit(), pictures.noise(700, 1200, 2)
    seen.upload("photo.jpg", pictures.png(Image.fromarray(upload), "jpeg", quality=95))
    upload = np.asarray(Image.open(io.BytesIO(pictures.png(Image.fromarray(upload), "jpeg", quality=95))))
    seen.status("Opened photo, 1200 × 700 pixels")
    side, left, top = (seen.page.get_by_label(f"number input for {name}") for name in ("Side", "Left", "Top"))
    assert (side.input_value(), left.input_value(), top.input_value()) == ("700", "250", "0")
    side.fill("300")
    side.blur()
    seen.page.wait_for_function("left => left.max === '900'", arg=left.element_handle())
    box = seen.page.locator("#preview img").bounding_box()
    seen.page.locator("#preview img").click(position={"x": box["width"] * 0.75, "y": box["height"] * 0.5})
    seen.page.wait_for_function("left => Math.abs(left.value - 750) < 5", arg=left.element_handle())
    left.fill("800")
    left.blur()
    top.fill("120")
    top.blur()
    seen.page.wait_for_timeout(1000)
    seen.page.get_by_role("button", name="Use this square").click()
    seen.status("The square of 300 pixels at 800, 120 is in the editor")
    stroke = [(0.3, 0.4), (0.6, 0.4)]
    seen.page.wait_for_timeout(2000)    # the editor takes the new square in
    seen.paint(*stroke)
    seen.complete(seed=8)
    _, completed = seen.download()
    far, near = far_and_near(700, 1200, (800, 120, 300), stroke)
    assert np.array_equal(completed[far], upload[far])
    assert (completed[near] != upload[near]).any(1).mean() > 0.9


def test_a_completion_can_be_the_next_input(visit, pictures):
    seen, upload = visit(), pictures.noise(200, 200, 3)
    seen.upload("cat.png", pictures.png(upload))
    seen.status("Opened cat")
    seen.paint((0.25, 0.25), (0.6, 0.25))
    seen.complete(seed=1)
    _, first = seen.download()
    seen.page.click("#reuse")
    seen.status("Seed 1 is the picture now")
    seen.page.wait_for_timeout(2000)
    seen.paint((0.25, 0.75), (0.6, 0.75))
    seen.complete(seed=31)
    _, second = seen.download()
    seen.page.get_by_label("Thumbnail 1 of 3").click()
    seen.status("Sample cat0")
    seen.upload("again.png", pictures.png(upload))
    seen.status("Opened again")
    seen.page.get_by_label("Thumbnail 1 of 3").click()    # the same sample once more
    seen.status("Sample cat0")
    far, near = far_and_near(200, 200, (0, 0, 200), [(0.25, 0.75), (0.6, 0.75)])
    assert np.array_equal(second[far], first[far]) and (second[near] != first[near]).any(1).mean() > 0.9


def test_paint_can_be_removed(visit):
    seen = visit()
    for y in (0.3, 0.6):
        seen.paint((0.3, y), (0.6, y))
        seen.page.get_by_role("button", name="Remove the paint").click()
        seen.page.wait_for_timeout(2000)
    seen.page.click("#complete")
    seen.status("Nothing is painted yet")


# ---- bad input ----


def test_bad_input_gets_a_sentence_and_the_page_lives_on(visit, pictures):
    seen = visit()
    plain = pictures.png(pictures.noise(64, 64))
    frames = [Image.fromarray(pictures.noise(64, 64, i)) for i in range(3)]
    cmyk = Image.fromarray(pictures.noise(64, 64)).convert("CMYK")
    huge = pictures.png(Image.new("1", (10_000, 10_000)))
    assert len(huge) < 1_000_000

    seen.page.click("#complete")    # the first sample is there, without a hole
    seen.status("Nothing is painted yet: paint over the part to be filled in, or upload a mask.")
    seen.upload("huge.png", huge)
    seen.status("huge.png has 10000x10000 pixels, more than the 4,000,000 allowed|has far more pixels than")
    for name in ("words.png", "words.txt"):
        seen.upload(name, b"these are words")
        seen.status(f"{name} is not a picture that can be read")
    seen.upload("cut.png", plain[: len(plain) // 2])
    seen.status("cannot read cut.png as a picture")
    seen.upload("tiny.png", pictures.png(pictures.noise(9, 64)))
    seen.status("tiny.png has 64x9 pixels; at least 16x16 are needed")
    seen.upload("empty.png", b"")
    seen.status("empty.png is not a picture that can be read")
    seen.upload("cmyk.jpg", pictures.png(cmyk, "jpeg"))
    seen.status("Opened cmyk, 64 × 64 pixels. Its CMYK colours were converted to RGB.")
    seen.upload("moving.gif", pictures.png(frames[0], "gif", save_all=True, append_images=frames[1:]))
    seen.status("Opened moving, 64 × 64 pixels. It has 3 frames; the first one is used.")

    seen.upload("mask.png", pictures.png(np.zeros((32, 64), dtype=np.uint8)), "Upload a mask")
    seen.status("the mask mask.png has 64x32 pixels, the picture 64x64; they must agree")
    seen.upload("all.png", pictures.png(np.zeros((64, 64), dtype=np.uint8)), "Upload a mask")
    seen.status("100% of the square")
    seen.page.click("#complete")
    seen.status("The whole square is painted: leave a part of the picture for the model to go by.")
    seen.page.get_by_label("Thumbnail 2 of 3").click()
    seen.status("Sample cat1")
    assert "completions" in seen.complete(seed=41)


def test_a_file_of_too_many_bytes_is_refused_on_the_page(visit, pictures):
    seen = visit()
    seen.tolerated.append("413|exceeds? the maximum|Failed to load resource")
    heavy = pictures.png(pictures.noise(1100, 1100))
    assert len(heavy) > 2_000_000
    seen.upload("heavy.png", heavy)
    seen.page.get_by_text(re.compile("exceed|too large", re.IGNORECASE)).first.wait_for()
    seen.page.get_by_label("Thumbnail 2 of 3").click()
    seen.status("Sample cat1")
    assert "completions" in seen.complete(seed=51)


# ---- several visitors, small screens, no mouse ----


def test_two_visitors_at_once_both_get_their_own(visit):
    one, two = visit(), visit()
    for seen, thumbnail, name in ((one, "Thumbnail 2 of 3", "cat1"), (two, "Thumbnail 3 of 3", "cat2")):
        seen.page.get_by_label(thumbnail).click()
        seen.status(f"Sample {name}")
        seen.page.get_by_label("Seed").fill("61")
    for seen in (one, two):
        seen.page.click("#complete")
    for seen, name in ((one, "cat1"), (two, "cat2")):
        seen.page.locator("#download", has_text="(seed 61)").wait_for()
        assert seen.download()[0] == f"{name}-seed61.png"


def test_a_phone_s_width_is_enough(visit):
    seen = visit(390, 844, has_touch=True, is_mobile=True, device_scale_factor=2)
    page = seen.page
    page.get_by_label("Thumbnail 2 of 3").tap()
    seen.status("Sample cat1")
    page.get_by_role("button", name="Advanced").tap()
    page.get_by_label("Seed").fill("71")
    page.locator("#complete").tap()
    page.locator("#download", has_text="(seed 71)").wait_for()
    page.wait_for_selector("#history ol.strip")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390, "nothing to scroll sideways"
    for control in page.locator("button:visible, input:visible, #editor canvas").all():
        box = control.bounding_box()
        inside = box is None or (box["x"] >= -1 and box["x"] + box["width"] <= 391)
        assert inside, control.evaluate("control => control.outerHTML.slice(0, 200)")


def test_touch_paints(visit):
    seen = visit(390, 844, has_touch=True, is_mobile=True)
    box, _ = seen.settled(seen.page.locator("#editor canvas").first)
    seen.page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    seen.page.wait_for_selector("#editor [aria-label='Undo']:not([disabled])")
    assert "completions" in seen.complete(seed=81)


CONTROLS = (
    "Thumbnail 1 of 3", "Thumbnail 3 of 3", "Upload a picture", "Upload a mask", "Brush", "Erase", "Brush Size",
    "Remove the paint", "number input for Completions", "range slider for Completions", "Seed", "Advanced",
    "number input for Rounds", "number input for Sweet spot", "number input for Temperature",
    "number input for Choice temperature", "Schedule", "Decoder", "black", "Complete", "Download PNG (seed 91)",
    "Use as next input",
)    # fmt: skip
NAME_OF_FOCUS = """() => {
    const e = document.activeElement;
    const labels = e.labels && e.labels.length ? e.labels[0].innerText : '';
    return (e.getAttribute('aria-label') || labels || e.innerText || e.value || '').trim().split('\\n')[0];
}"""


def test_the_keyboard_alone_will_do(visit):
    seen = visit()
    page = seen.page

    def tab_to(name: str) -> None:
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate(NAME_OF_FOCUS) == name:
                return
        raise AssertionError(f"Tab never came to {name!r}")

    tab_to("Thumbnail 2 of 3")
    page.keyboard.press("Enter")
    seen.status("Sample cat1")
    tab_to("Seed")
    page.keyboard.press("Control+a")
    page.keyboard.type("91")
    tab_to("Advanced")
    page.keyboard.press("Enter")
    page.get_by_label("number input for Rounds").wait_for()
    tab_to("Complete")
    page.keyboard.press("Enter")
    page.locator("#download", has_text="(seed 91)").wait_for()
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(NAME_OF_FOCUS))
    assert [name for name in CONTROLS if name not in reached] == [], reached
