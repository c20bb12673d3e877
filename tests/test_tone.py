"""models/tone.py: a fill's tone is mended in smooth places, texture and known pixels stay, tiles don't show."""
import pytest
import torch

from models import tone
from models.tone import match_tone


def sky(height: int = 60, width: int = 90) -> torch.Tensor:
    """(3, H, W) uint8, a smooth gradient."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    return (80 + 0.5 * rows + 0.25 * columns + torch.tensor([0, 20, 60])[:, None, None]).to(torch.uint8)


def stroke(height: int = 60, width: int = 90) -> torch.Tensor:
    hole = torch.zeros(1, height, width, dtype=torch.bool)
    hole[:, 25:34, 10:70] = True
    return hole


def test_a_shade_in_a_smooth_place_goes_and_known_pixels_stay():
    picture, hole = sky(), stroke()
    filled = torch.where(hole, picture + 12, picture)
    matched = match_tone(picture, filled, hole)
    assert torch.equal(torch.where(hole, picture, matched), picture)
    error = (matched.int() - picture.int())[hole.expand(3, -1, -1)].abs()
    assert error.float().mean() < 2 and error.max() <= 4    # 12 before
    assert (match_tone(picture, picture, hole).int() - picture.int()).abs().max() <= 2    # nothing to mend


def test_texture_keeps_its_fill():
    noise = torch.randint(60, 200, (3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    filled = torch.where(stroke(), noise - 20, noise)
    assert (match_tone(noise, filled, stroke()).int() - filled.int()).abs().max() <= 1


def test_what_the_picture_holds_in_the_hole_has_no_influence():
    picture, hole = sky(), stroke()
    filled = torch.where(hole, picture + 9, picture)
    other = torch.where(hole, 255 - picture, picture)
    assert torch.equal(match_tone(picture, filled, hole), match_tone(other, filled, hole))


@pytest.mark.parametrize("height, width", [(1, 40), (40, 1), (3, 200)])
def test_odd_sizes_and_holes_without_a_rim(height, width):
    picture = sky(height, width)
    hole = torch.zeros(1, height, width, dtype=torch.bool)
    hole[..., width // 4 : width // 2 + 1] = True
    assert match_tone(picture, picture, hole).shape == picture.shape
    assert torch.equal(match_tone(picture, picture, hole | True), picture)


def test_tiles_do_not_show(monkeypatch):
    picture, hole = sky(), stroke()
    filled = torch.where(hole, picture + 12, picture)
    whole = match_tone(picture, filled, hole)
    monkeypatch.setattr(tone, "TILE", 32)
    monkeypatch.setattr(tone, "MARGIN", 16)
    assert (match_tone(picture, filled, hole).int() - whole.int()).abs().max() <= 2
