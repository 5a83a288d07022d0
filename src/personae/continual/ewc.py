"""Elastic weight consolidation of one adapter, whose importances may come from diffusion-classifier scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personae.continual.contract import Layers, Need, Parts, adapters, caption, draw_with, may_move
from personae.continual.sequential_lora import WORD_RATE, rate_of_words
from personae.core import Arrays, Client, Denoiser, Facts, Penalty, Plan, State, Task, device_of, stream
from personae.errors import ConfigError
from personae.objective.dc_score import calibrated, candidate_errors, cross_entropy, dc_errors, noise_bank
from personae.objective.importance import squared_gradients
from personae.objective.quadratic import quadratic
from personae.personal.lora import is_lora

IMPORTANCE = "importance."
TEMPERATURE = "temperature"

CLASSES = 8
"""Captions of other things beside the concept's own, and noises for each, by which the temperature is found."""


@dataclass(frozen=True)
class Ewc:
    """The adapter trains on from concept to concept, tied to where it was by a spring on every number.

        loss        denoising + weight / 2 * sum F (p - p*)^2
        importance  F <- decay * F + F_n / mean F_n,  F_n = E g^2,  g = grad(denoising + dc_weight * cross-entropy)

    The cross-entropy is that of the concept's own caption among diffusion-classifier scores of itself, of the plain
    noun and of at most `candidates` earlier concepts, drawn by lot for every one of `draws` draws. With dc_weight 0 it
    is LoRA with plain EWC.

    Source: Jha et al. 2025, arXiv:2410.00700, their "EWC DC" and "LoRA EWC"; Kirkpatrick et al. 2017, arXiv:1612.00796.
    Departures: the paper's weights, rates, rank and number of draws are not known here, so all are ours; so are the
    scores' temperature, the scaling of each concept's importances to mean 1, and that the score is not trained on. An
    image's own caption stands for its concept among the candidates, whatever else it says of the image; the others are
    said in the run's wording.
    """

    rank: int = 16
    layers: Layers = "cross_kv"
    weight: float = 10.0
    dc_weight: float = 1.0
    decay: float = 1.0
    draws: int = 200
    candidates: int = 5
    word_rate: float = WORD_RATE

    def __post_init__(self) -> None:
        if self.draws < 1 or self.candidates < 0:
            raise ConfigError(
                f"ewc: {self.draws} draws and {self.candidates} candidates, expected at least 1 and at least 0"
            )

    @property
    def parts(self) -> Parts:
        return adapters(self.rank, self.layers)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration_prompts"} if self.dc_weight else ())

    def said(self, task: Task) -> str:
        return task.word

    def begin(self, client: Client, kept: State) -> Plan:
        return Plan(may_move(client.task, is_lora), self.springs(kept), rate_of_words(self.word_rate))

    def springs(self, kept: State) -> tuple[Penalty, ...]:
        """None for the first concept."""
        importance = importances(kept)
        anchor = {name: kept.params[name] for name in importance}
        return (quadratic(importance, anchor, self.weight),) if importance else ()

    def end(self, client: Client, kept: State) -> State:
        facts: Facts = {TEMPERATURE: temperature(client, kept, self.said)} if self.dc_weight else {}
        return State(client.model.params(), self.consolidated(client, kept, facts), facts)

    def consolidated(self, client: Client, kept: State, facts: Facts) -> Arrays:
        """The importances after this concept, as extras."""
        live = {name: parameter for name, parameter in client.model.live().items() if is_lora(name)}
        own = squared_gradients(live, lambda: self._draw(client, facts), self.draws)
        scale = float(sum(value.sum() for value in own.values())) / sum(value.numel() for value in own.values())
        if not scale > 0:
            raise ConfigError(f"concept {client.task.name!r} moves nothing that could matter; was it trained at all?")
        before = importances(kept)
        return {
            IMPORTANCE + name: value.cpu() / scale + self.decay * before.get(name, torch.zeros(()))
            for name, value in own.items()
        }

    def _draw(self, client: Client, facts: Facts) -> Tensor:
        """The loss of one image at one timestep and noise."""
        model, rng, images = client.model, client.rng, client.data.train
        index = torch.randint(len(images), (1,), generator=rng)
        t = torch.randint(model.schedule.num_timesteps, (1,), generator=rng)
        noise = torch.randn(1, *model.sample_shape, generator=rng)
        captions = [images.captions[int(index)], *self._others(client)] if self.dc_weight else []
        captions = list(dict.fromkeys(captions or [images.captions[int(index)]]))
        device = device_of(model)
        with torch.no_grad():
            x_0 = model.encode(images.floats(index).to(device))
        errors = candidate_errors(model, x_0, t.to(device), noise.to(device), captions)
        loss = errors[0, 0]
        if self.dc_weight:
            own = torch.zeros(1, dtype=torch.int64, device=device)
            loss = loss + self.dc_weight * cross_entropy(errors, own, float(facts[TEMPERATURE]))
        return loss

    def _others(self, client: Client) -> list[str]:
        """The plain noun, and some earlier concepts."""
        past = client.tasks[:-1]
        drawn = torch.randperm(len(past), generator=client.rng)[: self.candidates].tolist()
        concepts = (caption(past[at], self.said(past[at])) for at in drawn)
        return [caption(client.task, client.task.noun), *concepts]

    def compose(self, model: Denoiser, kept: State, concepts: Sequence[str]) -> None:
        draw_with(model, kept)


def importances(kept: State) -> dict[str, Tensor]:
    """By the parameter's name."""
    return {n.removeprefix(IMPORTANCE): value for n, value in kept.extras.items() if n.startswith(IMPORTANCE)}


def temperature(client: Client, kept: State, said: Callable[[Task], str]) -> float:
    """What diffusion-classifier scores are divided by: as the first concept's images and the untaught model have it.

    Asked among the concept's caption, that of its noun, and CLASSES others. Leaves the model as it is.
    """
    if TEMPERATURE in kept.facts:
        return float(kept.facts[TEMPERATURE])
    model, params = client.model, client.model.params()
    model.load(model.initial(stream(0, "calibration")))
    own = (caption(client.task, said(client.task)), caption(client.task, client.task.noun))
    captions = [*own, *client.given.prompts[:CLASSES]]
    device = device_of(model)
    with torch.no_grad():
        x_0 = model.encode(client.data.train.floats().to(device))
    bank = noise_bank(model, CLASSES, stream(0, "calibration noises"))
    found = calibrated(dc_errors(model, x_0, list(dict.fromkeys(captions)), bank))
    model.load(params)
    return found
