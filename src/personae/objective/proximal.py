"""The proximal term of FedProx."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from personae.core import Arrays, Denoiser, Noised, Penalty


def proximal(anchor: Arrays, mu: float) -> Penalty:
    """Pull parameters towards where the round began: mu / 2 * sum_n (p[n] - anchor[n])^2 over the names in `anchor`.

    Shapes: anchor[n] like parameter n.
    Source: Li et al. 2020, FedProx, Eq. 2.
    """

    def penalty(model: Denoiser, batch: Noised) -> Float[Tensor, ""]:
        live = model.live()
        squares = ((live[n] - a.to(live[n].device)).square().sum() for n, a in anchor.items())
        return mu / 2 * sum(squares, batch.prediction.new_zeros((), dtype=torch.float32))

    return penalty
