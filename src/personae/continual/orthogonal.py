"""Orthogonal Adaptation: concepts whose adapters read different directions of their layers' inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float32
from torch import Tensor

from personae.continual.contract import Layers, Need, Parts, adapters_and_changes, draw_with, may_move
from personae.continual.sequential_lora import WORD_RATE, rate_of_words
from personae.core import Client, Denoiser, Plan, State, Task, stream
from personae.errors import ConfigError
from personae.personal.delta import absorbed
from personae.personal.lora import A, is_lora

USED, ROOM = "used", "room"
"""For how many concepts rows have been taken, and for how many there are some left."""


@dataclass(frozen=True)
class Orthogonal:
    """Half of a fresh adapter trains for every concept; the other half reads directions that no other concept has.

    A_n is frozen: R rows of one orthonormal basis that no other concept has; B_n trains from zero, and `factor`
    times B_n A_n joins the sum. So A_i A_j^T = 0, exactly, until the basis is used up: after in / R concepts.

    Source: Po et al. 2024, arXiv:2312.02432. Departures: rows are disjoint, where the paper draws them
    independently, since here one knows those before, and a basis that is used up is refused, where one could begin a
    second pass; the paper's two tokens with an embedding per layer are one word; rank, layers and the factor 1 on what
    is summed are ours.
    """

    rank: int = 4
    layers: Layers = "cross_kv"
    factor: float = 1.0
    basis_seed: int = 0
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
        params = dict(client.model.params())
        number = int(kept.facts.get(USED, 0))
        widths = {value.shape[1] for name, value in params.items() if name.endswith(A)}
        if number >= (most := min(widths) // self.rank):
            raise ConfigError(
                f"concept {client.task.name!r} is number {number + 1}, and with rank {self.rank} there is room "
                f"for {most}: the narrowest layer reads {min(widths)} numbers; begin another run, with a lower rank"
            )
        facts = self._basis_facts(client)
        if changed := [key for key in facts if kept.facts.get(key, facts[key]) != facts[key]]:
            raise ConfigError(
                f"the {changed[0]} here is not the one that earlier concepts have rows of: another version of torch "
                "makes another; go on where the run began"
            )
        for name in (name for name in params if name.endswith(A)):
            params[name] = rows(self.basis_seed, params[name].shape[1], number, self.rank)
        client.model.load(params)
        return Plan(may_move(client.task, _is_b), rate=rate_of_words(self.word_rate))

    def end(self, client: Client, kept: State) -> State:
        widths = {value.shape[1] for name, value in client.model.live().items() if name.endswith(A)}
        used = int(kept.facts.get(USED, 0)) + 1
        facts = {**self._basis_facts(client), USED: used, ROOM: min(widths) // self.rank - used}
        return State(absorbed(client.model.params(), self.factor), facts=facts)

    def _basis_facts(self, client: Client) -> dict[str, int | float | str | bool]:
        widths = {value.shape[1] for name, value in client.model.live().items() if name.endswith(A)}
        return {f"basis {width}": _digest(self.basis_seed, width) for width in sorted(widths)}

    def compose(self, model: Denoiser, kept: State, concepts: Sequence[str]) -> None:
        draw_with(model, kept)


def rows(seed: int, width: int, number: int, rank: int) -> Float32[Tensor, "R D"]:
    """A concept's own rows of the basis of this width. They are orthonormal, and orthogonal to all other concepts'."""
    return _basis(seed, width)[number * rank : (number + 1) * rank].float()


@lru_cache(maxsize=8)
def _basis(seed: int, width: int) -> Tensor:
    """Orthonormal rows, uniformly at random."""
    drawn = torch.randn(width, width, generator=stream(seed, "basis", width), dtype=torch.float64)
    orthonormal, triangle = torch.linalg.qr(drawn)
    return (orthonormal * triangle.diagonal().sign()).T.contiguous()


def _digest(seed: int, width: int) -> str:
    """Of the basis to three digits, which rounding elsewhere leaves alone."""
    return hashlib.sha256((_basis(seed, width) * 1000).round().long().numpy().tobytes()).hexdigest()[:16]


def _is_b(name: str) -> bool:
    return is_lora(name) and not name.endswith(A)
