"""Distances between sets of pictures, from the pictures' features.

Fréchet distance (FID when the features are Inception's): Heusel et al. 2017, https://arxiv.org/abs/1706.08500
Kernel distance (KID when the features are Inception's): Binkowski et al. 2018, https://arxiv.org/abs/1801.01401
P-IDS and U-IDS: Zhao et al. 2021 (CoModGAN), https://arxiv.org/abs/2103.10428, section 4.2

Letters: N, M pictures, D features, R <= D rows of a factor.
"""
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.features import Features, first_line
from utils import UserError, atomic_write

MAX_SAVED_NUMBERS = 2**28    # features up to this many numbers (1 GB as float32) are saved beside mean and covariance
FOLDS = 5                    # of the cross-validation of P-IDS and U-IDS
# Weight of the SVM's errors. With fewer pictures than features it separates its training set at any weight; a small weight
# takes seconds instead of minutes, and tells held-out pictures apart as well.
SVM_C = 1e-3


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
) -> tuple[float, float]:
    """Kernel distance of feature sets (N, D) and (M, D): mean and standard deviation over random subsets.

    Args:
        subset_size: pictures in a subset; None takes 1000 as usual, but at most half of the smaller set, since subsets
            as large as the set would all be the same and show no spread.
        seed: the subsets are a function of it alone.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    smaller = min(len(a), len(b))
    subset_size = subset_size or min(1000, smaller // 2)
    if not 2 <= subset_size <= smaller:
        raise UserError(
            f"kernel distance: a subset size of {subset_size} must be at least 2 and at most {smaller}, the smaller set"
        )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)    # torchmetrics warns that it keeps all features in memory
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(nn.Identity(), subsets, subset_size)
        metric.update(a.double().cpu(), real=True)
        metric.update(b.double().cpu(), real=False)
        mean, std = metric.compute()
    return mean.item(), std.item()


def indistinguishable(real: Tensor, fake: Tensor, paired: bool = False, seed: int = 0) -> tuple[float, float]:
    """How often a linear SVM on the features takes completions for real pictures: U-IDS and P-IDS.

    The SVM is cross-validated: it judges only pictures that it was not trained on, and an original is held out together
    with its completion. (The paper scores the SVM on its training set; with fewer pictures than features, both would be 0.)

    Args:
        real, fake: features (N, D) and (M, D).
        paired: row i of both sets shows the same scene.
        seed: of the split into folds.
    Returns:
        U-IDS, the mean of the two error rates, and P-IDS, the share of pairs in which the completion looks more real than
        the original (a tie counts half; nan unless paired). Both are 0.5 where the sets can't be told apart, and nan
        where a set has less than two pictures a fold.
    """
    if min(len(real), len(fake)) < 2 * FOLDS:
        return math.nan, math.nan
    try:
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import LinearSVC
    except ImportError as error:
        raise UserError("P-IDS and U-IDS need scikit-learn: pip install scikit-learn") from error

    random = np.random.default_rng(seed)
    real_fold = random.permutation(np.arange(len(real)) % FOLDS)
    fake_fold = real_fold if paired else random.permutation(np.arange(len(fake)) % FOLDS)
    real, fake = real.double().numpy(), fake.double().numpy()
    real_margin, fake_margin = np.empty(len(real)), np.empty(len(fake))
    for fold in range(FOLDS):
        kept, kept_fake = real[real_fold != fold], fake[fake_fold != fold]
        svm = make_pipeline(StandardScaler(), LinearSVC(C=SVM_C, dual=True, class_weight="balanced", random_state=seed))
        svm.fit(np.concatenate([kept, kept_fake]), np.repeat([1, 0], [len(kept), len(kept_fake)]))
        real_margin[real_fold == fold] = svm.decision_function(real[real_fold == fold])
        fake_margin[fake_fold == fold] = svm.decision_function(fake[fake_fold == fold])
    u_ids = ((real_margin < 0).mean() + (fake_margin > 0).mean()) / 2
    p_ids = np.heaviside(fake_margin - real_margin, 0.5).mean() if paired else math.nan
    return float(u_ids), float(p_ids)


@dataclass(frozen=True)
class Statistics:
    """Features of a set of pictures, or only their moments when the set is too large to keep."""

    name: str                 # of the feature network
    sha256: str               # of the feature network's file
    moments: Moments
    features: Tensor | None   # (N, D) float64

    @classmethod
    def of(cls, network: Features, features: Tensor) -> "Statistics":
        """features: (N, D), as the network gave them."""
        return cls(network.name, network.sha256, Moments.of_features(features), features)

    def save(self, path: Path) -> None:
        """Write name, sha256, count, mean, covariance and, up to 1 GB, the features to an .npz file.

        The features are float32, as the network gave them: with them every distance can be had again, bit for bit.
        Mean and covariance alone give the Fréchet distance, to rounding.
        """
        arrays = {
            "name": self.name, "sha256": self.sha256, "count": self.moments.count,
            "mean": self.moments.mean.numpy(), "covariance": self.moments.covariance.numpy(),
        }
        if self.features is not None and self.features.numel() <= MAX_SAVED_NUMBERS:
            arrays["features"] = self.features.float().numpy()
        with atomic_write(path) as temporary, open(temporary, "wb") as file:    # savez would append .npz to a path
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path, network: Features) -> "Statistics":
        """Read saved statistics; UserError if the file is not one of ours or comes from another network."""
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
        except Exception as error:    # not a zip, truncated, pickled objects: numpy raises a class of its own for each
            raise UserError(f"{path} cannot be read as saved statistics: {first_line(error)}") from error
        if missing := {"name", "sha256", "count", "mean", "covariance"} - set(arrays):
            raise UserError(
                f"{path} lacks {', '.join(sorted(missing))}, so it is unknown which network it is of; make it with "
                "evaluate.py --save-statistics"
            )
        name, sha256 = str(arrays["name"]), str(arrays["sha256"])
        if (name, sha256) != (network.name, network.sha256):
            raise UserError(
                f"{path} holds features of {name} (sha256 {sha256[:8]}...), the chosen network is {network.name} "
                f"(sha256 {network.sha256[:8]}...): distances between two networks' features mean nothing"
            )
        if "features" in arrays:
            features = torch.from_numpy(arrays["features"]).double()
            return cls(name, sha256, Moments.of_features(features), features)
        mean, covariance = torch.from_numpy(arrays["mean"]), torch.from_numpy(arrays["covariance"])
        return cls(name, sha256, Moments.of_covariance(int(arrays["count"]), mean, covariance), None)
