"""models/discriminator.py: which scores count, and the losses' closed forms."""

import pytest
import torch
from torch import nn

from models.discriminator import FeatureDiscriminator, PatchDiscriminator, feature_matching, hinge_loss, mean_score


def discriminator(**options) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(**(dict(channels=8) | options))


def noise(size: int = 64) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("strided", [1, 2, 3])
def test_scores_and_features(strided):
    scores, features = discriminator(strided=strided)(noise())
    assert scores.shape == (1, 1, 64 // 2**strided, 64 // 2**strided)
    assert [f.shape[1] for f in features] == [8 * 2**i for i in range(strided + 1)]
    assert [f.shape[2] for f in features] == [64 // 2 ** min(i, strided) for i in range(1, strided + 2)]
    assert not scores.allclose(scores.mean())


def maps() -> list[torch.Tensor]:
    """Feature maps of two pictures, each position of unit length."""
    generator = torch.Generator().manual_seed(2)
    sizes = ((16, 9), (32, 5))
    return [nn.functional.normalize(torch.randn(2, c, s, s, generator=generator), dim=1) for c, s in sizes]


def feature_discriminator() -> FeatureDiscriminator:
    torch.manual_seed(0)
    return FeatureDiscriminator([16, 32], channels=8)


def test_a_judge_on_every_feature_map_scores_each_picture_alone():
    model, features = feature_discriminator(), maps()
    scores = model(features)
    assert [tuple(x.shape) for x in scores] == [(2, 1, 9, 9), (2, 1, 5, 5)]
    alone = model([x[1:] for x in features])
    assert all(torch.allclose(x[1:], y, atol=1e-6) for x, y in zip(scores, alone, strict=True))


def test_looking_changes_no_norm_and_renewing_finds_it():
    model, features = feature_discriminator(), maps()
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


def test_a_hole_everywhere_is_the_mean_over_the_picture():
    scores = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert mean_score(scores, torch.ones(2, 1, 64, 64)).allclose(scores.mean()) and mean_score(scores) == scores.mean()
    assert mean_score(scores, torch.zeros(2, 1, 64, 64)) == 0


def test_feature_matching_closed_form():
    a = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 2, 2)]
    b = [torch.full((1, 2, 4, 4), 3.0), torch.full((1, 4, 2, 2), -1.0)]
    assert feature_matching(a, b) == 2 and feature_matching(b, b) == 0
    with pytest.raises(ValueError, match="shorter"):
        feature_matching(a, b[:1])


def test_feature_matching_pulls_the_fake_side_only():
    model = discriminator()
    real, fake = noise().requires_grad_(), (noise() * 0.5).requires_grad_()
    loss = feature_matching(model(fake)[1], model(real)[1])
    assert loss > 0
    on_fake, on_real = torch.autograd.grad(loss, (fake, real), allow_unused=True)
    assert on_fake.abs().sum() > 0 and on_real is None
