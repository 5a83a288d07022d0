"""Weights that several concepts agree on, found by linear algebra in float64 and not by gradient descent.

Every function gives a change of weights, to be added to the base's. Rows of weights do not depend on each other, so
layers that read the same may stand on top of each other as one.

Letters in shapes: `N` samples, `D` width of what a layer reads, `M` of what it gives, `_` so many of a concept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

RIDGE = 1e-4
"""Ours: of a Gram matrix's mean eigenvalue."""

SAME = 1e-10
"""Constraints that differ by less, in squares and of the largest, are one: what is told from float32 cannot be told
apart more finely."""


def gram(features: Float[Tensor, "N D"]) -> Float64[Tensor, "D D"]:
    """The mean of x x^T, so that many samples count as much as few."""
    wide = features.double()
    return wide.T @ wide / len(wide)


def fused(pull: Float[Tensor, "M D"], total: Float[Tensor, "D D"], ridge: float = RIDGE) -> Float64[Tensor, "M D"]:
    """The change whose outputs are closest to those of every concept's own change dW_i on what this concept reads:

        (sum_i dW_i G_i) (sum_i G_i + rho I)^-1,   rho = ridge * trace(sum_i G_i) / D

    `pull` is the first sum, `total` the second, G_i the Gram matrix of what concept i reads; so both sums can run. With
    ridge 0 it is the smallest such change.

    Source: the least squares of Gu et al. 2023, Mix-of-Show, arXiv:2305.18292, solved here where theirs are descended.
    """
    return pull.double() @ _inverse(total, ridge)


def constrained(
    pairs: Sequence[tuple[Float[Tensor, "_ D"], Float[Tensor, "_ M"]]],
    general: Float[Tensor, "D D"],
    ridge: float = RIDGE,
) -> Float64[Tensor, "M D"]:
    """The change that gives each pair's second at its first, and otherwise gives least on what `general` is of:

        V^T (d C^T)^+ d,   d = C (G + rho I)^-1,   rho = ridge * trace(G) / D

    C and V are all pairs, one below the other. Constraints that contradict each other, or are more than D, are met in
    the sense of least squares.

    Source: Kumari et al. 2022, Custom Diffusion, arXiv:2212.04488, as in their published code; the ridge is ours.
    """
    features = torch.cat([each.double() for each, _ in pairs])
    values = torch.cat([each.double() for _, each in pairs])
    directions = features @ _inverse(general, ridge)
    overlaps = torch.linalg.pinv(directions @ features.T, rtol=SAME, hermitian=True)
    return values.T @ overlaps @ directions


def _inverse(matrix: Float[Tensor, "D D"], ridge: float) -> Float64[Tensor, "D D"]:
    wide = matrix.double()
    rho = ridge * wide.trace() / len(wide)
    return torch.linalg.pinv(wide + rho * torch.eye(len(wide), dtype=wide.dtype, device=wide.device), hermitian=True)
