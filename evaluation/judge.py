"""Scores a set of completed pictures: against their originals, and against other pictures.

Pictures may be of any size, each its own. Their features and metrics are measured one batch at a time and kept; the pictures
are not.
"""
import argparse
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from evaluation.distances import Statistics, frechet_distance, indistinguishable, kernel_distance
from evaluation.features import Features, load_features
from evaluation.metrics import SSIM_WINDOW, SUMMARY, Perceptual, load_perceptual, paired_metrics, summarise
from pictures.files import find_images
from pictures.images import read_image
from utils import UserError, fingerprint, pick_device, progress, seeded

CROP = 96                       # pixels: side of the crops around holes
CROPS = 24                      # of them in a picture
BATCH_PIXELS = 50 * 256 * 256   # measured together, so that large pictures fit into memory
MAX_BATCH = 50                  # pictures measured together

# How a score is written in a table: by its name, or by the last word of it ("paired FD-MobileNetV1").
FORMATS = {
    "FID": ".2f", "FD": ".2f", "KID": ".4f", "KD": ".4f", "U-IDS": ".1%", "P-IDS": ".1%",
    "hole_psnr": ".2f", "psnr": ".2f", "seam": ".3f", "detail": ".3f", "hole_area": ".1%", "known_changed": ".2%",
}


