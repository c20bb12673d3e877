"""The model inside another program: threads, seeds, and what can't be traced."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from models import MaskGIT

VQGAN = dict(image_size=32, codebook_size=64, codebook_dim=8, encoder_width=32, encoder_depth=1, decoder_channels=[16, 8, 8],
             decoder_blocks=[1, 1, 1], context_dim=32)    # fmt: skip
TRANSFORMER = dict(codebook_size=64, seq_len=64, embed_dim=32, depth=2, num_heads=2, mlp_dim=64, pixel_dim=64)


@pytest.fixture(scope="module")
def model() -> MaskGIT:
    torch.manual_seed(0)
    return MaskGIT(VQGAN, TRANSFORMER).eval()


def task(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    hole = np.zeros((32, 32), bool)
    top, left = rng.integers(2, 16, 2)
    hole[top : top + 10, left : left + 12] = True
    return rng.integers(0, 256, (32, 32, 3), dtype=np.uint8), hole


def test_two_threads_at_once_get_what_one_gets(model):
    def complete(seed: int) -> np.ndarray:
        return model.inpaint(*task(seed), seed=seed, precision=("fp32", "bf16")[seed % 2], total_iter=4)

    alone = [complete(seed) for seed in range(8)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(complete, range(8)))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_the_seed_decides_and_global_random_numbers_do_not(model):
    image, hole = task(0)
    torch.manual_seed(1)
    first = model.inpaint(image, hole, seed=3)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert drawn == torch.rand(1)    # and they are left as they were
    assert np.array_equal(model.inpaint(image, hole, seed=3), first)
    assert not np.array_equal(model.inpaint(image, hole, seed=4), first)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_is_refused_with_the_way_to_go(model):
    class Completion(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image, mask):
            return self.model.complete(image, mask, [0], total_iter=2).images

    image, mask = torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[:, :, 4:12, 4:12] = 1
    with pytest.raises(ValueError, match="--onnx"):
        torch.jit.trace(Completion(), (image, mask))
