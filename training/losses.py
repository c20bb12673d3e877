"""Losses and scores that stage 1 and the finish share, their perceptual network, and the pictures of a validation."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import getproxies

import torch
from huggingface_hub import constants as hub
from torch import Tensor
from torchvision.utils import save_image

from models.perceptual import PerceptualFeatures, weighted_mean
from utils import UserError, atomic_write, seeded

if TYPE_CHECKING:
    from training.run import Run


def hole_l1(output: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error, the hole counting about ten times as much as the known pixels. mask: (B, 1, H, W), 1 = hole."""
    return weighted_mean((output - image).abs().mean(1, keepdim=True), mask + 0.1).mean()


def hole_psnr(output: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Peak signal-to-noise ratio inside each hole, in dB: (B,)."""
    error = weighted_mean((output - image).pow(2).mean(1, keepdim=True), mask)
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


def load_features(network: str, weights: str | None, scales: list[int], flag: str) -> PerceptualFeatures:
    """A perceptual network, with the weights in the file of a command's flag or, without one, downloaded."""
    if weights is None:
        hub.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE or not has_network()    # else it tries for a minute
    try:
        return PerceptualFeatures(network, weights, scales)
    except OSError as error:
        raise UserError(f"no weights for {network} ({error}); give them with {flag} FILE") from error
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from error


def has_network() -> bool:
    """Whether names of other machines are known here; with a proxy they need not be."""
    try:
        return bool(getproxies() or socket.getaddrinfo("huggingface.co", 443))
    except OSError:
        return False


def validation_holes(run: Run) -> Tensor:
    """The same holes at every validation of a run: (M, 1, H, W) bool."""
    images = run.val_images
    return run.masks.val.random_holes(len(images), images.shape[-1], seeded(run.config.seed, "validation holes"))


def write_grid(path: Path, *rows: Tensor) -> None:
    """Write rows of as many pictures each, (n, 3, H, W) in [-1, 1], as one PNG."""
    with atomic_write(path) as temporary:
        save_image(torch.cat(rows).cpu(), temporary, format="png", nrow=len(rows[0]), value_range=(-1, 1), normalize=True)
