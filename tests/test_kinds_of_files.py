"""Kinds of files that people have: what is kept of a picture, what a mask means, which names belong together."""
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin
from small_sets import save_pixels, write_tar

from pictures.files import find_images, pair
from pictures.images import read_image, read_picture, write_completed, write_pixels
from pictures.masks import read_mask
from pictures.shards import ShardStream, count_pictures, is_shards
from utils import Parser, UserError

H, W = 12, 16
HOLE = torch.zeros(1, H, W, dtype=torch.bool)
HOLE[:, 3:7, 4:9] = True
KNOWN = ~HOLE[0].numpy()
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(channels: int = 3, dtype=np.uint8, height: int = H, width: int = W) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


def completed(path: Path, value: int = 77):
    """A file read, its hole filled with one gray, written and read again: (before, after)."""
    before = read_picture(path)
    output = path.with_name("completed.png")
    write_completed(output, before, torch.full((3, *before.pixels.shape[:2]), value, dtype=torch.uint8), HOLE)
    return before, read_picture(output)


@pytest.fixture(autouse=True)
def nothing_told():
    Parser().parse_args([])    # a command begins: every notice is new


# ---- what is kept of a picture ----


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_depth_and_channels_are_kept(tmp_path, channels, dtype):
    pixels = noise(channels, dtype)
    write_pixels(tmp_path / "a.png", pixels, icc_profile=b"" if channels < 3 else PROFILE, dpi=(300.0, 150.0))
    before, after = completed(tmp_path / "a.png")
    assert np.array_equal(before.pixels, pixels) and before.pixels.dtype == dtype
    assert after.pixels.dtype == dtype and np.array_equal(after.pixels[KNOWN], pixels[KNOWN])
    colours = after.pixels[~KNOWN][:, : 1 if channels < 3 else 3]
    assert (colours == 77 * (257 if dtype == np.uint16 else 1)).all()
    if channels in (2, 4):
        assert np.array_equal(after.pixels[:, :, -1], pixels[:, :, -1])
    assert after.extras["dpi"] == pytest.approx((300, 150), rel=1e-3)
    assert after.extras.get("icc_profile") == (None if channels < 3 else PROFILE)


def test_an_erased_hole_becomes_visible(tmp_path):
    pixels = noise(4)
    pixels[~KNOWN, 3] = 0
    write_pixels(tmp_path / "a.png", pixels)
    _, after = completed(tmp_path / "a.png")
    assert (after.pixels[~KNOWN, 3] == 255).all() and np.array_equal(after.pixels[KNOWN], pixels[KNOWN])


def test_16_bit_colours_are_read_as_another_reader_reads_them_and_transparent_ones(tmp_path):
    cv2 = pytest.importorskip("cv2")
    pixels = noise(3, np.uint16)
    for name in ("a.png", "a.tif", "b.tif"):    # BGR; the second TIFF is not compressed
        cv2.imwrite(str(tmp_path / name), pixels[:, :, ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, 1] if name == "b.tif" else [])
        assert np.array_equal(read_picture(tmp_path / name).pixels, pixels)
    large, options = noise(3, np.uint16, 300, 200), [cv2.IMWRITE_TIFF_COMPRESSION, 1, cv2.IMWRITE_TIFF_ROWSPERSTRIP, 32]
    cv2.imwrite(str(tmp_path / "strips.tif"), large[:, :, ::-1], options)
    assert np.array_equal(read_picture(tmp_path / "strips.tif").pixels, large)
    write_pixels(tmp_path / "ours.png", pixels)
    assert np.array_equal(cv2.imread(str(tmp_path / "ours.png"), cv2.IMREAD_UNCHANGED)[:, :, ::-1], pixels)
    assert read_image(tmp_path / "ours.png").permute(1, 2, 0).numpy() == pytest.approx(pixels / 257, abs=0.51)
    for channels in (1, 3):    # tRNS: the first pixel's colour is transparent
        pixels = noise(channels, np.uint16)
        write_pixels(tmp_path / "key.png", pixels)
        data, key = (tmp_path / "key.png").read_bytes(), b"tRNS" + pixels[0, 0].astype(">u2").tobytes()
        chunk = struct.pack(">I", len(key) - 4) + key + struct.pack(">I", zlib.crc32(key))
        (tmp_path / "key.png").write_bytes(data[:33] + chunk + data[33:])
        read = read_picture(tmp_path / "key.png").pixels
        assert np.array_equal(read[..., :-1], pixels) and (read[..., -1] == 0).sum() == 1 and read[0, 0, -1] == 0


