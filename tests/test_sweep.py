"""sweep.py and figures.py: one decode for all sweet spots, resuming, tables, figures, refusals."""
import csv
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import inpainting
from evaluation import figures
from evaluation.features import Features
from evaluation.metrics import frechet_distance, paired_metrics, summarise
from models import MaskGIT
from models.transformer import BidirectionalTransformer
from pictures.folders import load_folder
from pictures.images import read_image, write_image
from pictures.masks import read_mask
from tools import sweep
from utils import UserError

COUNT, SIDE = 5, 32


def mean_colours(images: torch.Tensor) -> torch.Tensor:
    """A feature network: the mean colour of each quarter, (B, 12)."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture(autouse=True)
def colour_features(monkeypatch):
    network = Features("Colour", "0" * 64, 12, mean_colours, batch_size=3)
    monkeypatch.setattr(sweep, "load_features", lambda *args, **options: network)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small random model, and pictures with originals and masks."""
    root = tmp_path_factory.mktemp("sweep")
    torch.manual_seed(0)
    vqgan = dict(image_size=SIDE, codebook_size=64, codebook_dim=4, encoder_width=16, encoder_depth=1,
                 decoder_channels=[16, 8, 8], decoder_blocks=[1, 1, 1])    # fmt: skip
    transformer = dict(codebook_size=64, seq_len=64, embed_dim=32, depth=2, num_heads=2, mlp_dim=64,
                       pre_norm=True, qk_norm=True, pixel_dim=64)    # fmt: skip
    MaskGIT(vqgan, transformer).save_file(root / "model.safetensors", torch.float32)
    generator = torch.Generator().manual_seed(1)
    for i in range(COUNT):
        image = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
        hole = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
        hole[:, 4 : 14 + 2 * i, 6:25] = True
        write_image(root / "originals" / f"p{i}.png", image)
        write_image(root / "masked" / f"p{i}.png", image.masked_fill(hole, 128))
        write_image(root / "masks" / f"p{i}.png", torch.where(hole, 0, 255).to(torch.uint8).expand(3, -1, -1).clone())
    return root


def arguments(folder: Path, output: Path, *extra: object) -> list[str]:
    paths = ["--images", folder / "masked", "--masks", folder / "masks", "--ground-truth", folder / "originals"]
    common = ["--checkpoint", folder / "model.safetensors", "--output", output, "--batch-size", "2", "--device", "cpu"]
    return [str(arg) for arg in (*paths, *common, *extra)]


SMALL = ("--mask-func", "cosine", "linear", "--total-iter", "3", "4", "--seeds", "0", "1", "--no-figures")


