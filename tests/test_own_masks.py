"""Masks of one's own for training: every draw has a hole, whatever the masks' sizes, and is a function of its seed."""

import numpy as np
import pytest
import torch
from PIL import Image

from pictures.own_masks import load_masks
from utils import UserError, seeded


@pytest.fixture
def folder(tmp_path):
    """A point in a large mask, a bar in a narrow one, a square in one smaller than a window. Black is the hole."""
    kinds = ("a", (300, 200), (150, 80, 151, 81)), ("b", (20, 90), (0, 40, 20, 44)), ("c", (8, 8), (2, 2, 6, 6))
    for name, size, hole in kinds:
        mask = Image.new("L", size, 255)
        mask.paste(0, hole)
        mask.save(tmp_path / f"{name}.png")
    return tmp_path


def test_every_draw_has_a_hole_and_something_known(folder):
    masks = load_masks(str(folder))
    whole, (windows, deep) = masks.random_holes(60, 16, seeded(1)), masks.window_holes(60, 16, seeded(2))
    for holes in (whole, windows):
        assert holes.shape == (60, 1, 16, 16)
        assert holes.dtype == torch.bool
        assert holes.flatten(1).any(1).all()
    assert not whole.flatten(1).all(1).any()
    assert torch.equal(deep, windows.float().mean((1, 2, 3)) > 0.5)


def test_a_draw_is_a_function_of_its_seed(folder):
    masks = load_masks(str(folder))
    assert torch.equal(masks.window_holes(9, 16, seeded(5))[0], masks.window_holes(9, 16, seeded(5))[0])
    assert not torch.equal(masks.random_holes(9, 16, seeded(5)), masks.random_holes(9, 16, seeded(6)))


def test_a_thin_hole_survives_in_a_small_picture(folder):
    masks = load_masks(str(folder))
    point = masks.masks[0]
    assert point.sum() == 1
    assert masks.random_holes(60, 16, seeded(0)).flatten(1).sum(1).min() == 1


@pytest.mark.parametrize("gray, word", [(0, "all hole"), (255, "without a hole")])
def test_a_mask_of_one_kind_is_refused_by_name(folder, gray, word):
    Image.fromarray(np.full((9, 9), gray, np.uint8)).save(folder / "z.png")
    with pytest.raises(UserError, match=f"z.png.*{word}"):
        load_masks(str(folder))
