"""tools/generate.py: pictures from nothing."""
import pytest
import torch
from small_sets import save_model

from pictures.images import read_image
from pictures.masks import read_mask
from tools import generate
from utils import UserError

SIZE = 16


def run(*argv) -> int:
    return generate.main([str(a) for a in ("--device", "cpu", *argv)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "model.safetensors", SIZE)


def test_a_picture_depends_on_its_seed_alone(checkpoint, tmp_path):
    common = ["--checkpoint", checkpoint, "--total-iter", "3"]
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
def test_it_refuses_in_a_sentence(checkpoint, tmp_path, flags, word):
    with pytest.raises(ValueError, match=word) as error:
        run("--checkpoint", checkpoint, "--output", tmp_path / "out", *flags)
    assert isinstance(error.value, UserError) or error.value.user_error
    assert not list(tmp_path.rglob("*.png"))
