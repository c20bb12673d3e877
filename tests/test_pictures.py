"""pictures/: finding, pairing, reading, writing, masks, folders, views, holes."""
from collections import Counter
from itertools import product
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import rng, save_pixels, smooth_picture

from models.convert import to_uint8
from pictures.ahead import write_behind
from pictures.files import find_images, pair
from pictures.folders import load_folder, read_square
from pictures.hard_holes import CORNER, SHARES, hard_hole
from pictures.holes import BOX_SHARE, _distance_to_segments, random_holes, random_walks
from pictures.images import read_image, to_float, write_image
from pictures.masks import read_mask
from pictures.own_masks import load_masks
from pictures.views import COLOUR, MAX_MOVE, MAX_TURN, ZOOM, Views, random_views, take_views
from utils import UserError, seeded


def read_hwc(path: Path) -> np.ndarray:
    return read_image(path).permute(1, 2, 0).numpy()


# ---- files and pairs ----


def test_the_pictures_of_a_folder_and_its_subfolders_by_name(tmp_path, capsys):
    for name in ("b.png", "a.JPG", "a-1.png", ".hidden.png", "sub/c.png", "sub/.cache/d.png", "masks/b.png"):
        save_pixels(tmp_path / name, smooth_picture(), format="PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "sub/loop").symlink_to(tmp_path)
    found = find_images(tmp_path, leave_out=[tmp_path / "masks"])
    assert list(found) == ["a", "a-1", "b", "sub/c"]
    assert found["a"] == tmp_path / "a.JPG"
    assert "notes.txt" in capsys.readouterr().err
    assert find_images(tmp_path / "b.png") == {"b": tmp_path / "b.png"}


def test_pairs_go_by_name(tmp_path):
    for name in ("a", "b", "sub/c"):
        save_pixels(tmp_path / "image" / f"{name}.jpg", smooth_picture())
        save_pixels(tmp_path / "mask" / f"{name}.png", smooth_picture())
    images, masks = tmp_path / "image", tmp_path / "mask"
    names = ("a", "b", "sub/c")
    assert pair(images, masks) == [(n, images / f"{n}.jpg", masks / f"{n}.png") for n in names]
    assert pair(images, masks / "b.png") == [(n, images / f"{n}.jpg", masks / "b.png") for n in names]
    assert pair(images / "b.jpg", masks) == [("b", images / "b.jpg", masks / "b.png")]
    save_pixels(images / "all.png", smooth_picture())    # the mask of all, beside the pictures
    assert pair(images, images / "all.png") == [(n, images / f"{n}.jpg", images / "all.png") for n in names]
    (images / "all.png").unlink()
    assert pair(images / "b.jpg", masks / "a.png") == [("b", images / "b.jpg", masks / "a.png")]
    (masks / "b.png").unlink()
    with pytest.raises(UserError, match=": b"):
        pair(images, masks)


# ---- reading ----


@pytest.mark.parametrize("mode, suffix", [("1", "png"), ("L", "png"), ("P", "gif"), ("P", "png"), ("CMYK", "tif"),
                                          ("L", "jpg"), ("CMYK", "jpg")])
def test_every_mode_reads_as_pillow_shows_it(tmp_path, mode, suffix):
    image = Image.fromarray(smooth_picture()).convert(mode)
    image.save(tmp_path / f"a.{suffix}")
    expected = np.asarray(image.convert("RGB")).astype(int)
    error = np.abs(read_hwc(tmp_path / f"a.{suffix}").astype(int) - expected)
    assert error.mean() < 3 if suffix == "jpg" else error.max() == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(tmp_path, mode):
    color = (200, 100, 50, 128) if mode == "RGBA" else (200, 128)
    image = Image.new(mode, (2, 1), color)
    image.putpixel((1, 0), (*color[:-1], 0))
    image.save(tmp_path / "a.png")
    half, clear = read_image(tmp_path / "a.png")[:, 0].T.tolist()
    colors = color[:3] if mode == "RGBA" else [200] * 3
    assert half == pytest.approx([255 + (c - 255) * 128 / 255 for c in colors], abs=1)
    assert clear == [255, 255, 255]


def test_transparent_palette_and_colour_key_are_white_and_pixels_without_a_range_are_refused(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=1)
    assert read_image(tmp_path / "palette.png")[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert read_image(tmp_path / "key.png").flatten().tolist() == [255, 255, 255]
    save_pixels(tmp_path / "float.tif", np.zeros((2, 2), dtype=np.float32))
    save_pixels(tmp_path / "int.tif", np.array([[70000]], dtype=np.int32))
    for name in ("float.tif", "int.tif"):
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)


@pytest.mark.parametrize("orientation, turn", [
    (1, lambda x: x), (2, lambda x: x[:, ::-1]), (3, lambda x: x[::-1, ::-1]), (4, lambda x: x[::-1]),
    (5, lambda x: x.transpose(1, 0, 2)), (6, lambda x: np.rot90(x, -1)),
    (7, lambda x: x[::-1, ::-1].transpose(1, 0, 2)), (8, lambda x: np.rot90(x))])
def test_exif_orientation_is_applied(tmp_path, orientation, turn):
    pixels = smooth_picture(height=3, width=5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    save_pixels(tmp_path / "a.png", pixels, exif=exif)
    assert np.array_equal(read_hwc(tmp_path / "a.png"), turn(pixels))


# ---- masks ----


def test_gray_levels_are_cut_at_128_with_a_notice(tmp_path, capsys):
    path = save_pixels(tmp_path / "a.png", np.array([[0, 1, 127, 128, 254, 255, 255, 255]], dtype=np.uint8))
    mask = read_mask(path)
    assert mask.flatten().tolist() == [True, True, True, False, False, False, False, False]
    assert "a.png" in capsys.readouterr().err
    assert torch.equal(read_mask(path, hole="white"), ~mask)


# ---- values and writing ----


def test_write_image_reads_back_exactly_and_leaves_nothing_else(tmp_path):
    image = torch.randint(256, (3, 6, 4), dtype=torch.uint8, generator=rng())
    path = tmp_path / "new" / "a.png"
    write_image(path, image)
    write_image(path, image.flip(-1))    # replaces
    assert torch.equal(read_image(path), image.flip(-1))
    with pytest.raises(UserError, match="a.jpg"):
        write_image(path.with_suffix(".jpg"), image)
    assert list(path.parent.iterdir()) == [path]
    values = torch.arange(256, dtype=torch.uint8)
    x = to_float(values)
    assert x.dtype == torch.float32 and x[0] == -1 and x[-1] == 1
    assert torch.equal(to_uint8(x), values)
    assert torch.equal(to_uint8(x.double()), values)
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.49 / 127.5 - 1, 0.51 / 127.5 - 1])).tolist() == [0, 255, 0, 1]


