"""Scores of completed pictures: Fréchet and kernel distance of feature sets, and metrics of picture pairs.

Fréchet distance (FID when the features are Inception's): Heusel et al. 2017, https://arxiv.org/abs/1706.08500
Kernel distance (KID when the features are Inception's): Binkowski et al. 2018, https://arxiv.org/abs/1801.01401
PSNR, SSIM, L1 and the kernel distance are torchmetrics'; the perceptual distance is models/perceptual.py.

Letters: N, M pictures, D features, R <= D rows of a factor, B batch, H W pixels.
"""
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.functional.regression import mean_absolute_error
from torchmetrics.image.kid import KernelInceptionDistance
from tqdm import tqdm

from models.perceptual import PerceptualFeatures, neighbour_steps, perceptual_distance
from utils import UserError

# Edges of the hole-area bins, as shares of the picture: fine where inpainting holes usually are.
HOLE_BINS = (0.0, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50, 0.60, 1.0)
PAIRED = ("psnr", "ssim", "l1", "perceptual")
RIM = ("rim_gradient", "rim_gradient_truth")             # their means' ratio is the seam
INSIDE = ("inside_gradient", "inside_gradient_truth")    # and of these the detail
SSIM_WINDOW = 11   # pixels: torchmetrics' Gaussian of sigma 1.5, the usual setting

