"""baselines.py: known pixels stay, the hole is never seen, closed forms."""
import sys

import pytest
import torch

from evaluation import baselines
from pictures.files import find_images
from pictures.images import read_image, write_image

SIDE = 24


@pytest.fixture
def picture() -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[:, 5:15, 8:20] = True
    return image, mask


def complete(image, mask, method):
    if method != "mean":
        pytest.importorskip("cv2")
    return baselines.complete(image, mask, method)


@pytest.mark.parametrize("method", baselines.METHODS)
def test_known_pixels_are_kept_and_the_hole_is_never_seen(picture, method):
    image, mask = picture
    before = image.clone()
    result = complete(image, mask, method)
    assert result.dtype == torch.uint8 and result.shape == image.shape
    assert torch.equal(result.masked_fill(mask, 0), image.masked_fill(mask, 0))
    assert torch.equal(complete(torch.where(mask, 255 - image, image), mask, method), result)
    assert torch.equal(image, before)


@pytest.mark.parametrize("method", baselines.METHODS)
def test_a_picture_of_one_colour_is_restored(picture, method):
    """OpenCV 5's Telea rounds on the way and is a few levels off."""
    _, mask = picture
    image = torch.tensor([200, 17, 90], dtype=torch.uint8)[:, None, None].expand(3, SIDE, SIDE).contiguous()
    error = complete(image, mask, method).int() - image.int()
    assert error.abs().max() <= (3 if method == "telea" else 0)


@pytest.mark.parametrize("method", ["telea", "navier-stokes"])
def test_channels_are_treated_alike(picture, method):
    image, mask = picture
    image[1], image[2] = image[0], image[0]
    result = complete(image, mask, method)
    assert torch.equal(result[0], result[1]) and torch.equal(result[0], result[2])


def test_mean_is_the_mean_of_the_known_pixels(picture):
    image, mask = picture
    expected = image[:, ~mask[0]].double().mean(1).round()
    assert torch.equal(complete(image, mask, "mean")[:, 10, 10].double(), expected)
    assert (complete(image, torch.ones_like(mask), "mean") == 128).all()


@pytest.fixture
def folders(tmp_path, picture):
    image, mask = picture
    for folder, pixels in (("images", image), ("masks", (~mask * 255).to(torch.uint8).expand(3, -1, -1))):
        (tmp_path / folder).mkdir()
        for stem in ("a", "b"):
            write_image(tmp_path / folder / f"{stem}.png", pixels)
    return tmp_path


def flags(folders, method):
    return ["--images", str(folders / "images"), "--masks", str(folders / "masks"), "--output", str(folders / "out"),
            "--method", method]


def test_the_program_completes_a_folder(folders, picture):
    assert baselines.main(flags(folders, "mean")) == 0
    written = find_images(folders / "out")
    assert list(written) == ["a", "b"]
    assert torch.equal(read_image(written["a"]), baselines.complete(*picture, "mean"))


def test_what_cannot_be_completed_is_refused(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="pip install opencv-python-headless"):
        baselines.main(flags(folders, "telea"))
    assert not (folders / "out").exists()
    write_image(folders / "masks" / "b.png", torch.zeros(3, SIDE, 30, dtype=torch.uint8))
    with pytest.raises(ValueError, match="its mask .*b.png"):
        baselines.main(flags(folders, "mean"))
    (folders / "masks" / "b.png").unlink()
    with pytest.raises(ValueError, match="b"):
        baselines.main(flags(folders, "mean"))
    with pytest.raises(ValueError, match="unknown method 'magic'"):
        baselines.complete(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.ones(1, 8, 8, dtype=torch.bool), "magic")
