"""DreamBooth with an adapter: beside the concept's images, others of the same noun that the untaught model drew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from personae.continual.contract import Layers, Need, Parts, adapters, draw_with, may_move
from personae.continual.sequential_lora import WORD_RATE, rate_of_words
from personae.core import Batch, Client, Denoiser, Loss, Noised, Plan, State, Task
from personae.errors import ConfigError
from personae.objective.denoising import denoising, noised
from personae.personal.lora import is_lora


@dataclass(frozen=True)
class DreamBooth:
    """One adapter that trains on, beside pictures that the untaught model draws of the same noun.

    loss(images, "a <rex> dog") + prior_weight * loss(pictures of the untaught model, "a dog"), as many of each in a
    step.

    The adapter trains on from concept to concept: the noun is protected, and no earlier concept is.

    Source: Ruiz et al. 2022, arXiv:2208.12242, section 3.2. Departures: an adapter in the place of all weights, as in
    diffusers' script; a new word that is trained, too, in the place of a rare one that stays as it is.
    """

    rank: int = 16
    layers: Layers = "cross_kv"
    prior_weight: float = 1.0
    word_rate: float = WORD_RATE

    @property
    def parts(self) -> Parts:
        return adapters(self.rank, self.layers)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"prior_images"} if self.prior_weight else ())

    def said(self, task: Task) -> str:
        return f"{task.word} {task.noun}"

    def begin(self, client: Client, kept: State) -> Plan:
        loss = with_prior(client, self.prior_weight) if self.prior_weight else None
        return Plan(may_move(client.task, is_lora), rate=rate_of_words(self.word_rate), loss=loss)

    def end(self, client: Client, kept: State) -> State:
        return State(client.model.params())

    def compose(self, model: Denoiser, kept: State, concepts: Sequence[str]) -> None:
        draw_with(model, kept)


def with_prior(client: Client, weight: float) -> Loss:
    """The denoising loss, and `weight` times that of as many pictures that the untaught model drew.

    Raises: ConfigError, when there are none.
    """
    prior, rng = client.given.prior, client.rng
    if prior is None:
        raise ConfigError("a prior_weight needs pictures that the untaught model drew, and the client was given none")

    def loss(model: Denoiser, batch: Noised) -> Float[Tensor, ""]:
        count, device = len(batch.x_0), batch.x_0.device
        index = torch.randint(len(prior), (count,), generator=rng)
        t = torch.randint(model.schedule.num_timesteps, (count,), generator=rng)
        noise = torch.randn(batch.x_0.shape, generator=rng)
        with torch.autocast(device.type, enabled=False):  # as `fit` encodes the concept's own
            x_0 = model.encode(prior.floats(index).to(device))
        told = tuple(prior.captions[at] for at in index.tolist())
        cond = model.condition(Batch(x_0, torch.zeros(count, dtype=torch.bool, device=device), told))
        others = noised(model, x_0, t.to(device), noise.to(device), cond)
        return denoising(model, batch) + weight * denoising(model, others)

    return loss
