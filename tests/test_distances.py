"""Distances between sets of features: closed forms, parity with pytorch-fid, saved statistics."""
import math

import numpy as np
import pytest
import torch
from small_sets import mean_colours, rng
from torch import Tensor

from evaluation import distances
from evaluation.distances import Moments, Statistics, frechet_distance, indistinguishable, kernel_distance
from utils import UserError


@pytest.mark.parametrize("count", [5, 50])    # fewer and more pictures than features
def test_equal_covariances_give_the_squared_distance_of_the_means(count):
    a, shift = torch.randn(count, 8, generator=rng()), torch.arange(8.0)
    assert frechet_distance(a, a + shift) == pytest.approx(shift.square().sum().item(), rel=1e-6)
    assert frechet_distance(a, a[torch.randperm(count, generator=rng())]) == pytest.approx(0, abs=1e-9)


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


def test_frechet_distance_refuses_what_has_no_covariance():
    a = torch.randn(10, 4)
    for wrong, words in ((a[:1], "at least 2 pictures"), (a / 0, "not finite"), (torch.randn(10, 5), "networks")):
        with pytest.raises(UserError, match=words):
            frechet_distance(a, wrong)


def test_kernel_distance_of_whole_sets_is_the_unbiased_estimate():
    a, b = torch.randn(20, 4, generator=rng(1)).double(), torch.randn(20, 4, generator=rng(2)).double() + 1
    def kernel(x, y):
        return (x @ y.T / 4 + 1) ** 3
    def off_diagonal_mean(k):
        return (k.sum() - k.trace()) / (20 * 19)
    expected = off_diagonal_mean(kernel(a, a)) + off_diagonal_mean(kernel(b, b)) - 2 * kernel(a, b).mean()
    result = kernel_distance(a, b, subsets=3, subset_size=20)
    assert result["mean"] == pytest.approx(expected.item(), rel=1e-9)
    assert result["std"] == pytest.approx(0, abs=1e-9)    # every subset is the whole set


def test_kernel_distance_is_a_function_of_its_seed_alone():
    a, b = torch.randn(20, 4, generator=rng(1)), torch.randn(30, 4, generator=rng(2))
    before = torch.get_rng_state()
    first = kernel_distance(a, b, subsets=5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert kernel_distance(a, b, subsets=5, seed=1) == first and first["subset_size"] == 10 and first["std"] > 0
    assert kernel_distance(a, b, subsets=5, seed=2)["mean"] != first["mean"]
    with pytest.raises(UserError, match="subset size"):
        kernel_distance(a, b, subset_size=21)


# ---- P-IDS and U-IDS ----


def test_sets_that_can_be_told_apart_have_no_indistinguishable_pictures():
    pytest.importorskip("sklearn")
    a = torch.randn(200, 6, generator=rng(1))
    assert indistinguishable(a, a + 100, paired=True) == (0, 0)
    u_ids, p_ids = indistinguishable(a, a - 100)
    assert u_ids == 0 and math.isnan(p_ids)


def test_sets_of_one_kind_can_not_be_told_apart_even_with_more_features_than_pictures():
    """An SVM separates its own training set here, so a score on that would be 0."""
    pytest.importorskip("sklearn")
    a, b = torch.randn(150, 300, generator=rng(1)), torch.randn(150, 300, generator=rng(2))
    u_ids, p_ids = indistinguishable(a, b, paired=True)
    assert 0.4 < u_ids < 0.6 and 0.4 < p_ids < 0.6
    assert indistinguishable(a, b, paired=True) == (u_ids, p_ids) != indistinguishable(a, b, paired=True, seed=1)
    assert indistinguishable(a, a, paired=True)[1] == 0.5    # ties count half
    assert all(map(math.isnan, indistinguishable(a[:9], b)))


def test_error_rates_count_alike_for_sets_of_different_size():
    """One feature, 0 or 1: real pictures are 1, a quarter of the others too."""
    pytest.importorskip("sklearn")
    real, fake = torch.ones(400, 1), torch.arange(40).remainder(4).eq(0).float()[:, None]
    assert indistinguishable(real, fake)[0] == pytest.approx((0 + 0.25) / 2)


# ---- saved statistics ----


class Network:
    name, sha256 = "Colour", "0" * 64


def test_saved_statistics_give_the_same_numbers(tmp_path, monkeypatch):
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


def test_foreign_statistics_are_refused(tmp_path):
    Statistics.of(Network, torch.rand(5, 3)).save(tmp_path / "s.npz")
    with pytest.raises(UserError, match="mean nothing"):
        Statistics.load(tmp_path / "s.npz", type("Other", (), {"name": "Colour", "sha256": "1" * 64}))
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(3), sigma=np.eye(3))    # pytorch-fid's own
    (tmp_path / "broken.npz").write_text("not an archive")
    for name, words in (("foreign", "lacks count"), ("broken", "cannot be read"), ("none", "no such file")):
        with pytest.raises(UserError, match=words):
            Statistics.load(tmp_path / f"{name}.npz", Network)
