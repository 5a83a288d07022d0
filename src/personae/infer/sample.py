"""Sampling with diffusers' samplers, from a generator of one's own.

Letters in shapes: `N` images, `*X` one of them, an image or a vector; a name in braces is the argument of that name.
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from personae.core import Batch, Denoiser
from personae.errors import ConfigError

Sampler = Literal["ddpm", "ddim", "dpmsolver++"]

SAMPLERS = {
    "ddpm": (DDPMScheduler, {"timestep_spacing": "trailing"}),
    "ddim": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "dpmsolver++": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "timestep_spacing": "trailing", "final_sigmas_type": "zero"},
    ),
}


def check_steps(sampler: Sampler, steps: int, num_timesteps: int) -> None:
    """Raises: ConfigError, when the steps are out of range, or do not divide the timesteps evenly for DDPM and DDIM.

    diffusers' DDPM and DDIM go down by whole strides of T // steps: with a remainder the last steps would remove less
    noise than the schedule says, and every image would come out paler without a word.
    """
    if not 1 <= steps <= num_timesteps:
        raise ConfigError(f"{steps} sampling steps were asked for, expected 1 to {num_timesteps}")
    if sampler != "dpmsolver++" and num_timesteps % steps:
        near = sorted((n for n in range(1, num_timesteps + 1) if num_timesteps % n == 0), key=lambda n: abs(n - steps))
        raise ConfigError(
            f"{steps} sampling steps do not divide the {num_timesteps} timesteps, which {sampler} needs; "
            f"take {near[0]} or {near[1]}, or the sampler dpmsolver++"
        )


@torch.no_grad()
def sample(
    model: Denoiser,
    num_images: int,
    rng: torch.Generator,
    *,
    sampler: Sampler = "ddim",
    steps: int = 50,
    unconditional: bool = False,
    guidance: float = 1.0,
    batch_size: int = 256,
) -> Float32[Tensor, "{num_images} ..."]:
    """Draw from what the model has loaded. Returned on the CPU, in the model's range.

    `unconditional` draws from the population (the null vector); `guidance` g gives
    prediction = null + g (own - null), and costs a second pass unless it is 1.

    Raises: ConfigError, when an argument is out of range.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler is {sampler!r}; expected one of {', '.join(SAMPLERS)}")
    if num_images < 1:
        raise ConfigError(f"{num_images} images were asked for, expected at least 1")
    check_steps(sampler, steps, model.schedule.num_timesteps)
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 1")
    kind, options = SAMPLERS[sampler]
    device = next(iter(model.live().values())).device
    model.train(False)
    parts = []
    for start in range(0, num_images, batch_size):
        count = min(batch_size, num_images - start)
        scheduler = kind.from_config(dict(model.schedule.config), **options)  # type: ignore[attr-defined]
        scheduler.set_timesteps(steps)
        x_t = torch.randn(count, *model.sample_shape, generator=rng).to(device)
        conds = [
            model.condition(Batch(x_t, torch.full((count,), null, device=device)))
            for null in ([unconditional] if unconditional or guidance == 1.0 else [False, True])
        ]
        # For some counts, 61 of 1000 for example, rounding makes diffusers append a step at -1.
        for t in scheduler.timesteps[scheduler.timesteps >= 0].tolist():
            times = torch.full((count,), t, dtype=torch.long, device=device)
            predictions = [model.forward(x_t, times, cond) for cond in conds]
            guided = predictions[0] if len(predictions) == 1 else predictions[1].lerp(predictions[0], guidance)
            noise_source = {"generator": rng} if sampler == "ddpm" else {}
            x_t = scheduler.step(guided, t, x_t, **noise_source).prev_sample
        parts.append(model.decode(x_t).float().cpu())
    return torch.cat(parts)


def to_bytes(images: Float[Tensor, " N *X"]) -> UInt8[Tensor, " N *X"]:
    """From [-1, 1] to 0..255, rounded; values outside are clamped."""
    return images.add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
