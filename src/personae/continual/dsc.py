"""DSC: what was learned is distilled, together with one earlier concept's adapter, into the adapter that goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from personae.continual.contract import Layers, Need, Parts, adapters, caption, draw_with, may_move
from personae.continual.ewc import TEMPERATURE, Ewc, temperature
from personae.continual.sequential_lora import WORD_RATE, rate_of_words
from personae.core import Arrays, Batch, Client, Denoiser, Noised, Penalty, Plan, State, Task, Training, pick
from personae.errors import ConfigError
from personae.local.fit import fit
from personae.objective.dc_score import probabilities
from personae.personal.lora import is_lora

POOL = "pool."
"""Before the names of adapters that are kept: "pool.<concept>/<name>"."""


SHARED = ("rank", "layers", "word_rate")
"""What springs have in common with what they hold."""


@dataclass(frozen=True)
class Dsc:
    """One adapter that trains on; then what was learned and what an earlier concept left are distilled into it.

    After a concept is learned, on its own images:

        a * H(P_1, P_S) + a * H(P_2, P_S) + b * |e_1(c_n) - e_S(c_n)|^2 + b * |e_2(c_j) - e_S(c_j)|^2

    S is the adapter that goes on; teacher 1 is what was just learned, teacher 2 what an earlier concept j, drawn anew
    for every step, was consolidated to. P are diffusion-classifier scores of the plain noun, j and n; e are
    predictions, all for the same noised images; `a` is `score_weight`, b `noise_weight`. With `ewc` the springs of that
    method hold in both stretches of training.

    What is kept grows by one adapter a concept. Pictures are drawn with one adapter for all concepts.

    Source: Jha et al. 2025, arXiv:2410.00700, their "DSC" and "DSC EWC DC". Departures: weights, the direction of H
    (the teacher is the target), the temperature, and `consolidation` are ours.
    """

    consolidation: Training
    rank: int = 16
    layers: Layers = "cross_kv"
    score_weight: float = 0.1
    noise_weight: float = 1.0
    ewc: Ewc | None = None
    word_rate: float = WORD_RATE

    def __post_init__(self) -> None:
        if self.ewc is not None and any(getattr(self.ewc, name) != getattr(self, name) for name in SHARED):
            raise ConfigError(
                f"ewc's {', '.join(SHARED)} are not those of dsc itself: both have one adapter; write the same"
            )

    @property
    def parts(self) -> Parts:
        return adapters(self.rank, self.layers)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration_prompts"})

    def said(self, task: Task) -> str:
        return task.word

    def begin(self, client: Client, kept: State) -> Plan:
        return Plan(may_move(client.task, is_lora), self._springs(kept), rate_of_words(self.word_rate))

    def end(self, client: Client, kept: State) -> State:
        facts = {TEMPERATURE: temperature(client, kept, self.said)}
        pool = {name: value for name, value in kept.extras.items() if name.startswith(POOL)}
        if pool:
            loss = self._distilled(client, pool, facts[TEMPERATURE])
            fit(replace(client, plan=Plan(is_lora, self._springs(kept), loss=loss)), is_lora, self.consolidation)
        params = client.model.params()
        pool |= {f"{POOL}{client.task.name}/{name}": value for name, value in pick(params, is_lora).items()}
        extras = {} if self.ewc is None else self.ewc.consolidated(client, kept, facts)
        return State(params, {**pool, **extras}, facts)

    def _springs(self, kept: State) -> tuple[Penalty, ...]:
        return () if self.ewc is None else self.ewc.springs(kept)

    def _distilled(self, client: Client, pool: Arrays, heat: float) -> Callable[[Denoiser, Noised], Tensor]:
        """The loss above."""
        learned = pick(client.model.params(), is_lora)
        earlier = [(task, adapter) for task in client.tasks[:-1] if (adapter := _of(pool, task))]

        def loss(model: Denoiser, batch: Noised) -> Float[Tensor, ""]:
            task, adapter = earlier[int(torch.randint(len(earlier), (), generator=client.rng))]
            concepts = (caption(each, self.said(each)) for each in (task, client.task))
            captions = (caption(client.task, client.task.noun), *concepts)
            student = predictions(model, batch, captions)
            with torch.no_grad():
                first = predictions(model, batch, captions, learned)
                second = predictions(model, batch, captions, adapter)
            target = model.schedule.target(batch.x_0, batch.noise, batch.t)
            own = _errors(student, target) / heat
            scores = sum(
                cross_entropy(-own, probabilities(_errors(teacher, target), heat)) for teacher in (first, second)
            )
            noises = mse_loss(student[:, 2], first[:, 2]) + mse_loss(student[:, 1], second[:, 1])
            return self.score_weight * scores + self.noise_weight * noises

        return loss

    def compose(self, model: Denoiser, kept: State, concepts: Sequence[str]) -> None:
        draw_with(model, kept)


def predictions(
    model: Denoiser, batch: Noised, captions: Sequence[str], instead: Arrays | None = None
) -> Float[Tensor, "B K ..."]:
    """What the model says of each noised image under every caption; with `instead`, as if its parameters of these names
    had these values. It is the one network, called with other tensors."""
    count, device = len(captions), batch.x_t.device
    x_t, t = batch.x_t.repeat_interleave(count, 0), batch.t.repeat_interleave(count)
    plain = torch.zeros(len(x_t), dtype=torch.bool, device=device)
    cond = model.condition(Batch(x_t, plain, tuple(captions) * len(batch.x_t)))
    if instead is None:
        said = model.forward(x_t, t, cond)
    else:
        assert isinstance(model, nn.Module), "denoisers with adapters are modules"
        inside = {id(parameter): name for name, parameter in model.named_parameters()}
        live = model.live()
        values = {inside[id(live[name])]: value.to(device) for name, value in instead.items()}
        said = torch.func.functional_call(model, values, (x_t, t, cond))
    return said.float().unflatten(0, (len(batch.x_t), count))


def _errors(said: Float[Tensor, "B K ..."], target: Float[Tensor, "B ..."]) -> Float[Tensor, "B K"]:
    return (said - target[:, None]).square().flatten(2).mean(2)


def _of(pool: Arrays, task: Task) -> dict[str, Tensor]:
    front = f"{POOL}{task.name}/"
    return {name.removeprefix(front): value for name, value in pool.items() if name.startswith(front)}
