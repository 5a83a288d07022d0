"""Custom Diffusion: each concept's keys and values become constraints, and the smallest change that meets all of them
is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personae.continual.closed_form import RIDGE, constrained, gram
from personae.continual.contract import Need, Parts, caption, draw_with, may_move
from personae.continual.dreambooth import with_prior
from personae.continual.features import text_features
from personae.continual.sequential_lora import rate_of_words
from personae.core import Arrays, Client, Denoiser, Plan, State, Task
from personae.errors import ConfigError
from personae.personal.delta import DELTA, Delta, is_delta

PAIR = "pair."
"""Before "<concept>/features" [P, D] and "<concept>/values" [P, M]: at these words' vectors, all keys and values,
side by side in the order of their weights' names, are to change by so much."""

CHANGE = "change"
"""The norm of the merged change over that of the weights. Above 1 is usual, in directions that other captions hardly
have; it explodes where concepts are told in nearly the same words and want other things."""


@dataclass(frozen=True)
class CustomDiffusion:
    """Keys and values of cross-attention train for every concept; then all concepts are solved for together.

    Each concept trains its word, and from the untaught weights W_0 keys and values of cross-attention, on
    DreamBooth's loss. Then, with C_i the text features of "<rex> dog" and "a <rex> dog", and V_i = W_i C_i what the
    trained weights make of them,

        W = argmin |(W - W_0) C_reg|   such that   W C_i = V_i for all concepts i so far,

    C_reg being the text features of captions of other things. The trained weights are dropped; C_i and V_i - W_0 C_i
    are kept, so that one after the other ends where all at once would.

    Source: Kumari et al. 2022, arXiv:2212.04488; keeping the pairs is ours. Departures: C_i begins at the word, since
    what stands before it reads the same for every concept; the word starts as its noun, not as a rare word; pictures
    are not resized with other captions, none has a region masked, and the first token's key and value train too.
    """

    prior_weight: float = 1.0
    ridge: float = RIDGE
    word_rate: float = 5.0

    @property
    def parts(self) -> Parts:
        return Parts(delta=Delta("cross_kv"))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration_prompts", *({"prior_images"} if self.prior_weight else ())})

    def said(self, task: Task) -> str:
        return f"{task.word} {task.noun}"

    def begin(self, client: Client, kept: State) -> Plan:
        client.model.load(untaught(client.model.params()))
        loss = with_prior(client, self.prior_weight) if self.prior_weight else None
        return Plan(may_move(client.task, is_delta), rate=rate_of_words(self.word_rate), loss=loss)

    def end(self, client: Client, kept: State) -> State:
        model, params, said = client.model, client.model.params(), self.said(client.task)
        names = sorted(filter(is_delta, params))
        trained = torch.cat([params[name] for name in names])
        features = text_features(model, (said, caption(client.task, said)))
        front = PAIR + client.task.name
        own = {f"{front}/features": features, f"{front}/values": (features.double() @ trained.double().T).float()}
        return self._merged(model, params, {**kept.extras, **own}, client.given.prompts)

    def forget(self, model: Denoiser, kept: State, prompts: Sequence[str]) -> State:
        """Each concept trained from the untaught weights, so that without its pair nothing of it is left."""
        return self._merged(model, kept.params, kept.extras, prompts)

    def _merged(self, model: Denoiser, params: Arrays, kept_pairs: Arrays, prompts: Sequence[str]) -> State:
        if not prompts:
            raise ConfigError("custom_diffusion needs captions of other things, and was given none")
        if not kept_pairs:
            return State(untaught(params), {}, {CHANGE: 0.0})
        names = sorted(filter(is_delta, params))
        merged = constrained(pairs(kept_pairs), gram(text_features(model, prompts)), self.ridge).float()
        parts = merged.split([len(params[name]) for name in names])
        weights = torch.cat([model.base()[name.removeprefix(DELTA)].cpu() for name in names])
        change = float(merged.norm() / weights.norm())
        return State({**params, **dict(zip(names, parts, strict=True))}, kept_pairs, {CHANGE: change})

    def compose(self, model: Denoiser, kept: State, concepts: Sequence[str]) -> None:
        draw_with(model, kept)


def untaught(params: Arrays) -> dict[str, Tensor]:
    """The same with no change of weights."""
    return {name: torch.zeros_like(value) if is_delta(name) else value for name, value in params.items()}


def pairs(extras: Arrays) -> list[tuple[Tensor, Tensor]]:
    """Features and values of all concepts, in the order of their names."""
    fronts = sorted(name.removesuffix("/features") for name in extras if name.endswith("/features"))
    return [(extras[f"{front}/features"], extras[f"{front}/values"]) for front in fronts]
