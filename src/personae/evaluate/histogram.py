"""Which classes were drawn, and how far their mix is from another.

Letters in shapes: `N` images, `C H W` image.
"""

from __future__ import annotations

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from personae.errors import ConfigError, DataError, ShapeError
from personae.evaluate.features import Features


def class_histogram(features: Features, images: UInt8[Tensor, "N C H W"]) -> Int64[Tensor, " num_classes"]:
    """How many images a classifier puts in each class.

    Raises: ConfigError, when the feature map is no classifier.
    """
    if features.classify is None or features.label_names is None:
        raise ConfigError(f"the feature map {features.name!r} has no classes; use that of a labelled data set")
    return torch.bincount(features.classify(images), minlength=len(features.label_names))


def histogram_distance(counts_a: Tensor, counts_b: Tensor) -> float:
    """Total variation between two mixes of classes: 0 for equal shares, 1 for no class in common.

    Shapes: [num_classes] each. Counts are divided by their sum first.
    Raises: ShapeError, when the numbers of classes differ; DataError, when one side counts nothing.
    """
    if counts_a.shape != counts_b.shape or counts_a.dim() != 1:
        raise ShapeError(
            f"histograms have shapes {list(counts_a.shape)} and {list(counts_b.shape)}, expected one "
            "entry per class in both; was the classifier trained on another data set?"
        )
    if not (counts_a.sum() > 0 and counts_b.sum() > 0):
        raise DataError("a histogram counts no image at all, expected at least one on each side")
    shares_a, shares_b = (counts.double() / counts.sum() for counts in (counts_a, counts_b))
    return float((shares_a - shares_b).abs().sum() / 2)
