"""Draws from a mixture of Gaussians, whose exact score is known: the yardstick before images.

Letters in shapes: `N` draws, `K` components, `D` width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from personae.core import Images
from personae.errors import ConfigError, ShapeError


def gaussian_mixture(weights: Tensor, means: Tensor, n: int, rng: torch.Generator) -> Images:
    """`n` draws from sum_k weights[k] N(means[k], I), labelled with their component.

    Weights are taken relative to their sum.

    Shapes: weights [K], means [K, D]; pixels float32 [n, D], labels int64 [n].
    Raises: ShapeError, when the shapes do not fit; ConfigError, when a weight is negative or not finite, all are zero,
        or `n` is below 1.
    """
    if means.dim() != 2 or weights.shape != means.shape[:1]:
        raise ShapeError(f"weights are {list(weights.shape)} and means {list(means.shape)}, expected [K] and [K, D]")
    if not (weights.isfinite().all() and (weights >= 0).all() and weights.sum() > 0):
        raise ConfigError(f"weights are {weights.tolist()}, expected finite, at least 0 and not all 0")
    if n < 1:
        raise ConfigError(f"n is {n}, expected at least 1")
    labels = torch.multinomial(weights.double(), n, replacement=True, generator=rng)
    noise = torch.randn(n, means.shape[1], generator=rng)
    return Images(means.float()[labels] + noise, labels)
