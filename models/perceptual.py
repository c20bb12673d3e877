"""Perceptual distance on an ImageNet network's features (Johnson et al. 2016; Zhang et al. 2018, LPIPS, section 3)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# Layers whose outputs are compared. SqueezeNet and VGG: those of LPIPS. EfficientNet (Tan & Le 2019): its last four stages,
# which tell better completions from worse.
TAPS = {
    "squeezenet1_1": (1, 4, 7, 9, 10, 11, 12),
    "vgg16": (3, 8, 15, 22, 29),
    "tf_efficientnet_lite0": (5, 6, 7, 8),
}
TIMM = {"tf_efficientnet_lite0"}    # built by timm; torchvision builds the others

Layers = tuple[nn.Sequential, Sequence[float], Sequence[float]]    # and mean and standard deviation of their input's colours

TYPICAL_STEP = 0.11    # mean difference of two neighbouring pixels of a cat face, in [-1, 1]


class PerceptualFeatures(nn.Module):
    """Frozen ImageNet features of an image at several depths.

    Args:
        network: 'squeezenet1_1', 'vgg16' or 'tf_efficientnet_lite0' (which takes timm).
        weights: a safetensors or .pth file with the network's `features` in torchvision's names ('0.weight' or
            'features.0.weight'), or the network in timm's; None lets torchvision or timm download its own.
        scales: factors by which the image is enlarged, one pass each. The networks were trained on 224 pixels, so in
            pictures of 64 the deep layers see only the whole.
    Raises:
        ValueError: unknown network, a file that doesn't fit, or timm is missing.
        OSError: no file given, and the download failed.
    """

    def __init__(
        self, network: str = "squeezenet1_1", weights: str | Path | None = None, scales: Sequence[int] = (1,)
    ) -> None:
        super().__init__()
        if network not in TAPS:
            raise ValueError(f"unknown perceptual network {network!r}; expected one of {', '.join(TAPS)}")
        layers, mean, std = (_timm_layers if network in TIMM else _torchvision_layers)(network, weights)
        self.taps, self.scales = TAPS[network], tuple(scales)
        self.layout: torch.memory_format | None = None    # of what the layers get; None: as it comes
        self.layers = layers[: self.taps[-1] + 1].eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def place(self, device: torch.device) -> "PerceptualFeatures":
        """Move to a device, in its fastest layout: channels last, except for depthwise convolutions on CUDA
        (EfficientNet-Lite0, forward and backward on an H100: 36 ms instead of 64)."""
        depthwise = any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in self.modules())
        self.layout = torch.contiguous_format if depthwise and device.type == "cuda" else torch.channels_last
        return self.to(device, memory_format=self.layout)

    @property
    def widths(self) -> list[int]:
        """Channels of the feature maps of `forward`."""
        with torch.no_grad():
            maps = self(self.mean.new_zeros(1, 3, 64, 64))
        return [x.shape[1] for x in maps]

    def forward(self, image: Tensor) -> list[Tensor]:
        """image: (B, 3, H, W) in [-1, 1].  Returns feature maps (B, C, h, w), each position scaled to unit length."""
        x = ((image + 1) / 2 - self.mean) / self.std                               # (B, 3, H, W)
        if self.layout is not None:
            x = x.contiguous(memory_format=self.layout)
        out: list[Tensor] = []
        for scale in self.scales:
            y = x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bilinear")
            for i, layer in enumerate(self.layers):
                y = layer(y)
                if i in self.taps:
                    out.append(F.normalize(y.float(), dim=1, eps=1e-6))
        return out


def perceptual_distance(a: list[Tensor], b: list[Tensor], weight: Tensor | None = None) -> Tensor:
    """Squared difference of unit-length features, averaged over positions, summed over channels, averaged over depths.

    LPIPS without its learned channel weights.

    Args:
        a, b: features of two batches.
        weight: (B, 1, H, W) >= 0, where to look, e.g. the hole; None counts every position alike.
    Returns:
        (B,) distances, 0 = alike.
    """
    total = torch.zeros(len(a[0]), device=a[0].device)
    for x, y in zip(a, b, strict=True):
        difference = (x - y).pow(2).sum(dim=1, keepdim=True)                          # (B, 1, h, w)
        if weight is None:
            total = total + difference.mean(dim=(1, 2, 3))
        else:
            part = F.interpolate(weight.float(), size=x.shape[-2:], mode="area")      # (B, 1, h, w)
            total = total + weighted_mean(difference, part)
    return total / len(a)


def weighted_mean(x: Tensor, weight: Tensor) -> Tensor:
    """Each picture's mean of x (B, 1, H, W), weighted by (B, 1, H, W) >= 0: (B,), 0 where all weights are 0."""
    return (x * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3)).clamp_min(1e-8)


