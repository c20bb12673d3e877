"""reconstruct.py: the true tokens of clean pictures, decoded with and without what is known."""
from pathlib import Path

import pytest
import torch
from torch import Tensor

import inpainting
from evaluation import reconstruct
from models import MaskGIT
from pictures.images import read_image, to_float, to_uint8, write_image
from pictures.masks import read_mask
from utils import seeded

SIZE, COUNT = 16, 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model with random weights, 16x16 pictures, 4x4 tokens."""
    torch.manual_seed(0)
    vqgan = dict(image_size=SIZE, codebook_size=32, codebook_dim=4, encoder_width=16, encoder_depth=1,
                 decoder_channels=[16, 8, 8], decoder_blocks=[1, 1, 1])    # fmt: skip
    transformer = dict(codebook_size=32, seq_len=16, embed_dim=16, depth=1, num_heads=2, mlp_dim=32, pixel_dim=64)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    MaskGIT(vqgan, transformer).save_file(path)
    return path


@pytest.fixture
def folders(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(1)
    for i in range(COUNT):
        write_image(tmp_path / "images" / f"cat_{i}.png", torch.randint(0, 256, (3, SIZE, SIZE), generator=generator).byte())
        hole = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
        hole[:, 4 : 8 + i, 3:11] = True
        write_image(tmp_path / "masks" / f"cat_{i}.png", torch.where(hole, 0, 255).byte().expand(3, -1, -1))
    return tmp_path


def run(script, checkpoint: Path, folders: Path, *flags: object, out: str = "out") -> dict[str, Tensor]:
    """The pictures that a script writes, by name."""
    argv = ["--checkpoint", checkpoint, "--images", folders / "images", "--masks", folders / "masks", "--device", "cpu"]
    assert script.main([str(arg) for arg in (*argv, "--output", folders / out, *flags)]) == 0
    return {path.stem: read_image(path) for path in sorted((folders / out / "images").iterdir())}


def originals(folders: Path) -> tuple[Tensor, Tensor]:
    images = torch.stack([read_image(path) for path in sorted((folders / "images").iterdir())])
    return images, torch.stack([read_mask(path) for path in sorted((folders / "masks").iterdir())])


def refused(checkpoint: Path, folders: Path, *flags: object) -> str:
    with pytest.raises(ValueError) as error:
        run(reconstruct, checkpoint, folders, *flags)
    assert getattr(error.value, "user_error", False) and not list(folders.glob("out/**/*.png"))
    return str(error.value)


@pytest.mark.parametrize("flags", [("--no-known", "--no-paste"), ("--no-paste",), ("--no-known",), ()])
def test_the_pictures_are_what_the_decoder_makes_of_the_true_tokens(checkpoint, folders, flags):
    done = torch.stack(list(run(reconstruct, checkpoint, folders, *flags, "--batch-size", 2).values()))
    images, holes = originals(folders)
    model, clean = MaskGIT.from_pretrained(checkpoint), to_float(images)
    tokens = model.vqgan.encode(clean)
    with torch.no_grad():
        decoded = model.vqgan.decode(tokens, *(() if "--no-known" in flags else (clean, holes.float())))
    expected = to_uint8(decoded)
    assert torch.equal(done, expected if "--no-paste" in flags else torch.where(holes, expected, images))


def test_the_true_tokens_do_not_depend_on_the_hole(checkpoint, folders):
    before = run(reconstruct, checkpoint, folders, "--no-known", "--no-paste", out="a")
    for path in (folders / "masks").iterdir():
        write_image(path, 255 - read_image(path))
    after = run(reconstruct, checkpoint, folders, "--no-known", "--no-paste", out="b")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_the_tokens_of_the_hole_tell_it_from_a_completion(checkpoint, folders):
    """With the completed tokens in place of the true ones, the picture is inpainting.py's."""
    completed = run(inpainting, checkpoint, folders, "--seed", 3)
    images, holes = originals(folders)
    model = MaskGIT.from_pretrained(checkpoint)
    seeds = [seeded(3, name, 0).initial_seed() for name in completed]
    rounds = model.complete_tokens(model.known(to_float(images), holes), seeds, total_iter=10, choice_temperature=4.5)
    model.vqgan.encode = lambda _: rounds[-1].tokens
    decoded = to_uint8(reconstruct.reconstruct(model, list(images), list(holes), known=True))
    assert torch.equal(torch.where(holes, decoded, images), torch.stack(list(completed.values())))


def test_other_sizes_keep_every_known_pixel(checkpoint, folders):
    for path in (folders / "images").iterdir():
        write_image(path, torch.randint(0, 256, (3, 40, 24), generator=torch.Generator().manual_seed(2)).byte())
        hole = torch.zeros(1, 40, 24, dtype=torch.bool)
        hole[:, 10:20, 3:9] = True
        write_image(folders / "masks" / path.name, torch.where(hole, 0, 255).byte().expand(3, -1, -1))
    done = run(reconstruct, checkpoint, folders)
    images, holes = originals(folders)
    changed = (torch.stack(list(done.values())) != images).any(1, keepdim=True)
    assert not (changed & ~holes).any() and changed.any()


def test_masked_pictures_are_refused_and_one_clean_picture_is_enough(checkpoint, folders):
    images, holes = originals(folders)
    for i in range(COUNT):
        write_image(folders / "images" / f"cat_{i}.png", images[i].masked_fill(holes[i], 128))
    assert "give the originals as --images" in refused(checkpoint, folders)
    write_image(folders / "images" / "cat_2.png", images[2])
    assert len(run(reconstruct, checkpoint, folders)) == COUNT


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("images/cat_1.png", b"hello", "cat_1.png"), ("masks/cat_1.png", None, "cat_1"), ("images/dog.png", b"", "dog")],
)
def test_bad_input_is_refused_and_nothing_is_written(checkpoint, folders, name, content, words):
    if content is None:
        (folders / name).unlink()
    else:
        (folders / name).write_bytes(content)
    assert words in refused(checkpoint, folders)


def test_flags_and_checkpoints_that_do_not_work_are_refused(checkpoint, folders):
    assert "--batch-size must be at least 1" in refused(checkpoint, folders, "--batch-size", 0)
    assert "not found" in refused(folders / "none.safetensors", folders)


def test_skip_bad_goes_on(checkpoint, folders, capsys):
    (folders / "images" / "cat_1.png").write_bytes(b"hello")
    assert sorted(run(reconstruct, checkpoint, folders, "--skip-bad")) == ["cat_0", "cat_2"]
    assert "cat_1.png" in capsys.readouterr().err
