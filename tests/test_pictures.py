"""pictures/: finding, pairing, reading, writing, masks, folders, holes, views, shards."""
from collections import Counter
from itertools import product
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pictures.ahead import read_ahead, write_behind
from pictures.files import find_images, pair
from pictures.folders import load_folder, read_square
from pictures.holes import _distance_to_box_centre, _distance_to_polyline, _nearest, random_holes, random_walks
from pictures.images import read_image, to_float, to_uint8, write_image
from pictures.masks import read_mask
from pictures.shards import open_shards, write_shards
from pictures.views import COLOUR, MAX_MOVE, MAX_TURN, ZOOM, Views, random_views, take_views
from utils import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int = 0, height: int = 32, width: int = 32) -> np.ndarray:
    """A smooth random picture, uint8 (height, width, 3), that survives JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def read_hwc(path: Path) -> np.ndarray:
    return read_image(path).permute(1, 2, 0).numpy()


# ---- files and pairs ----


def test_the_pictures_of_a_folder_and_its_subfolders_by_name(tmp_path, capsys):
    for name in ("b.png", "a.JPG", "a-1.png", ".hidden.png", "sub/c.png", "sub/.cache/d.png", "masks/b.png"):
        save(tmp_path / name, picture(), format="PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "sub/loop").symlink_to(tmp_path)
    found = find_images(tmp_path, leave_out=[tmp_path / "masks"])
    assert list(found) == ["a", "a-1", "b", "sub/c"]
    assert found["a"] == tmp_path / "a.JPG"
    assert "notes.txt" in capsys.readouterr().err
    assert find_images(tmp_path / "b.png") == {"b": tmp_path / "b.png"}


def test_find_images_refuses_missing_empty_and_ambiguous(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no picture in"):
        find_images(tmp_path)
    save(tmp_path / "a.png", picture())
    save(tmp_path / "a.jpg", picture())
    with pytest.raises(UserError, match="a.jpg and a.png .* share a name"):
        find_images(tmp_path)


def test_pairs_go_by_name(tmp_path):
    for name in ("a", "b", "sub/c"):
        save(tmp_path / "image" / f"{name}.jpg", picture())
        save(tmp_path / "mask" / f"{name}.png", picture())
    images, masks = tmp_path / "image", tmp_path / "mask"
    names = ("a", "b", "sub/c")
    assert pair(images, masks) == [(n, images / f"{n}.jpg", masks / f"{n}.png") for n in names]
    assert pair(images, masks / "b.png") == [(n, images / f"{n}.jpg", masks / "b.png") for n in names]
    assert pair(images / "b.jpg", masks) == [("b", images / "b.jpg", masks / "b.png")]
    save(images / "all.png", picture())    # the mask of all, beside the pictures
    assert pair(images, images / "all.png") == [(n, images / f"{n}.jpg", images / "all.png") for n in names]
    (images / "all.png").unlink()
    assert pair(images / "b.jpg", masks / "a.png") == [("b", images / "b.jpg", masks / "a.png")]
    (masks / "b.png").unlink()
    with pytest.raises(UserError, match="1 picture.* no mask .*: b"):
        pair(images, masks)
    with pytest.raises(UserError, match="1 mask.* no picture .*: b"):
        pair(masks, images)


# ---- reading ----


@pytest.mark.parametrize("mode, suffix", [("1", "png"), ("L", "png"), ("P", "gif"), ("P", "png"), ("CMYK", "tif"),
                                          ("L", "jpg"), ("CMYK", "jpg")])
def test_every_mode_reads_as_pillow_shows_it(tmp_path, mode, suffix):
    image = Image.fromarray(picture()).convert(mode)
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


def test_transparent_palette_and_colour_key_are_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=1)
    assert read_image(tmp_path / "palette.png")[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert read_image(tmp_path / "key.png").flatten().tolist() == [255, 255, 255]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, name):
    levels = np.array([[0, 128, 129, 255, 256, 257, 32768, 65278, 65535]], dtype=np.uint16)
    save(tmp_path / name, levels)
    expected = np.rint(levels / 257).astype(int)[0].tolist()
    assert expected[-1] == 255 and expected[3] == 1
    assert read_image(tmp_path / name)[:, 0].tolist() == [expected] * 3


def test_16_bit_gray_big_endian(tmp_path):
    levels = np.array([[0, 257 * 7, 65535]], dtype=np.uint16)
    Image.frombytes("I;16B", (3, 1), levels.astype(">u2").tobytes()).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif")[0, 0].tolist() == [0, 7, 255]


def test_pixels_without_a_defined_range_are_refused(tmp_path):
    save(tmp_path / "float.tif", np.zeros((2, 2), dtype=np.float32))
    with pytest.raises(UserError, match="float.tif holds floating-point"):
        read_image(tmp_path / "float.tif")
    save(tmp_path / "int.tif", np.array([[70000]], dtype=np.int32))
    with pytest.raises(UserError, match="int.tif holds 32-bit"):
        read_image(tmp_path / "int.tif")


@pytest.mark.parametrize("orientation, turn", [
    (1, lambda x: x), (2, lambda x: x[:, ::-1]), (3, lambda x: x[::-1, ::-1]), (4, lambda x: x[::-1]),
    (5, lambda x: x.transpose(1, 0, 2)), (6, lambda x: np.rot90(x, -1)),
    (7, lambda x: x[::-1, ::-1].transpose(1, 0, 2)), (8, lambda x: np.rot90(x))])
def test_exif_orientation_is_applied(tmp_path, orientation, turn):
    pixels = picture(height=3, width=5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "a.png", pixels, exif=exif)
    assert np.array_equal(read_hwc(tmp_path / "a.png"), turn(pixels))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animation_gives_its_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    assert read_image(tmp_path / name)[:, 0, 0].tolist() == [255, 0, 0]


def test_broken_files_are_named(tmp_path):
    good = save(tmp_path / "good.jpg", picture(height=64, width=64)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(good[:len(good) // 2])
    (tmp_path / "text.jpg").write_text("I am no picture")
    (tmp_path / "empty.png").touch()
    png = bytearray(save(tmp_path / "good.png", picture()).read_bytes())
    png[40:60] = bytes(20)
    (tmp_path / "broken.png").write_bytes(png)
    for name in ("cut.jpg", "text.jpg", "empty.png", "broken.png"):
        with pytest.raises(UserError, match=f"cannot read .*{name} as a picture"):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match="nowhere.png does not exist"):
        read_image(tmp_path / "nowhere.png")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = save(tmp_path / "bomb.png", picture(height=20, width=30))
    monkeypatch.setattr("pictures.images.MAX_PIXELS", 600)
    assert read_image(path).shape == (3, 20, 30)
    monkeypatch.setattr("pictures.images.MAX_PIXELS", 599)
    with pytest.raises(UserError, match="bomb.png has 30x20 pixels"):
        read_image(path)


# ---- masks ----


def test_black_or_white_marks_the_hole(tmp_path, capsys):
    path = save(tmp_path / "a.png", np.array([[0, 255, 255]], dtype=np.uint8))
    mask = read_mask(path)
    assert mask.dtype == torch.bool and mask.tolist() == [[[True, False, False]]]
    assert torch.equal(read_mask(path, hole="white"), ~mask)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="grey"):
        read_mask(path, hole="grey")


def test_gray_levels_are_cut_at_128_with_a_notice(tmp_path, capsys):
    path = save(tmp_path / "a.png", np.array([[0, 1, 127, 128, 254, 255, 255, 255]], dtype=np.uint8))
    mask = read_mask(path)
    assert mask.flatten().tolist() == [True, True, True, False, False, False, False, False]
    assert "a.png" in capsys.readouterr().err
    assert torch.equal(read_mask(path, hole="white"), ~mask)


# ---- values and writing ----


def test_float_and_back_is_exact_for_all_values():
    values = torch.arange(256, dtype=torch.uint8)
    x = to_float(values)
    assert x.dtype == torch.float32 and x[0] == -1 and x[-1] == 1
    assert torch.equal(to_uint8(x), values)
    assert torch.equal(to_uint8(x.double()), values)
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.49 / 127.5 - 1, 0.51 / 127.5 - 1])).tolist() == [0, 255, 0, 1]


def test_write_image_reads_back_and_leaves_nothing_else(tmp_path):
    image = torch.randint(256, (3, 6, 4), dtype=torch.uint8, generator=generator())
    path = tmp_path / "new" / "a.png"
    write_image(path, image)
    write_image(path, image.flip(-1))    # replaces
    assert torch.equal(read_image(path), image.flip(-1))
    assert list(path.parent.iterdir()) == [path]


def test_write_image_refuses_other_pixels_and_formats(tmp_path):
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"takes uint8 \(3, H, W\), got torch.float32"):
        write_image(tmp_path / "a.png", image.float())
    with pytest.raises(UserError, match="a.jpg must end in .png"):
        write_image(tmp_path / "a.jpg", image)
    assert not list(tmp_path.iterdir())


# ---- folders ----


def test_load_folder_is_sorted_and_exact_at_the_same_size(tmp_path):
    pixels = {stem: picture(seed, 16, 16) for seed, stem in enumerate("cab")}
    for stem, value in pixels.items():
        save(tmp_path / f"{stem}.png", value)
    images = load_folder(tmp_path, 16)
    assert images.dtype == torch.uint8 and images.shape == (3, 3, 16, 16)
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), np.stack([pixels[stem] for stem in "abc"]))


@pytest.mark.parametrize("height, width, rows, columns", [(16, 21, slice(0, 16), slice(2, 18)),
                                                          (20, 16, slice(2, 18), slice(0, 16))])
def test_the_centre_is_cut_without_resampling(tmp_path, height, width, rows, columns):
    pixels = picture(0, height, width)
    image = read_square(save(tmp_path / "a.png", pixels), 16)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels[rows, columns])


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255    # without antialiasing some columns would come out black or white
    image = read_square(save(tmp_path / "a.png", stripes), 8).int()
    assert (image - 128).abs().max() < 16


def test_load_folder_stops_at_or_skips_bad_pictures(tmp_path, capsys):
    for i in range(13):
        (tmp_path / f"bad{i:02}.png").write_text("no picture")
    with pytest.raises(UserError, match=r"none of the 13 picture\(s\) .* can be read; the first: .*bad00.png"):
        load_folder(tmp_path, 8, bad_images="skip")
    save(tmp_path / "a.png", picture(0, 8, 8))
    save(tmp_path / "z.png", picture(1, 8, 8))
    with pytest.raises(UserError, match="cannot read .*bad"):
        load_folder(tmp_path, 8)
    images = load_folder(tmp_path, 8, bad_images="skip")
    assert torch.equal(images, torch.stack([read_image(tmp_path / "a.png"), read_image(tmp_path / "z.png")]))
    said = capsys.readouterr().err
    assert "skipped 13 of 15 pictures" in said and "bad09.png" in said and "... and 3 more" in said
    with pytest.raises(UserError, match="unknown bad_images 'ignore'; expected 'error' or 'skip'"):
        load_folder(tmp_path, 8, bad_images="ignore")


# ---- ahead and behind ----


def test_reading_ahead_keeps_the_order_and_meets_bad_files_in_time():
    def read(item: int) -> int:
        if item == 7:
            raise UserError("seven is bad")
        return item * item

    skipped: list[str] = []
    for budget in (1, 3, 100):
        skipped.clear()
        got = list(read_ahead(read, range(10), lambda item: 1, budget, lambda error: skipped.append(str(error))))
        assert got == [(i, i * i) for i in range(10) if i != 7] and skipped == ["seven is bad"]
        before = []
        with pytest.raises(UserError, match="seven"):
            for item, _ in read_ahead(read, range(10), lambda item: 1, budget):
                before.append(item)
        assert len(before) == (0 if budget == 100 else 7)


def test_writing_behind_raises_what_went_wrong():
    written: list[int] = []
    with write_behind(budget=2) as write:
        for i in range(9):
            write(1, written.append, i)
    assert written == list(range(9))

    late = Event()

    def fail() -> None:
        late.wait(timeout=10)
        raise UserError("disk full")

    with pytest.raises(UserError, match="disk full"):
        with write_behind(budget=100) as write:
            write(1, fail)
            late.set()    # the last one fails when nothing more is written


# ---- random holes ----


@pytest.mark.parametrize("size", [2, 3, 8, 31, 64])
def test_every_random_mask_has_a_hole_and_a_known_pixel(size):
    count = 20_000 // size
    holes = random_holes(count, size, generator())
    assert holes.dtype == torch.bool and holes.shape == (count, 1, size, size)
    assert holes.flatten(1).any(1).all() and (~holes).flatten(1).any(1).all()


def test_random_holes_are_a_function_of_the_generator():
    g = generator(3)
    first, second = random_holes(20, 16, g), random_holes(20, 16, g)
    assert not torch.equal(first, second)
    torch.manual_seed(7)    # the global generator plays no part
    assert torch.equal(random_holes(20, 16, generator(3)), first)
    assert not torch.equal(random_holes(20, 16, generator(4)), first)
    assert random_holes(0, 16, g).shape == (0, 1, 16, 16)
    with pytest.raises(ValueError, match="at least 2"):
        random_holes(1, 1, g)


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
    codes = (random_walks(count, 2, generator()).flatten(1).int() << torch.arange(4)).sum(1)
    drawn = Counter(codes.tolist())
    assert set(drawn) == set(expected)
    for code, p in expected.items():
        assert abs(drawn[code] - count * p) < 4.5 * (count * p * (1 - p)) ** 0.5


def test_boxes_are_boxes_and_have_the_share_drawn():
    g = generator()
    distance = _distance_to_box_centre(200, 32, g)
    for hole in _nearest(distance, g).view(-1, 32, 32):
        rows, columns = hole.any(1), hole.any(0)
        assert torch.equal(hole, rows[:, None] & columns[None])    # a product of two sets...
        assert rows.int().diff().abs().sum() <= 2 and columns.int().diff().abs().sum() <= 2    # ...each an interval


def test_strokes_have_a_share_of_5_to_60_percent():
    g = generator()
    distance = _distance_to_polyline(200, 32, g)
    share = _nearest(distance, g).float().mean(1)
    assert share.min() >= 0.045 and share.max() <= 0.61 and share.min() < 0.06 and share.max() > 0.5


def test_polyline_distance_matches_dense_sampling():
    size = 16
    distance = _distance_to_polyline(3, size, generator(5))
    points = torch.rand(3, 4, 1, 2, generator=generator(5)).squeeze(2)             # the same draw
    t = torch.linspace(0, 1, 400)[:, None]
    centres = (torch.arange(size) + 0.5) / size
    grid = torch.cartesian_prod(centres, centres)
    for i in range(3):
        dense = torch.cat([points[i, j] * (1 - t) + points[i, j + 1] * t for j in range(3)])
        torch.testing.assert_close(distance[i], torch.cdist(grid, dense).amin(1), atol=2e-3, rtol=0)


def _hole_statistics(holes: torch.Tensor) -> dict[str, float]:
    """holes (n, 64, 64): share of the picture (mean, std), length of the outline per pixel, share of the border."""
    holes = holes.float()
    share = holes.mean((1, 2))
    outline = holes.diff(dim=1).abs().mean() + holes.diff(dim=2).abs().mean()
    border = torch.cat([holes[:, 0], holes[:, -1], holes[:, :, 0], holes[:, :, -1]], dim=1).mean()
    return {"mean": share.mean().item(), "std": share.std().item(), "outline": outline.item(), "border": border.item()}


def test_random_holes_resemble_the_test_masks(shared):
    files = find_images(shared / "data" / "catface64" / "test" / "mask")
    real = torch.cat([read_mask(file) for file in files.values()])            # (300, 64, 64)
    g = generator()
    expected, walks = _hole_statistics(real), _hole_statistics(random_walks(1000, 64, g).view(-1, 64, 64))
    tolerance = {"mean": 0.006, "std": 0.005, "outline": 0.005, "border": 0.012}    # 2 to 3 sigma of 300 masks
    for name, value in expected.items():
        assert walks[name] == pytest.approx(value, abs=tolerance[name]), name
    share = random_holes(4000, 64, g).float().mean((1, 2, 3))
    real_share = real.float().mean((1, 2))
    assert share.mean().item() == pytest.approx(real_share.mean().item(), abs=0.015)
    assert share.median().item() == pytest.approx(real_share.median().item(), abs=0.01)
    assert (share < 0.08).float().mean() > 0.02 and (share > 0.4).float().mean() > 0.02    # the wider tails


# ---- shards ----


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[str, torch.Tensor]:
    """23 pictures in 4 shards: (pattern, the pictures as load_folder gives them)."""
    pytest.importorskip("webdataset")
    folder = tmp_path_factory.mktemp("packed")
    for i in range(23):
        save(folder / "src" / f"{i:02}.v1.png", picture(i, 12, 16))    # a dot in the stem, which WebDataset would split
    write_shards(list(find_images(folder / "src").values()), folder, [f"s-{i:06}.tar" for i in range(4)], 8, 6, seed=0)
    assert sorted(file.name for file in folder.iterdir()) == [*(f"s-{i:06}.tar" for i in range(4)), "src"]
    return f"{folder}/s-{{000000..000003}}.tar", load_folder(folder / "src", 8)


def stream(packed, **options) -> list[torch.Tensor]:
    return list(open_shards(packed[0], 8, **{"buffer": 5, **options}))


def key(images) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


@pytest.mark.parametrize("seed", [None, 0])
def test_shards_hold_every_picture_once_bit_for_bit(packed, seed):
    images = stream(packed, seed=seed)
    assert images[0].dtype == torch.uint8 and images[0].shape == (3, 8, 8)
    assert sorted(key(images)) == sorted(key(packed[1]))
    assert key(images) != key(packed[1])    # written in random order


def test_the_order_is_a_function_of_seed_and_epoch(packed):
    orders = [key(stream(packed, seed=seed, epoch=epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (None, 0))]
    assert len({tuple(order) for order in orders}) == 4
    assert key(stream(packed, seed=0, epoch=1)) == orders[1]
    assert key(stream(packed, seed=None, epoch=3)) == orders[3]


@pytest.mark.parametrize("start", [0, 1, 5, 7, 10, 22, 23, 30])
def test_a_later_start_continues_the_same_order(packed, start):
    assert key(stream(packed, start=start)) == key(stream(packed))[start:]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_samples_evenly(packed, world_size):
    whole = key(stream(packed))
    even = len(whole) // world_size
    for rank in range(world_size):
        mine = key(stream(packed, rank=rank, world_size=world_size))
        assert mine == whole[rank::world_size][:even]
        assert key(stream(packed, rank=rank, world_size=world_size, start=2)) == mine[2:]


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_workers_give_the_batches_that_none_gives(packed, workers):
    shards = open_shards(packed[0], 8, batch_size=4, buffer=5, start=4, world_size=1)
    plain = list(DataLoader(shards, batch_size=4))
    loaded = list(DataLoader(shards, batch_size=4, num_workers=workers, multiprocessing_context="fork"))
    assert [len(batch) for batch in plain] == [4, 4, 4, 4, 3]
    assert all(torch.equal(a, b) for a, b in zip(plain, loaded, strict=True))


def test_shards_resize_and_refuse(packed, tmp_path):
    assert next(iter(open_shards(packed[0], 4))).shape == (3, 4, 4)
    with pytest.raises(UserError, match=r"2 of 6 shard\(s\) .* do not exist; the first: .*s-000004.tar"):
        open_shards(packed[0].replace("03}", "05}"), 8)
    for bad in ({"rank": 2, "world_size": 2}, {"start": -1}, {"epoch": -1}, {"seed": -1}, {"buffer": 0}, {"size": 0}):
        with pytest.raises(ValueError, match="open_shards needs"):
            open_shards(packed[0], **{"size": 8, **bad})
    first = Path(packed[0]).parent / "s-000000.tar"
    (tmp_path / "cut.tar").write_bytes(first.read_bytes()[:700])
    with pytest.raises(UserError, match="cannot read the shards: .*cut.tar"):
        list(open_shards(tmp_path / "cut.tar", 8))


def test_samples_without_a_picture_are_named(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "first", "txt": "hello"})
    with pytest.raises(UserError, match="sample first of .*a.tar holds no picture; its fields are txt"):
        list(open_shards(tmp_path / "a.tar", 8))
    with webdataset.TarWriter(str(tmp_path / "b.tar")) as writer:
        writer.write({"__key__": "second", "png": b"no picture"})
    with pytest.raises(UserError, match="cannot read second of .*b.tar as a picture"):
        list(open_shards(tmp_path / "b.tar", 8))


# ---- views ----


def smooth_pictures(count: int, size: int = 32) -> torch.Tensor:
    """(count, 3, size, size) in [-0.5, 0.5]."""
    pixels = np.stack([picture(i, size, size) for i in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5


def view(angle: float = 0.0, move: float = 0.0, colour=(0.0, 1.0, 1.0)) -> Views:
    c, s = np.cos(angle), np.sin(angle)
    place = torch.tensor([[[c, -s, move], [s, c, 0.0]]], dtype=torch.float32)
    return Views(torch.tensor([True]), place, torch.tensor([colour]))


def test_a_share_of_the_pictures_is_seen_otherwise_and_the_others_bit_for_bit():
    image = smooth_pictures(64)
    views = random_views(64, 0.5, generator())
    seen = take_views(image, views)
    same = (seen == image).flatten(1).all(1)
    assert torch.equal(same, ~views.changed) and 16 < views.changed.sum() < 48
    assert seen.abs().max() <= 1
    again = random_views(64, 0.5, generator())
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    assert not random_views(64, 0.0, generator()).changed.any()


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


def test_views_stay_within_their_limits():
    views = random_views(1000, 1.0, generator())
    size = torch.linalg.det(views.place[:, :, :2]).sqrt()    # of the part that is seen
    assert 1 / ZOOM[1] - 1e-4 < size.min() < size.max() < 1 / ZOOM[0] + 1e-4
    turn = torch.rad2deg(torch.atan2(views.place[:, 1, 0], views.place[:, 0, 0]))
    assert 0.9 * MAX_TURN < turn.abs().max() <= MAX_TURN + 1e-3
    assert 0.9 < views.place[:, :, 2].abs().max() / (2 * MAX_MOVE) <= 1
    unchanged = torch.tensor([0.0, 1.0, 1.0])
    assert ((views.colour - unchanged).abs() <= torch.tensor(COLOUR) + 1e-6).all()