def laplacian_distance(a: Tensor, b: Tensor, levels: int = 3) -> Tensor:
    """Mean absolute difference of two Laplacian pyramids (Bojanowski et al. 2018, GLO, section 3.2).

    Args:
        a, b: (B, 3, H, W); H and W divisible by 2**levels.
    Returns:
        Scalar; level j counts 1 / 2**j times, j = 0 being the finest.
    """
    difference, total = a - b, a.new_zeros(())    # the pyramid is linear, so one pyramid of the difference serves
    for level in range(levels):
        coarse = F.avg_pool2d(difference, 2)
        detail = difference - F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + detail.abs().mean() / 2**level
        difference = coarse
    return total + difference.abs().mean() / 2**levels


def seam_gap(output: Tensor, image: Tensor, hole: Tensor) -> Tensor:
    """Compares the mean step between neighbouring pixels across the hole's rim with the original's.

    Distances to the original favour the mean of all likely completions, which is smoother than each of them. This term asks
    for steps of the same mean size, wherever they are (compare the gradient variance of Abrahamyan et al. 2022,
    https://arxiv.org/abs/2202.00997). It is not relative to the picture's own steps: then flat pictures would weigh most.

    Args:
        output, image: (B, 3, H, W) in [-1, 1], alike outside the hole.
        hole: (B, 1, H, W), 1 = hole.
    Returns:
        (B,) squared differences in units of `TYPICAL_STEP`; 0 where there is no rim.
    """
    return _mean_step_gap(output, image, hole, torch.ne)


def detail_gap(output: Tensor, image: Tensor, hole: Tensor) -> Tensor:
    """`seam_gap` for the steps inside the hole. In one mean with the rim, a sharp inside could make up for a blurred rim."""
    return _mean_step_gap(output, image, hole, torch.logical_and)


def _mean_step_gap(output: Tensor, image: Tensor, hole: Tensor, chosen: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    sums = (neighbour_steps(x, hole, chosen) for x in (output, image))
    mine, original = (total / count.clamp_min(1) for total, count in sums)                        # (B,), (B,)
    return ((mine - original) / TYPICAL_STEP).square()


def neighbour_steps(
    images: Tensor, hole: Tensor, chosen: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Sum of the absolute differences of chosen pairs of neighbouring pixels, horizontal and vertical; mean of colours.

    Args:
        images: (B, 3, H, W).
        hole: (B, 1, H, W), 1 or True = hole.
        chosen: says from the hole at a pair's two pixels whether the pair counts: torch.ne is the rim, torch.logical_and the
            inside.
    Returns:
        (B,) sums and (B,) numbers of pairs.
    """
    total = count = torch.zeros(len(images), device=images.device)
    for dim in (2, 3):
        size = hole.shape[dim] - 1
        pairs = chosen(hole.narrow(dim, 0, size), hole.narrow(dim, 1, size))                      # (B, 1, H, W) less a row
        steps = images.diff(dim=dim).abs().mean(dim=1, keepdim=True)                              # like pairs
        total = total + (steps * pairs).sum(dim=(1, 2, 3))
        count = count + pairs.sum(dim=(1, 2, 3))
    return total, count


def _torchvision_layers(network: str, weights: str | Path | None) -> Layers:
    import torchvision

    build = getattr(torchvision.models, network)
    if weights is None:
        features = build(weights="IMAGENET1K_V1").features
    else:
        features = build(weights=None).features
        features.load_state_dict(_read_features(Path(weights), features))
    return features, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _timm_layers(network: str, weights: str | Path | None) -> Layers:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"{network} is built by timm, which is not installed; pip install timm") from error
    net = timm.create_model(network, pretrained=weights is None, num_classes=0)
    if weights is not None:
        net.load_state_dict(_read_features(Path(weights), net))
    config = net.pretrained_cfg
    fold_norms(net.eval())
    return nn.Sequential(net.conv_stem, net.bn1, *net.blocks), config["mean"], config["std"]


def fold_norms(module: nn.Module) -> None:
    """Make every batch norm part of the convolution before it: the same values, forward and backward 1.4 times as fast."""
    convolution = ""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), child))
            setattr(module, name, child.act)    # timm's batch norm holds its activation
        elif isinstance(child, nn.Conv2d):
            convolution = name
        else:
            fold_norms(child)


def _read_features(path: Path, features: nn.Module) -> dict[str, Tensor]:
    """The entries of a weight file that belong to `features`, without torchvision's prefix 'features.'.

    Batch norms' `num_batches_tracked` may be missing.
    """
    if not path.is_file():
        raise ValueError(f"perceptual weights {path} not found; give a file with the network's weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"perceptual weights {path} can't be read ({reason}); expected .safetensors or .pth") from error
    state = {str(name).removeprefix("features."): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    expected = features.state_dict()
    state = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")} | state
    if {name: getattr(value, "shape", None) for name, value in state.items()} != {n: x.shape for n, x in expected.items()}:
        raise ValueError(f"perceptual weights {path} don't have the layers of the network")
    return state