# Two batches (B, 3, H, W) in [-1, 1] and where to look (B, 1, H, W) or None -> (B,)
Perceptual = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a set of feature vectors.

    The covariance is kept as a factor F with F^T F = covariance, because the Fréchet distance needs no more.
    """

    count: int      # N, pictures
    mean: Tensor    # (D,) float64
    factor: Tensor  # (R, D) float64

    @classmethod
    def of_features(cls, features: Tensor) -> "Moments":
        """features: (N, D). F is the centred matrix over sqrt(N - 1), or its triangular factor when N > D."""
        count, dims = features.shape
        if count < 2:
            raise UserError(f"a covariance needs at least 2 pictures, got {count}")
        if not torch.isfinite(features).all():
            raise UserError("the features hold values that are not finite: the network or its weights are broken")
        features = features.double().cpu()
        mean = features.mean(dim=0)                            # (D,)
        factor = (features - mean) / math.sqrt(count - 1)      # (N, D)
        if count > dims:
            factor = torch.linalg.qr(factor, mode="r").R       # (D, D), the same F^T F
        return cls(count, mean, factor)

    @classmethod
    def of_covariance(cls, count: int, mean: Tensor, covariance: Tensor) -> "Moments":
        """mean (D,), covariance (D, D): F = diag(sqrt(eigenvalues)) V^T, so that F^T F = covariance."""
        values, vectors = torch.linalg.eigh(covariance.double())    # (D,), (D, D)
        root = values.clamp(min=0).sqrt()                           # rounding leaves some at -1e-16
        return cls(count, mean.double(), root[:, None] * vectors.T)

    @property
    def covariance(self) -> Tensor:
        return self.factor.T @ self.factor                     # (D, D)


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
    """Fréchet distance of two feature sets, (N, D) and (M, D), or of their moments.

    |mean_a - mean_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)), covariances over N - 1 as in pytorch-fid.

    The non-zero eigenvalues of C_a C_b = F_a^T F_a F_b^T F_b are those of (F_a F_b^T)(F_a F_b^T)^T, so the trace of
    the root is the sum of the singular values (the nuclear norm) of F_a F_b^T: exact, no matrix root, and at most
    N x M in size. With F = C^(1/2) it is the symmetric form tr((C_a^(1/2) C_b C_a^(1/2))^(1/2)).
    """
    a, b = (x if isinstance(x, Moments) else Moments.of_features(x) for x in (a, b))
    if a.mean.shape != b.mean.shape:
        raise UserError(f"the sets have {len(a.mean)} and {len(b.mean)} features: they come from different networks")
    root_trace = torch.linalg.svdvals(a.factor @ b.factor.T).sum()
    traces = a.factor.square().sum() + b.factor.square().sum()
    distance = (a.mean - b.mean).square().sum() + traces - 2 * root_trace
    return max(0.0, distance.item())                           # rounding can leave -1e-13 for equal sets


def kernel_distance(
    a: Tensor, b: Tensor, subsets: int = 100, subset_size: int | None = None, seed: int = 0
) -> dict[str, float]:
    """Kernel distance of feature sets (N, D) and (M, D): mean and standard deviation over random subsets.

    Args:
        subset_size: pictures a subset; None takes 1000 as usual, but at most half of the smaller set, since subsets
            as large as the set would all be the same and show no spread.
        seed: the subsets are a function of it alone.
    """
    smaller = min(len(a), len(b))
    subset_size = subset_size or min(1000, smaller // 2)
    if not 2 <= subset_size <= smaller:
        raise UserError(
            f"kernel distance: a subset size of {subset_size} must be at least 2 and at most {smaller}, the smaller set"
        )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)    # "will save all extracted features in buffer": so it should
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(nn.Identity(), subsets, subset_size)
        metric.update(a.double().cpu(), real=True)
        metric.update(b.double().cpu(), real=False)
        mean, std = metric.compute()
    return {"mean": mean.item(), "std": std.item(), "subsets": subsets, "subset_size": subset_size, "seed": seed}


def load_perceptual(weights: str | Path, device: torch.device | str = "cpu") -> Perceptual:
    """The perceptual distance of models/perceptual.py over SqueezeNet's features, as a function of two batches."""
    try:
        network = PerceptualFeatures("squeezenet1_1", weights).to(device)
    except ValueError as error:
        raise UserError(f"--perceptual-weights: {error}") from error

    @torch.no_grad()
    def perceptual(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
        weight = None if weight is None else weight.to(device)
        return perceptual_distance(network(a.to(device)), network(b.to(device)), weight).cpu()    # (B,)

    return perceptual


def paired_metrics(
    pred: Tensor, truth: Tensor, masks: Tensor, perceptual: Perceptual | None = None, batch_size: int = 50
) -> dict[str, Tensor]:
    """Metrics of each completed picture against its original.

    Args:
        pred, truth: uint8 (N, 3, H, W).
        masks: bool (N, 1, H, W), True = hole.
        perceptual: distance of two picture batches in [-1, 1], optionally weighted by place; left out when None.
    Returns:
        columns of N numbers: psnr (dB), ssim, l1 (on a scale of 0 to 1), perceptual; each also as hole_... over the
        hole alone (nan for a picture without a hole); hole_area (share of the picture); known_pixels and
        known_changed (counts, a pixel counts once however many of its channels differ); rim_gradient and inside_gradient
        (see there), of the completed picture, and with _truth behind the name of the original.
    """
    check_pairs(pred, truth, masks)
    columns: dict[str, list[Tensor]] = {}
    starts = tqdm(range(0, len(pred), batch_size), desc="paired metrics", unit="batch", disable=None)
    for i in starts:
        batch = slice(i, i + batch_size)
        for key, values in batch_metrics(pred[batch], truth[batch], masks[batch], perceptual).items():
            columns.setdefault(key, []).append(values.double().cpu())
    return {key: torch.cat(values) for key, values in columns.items()}


def batch_metrics(pred: Tensor, truth: Tensor, masks: Tensor, perceptual: Perceptual | None) -> dict[str, Tensor]:
    """As paired_metrics, for one batch: each column (B,)."""
    a, b = pred.float() / 255, truth.float() / 255                                          # (B, 3, H, W) in [0, 1]
    ssim, ssim_map = structural_similarity_index_measure(
        a, b, data_range=1.0, reduction="none", return_full_image=True
    )                                                                                       # (B,), (B, 3, H, W)
    hole = masks.expand_as(a)                                                               # (B, 3, H, W)
    changed = ((pred != truth).any(dim=1, keepdim=True) & ~masks).sum(dim=(1, 2, 3))        # (B,), exact on uint8
    columns = {
        "psnr": peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3), reduction="none"),
        "ssim": ssim,
        "l1": torch.stack([mean_absolute_error(x, y) for x, y in zip(a, b, strict=True)]),
        "hole_psnr": over_hole(lambda x, y: peak_signal_noise_ratio(x, y, data_range=1.0), a, b, hole),
        "hole_ssim": over_hole(lambda x, _: x.mean(), ssim_map, b, hole),
        "hole_l1": over_hole(mean_absolute_error, a, b, hole),
        "hole_area": masks.float().mean(dim=(1, 2, 3)),
        "known_pixels": (~masks).sum(dim=(1, 2, 3)),
        "known_changed": changed,
        "rim_gradient": rim_gradient(a, masks),
        "rim_gradient_truth": rim_gradient(b, masks),
        "inside_gradient": inside_gradient(a, masks),
        "inside_gradient_truth": inside_gradient(b, masks),
    }
    if perceptual is not None:
        columns["perceptual"] = perceptual(2 * a - 1, 2 * b - 1, None)
        weighted = perceptual(2 * a - 1, 2 * b - 1, masks.float())
        columns["hole_perceptual"] = weighted.masked_fill(~masks.flatten(1).any(dim=1).to(weighted.device), math.nan)
    return columns