@pytest.mark.parametrize("suffix", ["jpg", "webp", "avif", "png", "tif"])
def test_colour_profiles_are_kept(tmp_path, suffix):
    Image.fromarray(noise()).save(tmp_path / f"a.{suffix}", icc_profile=PROFILE)
    before, after = completed(tmp_path / f"a.{suffix}")
    assert after.extras["icc_profile"] == PROFILE and np.array_equal(after.pixels[KNOWN], before.pixels[KNOWN])


def test_exif_is_kept_but_orientation_and_thumbnail(tmp_path):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 6
    exif[0x011A] = 0.0
    data = bytearray(exif.tobytes())    # add a second directory with a thumbnail, as cameras do
    head, thumbnail = b"Exif\0\0", b"\xff\xd8 the picture before \xff\xd9"
    body = data[len(head) :]
    order = "<" if body[:2] == b"II" else ">"
    first = struct.unpack_from(order + "I", body, 4)[0]
    end = first + 2 + 12 * struct.unpack_from(order + "H", body, first)[0]
    struct.pack_into(order + "I", body, end, len(body))
    place = len(body) + 2 + 2 * 12 + 4
    body += struct.pack(order + "H", 2) + struct.pack(order + "HHII", 0x0201, 4, 1, place)
    body += struct.pack(order + "HHII", 0x0202, 4, 1, len(thumbnail)) + bytes(4) + thumbnail
    Image.fromarray(noise(height=W, width=H)).save(tmp_path / "a.jpg", exif=head + bytes(body), quality=100)
    before, after = completed(tmp_path / "a.jpg")
    assert before.pixels.shape == (H, W, 3)
    with Image.open(tmp_path / "completed.png") as image:
        kept = image.getexif()
        assert kept[0x010F] == "Maker" and kept[0x0112] == 1 and image.size == (W, H)
    assert b"the picture before" not in (tmp_path / "completed.png").read_bytes()
    assert b"the picture before" in (tmp_path / "a.jpg").read_bytes()
    assert before.lost == [] and after.lost == []


def test_odd_exif_entries_large_profiles_and_comments_do_no_harm(tmp_path):
    """Resolutions of n/0 and 0/0, and data that is no EXIF at all."""
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x011A, 5, 1, struct.pack("<I", 38))]
    odd = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHI", *e[:3]) + e[3] for e in entries)
    odd += bytes(4) + struct.pack("<ii", -1, 0)
    for name, exif, shape in (("odd", odd, (H, W)), ("none", b"garbage", (W, H))):
        Image.fromarray(noise(height=W, width=H)).save(tmp_path / f"{name}.jpg", exif=b"Exif\0\0" + exif)
        assert read_picture(tmp_path / f"{name}.jpg").pixels.shape[:2] == shape
    assert read_picture(tmp_path / "none.jpg").lost
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 5_000_000, zip=True)
    big = PROFILE[:128] + bytes(3_000_000)
    Image.fromarray(noise()).save(tmp_path / "a.png", icc_profile=big, pnginfo=text)
    _, after = completed(tmp_path / "a.png")
    assert after.extras["icc_profile"] == big


@pytest.mark.parametrize("bits, compression", [(1, None), (8, None), (8, "tiff_lzw"), (16, None), (16, "tiff_lzw")])
def test_white_is_zero_is_no_negative(tmp_path, bits, compression):
    gray = noise(1)[:, :, 0]
    image = Image.fromarray(gray.astype(np.uint16) * 257 if bits == 16 else gray)
    image = image.convert("1") if bits == 1 else image
    path = tmp_path / "a.tif"
    image.save(path, compression=compression)
    plain = read_image(path)
    data = bytearray(path.read_bytes())
    first, = struct.unpack_from("<I", data, 4)
    for place in range(first + 2, first + 2 + 12 * struct.unpack_from("<H", data, first)[0], 12):
        if struct.unpack_from("<H", data, place)[0] == 262:    # photometric interpretation
            struct.pack_into("<H", data, place + 8, 0)
    path.write_bytes(data)
    assert torch.equal(read_image(path), 255 - plain)


@pytest.mark.parametrize("kind", ["CMYK", "frames"])
def test_what_is_lost_is_said(tmp_path, kind):
    image = Image.fromarray(noise())
    if kind == "CMYK":
        image.convert("CMYK").save(tmp_path / "a.tif")
    else:
        image.save(tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(noise()[::-1])])
    before, after = completed(tmp_path / "a.tif")
    assert kind in " ".join(before.lost)
    assert np.array_equal(after.pixels[KNOWN], before.pixels[KNOWN])


# ---- what a mask means ----


