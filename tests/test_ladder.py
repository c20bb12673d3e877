"""ladder.py: every rung is made by the command that is told, and scored as evaluate.py scores it."""
import csv
import importlib
import json
import math
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
from evaluation.features import Features
from models import MaskGIT
from pictures.images import write_image
from tools import ladder

SIDE, COUNT = 16, 5


def mean_colours(images: torch.Tensor) -> torch.Tensor:
    """A feature network: the mean colour of each quarter, (B, 12)."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def distance(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """A perceptual distance: weighted L1."""
    weight = torch.ones_like(a[:, :1]) if weight is None else weight
    return ((a - b).abs().mean(1, keepdim=True) * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp_min(1)


@pytest.fixture(scope="module", autouse=True)
def networks():
    with pytest.MonkeyPatch.context() as patch:
        network = Features("Colour", "0" * 64, 12, mean_colours)
        for script in (ladder, evaluate):
            patch.setattr(script, "load_features", lambda *_, **__: network)
            patch.setattr(script, "load_perceptual", lambda *_: distance)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small random model, and smooth pictures with holes."""
    root = tmp_path_factory.mktemp("ladder")
    torch.manual_seed(0)
    vqgan = dict(image_size=SIDE, codebook_size=32, codebook_dim=4, encoder_width=16, encoder_depth=1,
                 decoder_channels=[16, 8, 8], decoder_blocks=[1, 1, 1])    # fmt: skip
    transformer = dict(codebook_size=32, seq_len=16, embed_dim=16, depth=1, num_heads=2, mlp_dim=32, pixel_dim=64)
    MaskGIT(vqgan, transformer).save_file(root / "model.safetensors")
    for i in range(COUNT):
        image = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4) * 255, size=SIDE, mode="bilinear")[0]
        hole = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
        hole[:, 3 : 7 + i, 5:12] = True
        write_image(root / "originals" / f"p{i}.png", image.byte())
        write_image(root / "masks" / f"p{i}.png", torch.where(hole, 0, 255).byte().expand(3, -1, -1))
    return root


def in_process(words: list[str]) -> None:
    """What `ladder.run` does, without the seconds that a new Python takes to import everything."""
    assert importlib.import_module(words[0].removesuffix(".py")).main(words[1:]) == 0


def arguments(folder: Path, output: Path, *extra: object) -> list[str]:
    paths = ["--originals", folder / "originals", "--masks", folder / "masks", "--checkpoint", folder / "model.safetensors"]
    return [str(arg) for arg in (*paths, "--output", output, "--perceptual-weights", "x", "--device", "cpu", *extra)]


@pytest.fixture(scope="module")
def climbed(folder) -> tuple[Path, dict[str, dict]]:
    """OUTPUT of one run, and its rows by method."""
    assert ladder.main(arguments(folder, folder / "out"), run=in_process) == 0
    with open(folder / "out" / "ladder.csv", newline="") as file:
        return folder / "out", {row["method"]: row for row in csv.DictReader(file)}


def test_every_rung_is_there_in_order(climbed):
    assert list(climbed[1]) == [rung.method for rung in ladder.rungs(0, 0.3)]
    assert len(climbed[1]) == 10 and all(row["n"] == str(COUNT) for row in climbed[1].values())


def test_the_scores_are_those_of_evaluate(climbed, folder):
    output, rows = climbed
    for rung in ladder.rungs(0, 0.3)[1:]:
        pictures = output / rung.name / ("" if rung.script == "baselines.py" else "images")
        argv = ["--predicted", pictures, "--ground-truth", folder / "originals", "--masks", folder / "masks"]
        argv += ["--perceptual-weights", "x", "--json", folder / "scores.json"]
        evaluate.main([str(arg) for arg in argv])
        report, row = json.loads((folder / "scores.json").read_text()), rows[rung.method]
        paired = report["paired"]
        expected = {
            "FD-Colour": report["frechet"]["value"], "KD-Colour": report["kernel"]["mean"],
            "psnr": paired["whole"]["psnr"], "hole_psnr": paired["hole"]["psnr"], "hole_ssim": paired["hole"]["ssim"],
            "perceptual": paired["whole"]["perceptual"], "hole_perceptual": paired["hole"]["perceptual"],
            "seam": paired["seam"], "known_pixels_changed": paired["known_pixels_changed"],
        }    # fmt: skip
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_original_is_perfect_by_measurement(climbed):
    row = climbed[1]["original"]
    assert float(row["FD-Colour"]) == pytest.approx(0, abs=1e-9) and float(row["hole_psnr"]) == math.inf
    assert float(row["seam"]) == 1 and float(row["perceptual"]) == 0 and row["command"] == ""