def over_hole(metric: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, hole: Tensor) -> Tensor:
    """metric of each picture's hole pixels: a, b (B, 3, H, W), hole bool like them -> (B,), nan without a hole."""
    rows = zip(a, b, hole, strict=True)
    return torch.stack([metric(x[h], y[h]) if h.any() else torch.tensor(math.nan) for x, y, h in rows])


def rim_gradient(images: Tensor, masks: Tensor) -> Tensor:
    """How steep pictures are across the rim of their holes, where a visible seam would be.

    The mean absolute difference of neighbouring pixels, left and right or above and below, of which exactly one lies in
    the hole.

    Args:
        images: (B, 3, H, W) in [0, 1].
        masks: bool (B, 1, H, W), True = hole.
    Returns:
        (B,), on the images' scale; nan for a picture without a rim.
    """
    total, count = neighbour_steps(images, masks, torch.ne)
    return total / count    # 0 / 0 = nan


def inside_gradient(images: Tensor, masks: Tensor) -> Tensor:
    """`rim_gradient` of the neighbours that both lie in the hole: how much detail there is; nan for single pixels."""
    total, count = neighbour_steps(images, masks, torch.logical_and)
    return total / count


def check_pairs(pred: Tensor, truth: Tensor, masks: Tensor) -> None:
    """Refuse tensors that are not N uint8 RGB pictures, N originals and N masks of one size."""
    if not (pred.dtype == truth.dtype == torch.uint8 and masks.dtype == torch.bool):
        raise UserError(f"expected uint8 pictures and bool masks, got {pred.dtype}, {truth.dtype} and {masks.dtype}")
    N, _, H, W = truth.shape
    if pred.shape != (N, 3, H, W) or truth.shape != (N, 3, H, W) or masks.shape != (N, 1, H, W):
        raise UserError(
            f"completed {tuple(pred.shape)}, original {tuple(truth.shape)} and mask {tuple(masks.shape)} do not match: "
            "expected (N, 3, H, W) twice and (N, 1, H, W)"
        )
    if min(H, W) < SSIM_WINDOW:
        raise UserError(f"pictures of {W}x{H} are smaller than the window of SSIM, {SSIM_WINDOW}x{SSIM_WINDOW}")


def summarise(columns: dict[str, Tensor]) -> dict:
    """Means of paired_metrics' columns: whole, hole only, by hole area, share of known pixels changed, seam and detail.

    Means are over pictures (the mean of PSNRs, not the PSNR of the mean error); a picture without a hole has no part
    in the hole's.
    """
    area = columns["hole_area"]
    edges = zip(HOLE_BINS[:-1], HOLE_BINS[1:], strict=True)
    chosen = [(low, high, (area > low) & (area <= high)) for low, high in edges]
    known = columns["known_pixels"].sum().item()
    changed = columns["known_changed"]
    return {
        "n": len(area),
        "hole_area": area.mean().item(),
        "whole": means(columns, ""),
        "hole": means(columns, "hole_"),
        "by_hole_area": [
            {"from": low, "to": high, "n": int(rows.sum())}
            | {"whole": means(columns, "", rows), "hole": means(columns, "hole_", rows)}
            for low, high, rows in chosen if rows.any()
        ],
        "known_pixels_changed": changed.sum().item() / known if known else math.nan,
        "pictures_with_known_pixels_changed": int((changed > 0).sum()),
        **{name: columns[name].nanmean().item() for name in (*RIM, *INSIDE)},
        "seam": seam(columns),
        "detail": detail(columns),
    }


def seam(columns: dict[str, Tensor]) -> float:
    """Ratio of the mean gradients across the rim, completed to original, of paired_metrics' columns.

    1 when nothing shows, above 1 for an edge along the rim, below 1 for a blurred one.
    """
    return _ratio(columns, RIM)


def detail(columns: dict[str, Tensor]) -> float:
    """Ratio of the mean gradients inside the hole: 1 when it is as sharp as the originals, below 1 for a blurred one."""
    return _ratio(columns, INSIDE)


def _ratio(columns: dict[str, Tensor], names: tuple[str, str]) -> float:
    mine, truth = (columns[name].nanmean() for name in names)
    return (mine / truth).item()    # tensors: nan or inf, not an error, where the originals are flat


def means(columns: dict[str, Tensor], prefix: str, rows: Tensor | None = None) -> dict[str, float]:
    """Mean of each metric whose column carries the prefix, over the chosen rows (all when None)."""
    present = [key for key in PAIRED if prefix + key in columns]
    every = slice(None) if rows is None else rows
    return {key: columns[prefix + key][every].nanmean().item() for key in present}
