"""Prices for what chosen weights of a frozen base are moved by, each a mean over those that it is about."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from personae.core import Arrays, Denoiser, Noised, Penalty
from personae.personal.delta import DELTA
from personae.personal.neurons import AT, NEURONS


def on_owned(owned: Arrays, weight: float) -> Penalty:
    """weight * the mean of d^2 over the neurons that are `owned`, d being what is added to one; 0, when none is.

    Shapes: owned[n] bool, like weight n, by its name.
    Source: form and mean are ours; that earlier concepts' weights are protected is of Liao et al. 2025,
    arXiv:2510.02296.
    """

    def penalty(model: Denoiser, batch: Noised) -> Float[Tensor, ""]:
        live, total = model.live(), batch.prediction.new_zeros((), dtype=torch.float32)
        count = total
        for name, mask in owned.items():
            at = live[AT + name]
            shared = mask.flatten().to(at.device)[at]
            total = total + (live[NEURONS + name].square() * shared).sum()
            count = count + shared.sum()
        return weight * total / count.clamp(min=1)

    return penalty


def from_base(weight: float) -> Penalty:
    """weight * the mean of (w - w_0)^2 over the neurons, w_0 being the base's weight: earlier changes of it count, too.

    Source: as above.
    """

    def penalty(model: Denoiser, batch: Noised) -> Float[Tensor, ""]:
        live, total, count = model.live(), batch.prediction.new_zeros((), dtype=torch.float32), 0
        for name in [name.removeprefix(AT) for name in live if name.startswith(AT)]:
            earlier = live[DELTA + name].flatten()[live[AT + name]]
            total = total + (live[NEURONS + name] + earlier).square().sum()
            count += len(earlier)
        return weight * total / max(1, count)

    return penalty
