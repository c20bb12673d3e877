"""Metrics of picture pairs: closed forms, holes, seams, detail."""
import math

import pytest
import torch
import torchvision
from small_sets import random_images, rng, weighted_l1
from torch import Tensor

from evaluation.metrics import (
    HOLE_BINS,
    by_hole_area,
    inside_gradient,
    load_perceptual,
    paired_metrics,
    rim_gradient,
    summarise,
)
from utils import UserError

SIDE = 24


def offset_pairs(offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three pictures whose holes, of 1, 2 and 3 eighths, are off by the same amount, and nothing else is."""
    truth = random_images(3, side=SIDE) // 2
    holes = torch.zeros(3, 1, SIDE, SIDE, dtype=torch.bool)
    for i in range(3):
        holes[i, :, : (i + 1) * SIDE // 8] = True
    return torch.where(holes, truth + offset, truth), truth, holes


def stripe(left: int, right: int, count: int = 1) -> Tensor:
    holes = torch.zeros(count, 1, SIDE, SIDE, dtype=torch.bool)
    holes[..., left:right] = True
    return holes


def test_a_constant_error_in_the_hole():
    columns = paired_metrics(*offset_pairs(10))
    area = torch.tensor([1, 2, 3]).double() / 8
    psnr = 20 * math.log10(255 / 10)
    torch.testing.assert_close(columns["hole_area"], area)
    torch.testing.assert_close(columns["hole_l1"], torch.full((3,), 10 / 255).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(columns["l1"], area * 10 / 255, rtol=1e-5, atol=0)
    torch.testing.assert_close(columns["hole_psnr"], torch.full((3,), psnr).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(columns["psnr"], psnr - 10 * area.log10(), rtol=1e-5, atol=0)
    assert (columns["hole_ssim"] < columns["ssim"]).all() and (columns["ssim"] < 1).all()
    assert columns["known_changed"].sum() == 0


def test_equal_pictures_are_perfect():
    _, truth, holes = offset_pairs(0)
    columns = paired_metrics(truth, truth, holes, weighted_l1)
    for prefix in ("", "hole_"):
        assert (columns[prefix + "psnr"] == math.inf).all() and (columns[prefix + "l1"] == 0).all()
        assert (columns[prefix + "perceptual"] == 0).all()
        torch.testing.assert_close(columns[prefix + "ssim"], torch.ones(3).double())
    summary = summarise(columns)
    assert summary["seam"] == pytest.approx(1) and summary["detail"] == pytest.approx(1)


def test_every_changed_known_pixel_counts_once():
    pred, truth, holes = offset_pairs(10)
    pred[0, 1, -1, 0] ^= 1       # one channel by one level
    pred[2, :, -1, :4] ^= 128    # all channels of four pixels
    columns = paired_metrics(pred, truth, holes)
    assert columns["known_changed"].tolist() == [1, 0, 4]
    assert summarise(columns)["known_changed"] == pytest.approx(5 / (SIDE * SIDE * (7 + 6 + 5) / 8))


def test_pictures_without_a_hole_have_no_part_in_the_hole():
    pred, truth, holes = offset_pairs(10)
    holes[0] = False
    columns = paired_metrics(pred, truth, holes, weighted_l1)
    assert all(columns[f"hole_{key}"].isnan().tolist() == [True, False, False] for key in ("psnr", "l1", "perceptual"))
    assert summarise(columns)["hole_l1"] == pytest.approx(10 / 255, rel=1e-5)
    assert sum(bin["n"] for bin in by_hole_area(columns)) == 2


def test_bins_hold_each_picture_once_and_average_to_the_whole():
    columns = paired_metrics(*offset_pairs(10))
    bins = by_hole_area(columns)
    assert [(bin["from"], bin["to"]) for bin in bins] == [(0.10, 0.15), (0.20, 0.25), (0.30, 0.40)]
    assert [bin["psnr"] for bin in bins] == pytest.approx(columns["psnr"].tolist())
    assert HOLE_BINS[0] == 0 and HOLE_BINS[-1] == 1 and list(HOLE_BINS) == sorted(HOLE_BINS)


def test_rim_and_inside_gradients_equal_their_definition_pixel_by_pixel():
    image, hole = random_images(1, side=12)[0].float() / 255, torch.rand(12, 12, generator=rng(2)) < 0.4
    rim, inside = [], []
    for y, x in torch.cartesian_prod(torch.arange(12), torch.arange(12)).tolist():
        for v, u in ((y + 1, x), (y, x + 1)):
            if v < 12 and u < 12:
                step = (image[:, y, x] - image[:, v, u]).abs().mean().item()
                if hole[y, x] != hole[v, u]:
                    rim.append(step)
                elif hole[y, x]:
                    inside.append(step)
    assert rim_gradient(image[None], hole[None, None]).item() == pytest.approx(sum(rim) / len(rim), rel=1e-5)
    assert inside_gradient(image[None], hole[None, None]).item() == pytest.approx(sum(inside) / len(inside), rel=1e-5)


def test_seam_and_detail_are_ratios_of_mean_gradients():
    """Columns that rise by 8. A stripe lifted by d has steps of 8 + d and |8 - d| across its rim, and 8 inside."""
    ramp, holes = (torch.arange(SIDE) * 8).to(torch.uint8).expand(2, 3, SIDE, SIDE), stripe(4, 8, 2)
    summary = summarise(paired_metrics(torch.where(holes, ramp + 64, ramp), ramp, holes))
    assert summary["seam"] == pytest.approx((72 + 56) / 2 / 8) and summary["detail"] == pytest.approx(1)
    assert summarise(paired_metrics(torch.where(holes, ramp // 2, ramp), ramp, holes))["detail"] == pytest.approx(0.5)
    one = holes & torch.tensor([True, False])[:, None, None, None]    # the picture without a hole doesn't count
    assert summarise(paired_metrics(ramp, ramp, one))["seam"] == 1


def test_a_seam_over_flat_originals_has_no_number():
    flat = torch.full((1, 3, SIDE, SIDE), 7, dtype=torch.uint8)
    assert summarise(paired_metrics(flat.masked_fill(stripe(4, 8), 9), flat, stripe(4, 8)))["seam"] == math.inf
    assert math.isnan(summarise(paired_metrics(flat, flat, stripe(4, 8)))["seam"])


def test_perceptual_distance_sees_the_hole_alone(tmp_path):
    from safetensors.torch import save_file
    torch.manual_seed(0)
    network = torchvision.models.squeezenet1_1(weights=None).features
    save_file({f"features.{key}": value for key, value in network.state_dict().items()}, tmp_path / "s.safetensors")
    pred, truth = random_images(2, side=64), random_images(2, seed=1, side=64)
    pred[:, :, :, 16:] = truth[:, :, :, 16:]    # different at the left edge only
    holes = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    holes[0, ..., :16], holes[1, ..., -1:] = True, True
    columns = paired_metrics(pred, truth, holes, load_perceptual(tmp_path / "s.safetensors"))
    assert columns["hole_perceptual"][0] > columns["perceptual"][0] > 0
    assert columns["hole_perceptual"][1] < columns["perceptual"][1]
    with pytest.raises(UserError, match="not found"):
        load_perceptual(tmp_path / "none.safetensors")
