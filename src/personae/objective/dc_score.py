"""Diffusion-classifier scores: which of several captions helps best to denoise a picture.

By Bayes' rule with all captions equally likely, and the variational bound in the place of the likelihood,
p(c_k | x) ~ softmax_k(-E |target - prediction(x_t, t, c_k)|^2). Only differences between captions count, so all of them
are asked about the same noises at the same timesteps: on a toy this makes a difference two orders of magnitude less
noisy.

Source: Li et al. 2023, arXiv:2303.16203, equations 4 to 6; timesteps evenly spaced, one noise at each, and successive
halving as in their published code. The temperature is ours: they take the smallest error and never form the softmax.

Letters in shapes: `B` pictures, `K` captions, `S` draws, `*X` one x_0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from personae.core import Batch, Denoiser, device_of
from personae.errors import ConfigError


@dataclass(frozen=True)
class NoiseBank:
    """Timesteps and noises that every caption is asked about."""

    t: Int64[Tensor, " S"]
    noise: Float[Tensor, " S *X"]

    def __len__(self) -> int:
        return len(self.t)


def noise_bank(model: Denoiser, draws: int, rng: torch.Generator) -> NoiseBank:
    """Timesteps evenly spaced, the first at half a stride, with one noise each, in an order drawn by lot.

    So the first ones of a bank are spread over the schedule, too. Raises: ConfigError, for no draws or too many.
    """
    most = model.schedule.num_timesteps
    if not 1 <= draws <= most:
        raise ConfigError(f"draws is {draws}, expected 1 to {most}, the number of timesteps")
    even = torch.tensor([(2 * draw + 1) * most // (2 * draws) for draw in range(draws)])
    order = torch.randperm(draws, generator=rng)
    return NoiseBank(even[order], torch.randn(draws, *model.sample_shape, generator=rng))


def candidate_errors(
    model: Denoiser,
    x_0: Float[Tensor, " B *X"],
    t: Int64[Tensor, " B"],
    noise: Float[Tensor, " B *X"],
    captions: Sequence[str],
) -> Float[Tensor, "B K"]:
    """Mean squared error of each picture at one timestep and noise, under every caption; with gradients.

    One forward of B x K examples.
    """
    count = len(captions)
    x_t = model.schedule.add_noise(x_0, noise, t).repeat_interleave(count, 0)
    told = tuple(captions) * len(x_0)
    plain = torch.zeros(len(x_t), dtype=torch.bool, device=x_0.device)
    prediction = model.forward(x_t, t.repeat_interleave(count), model.condition(Batch(x_t, plain, told))).float()
    target = model.schedule.target(x_0, noise, t).repeat_interleave(count, 0)
    return (prediction - target).square().flatten(1).mean(1).view(len(x_0), count)


@torch.no_grad()
def dc_errors(
    model: Denoiser,
    x_0: Float[Tensor, " B *X"],
    captions: Sequence[str],
    bank: NoiseBank,
    *,
    batch_size: int = 256,
) -> Float[Tensor, "B K"]:
    """The same, mean over a whole bank: B x K x S forwards of one example, so many at a time. On the CPU.

    Leaves the model in evaluation mode. Raises: ConfigError, without captions, or with some twice.
    """
    _check(captions)
    model.train(False)
    device, together = device_of(model), max(1, batch_size // len(captions))
    rows = torch.cartesian_prod(torch.arange(len(bank)), torch.arange(len(x_0)))
    total = torch.zeros(len(x_0), len(captions), dtype=torch.float64)
    for part in rows.split(together):
        draw, which = part[:, 0], part[:, 1]
        own, t, noise = x_0[which.to(x_0.device)], bank.t[draw], bank.noise[draw]
        errors = candidate_errors(model, own.to(device), t.to(device), noise.to(device), captions)
        total.index_add_(0, which, errors.cpu().double())
    return (total / len(bank)).float()


def calibrated(errors: Float[Tensor, "B K"]) -> float:
    """A temperature at which the softmax is neither flat nor all on one: the median over pictures of the standard
    deviation over captions. Ours; fixed once, on pictures of the first concept, and kept.

    Raises: ConfigError, when all captions are the same to the model.
    """
    spread = float(errors.std(dim=1).median()) if errors.shape[1] > 1 else 0.0
    if not spread > 0:
        raise ConfigError(
            f"a temperature needs two or more captions that the model tells apart; of {errors.shape[1]} it tells none"
        )
    return spread


def probabilities(errors: Float[Tensor, "B K"], temperature: float) -> Float[Tensor, "B K"]:
    """softmax(-error / temperature): how likely each caption is."""
    return torch.softmax(-errors / temperature, dim=1)


def cross_entropy(errors: Float[Tensor, "B K"], true: Int64[Tensor, " B"], temperature: float) -> Float[Tensor, ""]:
    """-log of the true captions' probability, mean over pictures.

    Its gradient is ((1 - p_n) d e_n - sum_{k != n} p_k d e_k) / temperature: it lowers the true caption's error, and
    raises that of others by how likely they look.
    """
    return torch.nn.functional.cross_entropy(-errors / temperature, true)


@dataclass(frozen=True)
class Stage:
    """Of successive halving: after `draws` draws in all, the `keep` captions with the smallest errors go on."""

    draws: int
    keep: int


@torch.no_grad()
def classify(
    model: Denoiser,
    x_0: Float[Tensor, " B *X"],
    captions: Sequence[str],
    bank: NoiseBank,
    stages: Sequence[Stage] = (),
    *,
    batch_size: int = 256,
) -> Int64[Tensor, " B"]:
    """The place of each picture's likeliest caption. With stages, captions that fall behind are asked no more.

    Raises: ConfigError, when the stages do not ask for more draws and fewer captions each, within the bank.
    """
    _check(captions)
    _check_stages(stages, len(captions), len(bank))
    if not stages:
        return dc_errors(model, x_0, captions, bank, batch_size=batch_size).argmin(1)
    return torch.tensor([_halved(model, one[None], captions, bank, stages, batch_size) for one in x_0])


def _halved(
    model: Denoiser,
    x_0: Float[Tensor, "1 ..."],
    captions: Sequence[str],
    bank: NoiseBank,
    stages: Sequence[Stage],
    batch_size: int,
) -> int:
    left, sums, done = list(range(len(captions))), torch.zeros(len(captions)), 0
    for stage in (*stages, Stage(len(bank), 1)):
        part = NoiseBank(bank.t[done : stage.draws], bank.noise[done : stage.draws])
        if len(part):
            found = dc_errors(model, x_0, [captions[k] for k in left], part, batch_size=batch_size)[0]
            sums[left] += found * len(part)
        left = sorted(left, key=lambda k: (float(sums[k]), k))[: stage.keep]
        done = stage.draws
        if len(left) == 1:
            break
    return left[0]


def _check(captions: Sequence[str]) -> None:
    if isinstance(captions, str) or not captions or len(set(captions)) < len(captions):
        raise ConfigError(f"captions are {captions!r}, expected one or more, each once")


def _check_stages(stages: Sequence[Stage], captions: int, draws: int) -> None:
    counts = [0, *(stage.draws for stage in stages)]
    kept = [captions, *(stage.keep for stage in stages)]
    if counts != sorted(set(counts)) or counts[-1] > draws or kept != sorted(kept, reverse=True) or kept[-1] < 1:
        raise ConfigError(
            f"stages are {[(stage.draws, stage.keep) for stage in stages]}; expected more draws each, {draws} at most, "
            f"and no more captions than before, {captions} at first and 1 at least"
        )