def test_known_pixels_change_only_where_nothing_is_pasted(climbed):
    changed = {method for method, row in climbed[1].items() if float(row["known_pixels_changed"]) > 0}
    assert changed == {"tokenizer, whole, nothing known", "completed, whole"}


def test_ratios_are_of_navier_stokes(climbed):
    rows = climbed[1]
    reference = rows["Navier-Stokes"]
    assert reference["frechet_ratio"] == reference["perceptual_ratio"] == reference["hole_perceptual_ratio"] == "1"
    for row in rows.values():
        ratio = float(row["FD-Colour"]) / float(reference["FD-Colour"])
        assert float(row["frechet_ratio"]) == pytest.approx(ratio, rel=1e-4)


def test_the_told_commands_make_the_pictures(climbed, folder):
    """Each in another folder: the same pictures, bit for bit. One of them in a Python of its own."""
    output, rows = climbed
    for rung in ladder.rungs(0, 0.3)[1:]:
        python, *words = shlex.split(rows[rung.method]["command"])
        again = folder / "again" / rung.name
        words[words.index("--output") + 1] = str(again)
        assert python == "python"
        (ladder.run if rung.name == "mean" else in_process)(words)
        made = sorted(path.relative_to(again) for path in again.rglob("*.png"))
        assert len(made) == COUNT
        assert all((again / path).read_bytes() == (output / rung.name / path).read_bytes() for path in made)


def test_report_and_grid(climbed):
    output, rows = climbed
    text = (output / "ladder.md").read_text()
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(tables) == 2 * (1 + len(rows)) and len({line.count("|") for line in tables}) == 2
    assert all(f"`{row['command']}`" in text for row in rows.values() if row["command"])
    assert "5 pictures are fewer than the features" in text and "python ladder.py --originals" in text
    with Image.open(output / "pictures.png") as grid:
        assert grid.height > (1 + len(rows)) * SIDE * 8 and grid.width > COUNT * SIDE * 8


def test_the_seed_reaches_the_completions_alone(folder):
    first, second = (ladder.rungs(seed, 0.3) for seed in (0, 1))
    differing = {a.script for a, b in zip(first, second, strict=True) if a != b}
    assert differing == {"inpainting.py"}


def test_a_failing_command_is_told_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text("import sys\nsys.exit('notice: odd\\nerror: no ' + sys.argv[1])")
    monkeypatch.setattr(ladder, "HERE", tmp_path)
    with pytest.raises(ladder.UserError) as error:
        ladder.run(["script.py", "my pictures"])
    assert str(error.value) == "python script.py 'my pictures' failed: no my pictures"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--checkpoint", "none.safetensors"), "not found"),
        (("--features", "none"), "compares Fréchet distances"),
        (("--show", "p9"), "p9: not among"),
        (("--masks", "nowhere"), "does not exist"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_rung(folder, flags, words):
    with pytest.raises(ValueError, match=words) as error:
        ladder.main(arguments(folder, folder / "refused", *flags), run=in_process)
    assert error.value.user_error and not (folder / "refused").exists()


def test_pictures_of_two_sizes_are_refused(folder, tmp_path):
    for name, side in (("a", 16), ("b", 20)):
        write_image(tmp_path / "originals" / f"{name}.png", torch.zeros(3, side, side, dtype=torch.uint8))
        mask = torch.full((3, side, side), 255, dtype=torch.uint8)
        mask[:, :4] = 0
        write_image(tmp_path / "masks" / f"{name}.png", mask)
    argv = arguments(tmp_path, tmp_path / "out", "--checkpoint", folder / "model.safetensors")
    with pytest.raises(ladder.UserError, match="b.png is not of the size of .*a.png"):
        ladder.main(argv, run=in_process)
