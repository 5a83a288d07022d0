"""All that is measured of one client, from its images and what its models draw.

Letters in shapes: `N` real images, `M` drawn ones, `C H W` image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from personae.core import ClientData
from personae.evaluate.copying import copy_ratio, nearest_distance
from personae.evaluate.distances import frechet, kid, precision_recall
from personae.evaluate.features import Features
from personae.evaluate.histogram import histogram_distance


@dataclass(frozen=True)
class Reference:
    """What a client is compared with: its own real images, and their features."""

    data: ClientData
    features: Features | None
    kid_subset_size: int
    kid_subsets: int
    seed: int

    @property
    def real(self) -> UInt8[Tensor, "N C H W"]:
        """All of the client's images, learned from and held out."""
        return torch.cat([self.data.train.pixels, self.data.heldout.pixels])


def measure(reference: Reference, drawn: UInt8[Tensor, "M C H W"]) -> Mapping[str, Any]:
    """Distances between what was drawn and the client's real images.

    A figure that cannot be had (no labels, no features, too few images) is None.
    """
    features, data = reference.features, reference.data
    figures: dict[str, Any] = {
        "nearest_train_distance": float(nearest_distance(drawn, data.train.pixels).median()),
        "copy_ratio": copy_ratio(drawn, data.train.pixels, data.heldout.pixels),
    }
    if features is None:
        return figures
    real_features, drawn_features = features.extract(reference.real), features.extract(drawn)
    size = min(reference.kid_subset_size, len(reference.real) // 2, len(drawn))
    if size >= 2:
        found = kid(
            drawn_features,
            real_features,
            features=features.name,
            subset_size=size,
            subsets=reference.kid_subsets,
            seed=reference.seed,
        )
        figures |= {"kid": found.mean, "kid_std": found.std, "kid_floor": found.floor}
        figures |= {"kid_features": features.name, "kid_subset_size": size}
    if min(len(reference.real), len(drawn)) > 3:
        precision, recall = precision_recall(real_features, drawn_features)
        figures |= {"precision": precision, "recall": recall}
        figures |= {"frechet": frechet(drawn_features, real_features), "frechet_features": features.name}
    return figures


def label_counts(labels: Int64[Tensor, " N"] | None, num_classes: int) -> list[int] | None:
    """How often each class occurs."""
    return None if labels is None else torch.bincount(labels, minlength=num_classes).tolist()


def histogram_figure(drawn: list[int] | None, real: list[int] | None) -> float | None:
    """Total variation between two counts of classes, in 0..1."""
    if drawn is None or real is None:
        return None
    return histogram_distance(torch.tensor(drawn, dtype=torch.float), torch.tensor(real, dtype=torch.float))
