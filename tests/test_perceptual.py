"""models/perceptual.py and models/discriminator.py: features as the libraries give them, closed forms, bad files."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn

from models.discriminator import FeatureDiscriminator, PatchDiscriminator, feature_matching, hinge_loss, mean_score
from models.perceptual import (
    TAPS,
    TYPICAL_STEP,
    PerceptualFeatures,
    detail_gap,
    laplacian_distance,
    perceptual_distance,
    seam_gap,
)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torchvision.models.squeezenet1_1(weights=None).eval()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "squeezenet1_1.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def features(weights) -> PerceptualFeatures:
    return PerceptualFeatures("squeezenet1_1", weights)


def pictures(count: int = 2, size: int = 32, seed: int = 1) -> torch.Tensor:
    return 2 * torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) - 1


# ---- features ----

@torch.no_grad()
def test_features_are_torchvisions_scaled_to_unit_length_at_every_scale(features, network, weights):
    image, taps = pictures(), TAPS["squeezenet1_1"]
    x = torchvision.transforms.functional.normalize((image + 1) / 2, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    out = features(image)
    assert [f.shape[1] for f in out] == [64, 128, 256, 384, 384, 512, 512]    # LPIPS compares the same seven
    for tap, feature in zip(taps, out, strict=True):
        expected = network.features[: tap + 1](x.clone())
        torch.testing.assert_close(feature, expected / expected.norm(dim=1, keepdim=True).clamp_min(1e-6))
    image, both = pictures(), PerceptualFeatures("squeezenet1_1", weights, [1, 2])
    expected = features(image) + features(F.interpolate(image, scale_factor=2, mode="bilinear"))
    torch.testing.assert_close(both(image), expected, rtol=1e-4, atol=1e-5)


def test_frozen_yet_the_picture_gets_a_gradient(features):
    assert not any(p.requires_grad for p in features.parameters()) and not features.layers.training
    image = pictures().requires_grad_()
    kept = image.detach().clone()
    perceptual_distance(features(image), features(pictures(seed=2))).sum().backward()
    assert image.grad.isfinite().all() and image.grad.abs().sum() > 0
    assert torch.equal(image, kept)    # ReLUs that work in place leave it alone


@pytest.mark.parametrize("prefix, suffix", [("", ".safetensors"), ("features.", ".safetensors"), ("", ".pth")])
def test_every_naming_reads_the_same(features, network, tmp_path, prefix, suffix):
    path = tmp_path / f"file{suffix}"
    state = {prefix + name: value for name, value in network.features.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    other = PerceptualFeatures("squeezenet1_1", str(path))
    for a, b in zip(features(pictures()), other(pictures()), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def efficientnet() -> torch.nn.Module:
    """Random weights, and batch norms that have seen something: mean, spread, scale and shift differ from 0 and 1."""
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0").eval()
    for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        for values, low, high in ((norm.running_mean, -0.3, 0.3), (norm.running_var, 0.5, 2), (norm.weight, 0.5, 1.5),
                                  (norm.bias, 0.2, 0.8)):    # fmt: skip
            torch.nn.init.uniform_(values, low, high)
    return net


@torch.no_grad()
@pytest.mark.parametrize("left_out", ["", "num_batches_tracked", "classifier"])
def test_efficientnet_taps_are_the_ends_of_its_last_four_stages(efficientnet, tmp_path, left_out):
    """timm's own hooks give two of them, the last ones of their resolutions; its pictures lie in [-1, 1]."""
    state = {name: x for name, x in efficientnet.state_dict().items() if not left_out or left_out not in name}
    save_file(state, tmp_path / "net.safetensors")
    image = pictures(1, 64)
    out = PerceptualFeatures("tf_efficientnet_lite0", tmp_path / "net.safetensors")(image)
    assert [f.shape[1] for f in out] == [80, 112, 192, 320]
    _, stages = efficientnet.forward_intermediates(image)
    for stage, feature in zip(stages[-2:], out[1::2], strict=True):
        torch.testing.assert_close(feature, stage / stage.norm(dim=1, keepdim=True).clamp_min(1e-6), rtol=1e-4, atol=1e-5)


