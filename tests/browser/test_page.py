"""What a visitor does, in a real headless Chromium: mouse, files, phone and keyboard."""

import base64
import io
import re

import numpy as np
import pytest
from conftest import noise, png
from PIL import Image

pytestmark = pytest.mark.browser

BRUSH = 32    # radius of the brush, in pixels of the canvas


def decoded(data_url: str) -> io.BytesIO:
    return io.BytesIO(base64.b64decode(data_url.partition(",")[2]))


def far_and_near(height: int, width: int, stroke: list[tuple[float, float]], canvas: tuple[int, int] = (1024, 1024)):
    """Pixels that a horizontal stroke surely left alone, and those in its core: two (H, W) bool."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    x, y = x / width * canvas[0], y / height * canvas[1]                         # on the canvas
    (x0, y0), (x1, _) = ((a * canvas[0], b * canvas[1]) for a, b in stroke)
    distance = np.hypot(np.maximum(np.maximum(x0 - x, x - x1), 0), y - y0)
    return distance > 1.35 * BRUSH + canvas[0] / width, distance < 0.6 * BRUSH


@pytest.mark.parametrize(("size", "canvas"), [((200, 260), (1024, 788)), ((600, 1000), (1024, 614))])
def test_paint_a_hole_into_an_upload_and_download_the_completion(visit, size, canvas):
    seen, upload = visit(), noise(*size, 7)
    seen.upload("my cat.png", png(upload))
    assert f"my_cat, {size[1]} × {size[0]} pixels" in seen.status("Opened")
    seen.page.wait_for_timeout(2000)    # the editor takes the picture in
    stroke = [(0.25, 0.5), (0.7, 0.5)]
    seen.paint(*stroke, canvas=canvas)
    assert re.match(r"4 completions in \d+\.\d\d s", seen.complete(seed=11))
    name, completed = seen.download()
    assert name == "my_cat-seed11.png" and completed.shape == upload.shape
    far, near = far_and_near(*size, stroke, canvas)
    assert far.mean() > 0.5 and near.mean() > 0.01
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
        before, after = seen.pictures("#compare")
        assert np.array_equal(before, sample) and np.array_equal(after, completion)


def test_the_rounds_are_shown_for_the_chosen_completion(visit):
    seen = visit()
    seen.page.get_by_label("Thumbnail 1 of 3").click()    # of several quick choices the last one counts
    seen.page.get_by_label("Thumbnail 2 of 3").click()
    seen.status("Sample cat1")
    seen.page.get_by_role("button", name="Advanced").click()
    seen.page.wait_for_timeout(2000)    # Gradio sets the controls of an opened part once more
    seen.page.get_by_label("number input for Rounds").fill("6")
    seen.page.get_by_label("number input for Rounds").blur()
    spot = seen.page.get_by_label("number input for Sweet spot")
    spot.fill("4")
    spot.blur()
    seen.complete(seed=21)
    seen.page.locator("#results button.thumbnail-item").nth(1).click()
    seen.page.locator("#results button.thumbnail-item").nth(2).click()
    seen.page.locator("#download", has_text="(seed 23)").wait_for()
    seen.page.click("#show-rounds")
    seen.page.locator("#history h3", has_text="seed 23").wait_for()
    texts = seen.page.locator("#history ol.strip li").all_inner_texts()
    counts = [int(re.search(r"(\d+) of \d+ tokens open", text)[1]) for text in texts]
    assert len(texts) == 5 and texts[0].startswith("Start") and texts[4].startswith("Round 4")
    assert counts == sorted(counts, reverse=True) and counts[-1] > 0
    sources = seen.page.locator("#history ol.strip img.tokens").evaluate_all("images => images.map(image => image.src)")
    for tokens, count in zip([np.asarray(Image.open(decoded(source))) for source in sources], counts, strict=True):
        assert tokens.shape == (8, 8, 3) and (tokens == (224, 33, 138)).all(2).sum() == count
    film = seen.page.locator("#history img.film").get_attribute("src")
    assert Image.open(decoded(film)).n_frames == 5


def test_an_uploaded_mask_is_followed_to_the_pixel(visit):
    seen, upload = visit(), noise(90, 70, 1)
    hole = np.zeros((90, 70), dtype=bool)
    hole[30:50, 10:41] = True
    hole[33, 20] = False
    seen.upload("cat.png", png(upload))
    seen.status("Opened cat, 70 × 90 pixels")
    seen.upload("mask.png", png(np.where(hole, 0, 255).astype(np.uint8)), "Upload a mask")
    assert f"{hole.mean():.0%} of the picture" in seen.status("Read the mask")
    seen.complete(seed=5)
    _, completed = seen.download()
    assert np.array_equal(completed[~hole], upload[~hole])
    assert (completed[hole] != upload[hole]).any(1).mean() > 0.9


def test_a_completion_can_be_the_next_input(visit):
    seen, upload = visit(), noise(200, 200, 3)
    seen.upload("cat.png", png(upload))
    seen.status("Opened cat")
    seen.page.wait_for_timeout(2000)
    seen.paint((0.25, 0.25), (0.6, 0.25))
    seen.complete(seed=1)
    _, first = seen.download()
    seen.page.click("#reuse")
    seen.status("Seed 1 is the picture now")
    seen.page.wait_for_timeout(2000)
    seen.paint((0.25, 0.75), (0.6, 0.75))
    seen.complete(seed=31)
    _, second = seen.download()
    far, near = far_and_near(200, 200, [(0.25, 0.75), (0.6, 0.75)])
    assert np.array_equal(second[far], first[far]) and (second[near] != first[near]).any(1).mean() > 0.9
    for i in range(2):    # the same sample can be chosen again
        seen.page.get_by_label("Thumbnail 1 of 3").click()
        seen.status("Sample cat0")
        seen.upload(f"again{i}.png", png(upload))
        seen.status(f"Opened again{i}")


# ---- bad input ----


def test_bad_input_gets_a_sentence_and_the_page_lives_on(visit):
    seen = visit()
    plain = png(noise(64, 64))
    for name, data, words in (
        ("huge.png", png(Image.new("1", (10_000, 10_000))), "more than the 4,000,000 pixels"),
        ("words.txt", b"these are words", "words.txt is not a picture"),
        ("cut.png", plain[: len(plain) // 2], "cannot read cut.png"),
        ("empty.png", b"", "empty.png is not a picture"),
        ("cmyk.jpg", png(Image.fromarray(noise(64, 64)).convert("CMYK"), "jpeg"), "Opened cmyk, .* CMYK colours"),
    ):
        seen.upload(name, data)
        seen.status(words)
    seen.upload("mask.png", png(np.zeros((32, 64), dtype=np.uint8)), "Upload a mask")
    seen.status("same size")
    seen.upload("all.png", png(np.zeros((64, 64), dtype=np.uint8)), "Upload a mask")
    seen.status("100% of the picture")
    seen.page.wait_for_timeout(2000)
    seen.page.click("#complete")
    seen.status("The whole picture is painted")
    seen.page.get_by_label("Thumbnail 2 of 3").click()
    seen.status("Sample cat1")
    assert "completions" in seen.complete(seed=41)


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


def test_a_phone_s_width_and_a_finger_are_enough(visit):
    seen = visit(390, 844, has_touch=True, is_mobile=True, device_scale_factor=2)
    page = seen.page
    page.get_by_role("button", name="Remove the paint").tap()
    seen.status("Removed")
    page.wait_for_timeout(2000)
    page.locator("#complete").tap()
    seen.status("Nothing is painted yet")
    page.locator("#editor canvas").first.scroll_into_view_if_needed()
    box, _ = seen.settled(page.locator("#editor canvas").first)
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#editor [aria-label='Undo']:not([disabled])")
    page.get_by_label("Seed").fill("71")
    page.locator("#complete").tap()
    page.locator("#download", has_text="(seed 71)").wait_for()
    page.locator("#show-rounds").tap()
    page.wait_for_selector("#history ol.strip")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390, "nothing to scroll sideways"
    for control in page.locator("button:visible, input:visible, #editor canvas").all():
        box = control.bounding_box()
        inside = box is None or (box["x"] >= -1 and box["x"] + box["width"] <= 391)
        assert inside, control.evaluate("control => control.outerHTML.slice(0, 200)")


CONTROLS = {
    "Thumbnail 1 of 3", "Upload a picture", "Upload a mask", "Brush", "Erase", "Brush Size", "Remove the paint",
    "number input for Completions", "number input for Rounds", "Schedule", "black", "Complete", "Download PNG (seed 91)",
    "Use as next input", "Show the rounds",
}    # fmt: skip
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
    assert CONTROLS - reached == set(), reached
