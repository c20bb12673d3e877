"""inpainting.py as people run it: files in, files out, and every refusal."""
import os

import pytest
import torch
from PIL import Image
from small_sets import save_model, small_model

import inpainting
import models.files
from models.transformer import Block
from pictures.images import read_image, write_image
from pictures.masks import read_mask
from utils import Parser, run_cli

SIZE = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    small_model(SIZE, depth=2).save_file(path)
    return path


def picture(seed: int, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def write_mask(path, hole) -> None:
    write_image(path, torch.where(hole, 0, 255).to(torch.uint8).expand(3, -1, -1))


@pytest.fixture
def folders(tmp_path):
    """Five pictures, each with a hole of its own."""
    for i in range(5):
        write_image(tmp_path / "images" / f"cat_{i}.png", picture(i))
        hole = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
        hole[:, i : i + 6, 2 : 9 + i] = True
        write_mask(tmp_path / "masks" / f"cat_{i}.png", hole)
    return tmp_path


def run(checkpoint, folders, *flags: str, out: str = "out") -> dict[str, torch.Tensor]:
    """Run the script in process; returns the pictures it wrote, by name."""
    argv = ["--checkpoint", checkpoint, "--images", folders / "images", "--masks", folders / "masks"]
    argv += ["--output", folders / out]
    assert inpainting.main([str(a) for a in argv] + ["--device", "cpu", "--precision", "fp32", *flags]) == 0
    return {p.stem: read_image(p) for p in sorted((folders / out / "images").iterdir())}


def exit_code(argv: list, capsys) -> tuple[int, str]:
    """Exit code and stderr of the script, run as the command line does."""
    with pytest.raises(SystemExit) as stopped:
        run_cli(lambda: inpainting.main([str(a) for a in argv]))
    return stopped.value.code, capsys.readouterr().err


def test_known_pixels_are_exact_and_what_lies_behind_the_hole_has_no_influence(checkpoint, folders):
    done = run(checkpoint, folders)
    assert sorted(done) == [f"cat_{i}" for i in range(5)]
    for name, result in done.items():
        image = read_image(folders / "images" / f"{name}.png")
        hole = read_mask(folders / "masks" / f"{name}.png").expand_as(image)
        assert torch.equal(result[~hole], image[~hole])
        assert not torch.equal(result[hole], image[hole])
    for i in range(5):
        image = read_image(folders / "images" / f"cat_{i}.png")
        hole = read_mask(folders / "masks" / f"cat_{i}.png")
        write_image(folders / "images" / f"cat_{i}.png", torch.where(hole, 255 - image, image))
    after = run(checkpoint, folders)
    assert all(torch.equal(done[name], after[name]) for name in done)


def test_a_picture_depends_neither_on_its_batch_nor_on_the_other_pictures(checkpoint, folders):
    together = run(checkpoint, folders, "--batch-size", "5", out="a")
    split = run(checkpoint, folders, "--batch-size", "2", out="b")
    assert together.keys() == split.keys()
    assert all(torch.equal(together[name], split[name]) for name in together)
    for name in ("cat_0", "cat_1"):
        (folders / "images" / f"{name}.png").unlink()
        (folders / "masks" / f"{name}.png").unlink()
    some = run(checkpoint, folders, out="c")
    assert len(some) == 3 and all(torch.equal(together[name], some[name]) for name in some)


def test_seeds_repeat_and_samples_differ(checkpoint, folders):
    first = run(checkpoint, folders, "--num-samples", "2", "--seed", "7", out="a")
    again = run(checkpoint, folders, "--num-samples", "2", "--seed", "7", out="b")
    other = run(checkpoint, folders, "--num-samples", "2", "--seed", "8", out="c")
    assert sorted(first) == sorted(f"cat_{i}_s{s}" for i in range(5) for s in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(first["cat_4_s0"], first["cat_4_s1"])
    for kind in ("images", "masks"):
        (folders / kind / "twin.png").write_bytes((folders / kind / "cat_4.png").read_bytes())
    twins = run(checkpoint, folders, "--seed", "7", out="d")
    assert not torch.equal(twins["twin"], twins["cat_4"])    # the same picture of another name


def test_no_paste_writes_the_whole_decode_and_half_precision_another(checkpoint, folders):
    pasted, whole = run(checkpoint, folders, out="a"), run(checkpoint, folders, "--no-paste", out="b")
    for name in pasted:
        hole = read_mask(folders / "masks" / f"{name}.png").expand_as(pasted[name])
        assert torch.equal(pasted[name][hole], whole[name][hole])
        assert not torch.equal(pasted[name][~hole], whole[name][~hole])
    full, half = run(checkpoint, folders, out="a"), run(checkpoint, folders, "--precision", "bf16", out="b")
    assert not any(torch.equal(full[name], half[name]) for name in full)


def test_compiled_blocks_complete_alike(checkpoint, folders, traced):
    plain, fast = run(checkpoint, folders), run(checkpoint, folders, "--compile", out="fast")
    assert sum(isinstance(part, Block) for part in traced) == 2
    assert all(torch.equal(plain[name], fast[name]) for name in plain)


def test_save_steps_writes_every_round(checkpoint, folders):
    run(checkpoint, folders, "--save-steps", "--total-iter", "4")
    for i in range(5):
        cells = 5    # the input and four rounds
        for kind in ("steps", "masks"):
            strip = read_image(folders / "out" / kind / f"cat_{i}.png")
            assert strip.shape == (3, SIZE + 4, cells * (SIZE + 2) + 2)
        with Image.open(folders / "out" / "steps" / f"cat_{i}.gif") as animation:
            assert animation.n_frames >= 2
        masks = read_image(folders / "out" / "masks" / f"cat_{i}.png")[0]
        left = [(masks[2:-2, 2 + k * (SIZE + 2) : 2 + k * (SIZE + 2) + SIZE] == 255).sum().item() for k in range(cells)]
        assert all(a > b or a == b == 0 for a, b in zip(left, left[1:], strict=False)) and left[-1] == 0


def test_one_mask_serves_all_and_a_file_is_a_folder_of_one(checkpoint, folders):
    argv = ["--checkpoint", checkpoint, "--images", folders / "images", "--masks", folders / "masks/cat_0.png"]
    assert inpainting.main([str(a) for a in [*argv, "--output", folders / "a", "--device", "cpu"]]) == 0
    assert len(list((folders / "a/images").iterdir())) == 5
    argv[3] = folders / "images/cat_2.png"
    assert inpainting.main([str(a) for a in [*argv, "--output", folders / "b", "--device", "cpu"]]) == 0
    assert torch.equal(read_image(folders / "a/images/cat_2.png"), read_image(folders / "b/images/cat_2.png"))


def test_white_holes(checkpoint, folders, capsys):
    Parser().parse_args([])
    run(checkpoint, folders, "--mask-hole", "white", out="wrong")
    assert "--mask-hole black" in capsys.readouterr().err
    black = run(checkpoint, folders, out="a")
    for path in (folders / "masks").iterdir():
        write_image(path, 255 - read_image(path))
    white = run(checkpoint, folders, "--mask-hole", "white", out="b")
    assert all(torch.equal(black[name], white[name]) for name in black)


def test_no_hole_is_copied_through_and_a_bad_file_skipped_with_a_notice(checkpoint, folders, capsys):
    write_mask(folders / "masks" / "cat_3.png", torch.zeros(1, SIZE, SIZE, dtype=torch.bool))
    (folders / "images" / "cat_1.png").write_bytes((folders / "images" / "cat_1.png").read_bytes()[:60])
    done = run(checkpoint, folders, "--skip-bad")
    assert sorted(done) == ["cat_0", "cat_2", "cat_3", "cat_4"]
    assert torch.equal(done["cat_3"], read_image(folders / "images" / "cat_3.png"))
    said = capsys.readouterr().err
    assert "cat_1.png" in said and "cat_3" in said


def broken(folders, what: str) -> list[str]:
    """Break the folders (or the flags) in one way; returns the flags to add."""
    images, masks = folders / "images", folders / "masks"
    if what == "missing folder":
        return ["--images", str(folders / "nowhere")]
    if what == "empty folder":
        (folders / "empty").mkdir()
        return ["--images", str(folders / "empty")]
    if what == "unpaired":
        (masks / "cat_2.png").unlink()
    if what == "truncated image":
        (images / "cat_4.png").write_bytes((images / "cat_4.png").read_bytes()[:60])
    if what == "not an image":
        (images / "cat_4.png").write_text("hello")
    if what == "mask of another size":
        write_mask(masks / "cat_4.png", torch.zeros(1, SIZE, SIZE + 1, dtype=torch.bool))
    if what == "all hole":
        write_mask(masks / "cat_4.png", torch.ones(1, SIZE, SIZE, dtype=torch.bool))
    if what == "output is a file":
        (folders / "file").write_text("")
        return ["--output", str(folders / "file")]
    return {
        "checkpoint missing": ["--checkpoint", "none.safetensors"],
        "unknown schedule": ["--mask-func", "sinus"],
        "sweet spot beyond T": ["--total-iter", "4", "--sweet-spot", "5"],
        "temperature nan": ["--temperature", "nan"],
        "unknown device": ["--device", "abacus"],
    }.get(what, [])


CASES = {
    "missing folder": "does not exist", "empty folder": "no picture", "unpaired": "cat_2", "truncated image": "cat_4.png",
    "not an image": "cat_4.png", "mask of another size": "same size", "all hole": "whole picture",
    "output is a file": "not writable", "checkpoint missing": "not found", "unknown schedule": "sinus",
    "sweet spot beyond T": "1..4", "temperature nan": "temperature", "unknown device": "abacus",
}    # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_bad_input_is_one_sentence_and_nothing_is_written(checkpoint, folders, capsys, what):
    argv = ["--checkpoint", checkpoint, "--images", folders / "images", "--masks", folders / "masks"]
    argv += ["--output", folders / "out", "--device", "cpu", *broken(folders, what)]
    code, err = exit_code(argv, capsys)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and CASES[what] in err
    assert not list(folders.glob("out/**/*.png"))


# ---- folders and files of all kinds ----


def tree(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("flags", [
    ["--output", "."],                                                      # writes images/
    ["--output", ".", "--images", "images/cat_0.png"],                      # one file of the folder that is written into
    ["--output", "link"], ["--output", "images/../"],
    ["--output", ".", "--images", "pictures", "--save-steps"],              # writes masks/
    ["--output", "other"],                                                  # other/images is a link to images
    ["--output", "hard"],                                                   # hard/images holds hard links
])
def test_an_output_that_is_an_input_is_refused(checkpoint, folders, capsys, monkeypatch, flags):
    (folders / "link").symlink_to(folders)
    for name in ("other", "hard/images"):
        (folders / name).mkdir(parents=True)
    (folders / "other/images").symlink_to(folders / "images")
    for file in (folders / "images").iterdir():
        (folders / "hard/images" / file.name).hardlink_to(file)
    if "pictures" in flags:
        (folders / "images").rename(folders / "pictures")
    monkeypatch.chdir(folders)
    before = tree(folders)
    code, err = exit_code(["--checkpoint", checkpoint, "--images", "images", "--masks", "masks", *flags], capsys)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "output" in err
    assert tree(folders) == before


def test_subfolders_are_read_and_kept_and_results_are_no_inputs(checkpoint, folders):
    for kind in ("images", "masks"):
        (folders / kind / "deep/er").mkdir(parents=True)
        (folders / kind / "cat_1.png").rename(folders / kind / "deep/er/cat_1.png")
    (folders / "masks").rename(folders / "images/holes")                    # masks and results inside the pictures' folder
    for _ in range(2):
        argv = ["--images", folders / "images", "--masks", folders / "images/holes", "--output", folders / "images/out"]
        assert inpainting.main([str(a) for a in ["--checkpoint", checkpoint, *argv, "--device", "cpu"]]) == 0
    made = folders / "images/out/images"
    assert sorted(str(p.relative_to(made)) for p in made.rglob("*.png")) == [
        "cat_0.png", "cat_2.png", "cat_3.png", "cat_4.png", "deep/er/cat_1.png"]


def test_names_that_are_long_or_no_utf_8(checkpoint, tmp_path, capsys):
    hole = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    hole[:, 4:9, 4:9] = True
    for stem in ("n" * 251, os.fsdecode(b"caf\xe9")):
        write_image(tmp_path / "images" / f"{stem}.png", picture(0))
        write_mask(tmp_path / "masks" / f"{stem}.png", hole)
    assert len(run(checkpoint, tmp_path)) == 2
    argv = ["--checkpoint", checkpoint, "--images", tmp_path / "images", "--masks", tmp_path / "masks", "--num-samples", "2"]
    code, err = exit_code([*argv, "--output", tmp_path / "two"], capsys)
    assert code == 2 and "255 bytes" in err and not (tmp_path / "two").exists()


def test_a_large_set_is_read_while_it_is_completed(checkpoint, folders, monkeypatch, capsys):
    whole = run(checkpoint, folders, out="a")
    monkeypatch.setattr(inpainting, "AT_ONCE", 2 * SIZE**2)
    ahead = run(checkpoint, folders, "--batch-size", "1", out="b")
    assert all(torch.equal(whole[name], ahead[name]) for name in whole)
    bad = folders / "images/cat_4.png"
    bad.write_bytes(bad.read_bytes()[:-30])                                 # found when four are written already
    argv = ["--checkpoint", checkpoint, "--images", folders / "images", "--masks", folders / "masks", "--batch-size", "1"]
    code, err = exit_code([*argv, "--output", folders / "c", "--device", "cpu"], capsys)
    assert code == 1 and "cat_4.png" in err and "4 picture(s) are completed" in err
    assert len(list((folders / "c/images").iterdir())) == 4
    monkeypatch.undo()                                                      # a small set is read before anything is written
    code, err = exit_code([*argv, "--output", folders / "d", "--device", "cpu"], capsys)
    assert code == 2 and "cat_4.png" in err and not list((folders / "d").rglob("*.png"))


def test_a_photograph_gets_the_model_for_photographs(folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "models").mkdir()
    for name, size in (("cat64", SIZE), ("photo", 2 * SIZE)):
        save_model(tmp_path / "models" / f"{name}.safetensors", size)
    monkeypatch.setattr(models.files, "bundled", lambda name: tmp_path / f"models/{name}.safetensors")
    monkeypatch.setattr(inpainting, "SMALL", (SIZE, SIZE))
    write_image(folders / "images/large.png", picture(9, 20, 40))
    hole = torch.zeros(1, 20, 40, dtype=torch.bool)
    hole[:, 4:9, 4:9] = True
    write_mask(folders / "masks/large.png", hole)
    common = ["--images", folders / "images", "--masks", folders / "masks", "--device", "cpu"]
    for output, more in (("mixed", []), ("cat", ["--checkpoint", tmp_path / "models/cat64.safetensors"]),
                         ("photo", ["--checkpoint", tmp_path / "models/photo.safetensors"])):
        assert inpainting.main([str(a) for a in [*common, *more, "--output", folders / output]]) == 0
        assert ("photo.safetensors" in capsys.readouterr().err) == (output == "mixed")
    made = {output: tree(folders / output / "images") for output in ("mixed", "cat", "photo")}
    (folders / "images/cat_1.png").write_text("no picture")
    assert inpainting.main([str(a) for a in [*common, "--skip-bad", "--output", folders / "skip"]]) == 0
    assert len(list((folders / "skip/images").iterdir())) == 5
    assert made["mixed"]["large.png"] == made["photo"]["large.png"] != made["cat"]["large.png"]
    assert made["mixed"]["cat_0.png"] == made["cat"]["cat_0.png"] != made["photo"]["cat_0.png"]


def test_bundled_weights_have_names_which_the_output_may_have_too(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--images", folders / "images/cat_0.png", "--masks", folders / "masks/cat_0.png", "--total-iter", "1"]
    for _ in range(2):
        assert inpainting.main([str(a) for a in [*argv, "--checkpoint", "cat64", "--output", "cat64"]]) == 0
    assert (tmp_path / "cat64/images/cat_0.png").is_file()