# ---- folders ----


@pytest.mark.parametrize("height, width, rows, columns", [(16, 21, slice(0, 16), slice(2, 18)),
                                                          (20, 16, slice(2, 18), slice(0, 16))])
def test_the_centre_is_cut_without_resampling(tmp_path, height, width, rows, columns):
    pixels = smooth_picture(0, height, width)
    image = read_square(save_pixels(tmp_path / "a.png", pixels), 16)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels[rows, columns])


def test_shrinking_is_antialiased_and_a_folder_of_bad_pictures_alone_is_refused(tmp_path):
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255    # without antialiasing some columns would come out black or white
    image = read_square(save_pixels(tmp_path / "a.png", stripes), 8).int()
    assert (image - 128).abs().max() < 16
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "bad.png").write_text("no picture")
    with pytest.raises(UserError, match="bad.png"):
        load_folder(tmp_path / "all", 8, bad_images="skip")


# ---- ahead and behind ----


def test_writing_behind_raises_what_went_wrong():
    late = Event()

    def fail() -> None:
        late.wait(timeout=10)
        raise UserError("disk full")

    with pytest.raises(UserError, match="disk full"):
        with write_behind(budget=100) as write:
            write(1, fail)
            late.set()    # the last one fails when nothing more is written


# ---- views ----


