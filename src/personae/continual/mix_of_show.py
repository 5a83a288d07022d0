"""Mix-of-Show: adapters that were trained alone are fused into weights that do on each concept's inputs what its own
adapter does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personae.continual.closed_form import RIDGE, fused, gram
from personae.continual.contract import (
    Layers,
    Need,
    Parts,
    adapters_and_changes,
    caption,
    draw_with,
    may_move,
)
from personae.continual.custom_diffusion import untaught
from personae.continual.features import CAPTION, by_source, picture_grams, text_vectors
from personae.continual.sequential_lora import WORD_RATE, rate_of_words
from personae.core import Client, Denoiser, Plan, State, Task, stream
from personae.errors import ConfigError
from personae.personal.delta import DELTA
from personae.personal.lora import is_lora, products

GRAM, PULL = "gram.", "pull."
"""Before the name of what layers read: sum_i G_i, and sum_i dW_i G_i of all layers that read it, on top of each other
in the order of their names. In float64, since they are to fit each other where G_i has nearly no weight."""

GENERAL_PICTURES = 8
"""Of so many captions of other things, the drawing is recorded, too."""


@dataclass(frozen=True)
class MixOfShow:
    """Every concept has an adapter of its own; then weights are solved for that do for all concepts what these do.

    Each concept trains an adapter, dW = B A, and its word, from the untaught weights W_0. Then, in every layer, with
    X_i what the layer reads of concept i,

        W = argmin sum_i |(W_0 + dW_i) X_i - W X_i|^2,

    where a concept counts by the mean over its X. Keys and values of cross-attention read the captions "<rex>" and
    "a <rex>"; other layers what they get while the concept's own model draws "a <rex>" by `sampling_steps` steps. The
    adapter is dropped; two running sums are kept, whose size does not grow. Captions of other things are one concept
    more, that asks for no change, with `general_weight`; 0 is the paper's.

    Source: Gu et al. 2023, arXiv:2305.18292; rank, layers in the U-Net and the ratio of rates are theirs. Departures:
    a closed form in the place of L-BFGS; one word, of as many vectors as the run has it, in the place of two with an
    embedding for each layer; no masks; the text encoder does not move; captions are read whole, padding and all, and
    not at the word and the end alone; no penalty on where cross-attention looks, and no noise offset; the word starts
    as its noun; the mean, the ridge, guidance and `general_weight` are ours.
    """

    rank: int = 4
    layers: Layers = "self+cross"
    sampling_steps: int = 20
    general_weight: float = 1.0
    ridge: float = RIDGE
    word_rate: float = WORD_RATE

    def __post_init__(self) -> None:
        if self.sampling_steps < 1:
            raise ConfigError(f"mix_of_show: {self.sampling_steps} sampling_steps, expected at least 1")

    @property
    def parts(self) -> Parts:
        return adapters_and_changes(self.rank, self.layers)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration_prompts"} if self.general_weight else ())

    def said(self, task: Task) -> str:
        return task.word

    def begin(self, client: Client, kept: State) -> Plan:
        client.model.load(untaught(client.model.params()))
        return Plan(may_move(client.task, is_lora), rate=rate_of_words(self.word_rate))

    def end(self, client: Client, kept: State) -> State:
        params, said = client.model.params(), self.said(client.task)
        changes = products(params)
        readers = by_source(changes)
        told = caption(client.task, said)
        texts = tuple(dict.fromkeys((said, told, *client.data.train.captions)))
        own = self._grams(client.model, readers, texts, (told,), client.rng)
        sums = dict(kept.extras) or self._general(client, readers)
        after = {name: value for name, value in params.items() if not is_lora(name)}
        for source, names in readers.items():
            change = torch.cat([changes[name] for name in names]).double()
            sums[PULL + source] = sums.get(PULL + source, 0) + change @ own[source]
            sums[GRAM + source] = sums.get(GRAM + source, 0) + own[source]
            solved = fused(sums[PULL + source], sums[GRAM + source], self.ridge).float()
            parts = solved.split([len(changes[name]) for name in names])
            after |= {DELTA + name: part for name, part in zip(names, parts, strict=True)}
        return State(after, sums)

    def _general(self, client: Client, readers: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        """What the sums begin with: captions of other things, read by the untaught model, which is left as it was."""
        if not self.general_weight:
            return {}
        if not client.given.prompts:
            raise ConfigError("mix_of_show with a general_weight needs captions of other things, and was given none")
        model, prompts, params = client.model, client.given.prompts, client.model.params()
        model.load({name: torch.zeros_like(value) if is_lora(name) else value for name, value in params.items()})
        rng = stream(0, "captions of other things")
        grams = self._grams(model, readers, prompts, prompts[:GENERAL_PICTURES], rng)
        model.load(params)
        return {GRAM + source: self.general_weight * value for source, value in grams.items()}

    def _grams(
        self,
        model: Denoiser,
        readers: Mapping[str, Sequence[str]],
        told: Sequence[str],
        drawn: Sequence[str],
        rng: torch.Generator,
    ) -> dict[str, Tensor]:
        """Of what every layer reads while the model is told, or draws, these captions."""
        watched = {source: names[0] for source, names in readers.items() if source != CAPTION}
        grams = picture_grams(model, watched, drawn, rng, self.sampling_steps) if watched else {}
        return {**grams, CAPTION: gram(text_vectors(model, told).flatten(0, 1))}

    def compose(self, model: Denoiser, kept: State, concepts: Sequence[str]) -> None:
        draw_with(model, kept)
