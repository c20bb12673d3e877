"""tools.sweep: scores of all sweet spots, going on after a stop, tables, figures, refusals."""
import csv
import statistics
from pathlib import Path

import pytest
import torch
from small_sets import mean_colours, refusal, weighted_l1, write_set

import inpainting
from evaluation import sweeps
from evaluation.distances import frechet_distance
from evaluation.metrics import paired_metrics, summarise
from pictures.folders import load_folder
from pictures.images import write_image
from pictures.masks import read_mask
from tools import figures, sweep
from utils import UserError

COUNT, SIDE = 5, 32
pytestmark = pytest.mark.usefixtures("small_networks")
SMALL = ("--mask-func", "cosine", "linear", "--total-iter", "3", "4", "--seeds", "0", "1", "--no-figures")


def arguments(folder: Path, output: Path, *extra: object) -> list[str]:
    paths = ["--images", folder / "masked", "--masks", folder / "masks", "--ground-truth", folder / "originals"]
    common = ["--checkpoint", folder / "model.safetensors", "--output", output, "--batch-size", "2", "--device", "cpu"]
    return [str(arg) for arg in (*paths, *common, *extra)]


def results(output: Path) -> list[dict]:
    with open(output / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---- decodes and scores ----


def test_a_sweet_spot_has_the_same_scores_whichever_others_are_asked_for(small_set, tmp_path):
    options = ("--mask-func", "cosine", "--total-iter", "6", "--seeds", "0", "--no-figures")
    assert sweep.main(arguments(small_set, tmp_path, *options, "--sweet-spot", "all")) == 0
    assert [row["sweet_spot"] for row in results(tmp_path)] == ["1", "2", "3", "4", "5", "6"]
    sweep.main(arguments(small_set, tmp_path / "last", *options))
    sweep.main(arguments(small_set, tmp_path / "few", *options, "--sweet-spot", "2", "3"))
    assert results(tmp_path / "few") == results(tmp_path)[1:3] and results(tmp_path / "last") == results(tmp_path)[5:]


@pytest.mark.parametrize("decoder", ["maskgit", "reference"])
def test_scores_are_those_of_the_pictures_that_inpainting_writes(small_set, tmp_path, decoder):
    options = ["--decoder", decoder, "--total-iter", "4", "--mask-func", "linear"]
    spots = ["--sweet-spot", "all", "--seeds", "7", "--perceptual-weights", "any"]
    sweep.main(arguments(small_set, tmp_path / "sweep", *options, *spots, "--no-figures"))
    row = results(tmp_path / "sweep")[2]
    assert (row["sweet_spot"], row["seed"], row["n"]) == ("3", "7", str(COUNT))
    inpainting.main([
        "--checkpoint", str(small_set / "model.safetensors"), "--images", str(small_set / "masked"), "--seed", "7",
        "--masks", str(small_set / "masks"), "--output", str(tmp_path / "out"), "--sweet-spot", "3", *options,
    ])    # fmt: skip
    pictures, truth = (load_folder(path, SIDE) for path in (tmp_path / "out" / "images", small_set / "originals"))
    masks = torch.stack([read_mask(small_set / "masks" / f"p{i}.png") for i in range(COUNT)])
    expected = frechet_distance(mean_colours(truth.float() / 255), mean_colours(pictures.float() / 255))
    assert float(row["paired FD-Colour"]) == pytest.approx(expected, rel=1e-4)
    for name, value in summarise(paired_metrics(pictures, truth, masks, weighted_l1)).items():
        assert float(row[name]) == pytest.approx(value, rel=1e-4)
    assert row["known_changed"] == "0"


def test_rounds_by_need_are_those_of_inpainting_without_total_iter(small_set, tmp_path):
    options = ["--mask-func", "linear", "square", "--total-iter", "need", "2", "--seeds", "7"]
    assert sweep.main(arguments(small_set, tmp_path / "sweep", *options)) == 0
    need, *planned = results(tmp_path / "sweep")
    assert (need["total_iter"], need["mask_func"], need["sweet_spot"]) == ("need", "", "") and len(planned) == 2
    assert {row["rounds"] for row in planned} == {"2"} and 1 <= float(need["rounds"]) <= 8
    inpainting.main([
        "--checkpoint", str(small_set / "model.safetensors"), "--images", str(small_set / "masked"), "--seed", "7",
        "--masks", str(small_set / "masks"), "--output", str(tmp_path / "out"),
    ])    # fmt: skip
    pictures, truth = (load_folder(path, SIDE) for path in (tmp_path / "out" / "images", small_set / "originals"))
    expected = frechet_distance(mean_colours(truth.float() / 255), mean_colours(pictures.float() / 255))
    assert float(need["paired FD-Colour"]) == pytest.approx(expected, rel=1e-4)
    assert "by need" in (tmp_path / "sweep" / "results.md").read_text()
    assert (tmp_path / "sweep" / "rounds_need.png").exists() and (tmp_path / "sweep" / "score_over_total_iter.png").exists()
    assert "reference" in refusal(sweep.main, *arguments(small_set, tmp_path / "no", *options), "--decoder", "reference")


def test_a_reference_adds_unpaired_distances_and_without_paste_the_whole_decode_is_scored(small_set, tmp_path):
    write_set(tmp_path / "other", 9, SIDE)
    options = ("--reference", tmp_path / "other" / "masked", "--limit", "3", "--no-paste", "--sweet-spot", "2", "4")
    sweep.main(arguments(small_set, tmp_path / "out", *SMALL, *options))
    rows = results(tmp_path / "out")
    row = rows[0]
    assert all(float(row["known_changed"]) > 0.5 for row in rows)
    spots = {(row["total_iter"], row["sweet_spot"]) for row in rows}
    assert spots == {("3", "2"), ("4", "2"), ("4", "4")}    # those beyond a run are left out
    assert float(row["FD-Colour"]) > 0 and float(row["FD-Colour"]) != float(row["paired FD-Colour"]) and row["n"] == "3"
    assert (tmp_path / "out" / "results.md").read_text().startswith("# FD-Colour")


@pytest.mark.parametrize("options", [(), ("--features", "none"), ("--features", "none", "--perceptual-weights", "any")])
def test_two_pictures_give_a_table_with_dashes(small_set, tmp_path, options):
    """Too few for a kernel distance; without a network there is none at all."""
    argv = ("--limit", "2", "--decoder", "halton", "--seeds", "0", "1", "--total-iter", "2", *options)
    assert sweep.main(arguments(small_set, tmp_path, *argv)) == 0
    text = (tmp_path / "results.md").read_text()
    assert "nan" not in text and ("–" in text) != bool(options)
    assert (tmp_path / "score_over_total_iter.png").is_file()
    assert ("FD-Colour" in text) != bool(options)


# ---- stopping and going on ----


def test_a_killed_sweep_goes_on_where_it_stopped(small_set, tmp_path, monkeypatch):
    whole, broken, score, started = tmp_path / "whole", tmp_path / "broken", sweeps.score, []
    sweep.main(arguments(small_set, whole, *SMALL, "--sweet-spot", "all"))

    def killed(model, pictures, setting, *rest):
        started.append(setting)
        if len(started) == 4:
            raise KeyboardInterrupt
        return score(model, pictures, setting, *rest)

    monkeypatch.setattr(sweeps, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(arguments(small_set, broken, *SMALL, "--sweet-spot", "all"))
    assert results(broken) == results(whole)[: len(results(broken))]
    assert {row["seed"] for row in results(broken)} == {"0", "1"} and len(results(broken)) == 3 * 3
    sweep.main(arguments(small_set, broken, *SMALL, "--sweet-spot", "all"))
    assert len(started) == 4 + 8 - 3    # 8 decodes in all, 3 of them were complete
    assert (broken / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    before = results(broken)
    sweep.main(arguments(small_set, broken, *SMALL, "--sweet-spot", "all", "--seeds", "0", "1", "2"))    # extended
    assert {setting.seed for setting in started[9:]} == {2} and results(broken)[: len(before)] == before


def test_results_of_something_else_and_pictures_that_do_not_fit_are_refused(small_set, tmp_path):
    sweep.main(arguments(small_set, tmp_path, *SMALL))
    assert "other paste" in refusal(sweep.main, *arguments(small_set, tmp_path, *SMALL, "--no-paste"))
    message = refusal(sweep.main, *arguments(small_set, tmp_path, *SMALL, "--limit", "3"))
    assert "pictures, holes, ground truth" in message and "another --output" in message
    (tmp_path / "sweep.json").unlink()
    assert "unknown" in refusal(sweep.main, *arguments(small_set, tmp_path, *SMALL))
    common = ["--checkpoint", small_set / "model.safetensors", "--output", tmp_path / "out", "--device", "cpu"]
    masked, masks, originals = (small_set / name for name in ("masked", "masks", "originals"))
    assert "blank" in refusal(sweep.main, *common, "--images", masked, "--masks", masks)
    white = tmp_path / "white.png"
    write_image(white, torch.full((3, SIDE, SIDE), 255, dtype=torch.uint8))
    assert "has a hole" in refusal(sweep.main, *common, "--images", originals, "--masks", white)
    write_image(tmp_path / "truth" / "p0.png", torch.zeros(3, SIDE, SIDE, dtype=torch.uint8))
    assert "p1" in refusal(sweep.main, *common, "--images", masked, "--masks", masks, "--ground-truth", tmp_path / "truth")
    pictures = ["--images", masked, "--masks", masks, "--ground-truth", originals]
    assert "reads" in refusal(sweep.main, *common, *pictures, "--output", masked)


# ---- tables and figures ----


def test_the_table_has_the_references_form(small_set, tmp_path, capsys):
    sweep.main(arguments(small_set, tmp_path, *SMALL, "--sweet-spot", "all"))
    text = (tmp_path / "results.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    lines = text.splitlines()
    start = lines.index("| t = T | cosine | linear |")
    rows = results(tmp_path)
    for line, total in zip(lines[start + 2 : start + 4], ("3", "4"), strict=True):
        expected = [total]
        for schedule in ("cosine", "linear"):
            scores = [float(row["paired FD-Colour"]) for row in rows
                      if (row["mask_func"], row["total_iter"], row["sweet_spot"]) == (schedule, total, total)]
            assert len(scores) == 2
            expected.append(f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f}")
        assert [cell.strip() for cell in line.strip("|").split("|")] == expected
    ranked = [float(line.split("|")[9].split("±")[0]) for line in lines[lines.index("## The best") + 4 :] if line]
    assert ranked == sorted(ranked) and len(ranked) == 10


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mask-func", "cosin"], "cosin"),
        (["--total-iter", "4", "0"], "at least 1"),
        (["--limit", "1"], "at least 2"),
        (["--temperature", "-1"], "0 or more"),
        (["--sweet-spot", "5", "--total-iter", "3", "4"], "1..4"),
        (["--sweet-spot", "last"], "--sweet-spot"),
        (["--features", "none", "--reference", "x"], "--features none"),
        (["--show", "p9"], "p9"),
    ],
)
def test_senseless_flags_are_refused(small_set, tmp_path, options, words):
    assert words in refusal(sweep.main, *arguments(small_set, tmp_path / "out", "--no-figures", *options))
    assert not (tmp_path / "out" / "results.csv").exists()


@pytest.mark.parametrize("text, word", [
    ("", "column"), ("maskgit,cosin,4,4,1,1,0,2.5", "cosin"), ("maskgit,cosine,4,4,1,1,0,high", "high"),
    ("maskgit,,need,,1,1,0,2.5", "by need"),
])
def test_tables_that_can_not_be_drawn_are_refused(tmp_path, text, word):
    path = tmp_path / "results.csv"
    path.write_text(f"{','.join(sweeps.KEY)},FD-X\n{text}\n" if text else "")
    with pytest.raises(UserError, match=word):
        figures.main(["sweep", str(path), "--output", str(tmp_path)])
