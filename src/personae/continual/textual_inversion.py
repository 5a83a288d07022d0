"""Textual Inversion: a word for every concept, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from personae.continual.contract import Need, Parts, draw_with, may_move
from personae.core import Client, Denoiser, Plan, State, Task


@dataclass(frozen=True)
class TextualInversion:
    """Each concept trains its own word's vectors; the model never moves, so nothing can be forgotten.

    Of what the model cannot draw, a word cannot learn much: the method bounds the others' forgetting from below, and
    their learning, too.

    Source: Gal et al. 2022, arXiv:2208.01618. Departures: none.
    """

    @property
    def parts(self) -> Parts:
        return Parts()

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset()

    def said(self, task: Task) -> str:
        return task.word

    def begin(self, client: Client, kept: State) -> Plan:
        return Plan(may_move(client.task))

    def end(self, client: Client, kept: State) -> State:
        return State(client.model.params())

    def compose(self, model: Denoiser, kept: State, concepts: Sequence[str]) -> None:
        draw_with(model, kept)
