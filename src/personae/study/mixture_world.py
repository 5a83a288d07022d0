"""Federations on Gaussian mixtures: what everybody draws from is known, so every error is too.

Letters in shapes: `K` components, `D` width, `R` copies that train side by side, `B` batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from personae.aggregate.mean import mean
from personae.backbone.mixture import MixtureDenoiser
from personae.backbone.schedule import schedule
from personae.core import Arrays, ClientData, Images, Job, Method, Run, Select, Training, stream
from personae.data.mixture import gaussian_mixture
from personae.engine.in_process import InProcess
from personae.engine.population import Population
from personae.errors import ConfigError
from personae.personal.embedding import EMBEDDING
from personae.theory.components import divergence, matched

SCHEDULE = schedule(clip_sample=False)

MOST_IMAGES = 5000

KL_DRAWS = 2000
"""Points of every component that a divergence is measured on."""


@dataclass(frozen=True)
class World:
    """Clients that draw from the same Gaussians N(mean_k, I), each in shares of its own.

    `start` are the means that a denoiser begins with, drawn without a look at the true ones.
    """

    means: Float[Tensor, "K D"]
    start: Float[Tensor, "K D"]
    weights: Mapping[str, Float[Tensor, " K"]]
    seed: int

    def images(self, client: str, num: int) -> Images:
        """The client's first `num` draws: fewer are a part of more. Raises: ConfigError, above `MOST_IMAGES`."""
        if num > MOST_IMAGES:
            raise ConfigError(f"{num} images of a client were asked for, expected at most {MOST_IMAGES}")
        drawn = gaussian_mixture(self.weights[client], self.means, MOST_IMAGES, stream(self.seed, "images", client))
        return drawn[torch.arange(num)]

    def divergence(self, client: str, logits: Tensor, learned: Tensor) -> float:
        """KL(what the client draws from || learned) in nats."""
        return self._divergence(self.weights[client], client, logits, learned)

    def population_divergence(self, clients: Sequence[str], logits: Tensor, learned: Tensor) -> float:
        """The same for the average of some clients."""
        weights = torch.stack([self.weights[name] for name in clients]).mean(0)
        return self._divergence(weights, "population", logits, learned)

    def mean_errors(self, learned: Tensor) -> list[float]:
        """The distance of every true mean to the learned one that stands for it."""
        learned = learned.double()
        return (learned[matched(learned, self.means)] - self.means).norm(dim=1).tolist()

    def _divergence(self, weights: Tensor, key: str, logits: Tensor, learned: Tensor) -> float:
        rng = stream(self.seed, "divergence", key)
        return divergence(weights, self.means, logits.flatten().double(), learned.double(), KL_DRAWS, rng)


def make_world(
    clients: Sequence[str], *, num_components: int, width: int, norm: float, concentration: float, seed: int
) -> World:
    """Orthogonal means of one norm; weights from a Dirichlet distribution, 0.01 added to each so that none is zero."""
    turned = torch.linalg.qr(torch.randn(width, width, generator=stream(seed, "means"), dtype=torch.float64)).Q
    start = torch.randn(num_components, width, generator=stream(seed, "start"), dtype=torch.float64)
    weights = {}
    for name in clients:
        chance = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=stream(seed, "weights", name))))
        drawn = torch.from_numpy(chance.dirichlet([concentration] * num_components)) + 0.01
        weights[name] = drawn / drawn.sum()
    return World(norm * turned[:num_components], start, weights, seed)


def federate(
    world: World,
    names: Sequence[str],
    num_images: int,
    *,
    early: Method,
    late: Method,
    rounds: int,
    folder: Path,
) -> Run:
    """A run of the library's engine in `folder`, taken up where it was left.

    After 70 % of the rounds with `early`, it is given the rest of its rounds with `late`, the same method but slower.
    """
    data = {}
    for name in names:
        images = world.images(name, num_images)
        data[name] = ClientData(images, images)  # nothing is measured on held-out images: the density is known
    population = Population(MixtureDenoiser(world.start, SCHEDULE), data, names)
    first = round(0.7 * rounds)
    job = Job(early, population, population, first, world.seed, mean, folder=folder, checkpoint_every=10)
    InProcess().run(job, resume=folder.exists())
    return InProcess().run(replace(job, method=late, rounds=rounds), resume=True)


def adapt(
    start: Arrays,
    images: Sequence[Images],
    rngs: Sequence[torch.Generator],
    moving: Select,
    how: Training,
    stops: Sequence[int],
) -> dict[int, dict[str, Tensor]]:
    """What `fit` makes of a mixture denoiser for each of R clients, after each number of steps in `stops`.

    All R train side by side, each from its own draws and with everything copied, shared parameters too: what R calls of
    `fit` would do one after the other. Constant rate, no dropout, no clipping. Shapes: every value is [R, ...].
    """
    values = {name: nn.Parameter(value[None].repeat(len(images), *[1] * value.dim())) for name, value in start.items()}
    for name, value in values.items():
        value.requires_grad_(moving(name))
    optimizer = torch.optim.Adam(values.values(), lr=how.lr, fused=True)
    found = {}
    for step in range(1, max(stops) + 1):
        x_0, t, noise = _draws(images, rngs, how.batch_size)
        x_t = SCHEDULE.add_noise(x_0.flatten(0, 1), noise.flatten(0, 1), t.flatten()).view_as(x_0)
        predicted = predict_noise(values["means"], values[EMBEDDING], x_t, t)
        (predicted - noise).square().mean((1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in stops:
            found[step] = {name: value.detach().clone() for name, value in values.items()}
    return found


def predict_noise(
    means: Float[Tensor, "R K D"],
    logits: Float[Tensor, "R 1 K"],
    x_t: Float[Tensor, "R B D"],
    t: Tensor,
) -> Float[Tensor, "R B D"]:
    """`MixtureDenoiser.forward` for R denoisers at once, on SCHEDULE."""
    alpha_bar = SCHEDULE.alpha_bar[t][:, :, None]
    bias = alpha_bar.sqrt() * (x_t @ means.mT) - alpha_bar * means.square().sum(2)[:, None] / 2
    expected = (logits + bias).softmax(2) @ means
    return (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * expected)


def _draws(images: Sequence[Images], rngs: Sequence[torch.Generator], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch for each client, every generator asked for the same numbers in the same order as `fit` asks."""
    x_0, times, noises = [], [], []
    for own, rng in zip(images, rngs, strict=True):
        x_0.append(own.floats(torch.randint(len(own), (size,), generator=rng)))
        times.append(torch.randint(SCHEDULE.num_timesteps, (size,), generator=rng))
        torch.rand(size, generator=rng)  # which examples drop their condition: none
        noises.append(torch.randn(x_0[-1].shape, generator=rng))
    return torch.stack(x_0), torch.stack(times), torch.stack(noises)
