"""Holes for training and tests: random ones, large ones, and those of one's own masks."""
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import rng

from pictures.hard_holes import CORNER, SHARES, hard_hole, scattered_boxes
from pictures.holes import _distance_to_box_centre, _distance_to_polyline, _nearest, random_holes, random_walks
from pictures.own_masks import load_masks
from utils import UserError, seeded

# ---- random holes ----


@pytest.mark.parametrize("size", [2, 3, 8, 31, 64])
def test_every_random_mask_has_a_hole_and_a_known_pixel(size):
    count = 20_000 // size
    holes = random_holes(count, size, rng())
    assert holes.dtype == torch.bool and holes.shape == (count, 1, size, size)
    assert holes.flatten(1).any(1).all() and (~holes).flatten(1).any(1).all()


def test_random_holes_are_a_function_of_the_generator():
    g = rng(3)
    first, second = random_holes(20, 16, g), random_holes(20, 16, g)
    assert not torch.equal(first, second)
    torch.manual_seed(7)    # the global generator plays no part
    assert torch.equal(random_holes(20, 16, rng(3)), first)
    assert not torch.equal(random_holes(20, 16, rng(4)), first)


def test_walks_have_the_law_of_a_walk_that_stays_at_the_border():
    """All 4 * 4**3 walks of 3 steps (0.8 * 4 pixels) in a 2x2 picture, counted, against 20,000 drawn ones."""
    expected = Counter()
    for start, *moves in product(range(4), *[((0, 1), (0, -1), (1, 0), (-1, 0))] * 3):
        y, x = divmod(start, 2)
        seen = set()
        for dy, dx in moves:
            y, x = min(max(y + dy, 0), 1), min(max(x + dx, 0), 1)
            seen.add(2 * y + x)
        expected[sum(1 << cell for cell in seen)] += 1 / 4**4
    count = 20_000
    codes = (random_walks(count, 2, rng()).flatten(1).int() << torch.arange(4)).sum(1)
    drawn = Counter(codes.tolist())
    assert set(drawn) == set(expected)
    for code, p in expected.items():
        assert abs(drawn[code] - count * p) < 4.5 * (count * p * (1 - p)) ** 0.5


def test_boxes_are_boxes_and_have_the_share_drawn():
    g = rng()
    distance = _distance_to_box_centre(200, 32, g)
    for hole in _nearest(distance, g).view(-1, 32, 32):
        rows, columns = hole.any(1), hole.any(0)
        assert torch.equal(hole, rows[:, None] & columns[None])    # a product of two sets...
        assert rows.int().diff().abs().sum() <= 2 and columns.int().diff().abs().sum() <= 2    # ...each an interval


def test_polyline_distance_matches_dense_sampling():
    size = 16
    distance = _distance_to_polyline(3, size, rng(5))
    points = torch.rand(3, 4, 1, 2, generator=rng(5)).squeeze(2)             # the same draw
    t = torch.linspace(0, 1, 400)[:, None]
    centres = (torch.arange(size) + 0.5) / size
    grid = torch.cartesian_prod(centres, centres)
    for i in range(3):
        dense = torch.cat([points[i, j] * (1 - t) + points[i, j + 1] * t for j in range(3)])
        torch.testing.assert_close(distance[i], torch.cdist(grid, dense).amin(1), atol=2e-3, rtol=0)


# ---- large holes ----


@pytest.mark.parametrize("size", [(64, 64), (97, 65), (3, 50)])
def test_hard_holes_hide_half_or_more_and_leave_something(size):
    shares = []
    for i in range(60):
        hole = hard_hole(*size, seeded("test", i))
        assert hole.shape == (1, *size) and hole.dtype == torch.bool and hole.any() and not hole.all()
        assert torch.equal(hole, hard_hole(*size, seeded("test", i)))
        shares.append(hole.float().mean().item())
    if min(size) > 10:
        expected = torch.tensor([*SHARES, 1 - CORNER**2])
        nearest = (torch.tensor(shares)[:, None] - expected).abs()
        assert nearest.amin(1).max() < 0.02 and nearest.argmin(1).bincount().min() >= 5


@pytest.mark.parametrize("share", SHARES)
def test_scattered_boxes_hide_their_share_to_the_pixel(share):
    for i in range(5):
        assert scattered_boxes(61, 47, share, seeded(i)).sum() == round(share * 61 * 47)


# ---- one's own masks ----


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
