"""tools.figures, tools.generate and tools.benchmark: what they draw, write and report, refusals."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import refusal

from pictures.images import read_image
from pictures.masks import read_mask
from tools import benchmark, figures, generate
from utils import UserError

SIDE = 32


def test_a_grid_pairs_pictures_by_name(small_set, tmp_path):
    path = tmp_path / "grid.png"
    rows = ["--rows", str(small_set / "originals"), str(small_set / "masked"), "--labels", "a", "b"]
    figures.main(["grid", *rows, "--names", "p3", "p1", "--scale", "2", "--output", str(path)])
    drawn = np.asarray(Image.open(path).convert("RGB"))
    left = drawn.shape[1] - 2 * (2 * SIDE + 3)
    assert drawn[:, :left].min() < 128    # the labels
    for i, name in enumerate(("originals", "masked")):
        for j, stem in enumerate(("p3", "p1")):
            y, x = 3 + i * (2 * SIDE + 3), left + j * (2 * SIDE + 3)
            expected = read_image(small_set / name / f"{stem}.png").permute(1, 2, 0).numpy()
            assert np.array_equal(drawn[y : y + 2 * SIDE : 2, x : x + 2 * SIDE : 2], expected)


def test_ladders_schedules_and_curves_of_trainings_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    table = tmp_path / "ladder.csv"
    table.write_text("method,FD-X,other\nours,1.5,2\nNavier-Stokes,30,4\n")
    figures.main(["ladder", str(table), "--output", str(tmp_path / "ladder.png")])
    figures.main(["ladder", str(table), "--score", "other", "--output", str(tmp_path / "other.png")])
    figures.main(["schedules", "--mask-func", "cosine", "sqrt", "--output", str(tmp_path / "schedules.png")])
    assert (tmp_path / "ladder.png").read_bytes() != (tmp_path / "other.png").read_bytes()
    assert Image.open(tmp_path / "schedules.png").size[0] > 300
    for run, losses in (("a", (3.5, 3.25)), ("b", (4.5,))):
        (tmp_path / run).mkdir()
        lines = [f'{{"step": {10 * i}, "val_loss": {loss}}}\n{{"step": {10 * i + 5}, "loss": 1}}\n'
                 for i, loss in enumerate(losses, 1)]    # fmt: skip
        (tmp_path / run / "metrics.jsonl").write_text("".join(lines))
    runs, out = [str(tmp_path / run) for run in "ab"], str(tmp_path / "curves.png")
    figures.main(["curves", *runs, "--output", out])
    assert (tmp_path / "curves.csv").read_text() == "run,step,val_loss\na,10,3.5\na,20,3.25\nb,10,4.5\n"
    assert Image.open(out).size[0] > 300
    for argv, word in (([*runs, "--score", "val_psnr"], "val_psnr"), ([str(tmp_path / "none")], "metrics.jsonl")):
        with pytest.raises(UserError, match=word):
            figures.main(["curves", *argv, "--output", str(tmp_path / "none.png")])
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sweep", "none.csv", "--output", "out"], "none.csv cannot be read"),
        (["schedules", "--output", "a.jpg"], "must end in .png"),
        (["schedules", "--mask-func", "cosin", "--output", "a.png"], "unknown --mask-func cosin"),
        (["grid", "--rows", "FOLDER", "--labels", "a", "b", "--output", "a.png"], "1 --rows need as many --labels"),
        (["grid", "--rows", "FOLDER", "--names", "p9", "--output", "a.png"], "has no picture named p9"),
        (["grid", "--rows", "FOLDER", "--count", "0", "--output", "a.png"], "must be at least 1"),
    ],
)
def test_senseless_figures_are_refused(small_set, monkeypatch, tmp_path, argv, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        figures.main([str(small_set / "masked") if arg == "FOLDER" else arg for arg in argv])
    assert not list(tmp_path.glob("*.png"))


# ---- pictures from nothing ----


SIZE = 32


def run(*argv) -> int:
    return generate.main([str(a) for a in ("--device", "cpu", *argv)])


def test_a_picture_depends_on_its_seed_alone(small_set, tmp_path):
    common = ["--checkpoint", small_set / "model.safetensors", "--total-iter", "3"]
    assert run(*common, "--output", tmp_path / "a", "--count", "5", "--batch-size", "2", "--holes") == 0
    assert run(*common, "--output", tmp_path / "b", "--seeds", "3", "1") == 0
    made = {p.stem: read_image(p) for p in (tmp_path / "a/images").iterdir()}
    assert sorted(made) == [f"cat_{i:05d}" for i in range(5)] and made["cat_00000"].shape == (3, SIZE, SIZE)
    assert not torch.equal(made["cat_00000"], made["cat_00001"])
    assert len(list((tmp_path / "b/images").iterdir())) == 2
    for seed in (3, 1):
        assert torch.equal(made[f"cat_{seed:05d}"], read_image(tmp_path / f"b/images/cat_{seed:05d}.png"))
        hole = read_mask(tmp_path / f"a/masks/cat_{seed:05d}.png")
        assert hole.any() and not hole.all()


@pytest.mark.parametrize(("flags", "word"), [
    (["--count", "0"], "--count"), (["--temperature", "-1"], "--temperature"), (["--seeds", "1", "-2"], "--seed"),
    (["--checkpoint", "none.safetensors"], "none.safetensors"),
])
def test_it_refuses_in_a_sentence(small_set, tmp_path, flags, word):
    argv = ["--checkpoint", small_set / "model.safetensors", "--output", tmp_path / "out", *flags]
    assert word in refusal(generate.main, *argv)
    assert not list(tmp_path.rglob("*.png"))


# ---- benchmark ----


@pytest.mark.parametrize("what, flags", [("inpaint", ["--compile"]), ("train", []), ("photos", [])])
def test_it_reports_every_case(what, flags, tmp_path, capsys, traced):
    path = tmp_path / "report.json"
    assert benchmark.main([what, "--quick", "--rounds", "1", "--device", "cpu", "--json", str(path), *flags]) == 0
    report, printed = json.loads(path.read_text()), capsys.readouterr()
    if what == "photos":
        assert len(report["photographs"]) == 5 and all(row["seconds"] > 0 < row["rounds"] for row in report["photographs"])
        return
    rows = report["completion" if what == "inpaint" else "training"]
    assert rows[0]["times as fast"] == 1 and "reference" in rows[0]["case"]
    assert all(row["pictures/s"] > 0 and row["case"] in printed.out and row["case"] in printed.err for row in rows)
    assert any("compiled" in row["case"] for row in rows) == bool(flags)
    if what == "train":
        assert rows[0]["GF a picture"] > rows[1]["GF a picture"] == pytest.approx(rows[2]["GF a picture"])    # the encoder's
