"""The denoising loss of held-out images, without the luck of the draw."""

from __future__ import annotations

import torch

from personae.core import Batch, Denoiser, Images, device_of, stream
from personae.errors import ConfigError, DataError
from personae.objective.denoising import denoising, noised


@torch.no_grad()
def denoising_loss(
    model: Denoiser,
    images: Images,
    *,
    grid: int = 10,
    seed: int = 0,
    draws: int = 1,
    batch_size: int = 256,
    unconditional: bool = False,
) -> float:
    """Mean squared error against the schedule's target, every image at every step of a fixed grid.

    The steps are the midpoints of `grid` equal intervals of [0, T). A noise depends on the seed, the image's place, the
    step and the draw alone: it is the same for every client and method, and for any batch size or number of images.
    Leaves the model in evaluation mode.

    Raises: ConfigError, when an argument is out of range; DataError, without images.
    """
    num_timesteps = model.schedule.num_timesteps
    if not 1 <= grid <= num_timesteps:
        raise ConfigError(f"grid is {grid}, expected 1 to {num_timesteps}, the number of timesteps")
    if draws < 1 or batch_size < 1:
        raise ConfigError(f"draws is {draws} and batch_size {batch_size}, expected both to be at least 1")
    if len(images) == 0:
        raise DataError("the denoising loss was asked for without held-out images; hold at least one image out")
    model.train(False)
    device = device_of(model)
    parts = torch.arange(len(images)).split(batch_size)
    x_0 = torch.cat([model.encode(images.floats(part).to(device)) for part in parts])
    times = torch.tensor([(2 * interval + 1) * num_timesteps // (2 * grid) for interval in range(grid)])
    rows = torch.cartesian_prod(torch.arange(len(images)), times, torch.arange(draws))
    total = 0.0
    for part in rows.split(batch_size):
        rngs = [stream(seed, "heldout", *row) for row in part.tolist()]
        noise = torch.stack([torch.randn(x_0.shape[1:], generator=rng) for rng in rngs])
        own = images[part[:, 0]]
        null = torch.full((len(part),), unconditional, device=device)
        cond = model.condition(Batch(own.floats().to(device), null, own.captions))
        batch = noised(model, x_0[part[:, 0].to(device)], part[:, 1].to(device), noise.to(device), cond)
        total += float(denoising(model, batch)) * len(part)
    return total / len(rows)