def results(output: Path) -> list[dict]:
    with open(output / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def refused(argv: list) -> str:
    with pytest.raises(ValueError) as error:
        sweep.main([str(arg) for arg in argv])
    assert getattr(error.value, "user_error", False)
    return str(error.value)


# ---- decodes and scores ----


def test_all_sweet_spots_cost_one_decode(folder, tmp_path, monkeypatch):
    calls, features = [], BidirectionalTransformer.features
    monkeypatch.setattr(BidirectionalTransformer, "features", lambda self, *a: calls.append(1) or features(self, *a))
    options = ("--mask-func", "cosine", "--total-iter", "6", "--seeds", "0", "--no-figures")
    assert sweep.main(arguments(folder, tmp_path, *options, "--sweet-spot", "all")) == 0
    batches = math.ceil(COUNT / 2)
    assert len(calls) == 6 * batches
    assert [row["sweet_spot"] for row in results(tmp_path)] == ["1", "2", "3", "4", "5", "6"]
    calls.clear()    # the rounds after the last one that is wanted are not run
    sweep.main(arguments(folder, tmp_path / "few", *options, "--sweet-spot", "2", "3"))
    assert len(calls) == 3 * batches
    assert results(tmp_path / "few") == results(tmp_path)[1:3]


def test_the_decoder_can_be_kept_from_the_known_pixels(folder, tmp_path, monkeypatch):
    shown, decode = [], MaskGIT.decode
    monkeypatch.setattr(MaskGIT, "decode", lambda self, t, *a: shown.append(a) or decode(self, t, *a))
    options = ("--mask-func", "cosine", "--total-iter", "2", "--seeds", "0", "--no-figures")
    sweep.main(arguments(folder, tmp_path / "plain", *options, "--no-known"))
    assert shown and all(not image.any() and mask.all() for image, mask, _ in shown)
    sweep.main(arguments(folder, tmp_path / "known", *options))
    assert results(tmp_path / "plain") != results(tmp_path / "known")


@pytest.mark.parametrize("decoder", ["maskgit", "reference"])
def test_scores_are_those_of_the_pictures_that_inpainting_writes(folder, tmp_path, decoder):
    options = ["--decoder", decoder, "--total-iter", "4"]
    argv = arguments(folder, tmp_path / "sweep", *options, "--mask-func", "linear", "--sweet-spot", "all", "--seeds", "7")
    sweep.main([*argv, "--no-figures"])
    row = results(tmp_path / "sweep")[2]
    assert (row["sweet_spot"], row["seed"], row["n"]) == ("3", "7", str(COUNT))
    inpainting.main([
        "--checkpoint", str(folder / "model.safetensors"), "--images", str(folder / "masked"), "--seed", "7",
        "--masks", str(folder / "masks"), "--output", str(tmp_path), "--mask-func", "linear", "--sweet-spot", "3", *options,
    ])    # fmt: skip
    pictures, truth = (load_folder(path, SIDE) for path in (tmp_path / "images", folder / "originals"))
    masks = torch.stack([read_mask(folder / "masks" / f"p{i}.png") for i in range(COUNT)])
    expected = frechet_distance(mean_colours(truth.float() / 255), mean_colours(pictures.float() / 255))
    assert float(row["FD-Colour"]) == pytest.approx(expected, rel=1e-4)
    columns = paired_metrics(pictures, truth, masks)
    for name in ("psnr", "hole_psnr", "ssim", "hole_l1"):
        assert float(row[name]) == pytest.approx(columns[name].mean().item(), rel=1e-4)
    assert row["known_changed"] == "0"
    assert float(row["seam"]) == pytest.approx(summarise(columns)["seam"], rel=1e-4)


def test_the_whole_decode_is_scored_without_paste(folder, tmp_path):
    sweep.main(arguments(folder, tmp_path, *SMALL, "--no-paste"))
    assert all(int(float(row["known_changed"])) > 0 for row in results(tmp_path))
    assert "known pixels as decoded" in (tmp_path / "results.md").read_text()


def test_holes_of_clean_pictures_are_drawn_and_blanked(folder):
    flags = ["--images", str(folder / "originals"), "--random-holes", "3", "--output", "unused"]
    whole, part = (sweep.load_pictures(sweep.parse_args([*flags, *limit]), SIDE) for limit in ([], ["--limit", "2"]))
    assert len(whole.stems) == COUNT and part.stems == whole.stems[:2]
    assert torch.equal(part.holes, whole.holes[:2])
    assert not whole.images.masked_select(whole.holes).any()
    assert torch.equal(whole.truth, load_folder(folder / "originals", SIDE))
    assert torch.equal(whole.images.masked_fill(whole.holes, 0), whole.truth.masked_fill(whole.holes, 0))
    other = sweep.load_pictures(sweep.parse_args([*flags[:3], "4", *flags[4:]]), SIDE)
    assert not torch.equal(other.holes, whole.holes)


def test_what_a_decoder_does_not_use_is_not_varied(folder, tmp_path):
    varied = ["--decoder", "maskgit", "reference", "halton", "--temperature", "0.5", "1", "--choice-temperature", "1", "2"]
    once = ["--seeds", "0", "--mask-func", "cosine", "--total-iter", "3"]
    args = sweep.parse_args(arguments(folder, tmp_path, *varied, *once))
    sweep.check_args(args)
    found = [(s.decoder, s.temperature, s.choice_temperature) for s in sweep.settings(args)]
    assert len(found) == len(set(found)) == 4 + 2 + 2
    assert ("reference", None, 1.0) in found and ("halton", 0.5, None) in found
    assert "temperature" not in sweep.Setting("reference", "cosine", 3, None, 1.0, 0).options()


def test_sweet_spots_beyond_a_run_are_left_out(folder, tmp_path):
    sweep.main(arguments(folder, tmp_path, *SMALL, "--sweet-spot", "2", "4"))
    found = {(row["total_iter"], row["sweet_spot"]) for row in results(tmp_path)}
    assert found == {("3", "2"), ("4", "2"), ("4", "4")}


# ---- stopping and going on ----


def test_a_killed_sweep_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    whole, broken, run, started = tmp_path / "whole", tmp_path / "broken", sweep.run, []
    sweep.main(arguments(folder, whole, *SMALL, "--sweet-spot", "all"))

    def killed(model, pictures, setting, *rest):
        started.append(setting)
        if len(started) == 4:
            raise KeyboardInterrupt
        return run(model, pictures, setting, *rest)

    monkeypatch.setattr(sweep, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(arguments(folder, broken, *SMALL, "--sweet-spot", "all"))
    assert results(broken) == results(whole)[: len(results(broken))]
    assert {row["seed"] for row in results(broken)} == {"0", "1"} and len(results(broken)) == 3 * 3
    assert not (broken / "results.md").exists()
    sweep.main(arguments(folder, broken, *SMALL, "--sweet-spot", "all"))
    assert len(started) == 4 + 8 - 3    # 8 decodes in all, 3 of them were complete
    assert (broken / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    assert not list(broken.glob(".*"))
    sweep.main(arguments(folder, broken, *SMALL, "--sweet-spot", "all"))
    assert len(started) == 9            # nothing left


def test_a_sweep_can_be_extended(folder, tmp_path, monkeypatch):
    sweep.main(arguments(folder, tmp_path, *SMALL))
    before, decoded, run = results(tmp_path), [], sweep.run
    monkeypatch.setattr(sweep, "run", lambda m, p, setting, *rest: decoded.append(setting.seed) or run(m, p, setting, *rest))
    sweep.main(arguments(folder, tmp_path, *SMALL, "--seeds", "0", "1", "2"))
    assert set(decoded) == {2} and results(tmp_path)[: len(before)] == before


def test_results_of_something_else_are_not_continued(folder, tmp_path):
    sweep.main(arguments(folder, tmp_path, *SMALL))
    assert "made with other paste" in refused(arguments(folder, tmp_path, *SMALL, "--no-paste"))
    message = refused(arguments(folder, tmp_path, *SMALL, "--limit", "3"))
    assert "made with other pictures, holes, ground truth" in message and "another --output" in message
    (tmp_path / "sweep.json").unlink()
    assert "nobody knows what" in refused(arguments(folder, tmp_path, *SMALL))


# ---- tables ----


def test_the_table_has_the_references_form(folder, tmp_path, capsys):
    sweep.main(arguments(folder, tmp_path, *SMALL, "--sweet-spot", "all"))
    text = (tmp_path / "results.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    lines = text.splitlines()
    start = lines.index("| t = T | cosine | linear |")
    rows = results(tmp_path)
    for line, total in zip(lines[start + 2 : start + 4], ("3", "4"), strict=True):
        expected = [total]
        for schedule in ("cosine", "linear"):
            scores = [float(row["FD-Colour"]) for row in rows
                      if (row["mask_func"], row["total_iter"], row["sweet_spot"]) == (schedule, total, total)]
            assert len(scores) == 2
            expected.append(f"{statistics.mean(scores):.4f} ± {statistics.stdev(scores):.4f}")
        assert [cell.strip() for cell in line.strip("|").split("|")] == expected
    assert f"{COUNT} pictures, known pixels put back" in text and "fewer than the 12 features" in text
    ranked = [float(line.split("|")[8].split("±")[0]) for line in lines[lines.index("## The best") + 4 :] if line]
    assert ranked == sorted(ranked) and len(ranked) == 10


def test_a_single_seed_has_no_spread():
    row = {"score": "12.345"}
    assert sweep.spread([row], "score") == "12.35" or sweep.spread([row], "score") == "12.34"
    assert sweep.spread([row, {"score": "14.345"}], "score").endswith("± 1.41")
    assert figures.mean_and_spread([{"s": "1"}, {"s": "2"}, {"s": "3"}], "s") == (2.0, 1.0)


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mask-func", "cosin"], "unknown --mask-func cosin; expected some of cosine, linear"),
        (["--decoder", "best"], "unknown --decoder best; expected some of maskgit, halton, reference"),
        (["--total-iter", "4", "0"], "--total-iter must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--limit", "1"], "at least 2 pictures"),
        (["--temperature", "-1"], "--temperature must be 0 or more, got -1"),
        (["--choice-temperature", "nan"], "--choice-temperature must be 0 or more, got nan"),
        (["--sweet-spot", "5", "--total-iter", "3", "4"], r"in 1..4 .the largest --total-iter., got 5"),
        (["--sweet-spot", "last"], "must be all or rounds in"),
        (["--sweet-spot", "0"], "must be all or rounds in"),
        (["--random-holes", "0"], "--masks DIR or --random-holes SEED, and not both"),
        (["--features", "none"], "must be inception or an ONNX file"),
        (["--show", "p9"], "--show p9: not among the pictures, which begin with p0, p1, p2"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--checkpoint", "missing.safetensors"], "missing.safetensors not found"),
        (["--perceptual-weights", "missing.safetensors"], "--perceptual-weights"),
    ],
)
def test_senseless_flags_are_refused(folder, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        sweep.main(arguments(folder, tmp_path, "--no-figures", *options))
    assert not (tmp_path / "results.csv").exists()


def test_pictures_that_do_not_fit_are_refused(folder, tmp_path):
    common = ["--checkpoint", folder / "model.safetensors", "--output", tmp_path / "out", "--device", "cpu", "--no-figures"]
    masked, masks, originals = (folder / name for name in ("masked", "masks", "originals"))
    assert "the holes are missing" in refused([*common, "--images", originals])
    drawn = ["--images", originals, "--random-holes", 0]
    assert "--ground-truth has no use" in refused([*common, *drawn, "--ground-truth", masked])
    assert "blank in their holes" in refused([*common, "--images", masked, "--masks", masks])
    white = tmp_path / "white.png"
    write_image(white, torch.full((3, SIDE, SIDE), 255, dtype=torch.uint8))
    assert "has a hole" in refused([*common, "--images", originals, "--masks", white])
    large = tmp_path / "large.png"
    write_image(large, torch.zeros(3, 40, 48, dtype=torch.uint8))
    message = refused([*common, "--images", originals, "--masks", large])
    assert "large.png is 48x40" in message and "32x32" in message
    write_image(tmp_path / "truth" / "p0.png", torch.zeros(3, SIDE, SIDE, dtype=torch.uint8))
    message = refused([*common, "--images", masked, "--masks", masks, "--ground-truth", tmp_path / "truth"])
    assert "4 differ, e.g. p1" in message


def test_missing_matplotlib_is_told_before_the_work(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert refused(arguments(folder, tmp_path)) == "figures need matplotlib: pip install matplotlib"
    assert not (tmp_path / "results.csv").exists()


# ---- figures ----


def picture_at(path: Path, y: int, x: int, side: int) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))[y : y + side, x : x + side]


def test_a_sweep_draws_its_results(folder, tmp_path):
    pytest.importorskip("matplotlib")
    sweep.main(arguments(folder, tmp_path, *SMALL[:-1], "--sweet-spot", "all", "--show", "p1"))
    names = ["rounds_3.png", "rounds_4.png", "schedules.png", "score_over_sweet_spot.png", "score_over_total_iter.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    for name in names:
        image = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert min(image.shape[:2]) > 100 and image.std() > 5    # something is drawn
    before = (tmp_path / "score_over_sweet_spot.png").read_bytes()
    figures.main(["sweep", str(tmp_path / "results.csv"), "--output", str(tmp_path / "again")])
    assert (tmp_path / "again" / "score_over_sweet_spot.png").read_bytes() == before    # from the CSV alone


@pytest.mark.parametrize(
    ("spots", "drawn"),
    [
        ({"4": ["4"], "8": ["8"]}, ["score_over_total_iter.png"]),
        ({"4": ["4"], "8": ["6", "8"]}, ["score_over_sweet_spot.png", "score_over_total_iter.png"]),
        ({"8": ["6"]}, ["score_over_sweet_spot.png"]),
    ],
)
def test_sweet_spots_are_drawn_where_there_are_several(spots, drawn, tmp_path):
    pytest.importorskip("matplotlib")
    fixed = {"decoder": "maskgit", "temperature": "1", "choice_temperature": "4.5", "mask_func": "cosine", "FD-x": "5"}
    rows = [fixed | {"total_iter": T, "sweet_spot": t, "seed": seed} for T in spots for t in spots[T] for seed in "01"]
    figures.draw_sweep(rows, "FD-x", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == drawn


def test_rounds_show_the_pictures_bit_for_bit(folder, tmp_path):
    pytest.importorskip("matplotlib")
    sweep.main(arguments(folder, tmp_path, *SMALL[:-1], "--show", "p1"))
    image = np.asarray(Image.open(tmp_path / "rounds_4.png").convert("RGB"))
    left = image.shape[1] - 4 * (SIDE + 3)                           # 4 rounds and their gaps
    original = read_image(folder / "originals" / "p1.png").permute(1, 2, 0).numpy()
    assert np.array_equal(picture_at(tmp_path / "rounds_4.png", 3, left, SIDE), original)
    hole = read_mask(folder / "masks" / "p1.png")[0].numpy()
    rows = [3 + i * (SIDE + 3) for i in range(5)]                    # input, cosine, its masks, linear, its masks
    for y in (rows[1], rows[3]):
        for t in range(4):
            completed = picture_at(tmp_path / "rounds_4.png", y, left + t * (SIDE + 3), SIDE)
            assert np.array_equal(completed[~hole], original[~hole])
    masks = [picture_at(tmp_path / "rounds_4.png", rows[4], left + t * (SIDE + 3), SIDE) for t in range(4)]
    counts = [int((mask[::4, ::4, 0] == 255).sum()) for mask in masks]
    first = int((picture_at(tmp_path / "rounds_4.png", rows[0], left + 2 * (SIDE + 3), SIDE)[::4, ::4, 0] == 255).sum())
    assert counts == [first * 3 // 4, first * 2 // 4, first // 4, 0]    # linear


def test_a_grid_pairs_pictures_by_name(folder, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "grid.png"
    rows = ["--rows", str(folder / "originals"), str(folder / "masked"), "--labels", "a", "b"]
    figures.main(["grid", *rows, "--names", "p3", "p1", "--scale", "2", "--output", str(path)])
    left = 12 + 8
    for i, name in enumerate(("originals", "masked")):
        for j, stem in enumerate(("p3", "p1")):
            drawn = picture_at(path, 3 + i * (2 * SIDE + 3), left + j * (2 * SIDE + 3), 2 * SIDE)
            assert np.array_equal(drawn[::2, ::2], read_image(folder / name / f"{stem}.png").permute(1, 2, 0).numpy())


def test_a_ladder_and_the_schedules_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    table = tmp_path / "ladder.csv"
    table.write_text("method,FD-X,other\nours,1.5,2\nNavier-Stokes,30,4\n")
    figures.main(["ladder", str(table), "--output", str(tmp_path / "ladder.png")])
    figures.main(["ladder", str(table), "--score", "other", "--output", str(tmp_path / "other.png")])
    figures.main(["schedules", "--mask-func", "cosine", "sqrt", "--output", str(tmp_path / "schedules.png")])
    assert (tmp_path / "ladder.png").read_bytes() != (tmp_path / "other.png").read_bytes()
    assert Image.open(tmp_path / "schedules.png").size[0] > 300


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no column mask_func"),
        ("mask_func,total_iter\n", "has no column sweet_spot, seed, decoder"),
        ("HEAD\n", "has no rows"),
        ("HEAD\nmaskgit,cosin,4,4,1,1,0,2.5\n", "unknown mask_func 'cosin'"),
        ("HEAD\nmaskgit,cosine,4.5,4,1,1,0,2.5\n", "expected a whole number"),
        ("HEAD\nmaskgit,cosine,4,4,1,1,0,high\n", "column FD-X holds 'high', expected a number"),
    ],
)
def test_foreign_tables_are_refused(tmp_path, text, words):
    path = tmp_path / "results.csv"
    path.write_text(text.replace("HEAD", ",".join([*sweep.KEY, "FD-X"])))
    with pytest.raises(UserError, match=words):
        figures.main(["sweep", str(path), "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sweep", "none.csv", "--output", "out"], "none.csv cannot be read"),
        (["schedules", "--output", "a.jpg"], "must end in .png"),
        (["schedules", "--mask-func", "cosin", "--output", "a.png"], "unknown --mask-func cosin"),
        (["grid", "--rows", "FOLDER", "--labels", "a", "b", "--output", "a.png"], "1 --rows need as many --labels, got 2"),
        (["grid", "--rows", "FOLDER", "--names", "p9", "--output", "a.png"], "has no picture named p9"),
        (["grid", "--rows", "FOLDER", "--count", "0", "--output", "a.png"], "must be at least 1"),
    ],
)
def test_senseless_figures_are_refused(folder, monkeypatch, tmp_path, argv, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        figures.main([str(folder / "masked") if arg == "FOLDER" else arg for arg in argv])
    assert not list(tmp_path.iterdir())
