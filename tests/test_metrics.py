"""Metrics of picture pairs and distances between sets: closed forms, parity with pytorch-fid, saved statistics."""
import math

import numpy as np
import pytest
import torch
import torchvision
from small_sets import mean_colours, random_images, rng, weighted_l1
from torch import Tensor

from evaluation import distances
from evaluation.distances import Moments, Statistics, frechet_distance, indistinguishable, kernel_distance
from evaluation.metrics import (
    HOLE_BINS,
    by_hole_area,
    load_perceptual,
    mean_step,
    paired_metrics,
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


def test_a_constant_error_in_the_hole_changed_known_pixels_and_equal_pictures():
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
    pred, truth, holes = offset_pairs(10)
    pred[0, 1, -1, 0] ^= 1       # one channel by one level
    pred[2, :, -1, :4] ^= 128    # all channels of four pixels
    columns = paired_metrics(pred, truth, holes)
    assert columns["known_changed"].tolist() == [1, 0, 4]
    assert summarise(columns)["known_changed"] == pytest.approx(5 / (SIDE * SIDE * (7 + 6 + 5) / 8))
    _, truth, holes = offset_pairs(0)
    columns = paired_metrics(truth, truth, holes, weighted_l1)
    for prefix in ("", "hole_"):
        assert (columns[prefix + "psnr"] == math.inf).all() and (columns[prefix + "l1"] == 0).all()
        assert (columns[prefix + "perceptual"] == 0).all()
        torch.testing.assert_close(columns[prefix + "ssim"], torch.ones(3).double())
    summary = summarise(columns)
    assert summary["seam"] == pytest.approx(1) and summary["detail"] == pytest.approx(1)


def test_bins_hold_each_picture_with_a_hole_once_and_average_to_the_whole():
    columns = paired_metrics(*offset_pairs(10))
    bins = by_hole_area(columns)
    assert [(bin["from"], bin["to"]) for bin in bins] == [(0.10, 0.15), (0.20, 0.25), (0.30, 0.40)]
    assert [bin["psnr"] for bin in bins] == pytest.approx(columns["psnr"].tolist())
    assert HOLE_BINS[0] == 0 and HOLE_BINS[-1] == 1 and list(HOLE_BINS) == sorted(HOLE_BINS)
    pred, truth, holes = offset_pairs(10)
    holes[0] = False
    columns = paired_metrics(pred, truth, holes, weighted_l1)
    assert all(columns[f"hole_{key}"].isnan().tolist() == [True, False, False] for key in ("psnr", "l1", "perceptual"))
    assert summarise(columns)["hole_l1"] == pytest.approx(10 / 255, rel=1e-5)
    assert sum(bin["n"] for bin in by_hole_area(columns)) == 2


def test_seam_and_detail_are_ratios_of_mean_gradients_that_equal_their_definition_pixel_by_pixel():
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
    assert mean_step(image[None], hole[None, None], torch.ne).item() == pytest.approx(sum(rim) / len(rim), rel=1e-5)
    steps = mean_step(image[None], hole[None, None], torch.logical_and)
    assert steps.item() == pytest.approx(sum(inside) / len(inside), rel=1e-5)
    # Columns that rise by 8. A stripe lifted by d has steps of 8 + d and |8 - d| across its rim, and 8 inside.
    ramp, holes = (torch.arange(SIDE) * 8).to(torch.uint8).expand(2, 3, SIDE, SIDE), stripe(4, 8, 2)
    summary = summarise(paired_metrics(torch.where(holes, ramp + 64, ramp), ramp, holes))
    assert summary["seam"] == pytest.approx((72 + 56) / 2 / 8) and summary["detail"] == pytest.approx(1)
    assert summarise(paired_metrics(torch.where(holes, ramp // 2, ramp), ramp, holes))["detail"] == pytest.approx(0.5)
    one = holes & torch.tensor([True, False])[:, None, None, None]    # the picture without a hole doesn't count
    assert summarise(paired_metrics(ramp, ramp, one))["seam"] == 1
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


# ---- distances between sets of features ----


def by_definition(a: Tensor, b: Tensor) -> float:
    """|m - n|^2 + tr(C) + tr(D) - 2 tr((C D)^(1/2)), the root's trace from the eigenvalues of C D."""
    a, b = a.double(), b.double()
    c, d = torch.cov(a.T), torch.cov(b.T)
    root_trace = torch.linalg.eigvals(c @ d).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + c.trace() + d.trace() - 2 * root_trace).item()


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
@pytest.mark.parametrize("counts", [(300, 200), (40, 30), (20, 200)])
def test_frechet_distance_equals_its_definition_and_pytorch_fids(counts):
    D = 48
    mix = torch.randn(D, D, generator=rng(1)) / D**0.5
    a = torch.randn(counts[0], D, generator=rng(2)) @ mix + 0.3
    b = torch.randn(counts[1], D, generator=rng(3)).relu() @ mix
    ours = frechet_distance(a, b)
    assert ours == pytest.approx(by_definition(a, b), rel=1e-3)
    assert frechet_distance(b, a) == pytest.approx(ours, rel=1e-9)
    moments = Moments.of_features(a)
    torch.testing.assert_close(moments.covariance, torch.cov(a.double().T))
    from_covariance = Moments.of_covariance(moments.count, moments.mean, moments.covariance)
    assert frechet_distance(from_covariance, b) == pytest.approx(ours, rel=1e-5)
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    statistics = [s for x in (a, b) for s in (np.mean(x.numpy(), 0), np.cov(x.double().numpy(), rowvar=False))]
    try:
        theirs = fid_score.calculate_frechet_distance(*statistics)
    except (TypeError, ValueError):    # scipy's sqrtm changed its signature and what it returns
        return
    assert ours == pytest.approx(float(theirs), rel=1e-3)


def test_kernel_distance_of_whole_sets_is_the_unbiased_estimate_and_senseless_sets_are_refused():
    a, b = torch.randn(20, 4, generator=rng(1)).double(), torch.randn(20, 4, generator=rng(2)).double() + 1
    def kernel(x, y):
        return (x @ y.T / 4 + 1) ** 3
    def off_diagonal_mean(k):
        return (k.sum() - k.trace()) / (20 * 19)
    expected = off_diagonal_mean(kernel(a, a)) + off_diagonal_mean(kernel(b, b)) - 2 * kernel(a, b).mean()
    mean, std = kernel_distance(a, b, subsets=3, subset_size=20)
    assert mean == pytest.approx(expected.item(), rel=1e-9)
    assert std == pytest.approx(0, abs=1e-9)    # every subset is the whole set
    assert len({kernel_distance(a, b, subsets=5, seed=seed)[0] for seed in (1, 1, 2)}) == 2
    a = torch.randn(10, 4)
    for wrong, words in ((a[:1], "at least 2 pictures"), (a / 0, "not finite"), (torch.randn(10, 5), "networks")):
        with pytest.raises(UserError, match=words):
            frechet_distance(a, wrong)


# ---- P-IDS and U-IDS ----


def test_only_sets_of_one_kind_have_indistinguishable_pictures():
    pytest.importorskip("sklearn")
    a = torch.randn(200, 6, generator=rng(1))
    assert indistinguishable(a, a + 100, paired=True) == (0, 0)
    u_ids, p_ids = indistinguishable(a, a - 100)
    assert u_ids == 0 and math.isnan(p_ids)
    # One feature, 0 or 1: real pictures are 1, a quarter of the others too. Both sets count alike.
    real, fake = torch.ones(400, 1), torch.arange(40).remainder(4).eq(0).float()[:, None]
    assert indistinguishable(real, fake)[0] == pytest.approx((0 + 0.25) / 2)
    # An SVM separates its own training set here, so a score on that would be 0.
    a, b = torch.randn(150, 300, generator=rng(1)), torch.randn(150, 300, generator=rng(2))
    u_ids, p_ids = indistinguishable(a, b, paired=True)
    assert 0.4 < u_ids < 0.6 and 0.4 < p_ids < 0.6
    assert indistinguishable(a, b, paired=True) == (u_ids, p_ids) != indistinguishable(a, b, paired=True, seed=1)
    assert indistinguishable(a, a, paired=True)[1] == 0.5    # ties count half
    assert all(map(math.isnan, indistinguishable(a[:9], b)))


# ---- saved statistics ----


class Network:
    name, sha256 = "Colour", "0" * 64


def test_saved_statistics_give_the_same_numbers_and_foreign_ones_are_refused(tmp_path, monkeypatch):
    features = mean_colours(torch.rand(9, 3, 8, 8, generator=rng())).double().float().double()
    Statistics.of(Network, features).save(tmp_path / "s.npz")
    loaded = Statistics.load(tmp_path / "s.npz", Network)
    assert torch.equal(loaded.features, features)
    assert frechet_distance(loaded.moments, features) == pytest.approx(0, abs=1e-12)
    monkeypatch.setattr(distances, "MAX_SAVED_NUMBERS", 5)    # too large to keep
    Statistics.of(Network, features).save(tmp_path / "m.npz")
    moments = Statistics.load(tmp_path / "m.npz", Network)
    assert moments.features is None and moments.moments.count == 9
    assert frechet_distance(moments.moments, features) == pytest.approx(0, abs=1e-9)
    Statistics.of(Network, torch.rand(5, 3)).save(tmp_path / "s.npz")
    with pytest.raises(UserError, match="mean nothing"):
        Statistics.load(tmp_path / "s.npz", type("Other", (), {"name": "Colour", "sha256": "1" * 64}))
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(3), sigma=np.eye(3))    # pytorch-fid's own
    (tmp_path / "broken.npz").write_text("not an archive")
    for name, words in (("foreign", "lacks count"), ("broken", "cannot be read"), ("none", "no such file")):
        with pytest.raises(UserError, match=words):
            Statistics.load(tmp_path / f"{name}.npz", Network)
