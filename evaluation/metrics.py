"""Metrics of completed pictures against their originals.

PSNR, SSIM and L1 are torchmetrics'; the perceptual distance is models/perceptual.py.

Letters: N pictures, B batch, H W pixels.
"""
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from models.perceptual import PerceptualFeatures, neighbour_steps, perceptual_distance
from utils import UserError

# Edges of the hole-area bins, as shares of the picture: fine where inpainting holes usually are.
HOLE_BINS = (0.0, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50, 0.60, 1.0)
SSIM_WINDOW = 11   # pixels: torchmetrics' Gaussian of sigma 1.5, the usual setting
# What `summarise` returns.
SUMMARY = (
    "hole_perceptual", "hole_psnr", "hole_ssim", "hole_l1", "perceptual", "psnr", "ssim", "l1",
    "seam", "detail", "hole_area", "known_changed",
)

# Two batches (B, 3, H, W) in [-1, 1] and where to look (B, 1, H, W) or None -> (B,)
Perceptual = Callable[[Tensor, Tensor, Tensor | None], Tensor]


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


def paired_metrics(pred: Tensor, truth: Tensor, hole: Tensor, perceptual: Perceptual | None = None) -> dict[str, Tensor]:
    """Metrics of each completed picture against its original.

    Args:
        pred, truth: uint8 (B, 3, H, W), at least 11x11 pixels.
        hole: bool (B, 1, H, W).
        perceptual: distance of two picture batches, optionally weighted by place; left out when None.
    Returns:
        columns of B float64 numbers: psnr (dB), ssim, l1 (on a scale of 0 to 1), perceptual; each also as hole_... over the
        hole alone (nan for a picture without a hole); hole_area (share of the picture); known_pixels and known_changed
        (a pixel counts once however many of its channels differ); rim_gradient and inside_gradient (see `mean_step`), of
        the completed picture, and with _truth behind the name of the original.
    """
    # torchmetrics takes seconds to import
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a, b = pred.float() / 255, truth.float() / 255                                          # (B, 3, H, W) in [0, 1]
    ssim, ssim_map = structural_similarity_index_measure(
        a, b, data_range=1.0, reduction="none", return_full_image=True
    )                                                                                       # (B,), (B, 3, H, W)
    error = (a - b).abs()                                                                   # (B, 3, H, W)
    columns = {
        "psnr": peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3), reduction="none"),
        "ssim": ssim,
        "l1": error.mean((1, 2, 3)),
        "hole_psnr": -10 * hole_mean(error.square(), hole).log10(),
        "hole_ssim": hole_mean(ssim_map, hole),
        "hole_l1": hole_mean(error, hole),
        "hole_area": hole.float().mean((1, 2, 3)),
        "known_pixels": (~hole).sum((1, 2, 3)),
        "known_changed": ((pred != truth).any(1, keepdim=True) & ~hole).sum((1, 2, 3)),     # exact on uint8
        "rim_gradient": mean_step(a, hole, torch.ne),
        "rim_gradient_truth": mean_step(b, hole, torch.ne),
        "inside_gradient": mean_step(a, hole, torch.logical_and),
        "inside_gradient_truth": mean_step(b, hole, torch.logical_and),
    }
    if perceptual is not None:
        columns["perceptual"] = perceptual(2 * a - 1, 2 * b - 1, None)
        within = perceptual(2 * a - 1, 2 * b - 1, hole.float())
        columns["hole_perceptual"] = within.masked_fill(~hole.flatten(1).any(1), math.nan)
    return {name: values.double() for name, values in columns.items()}


def hole_mean(values: Tensor, hole: Tensor) -> Tensor:
    """Mean over each picture's hole: values (B, 3, H, W), hole bool (B, 1, H, W) -> (B,), nan without a hole."""
    return (values * hole).double().sum((1, 2, 3)) / (3 * hole.sum((1, 2, 3)))


def mean_step(images: Tensor, hole: Tensor, chosen: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """How steep pictures are: the mean absolute difference of neighbouring pixels, left and right or above and below.

    Args:
        images: (B, 3, H, W) in [0, 1].
        hole: bool (B, 1, H, W).
        chosen: torch.ne for pairs of which exactly one lies in the hole: across its rim a visible seam would be.
            torch.logical_and for pairs that both lie in the hole: how much detail there is.
    Returns:
        (B,), on the images' scale; nan for a picture without such pairs.
    """
    total, count = neighbour_steps(images, hole, chosen)
    return total / count    # 0 / 0 = nan


def summarise(columns: dict[str, Tensor], rows: Tensor | slice = slice(None)) -> dict[str, float]:
    """Means of `paired_metrics`' columns over the chosen rows, by the names of `SUMMARY`.

    Means are over pictures (the mean of PSNRs, not the PSNR of the mean error); a picture without a hole has no part in
    the hole's. known_changed is a share of all known pixels. seam and detail are ratios of two mean gradients, completed
    to original, across the hole's rim and inside the hole: 1 is best; above 1 an edge shows along the rim, or the hole is
    noisy; below 1 it is blurred.
    """
    chosen = {name: values[rows] for name, values in columns.items() if values.ndim == 1}    # features are no metric
    mean = {name: values.nanmean() for name, values in chosen.items()}
    mean["known_changed"] = chosen["known_changed"].sum() / chosen["known_pixels"].sum()
    mean["seam"] = mean["rim_gradient"] / mean["rim_gradient_truth"]             # nan or inf where the originals are flat
    mean["detail"] = mean["inside_gradient"] / mean["inside_gradient_truth"]
    return {name: mean[name].item() for name in SUMMARY if name in mean}


def by_hole_area(columns: dict[str, Tensor]) -> list[dict[str, float]]:
    """`summarise` for each bin of `HOLE_BINS` that has pictures, with its edges and the number n of its pictures."""
    area, bins = columns["hole_area"], []
    for low, high in zip(HOLE_BINS[:-1], HOLE_BINS[1:], strict=True):
        rows = (area > low) & (area <= high)
        if rows.any():
            bins.append({"from": low, "to": high, "n": int(rows.sum())} | summarise(columns, rows))
    return bins
