"""A price for changing what was changed before."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from personae.core import Arrays, Denoiser, Noised, Penalty
from personae.personal.lora import products


def overlap(past: Arrays, weight: float) -> Penalty:
    """weight * sum_n |past[n] * (B A)[n]|^2 over the weights that adapters change; * is number by number.

    The paper's absolute value of `past` makes no difference to a square.

    Shapes: past[n] like weight n, by its name.
    Source: Smith et al. 2023, C-LoRA, arXiv:2304.06027.
    """

    def penalty(model: Denoiser, batch: Noised) -> Float[Tensor, ""]:
        total = batch.prediction.new_zeros((), dtype=torch.float32)
        for name, change in products(model.live()).items():
            total = total + (past[name].to(change.device) * change).square().sum()
        return weight * total

    return penalty
