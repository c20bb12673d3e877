"""Large holes: their shares, and that they are a function of the generator."""
import pytest
import torch

from pictures.hard_holes import CORNER, SHARES, hard_hole, scattered_boxes
from utils import seeded


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
