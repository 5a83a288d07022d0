"""A fresh adapter for every concept, which then joins what is there: the sum, or the larger of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from personae.continual.contract import Layers, Need, Parts, adapters_and_changes, draw_with, may_move
from personae.continual.sequential_lora import WORD_RATE, rate_of_words
from personae.core import Arrays, Client, Denoiser, Plan, State, Task
from personae.personal.delta import absorbed, is_delta
from personae.personal.lora import is_lora


@dataclass(frozen=True)
class MergedLora:
    """A fresh adapter for every concept, which then goes into the weights.

    `merge` says how a concept's change q joins the change p of all before it: "sum" p + q ("merge_init" in the
    source, merge and reinitialise), or "larger", number by number whichever of p and q has the larger magnitude, the
    later one on ties ("magmax"; it depends on the order).

    Source: Staniszewski, Zaleska, Deja 2024, arXiv:2410.04891. Departures: as in SequentialLora; changes are kept in
    float32 beside the base, where theirs go into the weights. "larger" trains on the base with what is merged so far.
    """

    rank: int = 16
    layers: Layers = "cross_kv"
    merge: Literal["sum", "larger"] = "sum"
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
        return Plan(may_move(client.task, is_lora), rate=rate_of_words(self.word_rate))

    def end(self, client: Client, kept: State) -> State:
        after = absorbed(client.model.params())
        return State(after if self.merge == "sum" else larger(kept.params, after))

    def compose(self, model: Denoiser, kept: State, concepts: Sequence[str]) -> None:
        draw_with(model, kept)


def larger(before: Arrays, after: Arrays) -> dict[str, Tensor]:
    """Of each change of weights: what it was, or what the last concept added, whichever is larger in magnitude."""
    merged = dict(after)
    for name in filter(is_delta, before):
        was, added = before[name], after[name] - before[name]
        merged[name] = added.where(added.abs() >= was.abs(), was)
    return merged
