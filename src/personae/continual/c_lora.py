"""C-LoRA: every concept's adapter keeps off what earlier ones changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from personae.continual.contract import Layers, Need, Parts, adapters_and_changes, draw_with, may_move, words_of
from personae.continual.sequential_lora import WORD_RATE, rate_of_words
from personae.core import Client, Denoiser, Plan, State, Task, pick
from personae.errors import ConfigError
from personae.objective.overlap import overlap
from personae.personal.delta import DELTA, absorbed, is_delta
from personae.personal.lora import is_lora


@dataclass(frozen=True)
class CLora:
    """A fresh adapter for every concept, which keeps off what earlier concepts have changed.

    W_t = W_0 + the sum of earlier B A + B_t A_t, on keys and values of cross-attention; the new product pays
    `weight` times its overlap with that sum.

    The word starts at random numbers, as widely spread as the table of known tokens, and captions leave the noun out.

    Source: Smith et al. 2023, arXiv:2304.06027. Departures: the sum is kept, not
    every concept's factors; rank, rates and `weight` are ours, since the paper's are not known here, and so is the
    spread of a word's start.
    """

    rank: int = 16
    layers: Layers = "cross_kv"
    weight: float = 1e6
    word_rate: float = WORD_RATE

    @property
    def parts(self) -> Parts:
        return adapters_and_changes(self.rank, self.layers)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def said(self, task: Task) -> str:
        return task.word

    def begin(self, client: Client, kept: State) -> Plan:
        draw_word(client)
        past = {name.removeprefix(DELTA): value for name, value in pick(kept.params, is_delta).items()}
        penalties = (overlap(past, self.weight),) if past else ()
        return Plan(may_move(client.task, is_lora), penalties, rate_of_words(self.word_rate))

    def end(self, client: Client, kept: State) -> State:
        return State(absorbed(client.model.params()))

    def compose(self, model: Denoiser, kept: State, concepts: Sequence[str]) -> None:
        draw_with(model, kept)


def draw_word(client: Client) -> None:
    """Start the concept's word at random, with the standard deviation of the known tokens' vectors."""
    tables = {name: value for name, value in client.model.base().items() if name.endswith("token_embedding.weight")}
    fronts = dict(zip(sorted(words_of(client.task)), (tables[name] for name in sorted(tables)), strict=False))
    if not fronts:
        raise ConfigError("the model has no table of tokens that a new word could start as widely spread as")
    params = dict(client.model.params())
    for name, table in fronts.items():
        params[name] = torch.randn(params[name].shape, generator=client.rng) * table.float().std().cpu()
    client.model.load(params)
