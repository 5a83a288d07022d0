"""The denoising loss of DDPM.

Letters in shapes: `B` batch, `*X` one x_0, an image or a vector; a name in braces is the argument of that name.
"""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor

from personae.core import Cond, Denoiser, Noised


def noised(
    model: Denoiser, x_0: Float[Tensor, " B *X"], t: Int64[Tensor, " B"], noise: Float[Tensor, " B *X"], cond: Cond
) -> Noised:
    """Add the noise and ask the model."""
    x_t = model.schedule.add_noise(x_0, noise, t)
    return Noised(x_0, t, noise, x_t, cond, model.forward(x_t, t, cond))


def denoising(model: Denoiser, batch: Noised) -> Float[Tensor, ""]:
    """Mean squared error between the prediction and the schedule's target.

    Source: Ho et al. 2020, Eq. 14 for noise; the sample and velocity targets weigh noise levels differently.
    """
    return denoising_each(model, batch, 1)[0]


def denoising_each(model: Denoiser, batch: Noised, num_clients: int) -> Float[Tensor, " {num_clients}"]:
    """The same for each of several clients, whose examples follow each other, equally many of each."""
    errors = batch.prediction.float() - model.schedule.target(batch.x_0, batch.noise, batch.t)
    return errors.square().reshape(num_clients, -1).mean(1)
