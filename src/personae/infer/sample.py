"""Sampling with diffusers' samplers, from a generator of one's own, for one client or for several in one batch.

Letters in shapes: `B` batch, `N` images, `*X` an image or a vector; a name in braces is the argument of that name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from personae.core import Batch, Denoiser, device_of
from personae.errors import ConfigError
from personae.infer.samplers import Sampler, check_steps, kind_of, scheduler_for, walk
from personae.personal.embedding import clients_in


def sample(
    model: Denoiser,
    num_images: int,
    rng: torch.Generator,
    *,
    sampler: Sampler = "ddim",
    steps: int = 50,
    unconditional: bool = False,
    guidance: float = 1.0,
    captions: Sequence[str] = (),
    batch_size: int = 256,
) -> Float32[Tensor, "{num_images} ..."]:
    """Draw from what the model has loaded. Returned on the CPU, in the model's range.

    `captions`, one for each image or none, say what a text-to-image model is to draw. `unconditional` draws from the
    population (the null vector, the empty caption); `guidance` g gives prediction = null + g (own - null), and costs a
    second pass unless it is 1.

    Raises: ConfigError, when an argument is out of range.
    """
    return sample_together(
        model,
        num_images,
        [rng],
        sampler=sampler,
        steps=steps,
        unconditional=unconditional,
        guidance=guidance,
        captions=captions,
        batch_size=batch_size,
    )[0]


@torch.no_grad()
def sample_together(
    model: Denoiser,
    num_images: int,
    rngs: Sequence[torch.Generator],
    *,
    sampler: Sampler = "ddim",
    steps: int = 50,
    unconditional: bool = False,
    guidance: float = 1.0,
    captions: Sequence[str] = (),
    batch_size: int = 256,
) -> Float32[Tensor, "{len(rngs)} {num_images} ..."]:
    """The same for every client that the model holds, each from its own generator: what it would draw alone, up to
    rounding. As many clients go through the model at once as `batch_size` images have room for.

    Raises: ConfigError, when an argument is out of range, or the model holds another number of clients.
    """
    kind = kind_of(sampler)
    if num_images < 1:
        raise ConfigError(f"{num_images} images were asked for, expected at least 1")
    check_steps(sampler, steps, model.schedule.num_timesteps)
    if not math.isfinite(guidance):
        raise ConfigError(f"guidance is {guidance}, expected a finite number")
    if len(captions) not in (0, num_images):
        raise ConfigError(f"{len(captions)} captions were given for {num_images} images; give one for each, or none")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 1")
    if (held := clients_in(model.live())) != len(rngs):
        raise ConfigError(f"the model holds {held} clients, and {len(rngs)} generators were given; give one for each")
    device = device_of(model)
    nulls = [unconditional] if unconditional or guidance == 1.0 else [False, True]
    model.train(False)
    groups = []
    for clients in torch.arange(len(rngs)).split(1 if kind.alone else max(1, batch_size // num_images)):
        own, parts = [rngs[client] for client in clients.tolist()], []
        for start in range(0, num_images, batch_size):
            count = min(batch_size, num_images - start)
            scheduler = scheduler_for(sampler, model.schedule, steps)
            noise = torch.cat([torch.randn(count, *model.sample_shape, generator=rng) for rng in own])
            x_t = noise.to(device) * scheduler.init_noise_sigma
            rows = clients.to(device).repeat_interleave(count)
            told = tuple(captions[start : start + count]) * len(own)
            conds = [
                model.condition(Batch(x_t, torch.full((len(x_t),), null, device=device), told, rows)) for null in nulls
            ]
            x_0 = walk(model, kind, scheduler, x_t, conds, guidance, own)
            parts.append(model.decode(x_0).float().cpu().unflatten(0, (len(own), count)))
        groups.append(torch.cat(parts, dim=1))
    return torch.cat(groups)


def draw(
    model: Denoiser, captions: Sequence[str], rng: torch.Generator, *, steps: int = 25, guidance: float = 3.0
) -> UInt8[Tensor, "{len(captions)} ..."]:
    """What a text-to-image model draws of these captions, by DPM-Solver++ and with guidance.

    Raises: ConfigError, when an argument is out of range.
    """
    images = sample(
        model,
        len(captions),
        rng,
        sampler="dpmsolver++",
        steps=steps,
        guidance=guidance,
        captions=captions,
        batch_size=latents_at_once(model),
    )
    return to_bytes(images)


def latents_at_once(model: Denoiser) -> int:
    """How many go through a latent model together while nothing trains: of large ones only a few have room."""
    _, height, width = model.sample_shape
    return max(1, 2**15 // (height * width))


def to_bytes(images: Float[Tensor, " N *X"]) -> UInt8[Tensor, " N *X"]:
    """From [-1, 1] to 0..255, rounded; values outside are clamped."""
    return images.add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