@pytest.mark.parametrize("low, high, dtype", [(0, 1, np.uint8), (0, 1, np.uint16), (0, 255, np.uint16), (1, 2, np.uint8),
                                              (0, 100, np.uint8), (150, 255, np.uint8), (0, 65535, np.uint16)])
def test_two_levels_are_black_and_white(tmp_path, capsys, low, high, dtype):
    path = save_pixels(tmp_path / "a.png", np.where(KNOWN, high, low).astype(dtype))
    assert torch.equal(read_mask(path), HOLE) and torch.equal(read_mask(path, "white"), ~HOLE)
    assert ("levels" in capsys.readouterr().err) == (high != np.iinfo(dtype).max or low > 0)


def test_masks_with_a_palette_of_one_bit_and_of_one_level(tmp_path):
    palette = Image.fromarray(KNOWN.astype(np.uint8), mode=None).convert("P")
    palette.putpalette([0, 0, 0, 128, 0, 0])    # as segmentation data sets have it
    palette.save(tmp_path / "palette.png")
    Image.fromarray(KNOWN).save(tmp_path / "bit.png")
    Image.fromarray(KNOWN).save(tmp_path / "bit.tif")
    for name in ("palette.png", "bit.png", "bit.tif"):
        assert torch.equal(read_mask(tmp_path / name), HOLE), name
    ones = save_pixels(tmp_path / "ones.png", np.ones((H, W), np.uint8))
    whites = save_pixels(tmp_path / "whites.png", np.where(KNOWN, 255, 254).astype(np.uint8))
    assert not read_mask(ones).any() and not read_mask(whites).any()


def rgba(colour, clear_colour, clear: np.ndarray) -> np.ndarray:
    """One colour, and another with alpha 0 where `clear`."""
    pixels = np.empty((H, W, 4), np.uint8)
    pixels[~clear], pixels[clear] = (*colour, 255), (*clear_colour, 0)
    return pixels


BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)


@pytest.mark.parametrize("hole_colour", ["black", "white"])
@pytest.mark.parametrize("colour, clear_colour, clear_is_hole", [
    (BLACK, BLACK, True), (WHITE, WHITE, True),      # one colour, the hole erased
    (WHITE, BLACK, False), (RED, BLACK, False), (BLACK, WHITE, False), (WHITE, WHITE, False),    # paint on clear
])
def test_the_hole_in_the_alpha_channel(tmp_path, capsys, colour, clear_colour, clear_is_hole, hole_colour):
    clear = ~KNOWN if clear_is_hole else KNOWN
    path = save_pixels(tmp_path / "a.png", rgba(colour, clear_colour, clear))
    assert torch.equal(read_mask(path, hole_colour), HOLE)
    assert "alpha" in capsys.readouterr().err


