"""Are samples copies of training images? Kernel and Fréchet distances do not see it: a perfect copy scores best.

Letters in shapes: `N` samples, `M` training images, `C H W` image.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor

from personae.errors import DataError, ShapeError

BLOCK = 512
"""Samples that are compared at a time, so that memory stays BLOCK x M numbers."""


def nearest_distance(samples: Shaped[Tensor, "N ..."], train: Shaped[Tensor, "M ..."]) -> Float64[Tensor, " N"]:
    """How far every sample is from the training image nearest to it.

    Shapes: samples uint8 [N, C, H, W], train uint8 [M, C, H, W].
    Units: root mean square difference of pixels on the scale 0 to 1. An exact copy is exactly 0.
    Raises: ShapeError, DataError.
    """
    if samples.shape[1:] != train.shape[1:] or samples.dtype != torch.uint8 or train.dtype != torch.uint8:
        raise ShapeError(
            f"samples are {samples.dtype} {list(samples.shape[1:])}, training images {train.dtype} "
            f"{list(train.shape[1:])}; expected uint8 of one shape"
        )
    if len(samples) == 0 or len(train) == 0:
        raise DataError(f"{len(samples)} samples were compared with {len(train)} training images, expected both")
    known = train.flatten(1).double()  # whole numbers this small are added without rounding, in any order
    known_squares = known.square().sum(1)
    parts = []
    for part in samples.flatten(1).split(BLOCK):
        asked = part.double()
        squares = asked.square().sum(1, keepdim=True) + known_squares - 2 * asked @ known.T
        parts.append(squares.min(1).values)
    return (torch.cat(parts) / known.shape[1]).sqrt() / 255


def copy_ratio(samples: Tensor, train: Tensor, heldout: Tensor) -> float | None:
    """Median distance of samples to training images, divided by that of held-out images.

    Near 1, samples are as new as images that were never seen; clearly below, training images were copied.
    None when the median held-out image is itself a copy of a training image, so that there is no yardstick.

    Shapes: uint8 [N, C, H, W] each, of one C, H and W.
    Raises: ShapeError, DataError.
    """
    usual = float(nearest_distance(heldout, train).median())
    return float(nearest_distance(samples, train).median()) / usual if usual > 0 else None