def smooth_pictures(count: int, size: int = 32) -> torch.Tensor:
    """(count, 3, size, size) in [-0.5, 0.5]."""
    pixels = np.stack([smooth_picture(i, size, size) for i in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5


def view(angle: float = 0.0, move: float = 0.0, colour=(0.0, 1.0, 1.0)) -> Views:
    c, s = np.cos(angle), np.sin(angle)
    place = torch.tensor([[[c, -s, move], [s, c, 0.0]]], dtype=torch.float32)
    return Views(torch.tensor([True]), place, torch.tensor([colour]))


def test_a_share_of_the_pictures_is_seen_otherwise_within_limits_and_the_others_bit_for_bit():
    image = smooth_pictures(64)
    views = random_views(64, 0.5, rng())
    seen = take_views(image, views)
    same = (seen == image).flatten(1).all(1)
    assert torch.equal(same, ~views.changed) and 16 < views.changed.sum() < 48
    assert seen.abs().max() <= 1
    again = random_views(64, 0.5, rng())
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    assert not random_views(64, 0.0, rng()).changed.any()
    views = random_views(1000, 1.0, rng())
    size = torch.linalg.det(views.place[:, :, :2]).sqrt()    # of the part that is seen
    assert 1 / ZOOM[1] - 1e-4 < size.min() < size.max() < 1 / ZOOM[0] + 1e-4
    turn = torch.rad2deg(torch.atan2(views.place[:, 1, 0], views.place[:, 0, 0]))
    assert 0.9 * MAX_TURN < turn.abs().max() <= MAX_TURN + 1e-3
    assert 0.9 < views.place[:, :, 2].abs().max() / (2 * MAX_MOVE) <= 1
    unchanged = torch.tensor([0.0, 1.0, 1.0])
    assert ((views.colour - unchanged).abs() <= torch.tensor(COLOUR) + 1e-6).all()


def test_what_a_view_does():
    image = smooth_pictures(1)
    assert torch.allclose(take_views(image, view()), image, atol=1e-5)
    quarter = take_views(image, view(angle=np.pi / 2))
    assert torch.allclose(quarter, image.rot90(1, (2, 3)), atol=1e-4)
    moved = take_views(image, view(move=2 * 4 / 32))    # four pixels of 32; the picture is 2 wide
    assert torch.allclose(moved[..., :-4], image[..., 4:], atol=1e-5)
    mean = image.mean((1, 2, 3))
    assert torch.allclose(take_views(image, view(colour=(0.1, 1.0, 1.0))), image + 0.1, atol=1e-5)
    assert torch.allclose(take_views(image, view(colour=(0.0, 0.5, 1.0))).mean((1, 2, 3)), mean, atol=1e-5)
    gray = take_views(image, view(colour=(0.0, 1.0, 0.0)))
    assert torch.allclose(gray, image.mean(1, keepdim=True).expand_as(image), atol=1e-5)


# ---- random holes ----


@pytest.mark.parametrize("size", [2, 3, 8, 31, 64])
def test_every_random_mask_has_a_hole_and_a_known_pixel(size):
    count = 20_000 // size
    holes = random_holes(count, size, rng())
    assert holes.dtype == torch.bool and holes.shape == (count, 1, size, size)
    assert holes.flatten(1).any(1).all() and (~holes).flatten(1).any(1).all()


def test_random_holes_are_a_function_of_the_generator_and_a_tenth_are_boxes():
    g = rng(3)
    first, second = random_holes(20, 16, g), random_holes(20, 16, g)
    assert not torch.equal(first, second)
    torch.manual_seed(7)    # the global generator plays no part
    assert torch.equal(random_holes(20, 16, rng(3)), first)
    assert not torch.equal(random_holes(20, 16, rng(4)), first)
    holes = random_holes(2000, 32, rng())[:, 0]
    rows, columns = holes.any(2), holes.any(1)
    full = (holes == (rows[:, :, None] & columns[:, None])).flatten(1).all(1)                  # a product of two sets...
    box = full & (rows.int().diff().abs().sum(1) <= 2) & (columns.int().diff().abs().sum(1) <= 2)    # ...each an interval
    assert box.float().mean() == pytest.approx(BOX_SHARE, abs=0.03)


def test_polyline_distance_matches_dense_sampling():
    size, points = 16, torch.rand(3, 4, 2, generator=rng(5))
    distance = _distance_to_segments(points.unsqueeze(2), size).amin(1)
    t = torch.linspace(0, 1, 400)[:, None]
    centres = (torch.arange(size) + 0.5) / size
    grid = torch.cartesian_prod(centres, centres)
    for i in range(3):
        dense = torch.cat([points[i, j] * (1 - t) + points[i, j + 1] * t for j in range(3)])
        torch.testing.assert_close(distance[i], torch.cdist(grid, dense).amin(1), atol=2e-3, rtol=0)


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


def test_every_draw_from_ones_own_masks_has_a_hole_and_something_known(folder):
    masks = load_masks(str(folder))
    whole, (windows, deep) = masks.random_holes(60, 16, seeded(1)), masks.window_holes(60, 16, seeded(2))
    for holes in (whole, windows):
        assert holes.shape == (60, 1, 16, 16)
        assert holes.dtype == torch.bool
        assert holes.flatten(1).any(1).all()
    assert not whole.flatten(1).all(1).any()
    assert torch.equal(deep, windows.float().mean((1, 2, 3)) > 0.5)
    assert torch.equal(masks.window_holes(9, 16, seeded(5))[0], masks.window_holes(9, 16, seeded(5))[0])
    assert not torch.equal(masks.random_holes(9, 16, seeded(5)), masks.random_holes(9, 16, seeded(6)))
    point = masks.masks[0]
    assert point.sum() == 1
    assert masks.random_holes(60, 16, seeded(0)).flatten(1).sum(1).min() == 1


@pytest.mark.parametrize("gray, word", [(0, "all hole"), (255, "without a hole")])
def test_a_mask_of_one_kind_is_refused_by_name(folder, gray, word):
    Image.fromarray(np.full((9, 9), gray, np.uint8)).save(folder / "z.png")
    with pytest.raises(UserError, match=f"z.png.*{word}"):
        load_masks(str(folder))