def test_a_picture_with_the_hole_cut_out_a_mask_on_clear_and_a_photograph(tmp_path):
    cut = np.concatenate([noise(), np.where(KNOWN, 255, 0)[..., None].astype(np.uint8)], axis=2)
    assert torch.equal(read_mask(save_pixels(tmp_path / "cut.png", cut)), HOLE)
    gray = np.where(KNOWN, 255, 0).astype(np.uint8)
    alpha = np.full((H, W), 255, np.uint8)
    alpha[:, 12:] = 0    # nothing was said of the right side
    mask = save_pixels(tmp_path / "mask.png", np.stack([gray, gray, gray, alpha], axis=2))
    assert torch.equal(read_mask(mask), HOLE)
    opaque = save_pixels(tmp_path / "opaque.png", np.stack([gray, gray, gray, np.full_like(alpha, 255)], axis=2))
    assert torch.equal(read_mask(opaque), HOLE)
    with pytest.raises(UserError, match="photograph.*swapped"):
        read_mask(save_pixels(tmp_path / "a.png", noise(height=64, width=64)))
    soft = Image.fromarray(np.where(KNOWN, 255, 0).astype(np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
    soft.save(tmp_path / "soft.jpg", quality=60)
    assert 0.05 < read_mask(tmp_path / "soft.jpg").float().mean() < 0.2


# ---- which files are pictures, and which belong together ----


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise()).save(folder / name, format="PNG")


def test_whatever_pillow_reads_is_a_picture_and_what_is_skipped_is_told(tmp_path, capsys):
    for suffix in ("avif", "jfif", "tga", "jp2", "sgi", "webp", "pcx"):
        Image.fromarray(noise()).save(tmp_path / f"a_{suffix}.{suffix}", **{"format": "JPEG"} if suffix == "jfif" else {})
    touch(tmp_path, "no suffix", "odd.data")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "draw.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    found = find_images(tmp_path)
    assert len(found) == 9 and all(read_image(path).shape[0] == 3 for path in found.values())
    said = capsys.readouterr().err
    assert "2 file(s)" in said and "notes.txt" in said and "draw.eps" in said and said.count("\n") == 1


@pytest.mark.parametrize("images, masks", [
    (["image_000.png", "image_001.png"], ["mask_000.png", "mask_001.png"]),
    (["image_001.png", "image_002.png"], ["m1_001.png", "m1_002.png"]),
    (["a.png", "b.png"], ["a_mask.png", "b_mask.png"]),
    (["a_gt.png", "b_gt.png"], ["a_mask.png", "b_mask.png"]),
    (["in-cat.jpg", "in-cow.jpg"], ["out-cat.png", "out-cow.png"]),
    (["img1.png", "img10.png"], ["mask1.png", "mask10.png"]),
    (["x/image_0.png", "y/image_0.png"], ["x/mask_0.png", "y/mask_0.png"]),
    (["one.png"], ["other.png"]),
])
def test_names_pair_by_what_differs_in_them(tmp_path, capsys, images, masks):
    touch(tmp_path / "images", *images), touch(tmp_path / "masks", *masks)
    pairs = pair(tmp_path / "images", tmp_path / "masks")
    expected = zip(images, masks, strict=True)
    assert [both for _, *both in pairs] == [[tmp_path / "images" / a, tmp_path / "masks" / b] for a, b in expected]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and Path(images[0]).name in said and Path(masks[0]).name in said
    if "/" not in images[0]:
        assert pair(pairs[-1][1], tmp_path / "masks")[0][2] == pairs[-1][2]


@pytest.mark.parametrize("images, masks, words", [
    (["image_000.png", "image_001.png"], ["mask_001.png", "mask_002.png"], ["image_000", "mask_001"]),
    (["image_000.png", "image_001.png"], ["mask_a.png", "mask_b.png"], ["image_000", "mask_a"]),
    (["000.png", "image_001.png"], ["000.png", "mask_001.png"], ["image_001"]),
    (["a1_b.png", "a2_b.png"], ["a1_b_1.png", "a1_b_2.png"], ["a1_b"]),
])
def test_names_that_do_not_pair_are_refused(tmp_path, images, masks, words):
    touch(tmp_path / "images", *images), touch(tmp_path / "masks", *masks)
    with pytest.raises(UserError) as error:
        pair(tmp_path / "images", tmp_path / "masks")
    assert all(word in str(error.value) for word in words)


def test_accents_composed_or_not_and_names_that_are_no_utf_8(tmp_path):
    touch(tmp_path / "images", "caf\u00e9.png", os.fsdecode(b"caf\xe9 latin.png"))
    touch(tmp_path / "masks", "cafe\u0301.png", os.fsdecode(b"caf\xe9 latin.png"))
    assert len(pair(tmp_path / "images", tmp_path / "masks")) == 2
    touch(tmp_path / "images", "cafe\u0301.png")
    with pytest.raises(UserError, match="share a name"):
        find_images(tmp_path / "images")


# ---- shards ----


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise()).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("files, word", [
    (["IMG.01.00.png", "IMG.01.01.png"], "first dot"), (["0.png", "0.webp"], "one sample"),
    (["0.jpg", "0.mask.png"], "one sample"), (["0.txt"], "no picture"),
])
def test_samples_that_hold_not_one_picture_are_refused_with_the_cause(tmp_path, files, word):
    pattern = write_tar(tmp_path / "a.tar", dict.fromkeys(files, png()))
    for read in (count_pictures, lambda path: list(ShardStream(path, 8))):
        with pytest.raises(UserError, match=word) as error:
            read(pattern)
        assert files[0].partition(".")[0] in str(error.value)


def test_dots_in_single_names_and_compressed_shards_are_read(tmp_path):
    pytest.importorskip("webdataset")
    files = {"a.v1.png": png(), "a.json": b"{}", "b.PNG": png()}
    for name, mode in (("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz")):
        path = write_tar(tmp_path / name, files, mode)
        assert is_shards(path) and count_pictures(path) == 2 and len(list(ShardStream(path, 8, seed=None))) == 2
    data = (tmp_path / "a.tar.gz").read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(data[: len(data) // 2])
    for read in (count_pictures, lambda path: list(ShardStream(path, 8))):
        with pytest.raises(UserError, match="read"):
            read(str(tmp_path / "a.tar.gz"))
    assert not is_shards("folder.tarnished")
