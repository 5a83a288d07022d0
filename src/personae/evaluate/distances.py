"""Distances between two sets of images, on any feature map.

The names FID and KID belong to Inception features. Elsewhere a number says nothing without the name of its feature map,
so a `Kid` carries it, and whoever shows a Fréchet distance writes it beside the number.

Letters in shapes: `N` generated, `M` real, `F` features.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from personae.core import stream
from personae.errors import ConfigError, DataError, ShapeError


@dataclass(frozen=True)
class Kid:
    """A kernel distance: mean and standard deviation over subsets.

    `floor` is what two disjoint halves of the real images score: differences of that size are noise.
    `mean` and `floor` are unbiased, hence below zero about half of the time when there is nothing to see.
    """

    mean: float
    std: float
    floor: float
    subset_size: int
    subsets: int
    features: str


def kid(
    generated: Tensor,
    real: Tensor,
    *,
    features: str,
    subset_size: int | None = None,
    subsets: int = 100,
    seed: int = 0,
) -> Kid:
    """Squared maximum mean discrepancy, unbiased, with the kernel (u.v / F + 1)^3.

    `features` names the map that both sets went through. Without a `subset_size`, it is half of the smaller set, at
    most 1000; what was used stands in the result.

    Shapes: generated [N, F], real [M, F].
    Raises: DataError, when there are too few images for the subsets; ConfigError, ShapeError.
    Source: Binkowski et al. 2018, section 4.
    """
    generated, real = _doubles(generated, real)
    half = len(real) // 2
    if subset_size is None:
        subset_size = min(1000, len(generated) // 2, half)
    if subsets < 1:
        raise ConfigError(f"{subsets} subsets were asked for, expected at least 1")
    if not 2 <= subset_size <= min(len(generated), half):
        raise DataError(
            f"subsets of {subset_size} images cannot be drawn from {len(generated)} generated and two halves of "
            f"{len(real)} real ones; expected 2 to {min(len(generated), half)}. Draw more or take smaller subsets"
        )
    order = torch.randperm(len(real), generator=stream(seed, "kid-halves"))
    mean, std = _over_subsets(generated, real, subset_size, subsets, seed)
    floor, _ = _over_subsets(real[order[:half]], real[order[half : 2 * half]], subset_size, subsets, seed)
    return Kid(mean, std, floor, subset_size, subsets, features)


def frechet(generated: Tensor, real: Tensor) -> float:
    """Fréchet distance between the Gaussians of the same mean and covariance as the two sets.

    Gives |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). Biased upwards, the more so the fewer images there are:
    only compare values of equal N and M.

    Shapes: generated [N, F], real [M, F].
    Raises: DataError, when a set has fewer than 2 images; ShapeError.
    Source: Heusel et al. 2017, Eq. 6.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    generated, real = _doubles(generated, real)
    _at_least(2, generated, real, "a covariance")
    metric = FrechetInceptionDistance(feature=Precomputed(real.shape[1]))
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return max(0.0, float(metric.compute()))  # below zero by rounding alone


def precision_recall(real: Tensor, generated: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Share of generated images that look real, and share of real images that are covered.

    A point counts when it lies in a ball around some point of the other set, whose radius is the distance from that
    point to its k-th nearest neighbour in its own set.

    Shapes: real [M, F], generated [N, F].
    Raises: DataError, when a set has no k-th neighbour; ConfigError, ShapeError.
    Source: Kynkäänniemi et al. 2019, Eq. 1 and 2.
    """
    if k < 1:
        raise ConfigError(f"k is {k}, expected at least 1")
    real, generated = _doubles(real, generated)
    _at_least(k + 1, real, generated, f"neighbour number {k}")
    between = _distances(generated, real)
    precision = (between <= _radii(real, k)).any(1)
    recall = (_radii(generated, k) >= between.T).any(1)
    return float(precision.double().mean()), float(recall.double().mean())


class Precomputed(nn.Module):
    """Stands where torchmetrics expects a network, when the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Float[Tensor, "N F"]) -> Float[Tensor, "N F"]:
        return features


def _over_subsets(generated: Tensor, real: Tensor, size: int, subsets: int, seed: int) -> tuple[float, float]:
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all", UserWarning)
        metric = KernelInceptionDistance(feature=Precomputed(real.shape[1]), subsets=subsets, subset_size=size)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics picks the subsets with the global generator
        torch.default_generator.manual_seed(stream(seed, "kid").initial_seed())
        mean, std = metric.compute()
    return float(mean), float(std)


def _doubles(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ShapeError(
            f"features have shapes {list(a.shape)} and {list(b.shape)}, expected [N, F] and [M, F] from one feature map"
        )
    return a.detach().cpu().double(), b.detach().cpu().double()


def _at_least(count: int, a: Tensor, b: Tensor, what: str) -> None:
    if min(len(a), len(b)) < count:
        raise DataError(f"{what} needs at least {count} images on each side, found {len(a)} and {len(b)}; draw more")


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Exact also where points coincide, which the faster matrix product is not."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance to the k-th nearest other point; every point is its own nearest."""
    return _distances(points, points).kthvalue(k + 1, dim=1).values