class Malicious:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_files_that_do_not_fit_are_refused_in_a_sentence(network, tmp_path):
    def refused(name, word):
        with pytest.raises(ValueError, match=word) as caught:
            PerceptualFeatures("squeezenet1_1", tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)

    refused("nowhere.pth", "not found")
    state = network.features.state_dict()
    name = next(iter(state))
    one_missing, nested = {k: v for k, v in state.items() if k != name}, {"model": dict(state)}
    for wrong in (one_missing, state | {"99.weight": torch.zeros(1)}, state | {name: state[name][:1]}, nested):
        torch.save(wrong, tmp_path / "wrong.pth")
        refused("wrong.pth", "layers")
    torch.save(Malicious(tmp_path / "victim"), tmp_path / "code.pth")
    refused("code.pth", "can't be read")
    assert not (tmp_path / "victim").exists()                # no code is run
    for suffix in (".pth", ".safetensors"):
        (tmp_path / f"text{suffix}").write_text("no weights")
        refused(f"text{suffix}", "can't be read")


# ---- perceptual distance ----


def test_distance_closed_form_with_and_without_weights():
    """Orthogonal unit vectors are sqrt(2) apart: 2 at each position where they differ, 1 on average with half of them."""
    one, two = torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2)
    one[:, 0], two[:, 0] = 1, 1
    two[:, :, 0] = torch.tensor([0, 1, 0, 0]).view(1, 4, 1)       # they differ in the upper row
    upper, lower, quarter = torch.zeros(3, 2, 1, 8, 8)
    upper[:, :, :4], lower[:, :, 4:] = 1, 1
    quarter[:, :, :1] = 1                                         # a quarter of the upper row's area
    assert torch.equal(perceptual_distance([one], [two], upper), torch.full((2,), 2.0))
    assert torch.equal(perceptual_distance([one], [two], lower), torch.zeros(2))
    assert torch.equal(perceptual_distance([one], [two], torch.ones(2, 1, 8, 8)), torch.ones(2))
    # Area averaging: quarter + lower weighs the rows 1/4 : 1.
    torch.testing.assert_close(perceptual_distance([one], [two], quarter + lower), torch.full((2,), 2 * 0.25 / 1.25))
    each = torch.cat([upper[:1], lower[:1]])                      # a hole of its own for each picture
    assert perceptual_distance([one], [two], each.bool()).tolist() == [2, 0]
    assert torch.equal(perceptual_distance([one], [two], 0 * upper), torch.zeros(2))    # nothing to look at
    assert perceptual_distance([one], [two]).tolist() == [1, 1]
    assert perceptual_distance([one, one], [two, one]).tolist() == [0.5, 0.5]    # averaged over depths
    with pytest.raises(ValueError, match="shorter"):
        perceptual_distance([one, one], [two])


# ---- Laplacian pyramid ----

def checkerboard(size: int, cell: int) -> torch.Tensor:
    cells = torch.arange(size) // cell
    return (1 - 2 * ((cells + cells.unsqueeze(1)) % 2)).float().expand(2, 3, size, size)


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_constant_difference_and_checkerboard_are_left_to_one_level(levels):
    a = pictures(2, 16)
    torch.testing.assert_close(laplacian_distance(a, a + 0.5, levels), torch.tensor(0.5 / 2**levels), rtol=1e-4, atol=1e-6)
    board = 0.3 * checkerboard(16, 1)
    if levels:    # left to the finest level
        torch.testing.assert_close(laplacian_distance(board, 0 * board, levels), torch.tensor(0.3))


def frame(size: int, side: int) -> torch.Tensor:
    """A square hole of `side` in the middle: (1, 1, size, size)."""
    hole, first = torch.zeros(1, 1, size, size), (size - side) // 2
    hole[..., first : first + side, first : first + side] = 1
    return hole


def test_the_seam_gap_compares_mean_steps_across_the_rim_alone():
    hole, flat = frame(8, 4), torch.zeros(1, 3, 8, 8)
    image, output = flat + 0.4 * hole, flat + 0.6 * hole        # 16 steps of 0.4, and of 0.6
    assert seam_gap(output, image, hole).item() == pytest.approx((0.2 / TYPICAL_STEP) ** 2, rel=1e-5)
    assert seam_gap(-image, image, hole).item() == 0            # as steep, elsewhere
    half = image.clone()
    half[..., 2:6, 2:4] = 0.2                                   # half of the steps 0.2 lower ...
    half[..., 2:6, 4:6] = 0.6                                   # ... and half of them 0.2 higher
    assert seam_gap(half, image, hole).item() == pytest.approx(0.0, abs=1e-9)
    image, output = flat, flat.clone()
    output[..., 3:5, 3:5] = 1.0            # inside, not touching the rim
    output[..., 0, 0] = 1.0                # outside
    assert seam_gap(output, image, hole).item() == 0
    output[..., 2, 3] = 1.0                # one of 16 steps
    assert seam_gap(output, image, hole).item() == pytest.approx((1 / 16 / TYPICAL_STEP) ** 2, rel=1e-5)


