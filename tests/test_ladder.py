"""tools.ladder: its rungs, their pictures and their scores; true tokens."""
import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_sets import refusal
from torch import Tensor

import evaluate
import inpainting
from evaluation import baselines
from evaluation.reconstruct import reconstruct
from models import MaskGIT
from models.convert import to_uint8
from pictures.folders import load_folder
from pictures.images import read_image, write_image
from pictures.masks import read_mask
from tools import ladder

COUNT, SIDE = 5, 32
pytest.importorskip("cv2")
pytestmark = pytest.mark.usefixtures("small_networks")


def arguments(folder: Path, output: Path, *extra: object) -> list[str]:
    paths = ["--originals", folder / "originals", "--masks", folder / "masks", "--checkpoint", folder / "model.safetensors"]
    return [str(arg) for arg in (*paths, "--output", output, "--device", "cpu", "--total-iter", "3", *extra)]


def climbed(output: Path) -> dict[str, dict]:
    with open(output / "ladder.csv", newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def originals(folder: Path) -> tuple[Tensor, Tensor]:
    masks = torch.stack([read_mask(path) for path in sorted((folder / "masks").iterdir())])
    return load_folder(folder / "originals", SIDE), masks


# ---- the ladder ----


def test_rungs_are_scored_as_evaluate_scores_their_pictures(small_set, tmp_path):
    output = tmp_path / "out"
    assert ladder.main(arguments(small_set, output, "--perceptual-weights", "any")) == 0
    rows = climbed(output)
    assert list(rows)[0] == "original" and float(rows["original"]["paired FD-Colour"]) == pytest.approx(0, abs=1e-9)
    for method, name in (("completed, whole", "completed_whole"), ("Navier-Stokes", "navier-stokes")):
        evaluate.main([str(x) for x in (
            "--predicted", output / name, "--ground-truth", small_set / "originals", "--masks", small_set / "masks",
            "--perceptual-weights", "any", "--json", tmp_path / "scores.json", "--device", "cpu",
        )])    # fmt: skip
        scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
        for key, value in scores.items():
            if value is not None:
                assert float(rows[method][key]) == pytest.approx(value, rel=1e-4)
    ratio = float(rows["Telea"]["hole_perceptual"]) / float(rows["Navier-Stokes"]["hole_perceptual"])
    assert float(rows["Telea"]["hole_perceptual ratio"]) == pytest.approx(ratio, rel=1e-4)
    changed = {method for method, row in rows.items() if float(row["known_changed"])}
    assert changed == {"tokenizer, whole, nothing known", "completed, whole"}
    with Image.open(output / "pictures.png") as grid:
        assert grid.height > (1 + len(rows)) * SIDE * 4 and grid.width > COUNT * SIDE * 4
    assert "completed, pasted" in (output / "ladder.md").read_text()


def test_completions_are_those_of_inpainting(small_set, tmp_path):
    ladder.main(arguments(small_set, tmp_path / "out", "--seed", "3", "--features", "none", "--rungs", "completed_pasted"))
    inpainting.main([
        "--checkpoint", str(small_set / "model.safetensors"), "--images", str(small_set / "originals"), "--seed", "3",
        "--masks", str(small_set / "masks"), "--output", str(tmp_path / "again"), "--total-iter", "3",
    ])    # fmt: skip
    for i in range(COUNT):
        ours, theirs = tmp_path / "out" / "completed_pasted" / f"p{i}.png", tmp_path / "again" / "images" / f"p{i}.png"
        assert torch.equal(read_image(ours), read_image(theirs))
    assert list(climbed(tmp_path / "out")) == ["completed, pasted", "Navier-Stokes"]
    text = (tmp_path / "out" / "ladder.md").read_text()
    assert "FD-" not in text and "hole psnr" in text    # --features none gives the paired scores


def test_pictures_of_mixed_sizes(small_set, tmp_path):
    for i, (height, width) in enumerate(((100, 110), (SIDE, SIDE), (120, 97))):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        mask = torch.full((3, height, width), 255, dtype=torch.uint8)
        mask[:, 10:20, 5:15] = 0
        write_image(tmp_path / "originals" / f"q{i}.png", image)
        write_image(tmp_path / "masks" / f"q{i}.png", mask)
    ladder.main(arguments(tmp_path, tmp_path / "out", "--checkpoint", small_set / "model.safetensors"))
    rows = climbed(tmp_path / "out")
    pasted = ("completed, pasted", "completed, shrunk to the model", "tokenizer, pasted, true tokens", "Telea")
    assert all(float(rows[method]["known_changed"]) == 0 for method in pasted)
    assert float(rows["mean colour"]["crops FD-Colour"]) > 0
    assert read_image(tmp_path / "out" / "completed_pasted" / "q2.png").shape == (3, 120, 97)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--features", "none", "--reference", "x"), "--features none"),
        (("--show", "p9"), "p9"),
        (("--rungs", "telea", "magic"), "magic"),
        (("--low-temperature", "-1"), "0 or more"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_rung(small_set, flags, words):
    assert words in refusal(ladder.main, *arguments(small_set, small_set / "refused", *flags))
    assert not (small_set / "refused").exists()


# ---- true tokens ----


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("paste", [True, False])
def test_true_tokens_are_those_of_the_clean_picture(small_set, known, paste):
    model = MaskGIT.from_pretrained(small_set / "model.safetensors")
    images, holes = originals(small_set)
    clean = images.float() / 127.5 - 1
    with torch.no_grad():
        decoded = model.vqgan.decode(model.vqgan.encode(clean), *((clean, holes.float()) if known else ()))
    for i in range(COUNT):
        expected = to_uint8(decoded[i])
        expected = torch.where(holes[i], expected, images[i]) if paste else expected
        assert (reconstruct(model, images[i], holes[i], known, paste).int() - expected.int()).abs().max() <= 1


# ---- classic methods ----


@pytest.fixture
def picture() -> tuple[Tensor, Tensor]:
    image = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[:, 5:15, 8:20] = True
    return image, mask


@pytest.mark.parametrize("method", baselines.NEEDS)
def test_known_pixels_are_kept_and_the_hole_is_never_seen(picture, method):
    if not baselines.available(method):
        pytest.skip(f"{method} is not installed")
    image, mask = picture
    before = image.clone()
    result = baselines.complete(image, mask, method)
    assert result.dtype == torch.uint8 and result.shape == image.shape
    assert torch.equal(result.masked_fill(mask, 0), image.masked_fill(mask, 0))
    assert torch.equal(baselines.complete(torch.where(mask, 255 - image, image), mask, method), result)
    assert torch.equal(image, before)
    colour = torch.tensor([200, 17, 90], dtype=torch.uint8)[:, None, None].expand(3, SIDE, SIDE).contiguous()
    error = baselines.complete(colour, mask, method).int() - colour.int()
    assert error.abs().max() <= (3 if method == "telea" else 0)    # OpenCV 5's Telea rounds on the way
