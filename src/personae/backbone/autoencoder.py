"""Training an autoencoder of latents, which denoisers then never move.

Letters in shapes: `N` pictures, `B` batch, `C H W` picture, `c h w` latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, l1_loss, mse_loss

from personae.core import Arrays, Training
from personae.errors import ConfigError, Diverged

KL_WEIGHT = 1e-6
"""As in latent diffusion (Rombach et al. 2022, section G): latents are held near unit size, no more."""

EDGE_WEIGHT = 1.0
"""Of differences between neighbouring pixels, beside the pixels themselves: drawn outlines are thin. Our choice."""


@dataclass(frozen=True)
class Learned:
    """Mean losses of a stretch: the whole, and the mean squared error of pixels in [-1, 1] alone."""

    loss: float
    error: float
    moments: Arrays


def fit_autoencoder(
    vae: AutoencoderKL,
    pixels: UInt8[Tensor, "N C H W"],
    how: Training,
    rng: torch.Generator,
    moments: Arrays | None = None,
) -> Learned:
    """Train in place, on pictures drawn with replacement. `moments` go on from an earlier stretch's.

    Of `how`, steps, lr, batch_size, weight_decay and max_grad_norm count; the optimizer is AdamW.

    Raises: ConfigError, when another optimizer or a schedule is asked for; Diverged, when the loss is not finite.
    """

    def losses(index: Int64[Tensor, " B"]) -> tuple[Tensor, Tensor]:
        images = floats(pixels[index])
        latents = vae.encode(images).latent_dist
        noise = torch.randn(latents.mean.shape, generator=rng)
        made = vae.decode(latents.mean + latents.std * noise).sample
        return autoencoding(images, made) + KL_WEIGHT * latents.kl().mean(), mse_loss(made, images)

    return _fit(vae, dict(vae.named_parameters()), losses, len(pixels), how, rng, moments or {})


def fit_decoder(
    vae: AutoencoderKL,
    latents: Float[Tensor, "N c h w"],
    pixels: UInt8[Tensor, "N C H W"],
    how: Training,
    rng: torch.Generator,
    moments: Arrays | None = None,
) -> Learned:
    """Train the decoder alone, on pictures and their latents, which stay what they are: a denoiser that has learned
    them can stay, too. Otherwise as `fit_autoencoder`; latents are of unit variance, as a denoiser gives them."""
    decoding = {n: p for n, p in vae.named_parameters() if n.startswith(("decoder.", "post_quant_conv."))}
    scale = float(vae.config.scaling_factor)

    def losses(index: Int64[Tensor, " B"]) -> tuple[Tensor, Tensor]:
        images = floats(pixels[index])
        made = vae.decode(latents[index] / scale).sample
        return autoencoding(images, made), mse_loss(made, images)

    return _fit(vae, decoding, losses, len(pixels), how, rng, moments or {})


def _fit(
    vae: AutoencoderKL,
    named: Mapping[str, nn.Parameter],
    losses: Callable[[Int64[Tensor, " B"]], tuple[Tensor, Tensor]],
    count: int,
    how: Training,
    rng: torch.Generator,
    moments: Arrays,
) -> Learned:
    """`losses` gives what is lowered and the squared error, of the pictures with these numbers out of `count`."""
    if how.optimizer != "adamw" or how.decay != "constant" or how.warmup_steps or how.accumulate != 1:
        raise ConfigError("an autoencoder trains with optimizer 'adamw' at a constant rate, one batch in each step")
    optimizer = torch.optim.AdamW(named.values(), lr=how.lr, weight_decay=how.weight_decay, fused=True)
    for key, value in moments.items():
        slot, name = key.split(".", 1)
        optimizer.state[named[name]][slot] = value.clone()
    vae.train()
    for parameter in named.values():
        parameter.requires_grad_(True)
    total = error = 0.0
    for step in range(how.steps):
        loss, squared = losses(torch.randint(count, (how.batch_size,), generator=rng))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if how.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(named.values(), how.max_grad_norm)
        optimizer.step()
        total, error = total + loss.item() / how.steps, error + squared.item() / how.steps
        if not math.isfinite(total):
            raise Diverged("autoencoder", f"the loss is not finite after {step + 1} steps; lower lr (now {how.lr:g})")
    vae.requires_grad_(False).eval()
    kept = {f"{slot}.{name}": value.detach().clone() for name, parameter in named.items()
            for slot, value in optimizer.state[parameter].items()}  # fmt: skip
    return Learned(total, error, kept)


def floats(pixels: UInt8[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """In [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


def autoencoding(images: Float[Tensor, "B C H W"], made: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    """Absolute error of pixels, of their differences to the right and below, and of 4 x 4 means."""
    edges = sum(l1_loss(images.diff(dim=axis), made.diff(dim=axis)) for axis in (2, 3))
    return l1_loss(made, images) + EDGE_WEIGHT * edges + l1_loss(avg_pool2d(images, 4), avg_pool2d(made, 4))


@torch.no_grad()
def set_scale(vae: AutoencoderKL, pixels: UInt8[Tensor, "N C H W"]) -> None:
    """Choose the factor that gives these pictures' latents a standard deviation of 1.

    Their mean stays: pipelines of Stable Diffusion's kind know a factor only.
    """
    parts = [vae.encode(floats(part)).latent_dist.mean for part in pixels.split(256)]
    vae.register_to_config(scaling_factor=float(1 / torch.cat(parts).std()))