def test_the_detail_gap_looks_inside_the_hole_alone():
    hole, image = frame(8, 4), torch.zeros(1, 3, 8, 8)
    output = image + 0.5 * hole            # 16 steep steps on the rim, none inside
    output[..., 0, 0] = 1.0                # outside
    assert detail_gap(output, image, hole).item() == 0
    output[..., 3, 3] = 1.0                # inside: 4 of 24 steps, each of 0.5
    assert detail_gap(output, image, hole).item() == pytest.approx((4 * 0.5 / 24 / TYPICAL_STEP) ** 2, rel=1e-5)
    holes = torch.zeros(2, 1, 6, 6)
    holes[0, 0, ::2, ::2] = 1
    output = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gap = detail_gap(output, torch.zeros(2, 3, 6, 6), holes)
    gap.sum().backward()
    assert gap.tolist() == [0, 0] and output.grad.abs().max() == 0


# ---- discriminators ----


def discriminator(**options) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(**(dict(channels=8) | options))


def noise(size: int = 64) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


def maps() -> list[torch.Tensor]:
    """Feature maps of two pictures, each position of unit length."""
    generator = torch.Generator().manual_seed(2)
    sizes = ((16, 9), (32, 5))
    return [nn.functional.normalize(torch.randn(2, c, s, s, generator=generator), dim=1) for c, s in sizes]


def feature_discriminator() -> FeatureDiscriminator:
    torch.manual_seed(0)
    return FeatureDiscriminator([16, 32], channels=8)


def test_a_judge_on_every_feature_map_scores_each_picture_alone_and_changes_no_norm():
    model, features = feature_discriminator(), maps()
    scores = model(features)
    assert [tuple(x.shape) for x in scores] == [(2, 1, 9, 9), (2, 1, 5, 5)]
    alone = model([x[1:] for x in features])
    assert all(torch.allclose(x[1:], y, atol=1e-6) for x, y in zip(scores, alone, strict=True))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model(features)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    for _ in range(300):
        model.renew_norms()
    assert not model.training
    for layer in (x for x in model.modules() if isinstance(x, nn.Conv2d)):
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("real, fake, expected", [
    ([1.0, 2.0], [-1.0, -9.0], 0.0), ([0.0], [0.0], 1.0), ([-1.0], [1.0], 2.0), ([0.5, 2.0], [-2.0, 0.0], 0.375),
    ([1.0], [1.0], 1.0), ([-2.0], [-2.0], 1.5),
])
def test_hinge_loss(real, fake, expected):
    assert hinge_loss(torch.tensor(real), torch.tensor(fake)) == expected


def test_scores_outside_the_hole_do_not_count():
    hole = torch.zeros(2, 1, 16, 16)
    hole[0, :, 4:8, 4:8] = 1                    # one score of 4 x 4
    hole[1, :, :8, :6] = 1                      # two whole ones and two halves
    scores = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    own = scores[1, 0]
    second = (own[0, 0] + own[1, 0] + own[0, 1] / 2 + own[1, 1] / 2) / 3
    assert mean_score(scores, hole).allclose((scores[0, 0, 1, 1] + second) / 2)
    other = torch.where(hole[:, :, ::4, ::4].bool(), scores, 99.0)
    assert mean_score(other, hole) == mean_score(scores, hole)
    assert hinge_loss(other, other, hole) == hinge_loss(scores, scores, hole) != hinge_loss(scores, scores)
    assert mean_score(scores, torch.ones(2, 1, 64, 64)).allclose(scores.mean()) and mean_score(scores) == scores.mean()
    assert mean_score(scores, torch.zeros(2, 1, 64, 64)) == 0


def test_feature_matching_closed_form_pulls_the_fake_side_only():
    a = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 2, 2)]
    b = [torch.full((1, 2, 4, 4), 3.0), torch.full((1, 4, 2, 2), -1.0)]
    assert feature_matching(a, b) == 2 and feature_matching(b, b) == 0
    with pytest.raises(ValueError, match="shorter"):
        feature_matching(a, b[:1])
    model = discriminator()
    real, fake = noise().requires_grad_(), (noise() * 0.5).requires_grad_()
    loss = feature_matching(model(fake)[1], model(real)[1])
    assert loss > 0
    on_fake, on_real = torch.autograd.grad(loss, (fake, real), allow_unused=True)
    assert on_fake.abs().sum() > 0 and on_real is None
