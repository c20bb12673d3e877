"""Discriminators and their losses: one sees patches of pixels, one the features of an ImageNet network.

Isola et al. 2017, section 3.2.2 (https://arxiv.org/abs/1611.07004); Esser et al. 2021, section 3.1; Sauer et al. 2021,
Projected GANs (https://arxiv.org/abs/2111.01007).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .norms import GroupNorm
from .perceptual import weighted_mean


class PatchDiscriminator(nn.Module):
    """PatchGAN: scores overlapping patches as real or made up.

    Args:
        channels: width after the first layer; each later layer doubles it.
        strided: number of 4x4 stride-2 layers, at least 1. A score sees 26 x 26 pixels with two of them, 54 x 54 with three,
            nearly a whole picture of 64. (Through GroupNorm it also depends on the contrast of the whole picture.)
    """

    def __init__(self, channels: int = 64, strided: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2))]
        for i in range(1, strided + 1):
            stride, width = (2, 4) if i < strided else (1, 3)    # the last one keeps the resolution
            layers.append(
                nn.Sequential(
                    nn.Conv2d(channels, 2 * channels, width, stride=stride, padding=1),
                    GroupNorm(2 * channels),
                    nn.LeakyReLU(0.2),
                )
            )
            channels *= 2
        self.layers = nn.ModuleList(layers)
        self.judge = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """image: (B, 3, H, W).  Returns scores (B, 1, h, w), high = real, and the features of every layer."""
        features = []
        for layer in self.layers:
            image = layer(image)
            features.append(image)
        return self.judge(image), features


class FeatureDiscriminator(nn.Module):
    """Projected GAN (Sauer et al. 2021, section 3): a few layers on each feature map of a frozen ImageNet network.

    So few weights overfit a small training set late. Their random mixing of the maps is left out. Spectral norms (Miyato et
    al. 2018) bound the slope, and with it the discriminator's share of the loss.

    Args:
        widths: channels of the feature maps.
        channels: hidden width.
    """

    def __init__(self, widths: Sequence[int], channels: int = 64) -> None:
        super().__init__()
        self.judges = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(width, channels, 1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(channels, channels, 3, padding=1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(channels, 1, 1)),
            )
            for width in widths
        )
        self.eval()

    @torch.no_grad()
    def renew_norms(self) -> None:
        """One round of the power iteration behind each spectral norm; to be called once a step.

        In training mode PyTorch makes a round each time a weight is used, so that the result would depend on `accum_grad`.
        """
        self.train()
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight    # noqa: B018
        self.eval()

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Feature maps (B, C, h, w), each position of unit length.  Returns scores (B, 1, h, w) for each, high = real."""
        return [judge(x * x.shape[1] ** 0.5) for judge, x in zip(self.judges, features, strict=True)]


def hinge_loss(real: Tensor, fake: Tensor, hole: Tensor | None = None) -> Tensor:
    """The discriminator's loss: real scores above 1, fake scores below -1 (Lim & Ye 2017). `hole` as in `mean_score`."""
    return 0.5 * (mean_score(F.relu(1 - real), hole) + mean_score(F.relu(1 + fake), hole))


def mean_score(scores: Tensor, hole: Tensor | None = None) -> Tensor:
    """Mean of the scores (B, 1, h, w), or each picture's mean over its hole.

    Outside the hole a completed picture is real, so patches there teach nothing (Zeng et al. 2021, AOT-GAN, section 3.3).

    Args:
        hole: (B, 1, H, W), 1 = hole; the weight of a score is the share of its cell of the picture that lies in the hole.
    """
    if hole is None:
        return scores.mean()
    share = F.interpolate(hole.to(scores.dtype), size=scores.shape[-2:], mode="area")            # (B, 1, h, w)
    return weighted_mean(scores, share).mean()


def feature_matching(fake: list[Tensor], real: list[Tensor]) -> Tensor:
    """Mean absolute difference of the discriminator's features (Wang et al. 2018, pix2pixHD, equation 4)."""
    return torch.stack([F.l1_loss(f, r.detach()) for f, r in zip(fake, real, strict=True)]).mean()
