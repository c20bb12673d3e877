"""A small random model, feature networks that need no file, pictures and folders of pictures."""
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models import MaskGIT
from pictures.images import write_image


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, seed: int = 0, side: int = 24) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=rng(seed))


def smooth_picture(seed: int = 0, height: int = 32, width: int = 32) -> np.ndarray:
    """A random picture, uint8 (height, width, 3), that survives JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save_pixels(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def small_model(size: int = 16, vqgan: dict | None = None, seed: int = 0, **transformer) -> MaskGIT:
    """Random weights, pictures of size x size, tokens of 4x4 pixels; any setting can be given."""
    torch.manual_seed(seed)
    codes = dict(image_size=size, codebook_size=32, codebook_dim=4, encoder_width=16, encoder_depth=1,
                 decoder_channels=[16, 8, 8], decoder_blocks=[1, 1, 1]) | (vqgan or {})    # fmt: skip
    tokens = dict(codebook_size=codes["codebook_size"], seq_len=(size // 4) ** 2, embed_dim=16, depth=1, num_heads=2,
                  mlp_dim=32, pre_norm=True, qk_norm=True, pixel_dim=64) | transformer    # fmt: skip
    return MaskGIT(codes, tokens).eval()


def save_model(path: Path, size: int) -> Path:
    small_model(size).save_file(path, torch.float32)
    return path


def write_set(root: Path, count: int, side: int) -> Path:
    """originals/, masked/ and masks/ (black = hole) with the pictures p0, p1, ...; each has a hole of its own."""
    for i, image in enumerate(random_images(count, seed=1, side=side)):
        hole = torch.zeros(1, side, side, dtype=torch.bool)
        hole[:, side // 8 : side // 2 + i, side // 5 : side - 7] = True
        write_image(root / "originals" / f"p{i}.png", image)
        write_image(root / "masked" / f"p{i}.png", image.masked_fill(hole, 128))
        write_image(root / "masks" / f"p{i}.png", torch.where(hole, 0, 255).to(torch.uint8).expand(3, -1, -1).clone())
    return root


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> str:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def assert_equal_in_half(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].half(), other[name].half()) for name in one)


def refusal(main: Callable, *argv: object) -> str:
    """What a command says when it refuses what it was given."""
    with pytest.raises(ValueError) as error:
        main([str(x) for x in argv])
    assert error.value.user_error
    return str(error.value)


def mean_colours(images: Tensor) -> Tensor:
    """A feature network: the mean colour of each quarter, (B, 12)."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def weighted_l1(a: Tensor, b: Tensor, weight: Tensor | None) -> Tensor:
    """A perceptual distance, (B,)."""
    weight = torch.ones_like(a[:, :1]) if weight is None else weight
    return ((a - b).abs().mean(1, keepdim=True) * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp_min(1)
