"""One adapter that trains on from concept to concept: what every other method is to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from personae.continual.contract import Layers, Need, Parts, adapters, draw_with, may_move
from personae.core import Client, Denoiser, Plan, State, Task
from personae.personal.lora import is_lora
from personae.personal.tokens import is_word

WORD_RATE = 10.0
"""Of the rate of adapters: at one and the same rate a word learns hardly anything of its concept. Ours."""


@dataclass(frozen=True)
class SequentialLora:
    """The adapter begins each concept as the one before left it; nothing protects what it knew.

    `word_rate` is the learning rate of the word over that of the adapter.

    Source: the variant "naive" of Staniszewski, Zaleska, Deja 2024, arXiv:2410.04891. Departures: rank, layers and
    rates are the recipe's; the concept's word trains beside the adapter.
    """

    rank: int = 16
    layers: Layers = "cross_kv"
    word_rate: float = WORD_RATE

    @property
    def parts(self) -> Parts:
        return adapters(self.rank, self.layers)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def said(self, task: Task) -> str:
        return task.word

    def begin(self, client: Client, kept: State) -> Plan:
        return Plan(may_move(client.task, is_lora), rate=rate_of_words(self.word_rate))

    def end(self, client: Client, kept: State) -> State:
        return State(client.model.params())

    def compose(self, model: Denoiser, kept: State, concepts: Sequence[str]) -> None:
        draw_with(model, kept)


def rate_of_words(factor: float) -> Callable[[str], float]:
    """The factor on the learning rate, by name: this one for words, 1 for all else."""
    return lambda name: factor if is_word(name) else 1.0
