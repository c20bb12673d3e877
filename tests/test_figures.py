"""tools.figures: grids of pictures, bars, schedules, refusals."""
import numpy as np
import pytest
from PIL import Image
from small_sets import write_set

from pictures.images import read_image
from tools import figures
from utils import UserError

SIDE = 32


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "set", 4, SIDE)


def test_a_grid_pairs_pictures_by_name(folder, tmp_path):
    path = tmp_path / "grid.png"
    rows = ["--rows", str(folder / "originals"), str(folder / "masked"), "--labels", "a", "b"]
    figures.main(["grid", *rows, "--names", "p3", "p1", "--scale", "2", "--output", str(path)])
    drawn = np.asarray(Image.open(path).convert("RGB"))
    left = drawn.shape[1] - 2 * (2 * SIDE + 3)
    assert drawn[:, :left].min() < 128    # the labels
    for i, name in enumerate(("originals", "masked")):
        for j, stem in enumerate(("p3", "p1")):
            y, x = 3 + i * (2 * SIDE + 3), left + j * (2 * SIDE + 3)
            expected = read_image(folder / name / f"{stem}.png").permute(1, 2, 0).numpy()
            assert np.array_equal(drawn[y : y + 2 * SIDE : 2, x : x + 2 * SIDE : 2], expected)


def test_a_ladder_and_the_schedules_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    table = tmp_path / "ladder.csv"
    table.write_text("method,FD-X,other\nours,1.5,2\nNavier-Stokes,30,4\n")
    figures.main(["ladder", str(table), "--output", str(tmp_path / "ladder.png")])
    figures.main(["ladder", str(table), "--score", "other", "--output", str(tmp_path / "other.png")])
    figures.main(["schedules", "--mask-func", "cosine", "sqrt", "--output", str(tmp_path / "schedules.png")])
    assert (tmp_path / "ladder.png").read_bytes() != (tmp_path / "other.png").read_bytes()
    assert Image.open(tmp_path / "schedules.png").size[0] > 300


def test_curves_of_trainings_are_drawn_and_written_as_a_table(tmp_path):
    pytest.importorskip("matplotlib")
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
            figures.main(["curves", *argv, "--output", str(tmp_path / "other.png")])
    assert not (tmp_path / "other.png").exists()


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
def test_senseless_figures_are_refused(folder, monkeypatch, tmp_path, argv, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        figures.main([str(folder / "masked") if arg == "FOLDER" else arg for arg in argv])
    assert not list(tmp_path.glob("*.png"))
