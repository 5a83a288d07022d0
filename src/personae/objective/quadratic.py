"""A spring to where parameters were, each as stiff as it matters."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from personae.core import Arrays, Denoiser, Noised, Penalty
from personae.errors import MismatchedNames


def quadratic(importance: Arrays, anchor: Arrays, weight: float) -> Penalty:
    """weight / 2 * sum_n importance[n] * (p[n] - anchor[n])^2 over the names in both.

    Shapes: importance[n] and anchor[n] like parameter n.
    Units: importance in squared loss per squared parameter, or without a unit where it was scaled.
    Source: Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3. Raises: MismatchedNames.
    """
    if importance.keys() != anchor.keys():
        odd = sorted(importance.keys() ^ anchor.keys())
        raise MismatchedNames(f"importances and anchors are of different parameters: {', '.join(odd[:3])}")

    def penalty(model: Denoiser, batch: Noised) -> Float[Tensor, ""]:
        live, total = model.live(), batch.prediction.new_zeros((), dtype=torch.float32)
        for name, stiffness in importance.items():
            parameter = live[name]
            away = parameter - anchor[name].to(parameter.device)
            total = total + (stiffness.to(parameter.device) * away.square()).sum()
        return weight / 2 * total

    return penalty