class Measurements:
    """What is measured on pictures that are added one after the other, in the order in which they are added."""

    def __init__(self, network: Features | None, perceptual: Perceptual | None = None) -> None:
        self.network, self.perceptual = network, perceptual
        self.waiting: list[tuple[Tensor, Tensor | None, Tensor | None]] = []    # all of one size
        self.parts: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, picture: Tensor, hole: Tensor | None = None, original: Tensor | None = None) -> None:
        """A picture and its original, uint8 (3, H, W), and its hole, bool (1, H, W).

        With a hole, crops around it are measured too, and with an original the metrics of the pair.
        """
        if self.waiting:
            size = self.waiting[0][0].shape
            if size != picture.shape or len(self.waiting) >= min(MAX_BATCH, max(1, BATCH_PIXELS // size[1:].numel())):
                self._measure()
        self.waiting.append((picture, hole, original))

    def columns(self) -> dict[str, Tensor]:
        """All that was measured: "features" (N, D), "crops" (M, D) where pictures were large enough, and the columns of
        `paired_metrics`, (N,) each.
        """
        if self.waiting:
            self._measure()
        return {name: torch.cat(parts) for name, parts in self.parts.items()}

    def _measure(self) -> None:
        batch, hole, original = (None if part[0] is None else torch.stack(part) for part in zip(*self.waiting, strict=True))
        self.waiting = []
        if self.network is not None:
            self.parts["features"].append(self.network(batch))
            if hole is not None and (crops := crops_around(batch, hole)):
                self.parts["crops"].append(self.network(torch.stack(crops)))
        if original is not None and hole is not None:
            for name, values in paired_metrics(batch, original, hole, self.perceptual).items():
                self.parts[name].append(values)


def crops_around(pictures: Tensor, holes: Tensor) -> list[Tensor]:
    """Crops (3, 96, 96) centred at random pixels of the holes, 24 a picture, or one for each pixel of a smaller hole.

    A crop that would leave the picture is moved inside. Which pixels are drawn depends on the hole alone, so a completion
    and its original give the same places.

    Args:
        pictures: (B, 3, H, W); pictures smaller than a crop give none.
        holes: bool (B, 1, H, W).
    """
    H, W = pictures.shape[2:]
    if min(H, W) < CROP:
        return []
    crops = []
    for picture, hole in zip(pictures, holes, strict=True):
        centres = hole[0].nonzero()                                                              # (P, 2) as (y, x)
        order = torch.randperm(len(centres), generator=seeded("crops", fingerprint(hole)))
        for y, x in centres[order[:CROPS]].tolist():
            top, left = (min(max(c - CROP // 2, 0), side - CROP) for c, side in ((y, H), (x, W)))
            crops.append(picture[:, top : top + CROP, left : left + CROP])
    return crops


@dataclass(frozen=True)
class Judge:
    """What scores are made with. A part that is None leaves out the scores that need it."""

    network: Features | None = None
    perceptual: Perceptual | None = None
    reference: Statistics | None = None    # features of other pictures
    originals: Statistics | None = None    # features of the pictures that are to be restored
    crops: Statistics | None = None        # features of the originals' crops around their holes
    kernel_subsets: int = 100
    kernel_subset_size: int | None = None
    seed: int = 0

    def measurements(self) -> Measurements:
        return Measurements(self.network, self.perceptual)

    def with_originals(self, columns: dict[str, Tensor]) -> "Judge":
        """The same judge, who also knows what was measured on the originals and their holes."""
        if "features" not in columns:
            return self
        crops = Statistics.of(self.network, columns["crops"]) if "crops" in columns else None
        return replace(self, originals=Statistics.of(self.network, columns["features"]), crops=crops)

    def scores(self, columns: dict[str, Tensor], svm: bool = True) -> dict[str, float]:
        """Scores of what was measured, by name; `svm` includes P-IDS and U-IDS, which take seconds to minutes.

        Names: FD-... and KD-... (FID and KID with Inception) and U-IDS are distances to the reference. With "paired "
        before them they are distances to the originals: these reward likeness to one picture each. P-IDS is paired by its
        definition. "crops FD-..." compares crops around the holes with the originals' at the same places.
        """
        scores = {}
        if self.network is not None:
            statistics = Statistics.of(self.network, columns["features"])
            if self.reference is not None:
                scores |= self._distances("", self.reference, statistics)
                if svm and self.reference.features is not None:
                    scores["U-IDS"] = indistinguishable(self.reference.features, statistics.features, seed=self.seed)[0]
            if self.originals is not None:
                scores |= self._distances("paired ", self.originals, statistics)
                if svm:
                    real, fake = self.originals.features, statistics.features
                    u_ids, scores["P-IDS"] = indistinguishable(real, fake, paired=True, seed=self.seed)
                    scores["paired U-IDS"] = u_ids
            if self.crops is not None and "crops" in columns:
                crops = Statistics.of(self.network, columns["crops"])
                scores[f"crops {self.network.frechet_name}"] = frechet_distance(self.crops.moments, crops.moments)
        return scores | (summarise(columns) if "l1" in columns else {})

    def _distances(self, prefix: str, other: Statistics, mine: Statistics) -> dict[str, float]:
        frechet, kernel = prefix + self.network.frechet_name, prefix + self.network.kernel_name
        scores = {frechet: frechet_distance(other.moments, mine.moments), kernel: math.nan}
        smaller = min(other.moments.count, mine.moments.count)
        if other.features is not None and smaller >= 4:    # fewer have no different subsets
            scores[kernel], scores[f"{kernel} spread"] = kernel_distance(
                other.features, mine.features, self.kernel_subsets, self.kernel_subset_size, self.seed
            )
        return scores

    def names(self, svm: bool = True) -> list[str]:
        """The names of `scores` for pairs with holes, spreads left out; the first is the one to rank by, lower is better."""
        names = []
        if self.network is not None:
            distances = [self.network.frechet_name, self.network.kernel_name]
            if self.reference is not None:
                names += [*distances, "U-IDS"] if svm else distances
            if self.originals is not None:
                names += [f"paired {name}" for name in distances] + (["paired U-IDS", "P-IDS"] if svm else [])
            if self.crops is not None:
                names.append(f"crops {self.network.frechet_name}")
        summary = [name for name in SUMMARY if self.perceptual or "perceptual" not in name]
        first = "hole_perceptual" if self.perceptual else "hole_l1"
        return [*names, first, *(name for name in summary if name != first)]

    def notes(self, count: int) -> list[str]:
        """Sentences that belong beside the scores of `count` pictures."""
        network = self.network
        if network is None:
            return ["no distances between sets: --features none leaves the metrics of pairs"]
        notes = [network.note] if network.note else []
        if count < network.dims:
            notes.append(
                f"{count} pictures are fewer than the {network.dims} features, so {network.frechet_name} is biased upwards: "
                "compare it only with scores of as many pictures, such as the originals' own"
            )
        if self.reference is not None and self.reference.features is None:
            notes.append(f"the reference holds no features, only mean and covariance: no {network.kernel_name}, no U-IDS")
        if self.reference is not None and self.originals is not None and (same := self.shared()):
            notes.append(f"{same} of the originals are in the reference too, so it is not a set of other pictures")
        return notes

    def shared(self) -> int:
        """How many originals the reference holds too."""
        if self.reference.features is None:
            return 0
        ours, theirs = self.originals.features.float(), self.reference.features.float()
        nearest = torch.cdist(ours, theirs).amin(1)                                              # (N,)
        return int((nearest < 1e-4 * ours.norm(dim=1)).sum())


def load_judge(args: argparse.Namespace) -> Judge:
    """The networks and the reference that a command's flags ask for (see evaluation/flags.py)."""
    device, network = pick_device(args.device), None
    if args.features != "none":
        network = load_features(
            args.features, inception_weights=args.inception_weights, name=args.features_name, device=device
        )
    elif args.reference is not None:
        raise UserError("--reference needs a feature network: leave out --features none")
    judge = Judge(network, load_perceptual(args.perceptual_weights, device) if args.perceptual_weights else None)
    return judge if args.reference is None else replace(judge, reference=load_reference(args.reference, network))


def load_reference(path: Path, network: Features) -> Statistics:
    """Statistics of a folder of pictures, or those saved in an .npz file."""
    if path.suffix == ".npz":
        return Statistics.load(path, network)
    measured = Measurements(network)
    for file in progress(find_images(path).values(), desc="measuring the reference", unit="picture"):
        measured.add(read_image(file))
    return Statistics.of(network, measured.columns()["features"])


def check_pair(name: object, picture: Tensor, original: Tensor) -> None:
    """Refuse a completed picture whose size is not its original's, or that is too small for SSIM."""
    (H, W), (height, width) = picture.shape[1:], original.shape[1:]
    if (H, W) != (height, width):
        raise UserError(f"{name} is {W}x{H}, its original is {width}x{height}: they must have one size")
    if min(H, W) < SSIM_WINDOW:
        raise UserError(f"{name} is {W}x{H}, smaller than the window of SSIM, {SSIM_WINDOW}x{SSIM_WINDOW}")


def is_distance(name: str) -> bool:
    """Whether a score compares two sets of pictures."""
    return any(word in name for word in ("FID", "FD-", "KID", "KD-", "IDS")) and not name.endswith("spread")


def format_score(name: str, value: float, spread: float | None = None) -> str:
    """A score as it is written in tables; a dash where it has no number."""
    if math.isnan(value):
        return "–"
    if name.endswith(" ratio"):
        return f"{value:.3f}"
    key = name.split()[-1]
    form = FORMATS.get(key) or FORMATS.get(key.partition("-")[0], ".4f")
    if spread is None or math.isnan(spread):
        return f"{value:{form}}"
    return f"{value:{form}} ± {spread:{form}}"
