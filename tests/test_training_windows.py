"""Windows of photographs: a function of (seed, step), a guess inside the hole alone, an exact resume, an equal start."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import small_model
from tiny_runs import CONFIG, assert_same_run, kill_at, make_setting, metrics, run, succeed

from models.maskgit import MaskGIT
from pictures.holes import window_holes
from pictures.images import to_float
from training.weights import with_guess
from training.windows import Windows, load_photographs, make_guess
from utils import UserError, seeded


@pytest.fixture
def model() -> MaskGIT:
    return small_model()


def photographs(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (3, *size), dtype=np.uint8)) for size in sizes]


def windows(**changes) -> Windows:
    options = {"size": 16, "per_epoch": 8, "batch_size": 8, "seed": 3} | changes
    return Windows(photographs((40, 31), (16, 16), (9, 30), (16, 200)), **options)


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip((*one[:2], *one.plan), (*other[:2], *other.plan), strict=True))


def test_a_batch_is_a_function_of_seed_and_step_with_windows_and_holes_of_the_right_kind():
    assert same(windows().batch(5), windows().batch(5))
    assert not same(windows().batch(5), windows().batch(6))
    assert not same(windows().batch(5), windows(seed=4).batch(5))
    whole, parts = windows().batch(2), [windows(rank=rank, processes=2).batch(2) for rank in (0, 1)]
    for rank, part in enumerate(parts):
        assert torch.equal(part.image, whole.image[rank::2])
        assert torch.equal(part.plan.noise, whole.plan.noise[rank::2])
    batch = windows(batch_size=64).batch(0)
    assert batch.image.shape == (64, 3, 16, 16)
    assert batch.image.dtype == torch.uint8
    source = windows()
    assert torch.equal(source.cut(0, 0.0, 0.0, 0.0, 0.9), source.photographs[0][:, :16, :16])
    assert torch.equal(source.cut(0, 0.0, 0.0, 0.0, 0.1), source.photographs[0][:, :16, :16].flip(2))
    holes, deep = window_holes(200, 16, seeded(0))
    share = holes.float().mean((1, 2, 3))
    assert (share > 0).all()
    assert 0.1 < deep.float().mean() < 0.45
    assert share[deep].mean() > share[~deep].mean()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_guess_is_seen_inside_the_hole_alone(model, share):
    batch = windows(batch_size=64, guess_share=share).batch(0)
    image = to_float(batch.image)
    guess = make_guess(model.vqgan, image, batch.holes, batch.plan)
    assert guess.abs().amax() <= 1
    assert not guess.masked_select(~batch.holes).any()
    assert round(guess[:, 3].amax((1, 2)).mean().item(), 1) == share    # few are emptied by chance


def test_a_guess_is_near_the_truth_and_a_model_that_learns_to_take_one_begins_as_it_was(model):
    batch = windows(batch_size=64, guess_share=1.0).batch(0)
    smooth = torch.linspace(-1, 1, 16).expand(64, 3, 16, 16)
    plan = batch.plan._replace(recoded=torch.zeros(64, dtype=torch.bool))    # the tokenizer here has random weights
    guess = make_guess(model.vqgan, smooth, batch.holes, plan)
    error = (guess[:, :3] - smooth).abs()[guess[:, 3:].bool().expand(-1, 3, -1, -1)]
    assert error.mean() < 0.15
    wider = with_guess(model)
    image, hole = torch.rand(2, 3, 16, 16) * 2 - 1, torch.zeros(2, 1, 16, 16)
    hole[:, :, 3:11, 2:9] = 1
    before, after = (m.complete(image, hole, [1, 2]).images for m in (model, wider))
    assert torch.equal(before, after)
    guess = torch.cat([image, torch.ones_like(hole)], 1)
    assert torch.equal(before, wider.complete(image, hole, [1, 2], guess=guess).images)
    assert torch.equal(with_guess(wider).transformer.pixel_embed.weight, wider.transformer.pixel_embed.weight)


def test_repeated_folders_count_several_times_and_bad_ones_are_refused(tmp_path):
    for name, side in (("a", 20), ("b", 900)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (side, side), (10, 20, 30)).save(tmp_path / name / "x.png")
    assert [p.shape[1] for p in load_photographs([str(tmp_path / n) for n in "aba"])] == [20, 400, 20]
    (tmp_path / "a" / "y.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="y.png"):
        load_photographs([str(tmp_path / "a")])
    assert len(load_photographs([str(tmp_path / "a")], "skip")) == 1


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Of stage 2 on windows: 3 steps an epoch, as in tiny_runs."""
    setting = make_setting(tmp_path_factory.mktemp("windows"))
    wider = CONFIG.replace("pixel_dim: 64", "pixel_dim: 128")
    setting.config.write_text(wider.replace("train_transformer: {", "train_transformer: {windows: 24, "))
    return setting


@pytest.mark.parametrize("stage, flags, kill", [
    ("transformer", (), 7), ("vqgan", ("--epochs", "1", "--set", "train_vqgan.windows=24"), 3),
])
def test_trainings_on_windows_resume_exactly(setting, tmp_path, stage, flags, kill):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    succeed(stage, setting.argv(stage, whole, *flags))
    assert stage == "vqgan" or {"val_loss", "val_guessed"} <= set().union(*metrics(whole))
    assert run(stage, setting.argv(stage, cut, *flags), kill_at(kill)).code == -9
    succeed(stage, setting.argv(stage, cut, *flags, "--resume", "auto"))
    assert_same_run(whole, cut, stage)


@pytest.mark.parametrize("change", ["train_transformer.windows=-1", "train_transformer.windows=7",
                                    "train_transformer.guess_share=2",
                                    "train_transformer.augment=0.5", "transformer.pixel_dim=64"])    # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(setting, tmp_path, change):
    child = run("transformer", setting.argv("transformer", tmp_path / "x", "--set", change))
    assert child.code == 2
    assert change.partition("=")[0].partition(".")[2] in child.errors[-1]


@pytest.mark.parametrize("windows", [24, 0])
def test_holes_come_from_ones_own_masks(setting, tmp_path, windows):
    for kind, side in (("a", 40), ("b", 8)):
        mask = Image.new("L", (side, side), 255)
        mask.paste(0, (2, 2, 6, 6))
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / "masks" / f"{kind}.png")
    flags = ("--train-masks", tmp_path / "masks", "--val-masks", tmp_path / "masks", "--epochs", "1",
             "--set", f"train_transformer.windows={windows}",
             f"transformer.pixel_dim={128 if windows else 64}")    # fmt: skip
    succeed("transformer", setting.argv("transformer", tmp_path / "own", *map(str, flags)))
    random = setting.argv("transformer", tmp_path / "random", *map(str, flags[4:]))
    succeed("transformer", random)
    assert metrics(tmp_path / "own")[0]["loss"] != metrics(tmp_path / "random")[0]["loss"]
    child = run("transformer", [*random, "--resume", "auto", "--train-masks", str(tmp_path / "masks")])
    assert child.code == 2
    assert "training masks" in child.errors[-1]
