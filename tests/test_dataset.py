"""tools/dataset.py: duplicates, splits, holes, shards."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_sets import refusal, save_pixels, smooth_picture

from pictures import duplicates
from pictures.files import pair
from pictures.holes import random_holes, random_walks
from pictures.images import read_image
from pictures.masks import read_mask
from tools import dataset

CATS = Path(__file__).resolve().parents[2] / "shared/data/catface64"


def run(*argv) -> int:
    return dataset.main([str(a) for a in argv])


# ---- duplicates ----


@pytest.fixture
def planted(tmp_path) -> tuple[Path, Path]:
    """Two folders of 12 and 6 different pictures; in the second also exact, re-encoded and mirrored copies."""
    train, val = tmp_path / "train", tmp_path / "val"
    for i in range(12):
        save_pixels(train / f"{i:02}.png", smooth_picture(i))
    for i in range(6):
        save_pixels(val / f"{i:02}.png", smooth_picture(100 + i))
    save_pixels(val / "exact.bmp", smooth_picture(0))
    save_pixels(val / "third.jpg", smooth_picture(0), quality=40)    # one group with the two that are equal
    save_pixels(val / "encoded.jpg", smooth_picture(1), quality=40)
    save_pixels(val / "mirrored.png", smooth_picture(2)[:, ::-1])
    save_pixels(train / "inside.png", smooth_picture(3))
    return train, val


def test_check_finds_planted_duplicates(planted, tmp_path, capsys):
    train, val = planted
    report = tmp_path / "report.json"
    assert run("check", train, val, "--json", report) == 1
    found = json.loads(report.read_text())
    assert found["leak"] is True and found["folders"] == [str(train), str(val)]
    groups = {frozenset(Path(file).name for file in group["files"]): group for group in found["groups"]}
    expected = {
        ("00.png", "exact.bmp", "third.jpg"): ("near", False, True), ("01.png", "encoded.jpg"): ("near", False, True),
        ("02.png", "mirrored.png"): ("near", True, True), ("03.png", "inside.png"): ("exact", False, False),
    }    # fmt: skip
    fields = ("kind", "mirrored", "crossing")
    assert {names: tuple(groups[frozenset(names)][field] for field in fields) for names in expected} == expected
    assert len(groups) == 4 and not list(tmp_path.glob(".*"))
    out = capsys.readouterr().out
    assert "0 exact, 3 near (a leak)" in out and "1 exact, 0 near" in out
    assert "1.000 mirrored" in out and "inside.png" not in out


@pytest.mark.parametrize("argv, word", [
    (["train", "train"], "twice"), (["train", "nowhere"], "nowhere"), (["train", "--threshold", "1.5"], "threshold"),
    (["train", "--json", "train/00.png/report.json"], "write"), (["train", "--json", "train/00.png"], "written over"),
])
def test_check_refuses_in_a_sentence(planted, monkeypatch, argv, word):
    monkeypatch.chdir(planted[0].parent)
    assert word in refusal(dataset.main, "check", *argv)


def test_a_folder_inside_another_is_a_set_of_its_own_and_bad_pictures_are_named(planted, capsys):
    train, val = planted
    val.rename(train / "val")
    assert run("check", train, train / "val") == 1
    assert "13 pictures" in capsys.readouterr().out
    (train / "text.jpg").write_text("no picture")
    assert "text.jpg" in refusal(dataset.main, "check", train)


def test_groups_of_duplicates_do_not_depend_on_the_block_size_and_hold_what_is_alike(tmp_path):
    rng = np.random.default_rng(0)
    thumbs = rng.standard_normal((40, 16, 16)).astype(np.float32)
    thumbs[30:] = thumbs[:10] + 0.05 * rng.standard_normal((10, 16, 16))
    thumbs[20:25] = thumbs[5:10, :, ::-1]
    thumbs -= thumbs.mean((1, 2), keepdims=True)
    thumbs /= np.linalg.norm(thumbs, axis=(1, 2), keepdims=True)
    whole, blocks = (sorted((i, j, m) for i, j, _, m in duplicates.near_pairs(thumbs, 0.9, rows=rows))
                     for rows in (100, 7))
    same = [(i, 30 + i, False) for i in range(10)]
    mirrored = [(i, 15 + i, True) for i in range(5, 10)] + [(15 + i, 30 + i, True) for i in range(5, 10)]
    assert whole == blocks == sorted(same + mirrored)
    for name, level in (("a", 10), ("b", 10), ("c", 200)):
        save_pixels(tmp_path / f"{name}.png", np.full((8, 8, 3), level, dtype=np.uint8))
    save_pixels(tmp_path / "d.png", np.full((4, 16, 3), 10, dtype=np.uint8))    # as many equal bytes, another shape
    groups = duplicates.group_duplicates(duplicates.fingerprint_folder(tmp_path), 0.96)
    assert sorted([p.file.stem for p in group.pictures] for group in groups) == [["a", "b"], ["c"], ["d"]]
    one, other = np.random.default_rng(0).standard_normal((2, 16, 16)).astype(np.float32)
    thumbs = {"a": one, "b": other, "c": one + other}    # a and b are not alike
    pictures = [duplicates.Fingerprint(Path(), Path(name), name, x / np.linalg.norm(x)) for name, x in thumbs.items()]
    (group,) = duplicates.group_duplicates(pictures, 0.6)
    assert len(group.pictures) == 3


@pytest.mark.skipif(not CATS.is_dir(), reason=f"needs the pictures in {CATS}, which is not part of the repository")
def test_the_real_split_has_no_leak():
    assert dataset.main(["check", *(str(CATS / name) for name in ("train", "val", "test/image"))]) == 0


# ---- split ----


def contents(folder: Path) -> dict[str, list[str]]:
    """Part -> sorted digests of its pictures."""
    return {part.name: sorted(duplicates.fingerprint(folder, file).digest for file in part.iterdir())
            for part in sorted(folder.iterdir())}


@pytest.fixture
def mixed(tmp_path) -> Path:
    """30 pictures: 20 different, and near or exact copies of 10 of them."""
    for i in range(20):
        save_pixels(tmp_path / "mixed" / f"{i:02}.png", smooth_picture(i))
    for i in range(5):
        save_pixels(tmp_path / "mixed" / f"near{i:02}.jpg", smooth_picture(i), quality=50)
        save_pixels(tmp_path / "mixed" / f"exact{i:02}.png", smooth_picture(5 + i))
    return tmp_path / "mixed"


def test_split_is_complete_leak_free_of_the_right_size_and_on_demand_distinct(mixed, tmp_path, capsys):
    output = tmp_path / "out"
    argv = ["split", str(mixed), "--output", str(output), "--val-share", "0.2", "--test-share", "0.1"]
    assert dataset.main(argv) == 0
    files = {part: {file.name for file in (output / part).iterdir()} for part in ("train", "val", "test")}
    assert [len(files[part]) for part in ("train", "val", "test")] == [21, 6, 3]
    assert set.union(*files.values()) == {file.name for file in mixed.iterdir()}
    for part, names in files.items():
        assert all((output / part / name).read_bytes() == (mixed / name).read_bytes() for name in names)
    capsys.readouterr()
    assert dataset.main(["check", *(str(output / part) for part in files)]) == 0
    assert not list(tmp_path.glob(".*"))
    distinct = tmp_path / "distinct"
    distinct.mkdir()    # empty is fine
    assert dataset.main(["split", str(mixed), "--output", str(distinct), "--distinct"]) == 0
    digests = sum(contents(distinct).values(), [])
    assert len(digests) == len(set(digests)) == 25
    names = {file.name for part in distinct.iterdir() for file in part.iterdir()}
    assert "05.png" in names and "exact00.png" not in names    # the first by name stays


def test_split_depends_on_content_and_seed_only(mixed, tmp_path):
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for i, file in enumerate(sorted(mixed.iterdir(), reverse=True)):
        (renamed / f"{i:03}{file.suffix}").write_bytes(file.read_bytes())
    for source, output, seed in ((mixed, "a", 0), (renamed, "b", 0), (mixed, "c", 1)):
        assert dataset.main(["split", str(source), "--output", str(tmp_path / output), "--val-share", "0.3",
                          "--seed", str(seed)]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["val"] != contents(tmp_path / "c")["val"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["train", "val"]


# ---- holes ----


def test_every_picture_gets_a_hole_of_its_size_that_depends_on_seed_and_name(tmp_path, capsys):
    for name, width, height in (("a.png", 64, 64), ("b.jpg", 64, 64), ("c.png", 40, 90)):
        save_pixels(tmp_path / "src" / name, smooth_picture(0, height, width))
    save_pixels(tmp_path / "one" / "b.png", smooth_picture(1, 64, 64))
    for source, output, *flags in (("src", "x"), ("one", "y"), ("src", "z", "--seed", "1"), ("src", "w", "--kind", "all"),
                                   ("src", "v", "--kind", "hard")):
        assert dataset.main(["holes", str(tmp_path / source), "--output", str(tmp_path / output), *flags]) == 0
    pairs = pair(tmp_path / "src", tmp_path / "x")
    masks = {stem: read_mask(mask) for stem, _, mask in pairs}
    assert {stem: read_image(image).shape[1:] for stem, image, _ in pairs} == {s: m.shape[1:] for s, m in masks.items()}
    drawn = {seed: random_walks(1, 64, dataset.hole_generator("b", seed))[0] for seed in (0, 1)}
    of_all_kinds = random_holes(1, 64, dataset.hole_generator("b", 0))[0]
    for mask, expected in ((masks["b"], drawn[0]), *((read_mask(tmp_path / folder / "b.png"), hole) for folder, hole in
                           (("y", drawn[0]), ("z", drawn[1]), ("w", of_all_kinds)))):    # fmt: skip
        assert torch.equal(mask, expected)
    hard = [read_mask(tmp_path / "v" / f"{name}.png").float().mean() for name in "abc"]
    assert all(0.4 < share < 1 for share in hard)
    assert not torch.equal(masks["a"], masks["b"]) and not torch.equal(drawn[0], drawn[1])
    share = sum(mask.double().mean().item() for mask in masks.values()) / 3
    assert f"3 holes of {share:.1%}" in capsys.readouterr().out


# ---- refusals ----


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current folder, with folders to give wrongly."""
    save_pixels(tmp_path / "src/a.png", smooth_picture(0, 64, 64))
    save_pixels(tmp_path / "tiny/a.png", smooth_picture(0, 1, 1))
    for quality in (50, 60, 70):
        save_pixels(tmp_path / f"alike/{quality}.jpg", smooth_picture(), quality=quality)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/text.png").write_text("no picture")
    (tmp_path / "s-000000.tar").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("argv, word", [
    ("split src --output tiny", "not empty"), ("split src --output src/new", "reads"),
    ("split src/a.png --output new", "not a folder"),
    ("split src --output new --val-share nan", "between 0 and 1"),
    ("split src --output new --val-share 0.6 --test-share 0.4", "between 0 and 1"),
    ("split alike --output new", "no picture is left"),
    ("holes src --output tiny", "not empty"), ("holes src --output new --size 1", "--size"),
    ("holes tiny --output new", "too small"),
    ("shards src --size 8 --output one.tar", "number"), ("shards src --size 8 --output %d-%d.tar", "number"),
    ("shards src --size 8 --output s-%06d.tar", "exists"), ("shards bad --size 8 --output t-%06d.tar", "read"),
])
def test_refusals_leave_nothing(place, argv, word):
    before = sorted(place.rglob("*"))
    assert word in refusal(dataset.main, *argv.split())
    assert sorted(place.rglob("*")) == before
