"""evaluate.py on folders: what it reports, pictures of mixed sizes, other pictures, refusals."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from small_sets import mean_colours, random_images, refusal, weighted_l1, write_set

import evaluate
from evaluation.distances import frechet_distance, indistinguishable, kernel_distance
from evaluation.judge import CROP, crops_around
from evaluation.metrics import paired_metrics, summarise
from pictures.files import find_images
from pictures.images import read_image, write_image
from pictures.masks import read_mask

N, SIDE = 12, 24
pytestmark = pytest.mark.usefixtures("small_networks")


@pytest.fixture
def folders(tmp_path) -> Path:
    """pred, originals, masks and other; pred is wrong in the hole only, and its files have another suffix."""
    write_set(tmp_path, N, SIDE)
    for i, image in enumerate(random_images(N, seed=2, side=SIDE)):
        hole = read_mask(tmp_path / "masks" / f"p{i}.png")
        original = read_image(tmp_path / "originals" / f"p{i}.png")
        write_image(tmp_path / "pred" / f"p{i}.png", torch.where(hole, image, original))
    for i, image in enumerate(random_images(20, seed=3, side=SIDE)):
        write_image(tmp_path / "other" / f"o{i}.png", image)
    return tmp_path


def arguments(folders: Path, *more: object) -> list[str]:
    return [str(x) for x in ("--predicted", folders / "pred", "--device", "cpu", *more)]


def paired(folders: Path, *more: object) -> list[str]:
    masks = ("--masks", folders / "masks", "--perceptual-weights", "any")
    return arguments(folders, "--ground-truth", folders / "originals", *masks, *more)


def report(argv: list[str], folders: Path) -> dict:
    """The JSON of a run, which must be JSON by the letter: no NaN, no Infinity."""
    assert evaluate.main([*argv, "--json", str(folders / "scores.json")]) == 0

    def strict(constant):
        raise AssertionError(f"{constant} is no JSON")
    return json.loads((folders / "scores.json").read_text(), parse_constant=strict)


def stacked(folder: Path) -> torch.Tensor:
    return torch.stack([read_image(path) for path in find_images(folder).values()])


def features(folder: Path) -> torch.Tensor:
    return mean_colours(stacked(folder).float() / 255).double()


# ---- what it reports ----


def test_paired_scores_are_what_the_functions_give(folders, capsys):
    found = report(paired(folders), folders)
    pred, truth, scores = features(folders / "pred"), features(folders / "originals"), found["scores"]
    assert scores["paired FD-Colour"] == pytest.approx(frechet_distance(truth, pred))
    assert scores["paired KD-Colour"] == pytest.approx(kernel_distance(truth, pred)[0])
    assert [scores["paired U-IDS"], scores["P-IDS"]] == pytest.approx(indistinguishable(truth, pred, paired=True))
    holes = torch.stack([read_mask(path) for path in find_images(folders / "masks").values()])
    columns = paired_metrics(stacked(folders / "pred"), stacked(folders / "originals"), holes, weighted_l1)
    for name, value in summarise(columns).items():
        assert scores[name] == pytest.approx(value, rel=1e-5)
    assert scores["known_changed"] == 0 and found["n"] == N and "FD-Colour" not in scores
    other = report(paired(folders, "--kid-subsets", 7, "--kid-subset-size", 5, "--seed", 3), folders)["scores"]
    assert other["paired KD-Colour"] == pytest.approx(kernel_distance(truth, pred, 7, 5, 3)[0])
    assert other["P-IDS"] == pytest.approx(indistinguishable(truth, pred, paired=True, seed=3)[1])
    assert sorted(found["per_picture"]) == sorted(f"p{i}" for i in range(N))
    assert found["per_picture"]["p1"]["hole_psnr"] == pytest.approx(columns["hole_psnr"][1].item(), rel=1e-5)
    assert "--ground-truth" in found["command"] and found["versions"]["torch"]
    printed = capsys.readouterr().out
    assert f"{scores['paired FD-Colour']:.2f}" in printed and "known pixels changed: 0.0000%" in printed
    assert "12 pictures are fewer" not in printed and "FID" not in printed


def test_a_reference_gives_unpaired_distances_and_the_originals_own(folders, capsys):
    found = report(paired(folders, "--reference", folders / "other"), folders)
    pred, truth, other = (features(folders / name) for name in ("pred", "originals", "other"))
    assert found["scores"]["FD-Colour"] == pytest.approx(frechet_distance(other, pred))
    assert found["originals"]["FD-Colour"] == pytest.approx(frechet_distance(other, truth))
    assert found["scores"]["U-IDS"] == pytest.approx(indistinguishable(other, pred)[0])
    assert found["n_reference"] == 20 and "paired FD-Colour" in found["scores"]
    assert "originals" in capsys.readouterr().out
    alone = report(arguments(folders, "--reference", folders / "other"), folders)    # no originals needed
    assert alone["scores"]["FD-Colour"] == found["scores"]["FD-Colour"] and alone["originals"] == {}
    assert not any("in the reference too" in note for note in found["notes"])
    shutil.copy(folders / "originals" / "p3.png", folders / "other")
    again = report(paired(folders, "--reference", folders / "other"), folders)
    assert any("1 of the originals" in note for note in again["notes"])


def test_saved_statistics_and_the_images_of_inpaintings_output_give_the_same_scores(folders):
    plain = report(arguments(folders, "--reference", folders / "other", "--save-statistics", folders / "o.npz"), folders)
    assert report(arguments(folders, "--reference", folders / "o.npz"), folders)["scores"] == plain["scores"]
    (folders / "pred").rename(folders / "x")
    (folders / "pred").mkdir()
    (folders / "x").rename(folders / "pred" / "images")
    write_image(folders / "pred" / "steps" / "p0.png", torch.zeros(3, SIDE, SIDE, dtype=torch.uint8))
    assert report(arguments(folders, "--reference", folders / "other"), folders)["scores"] == plain["scores"]


def test_equal_folders_without_a_network_and_one_mask_for_all(folders):
    argv = paired(folders, "--features", "none")
    argv[1] = str(folders / "originals")
    found = report(argv, folders)
    assert found["scores"]["psnr"] == "inf" and found["scores"]["l1"] == 0
    assert not any("FD" in name or "IDS" in name for name in found["scores"])
    argv = [*paired(folders, "--features", "none"), "--masks", str(folders / "masks" / "p0.png")]
    scores, inverse = (report([*argv, *more], folders)["scores"] for more in ((), ("--mask-hole", "white")))
    assert scores["hole_area"] + inverse["hole_area"] == pytest.approx(1) and inverse["known_changed"] > 0


# ---- pictures of any size ----


def test_pictures_of_mixed_sizes_are_scored_as_each_alone(folders):
    for i in range(0, N, 2):
        size = (3, 120 + i, 100)
        hole = torch.zeros(1, *size[1:], dtype=torch.bool)
        hole[:, 40:60, 30 : 50 + i] = True
        original = torch.randint(0, 256, size, dtype=torch.uint8)
        write_image(folders / "originals" / f"p{i}.png", original)
        write_image(folders / "pred" / f"p{i}.png", torch.where(hole, 255 - original, original))
        write_image(folders / "masks" / f"p{i}.png", torch.where(hole, 0, 255).byte().expand(3, -1, -1).clone())
    found = report(paired(folders), folders)
    assert found["scores"]["known_changed"] == 0 and found["scores"]["crops FD-Colour"] > 0
    for name, row in found["per_picture"].items():
        columns = paired_metrics(*(x[None] for x in (
            read_image(folders / "pred" / f"{name}.png"), read_image(folders / "originals" / f"{name}.png"),
            read_mask(folders / "masks" / f"{name}.png"),
        )), weighted_l1)    # fmt: skip
        assert row["hole_perceptual"] == pytest.approx(columns["hole_perceptual"].item(), rel=1e-5)


def test_crops_lie_around_the_hole_and_at_the_same_places_in_both_pictures():
    y, x = torch.meshgrid(torch.arange(150), torch.arange(120), indexing="ij")
    places = torch.stack([y, x, x * 0]).to(torch.uint8)[None]                 # each pixel knows where it was
    hole = torch.zeros(1, 1, 150, 120, dtype=torch.bool)
    hole[..., 100:140, 2:5] = True
    crops = crops_around(places, hole)
    assert len(crops) == 24 and all(crop.shape == (3, CROP, CROP) for crop in crops)
    for crop in crops:
        top, left = crop[:2, 0, 0].tolist()
        assert left == 0 and 52 <= top <= 54                                  # moved inside the picture
        assert crop[:, -1, -1].tolist() == [top + CROP - 1, left + CROP - 1, 0]
    assert all(torch.equal(a, b) for a, b in zip(crops, crops_around(places, hole), strict=True))
    assert len(crops_around(places, hole & (y == 120))) == 3                  # a hole of three pixels has no more
    assert crops_around(places[..., :90], hole[..., :90]) == []


# ---- refusals ----


def test_other_sizes_and_other_pictures_are_refused_by_name(folders):
    write_image(folders / "pred" / "p2.png", torch.zeros(3, SIDE, SIDE + 1, dtype=torch.uint8))
    assert "p2.png is 25x24" in refusal(evaluate.main, *paired(folders))
    shutil.copy(folders / "originals" / "p2.png", folders / "pred")
    write_image(folders / "masks" / "p1.png", torch.zeros(3, SIDE + 1, SIDE, dtype=torch.uint8))
    assert "p1.png is 24x25" in refusal(evaluate.main, *paired(folders))
    argv = arguments(folders, "--ground-truth", folders / "originals")
    write_image(folders / "pred" / "stale.png", random_images(1, side=SIDE)[0])
    assert "stale" in refusal(evaluate.main, *argv)
    (folders / "pred" / "stale.png").unlink(), (folders / "pred" / "p3.png").unlink()
    assert "p3" in refusal(evaluate.main, *argv)


@pytest.mark.parametrize(("more", "words"), [
    ([], "nothing to compare"),
    (["--ground-truth", "originals", "--perceptual-weights", "w.safetensors"], "--masks"),
    (["--reference", "other", "--masks", "masks"], "--ground-truth"),
    (["--reference", "other", "--features", "none"], "--features none"),
    (["--ground-truth", "originals", "--save-statistics", "s.npz"], "--reference"),
    (["--reference", "other", "--json", f"{__file__}/scores.json"], "writable"),
    (["--reference", "other", "--json", "pred/p1.png"], "reads"),
    (["--reference", "nowhere"], "nowhere"),
])
def test_flags_that_cannot_be_honoured_are_refused(folders, monkeypatch, more, words):
    monkeypatch.chdir(folders)
    assert words in refusal(evaluate.main, *arguments(folders, *more))
