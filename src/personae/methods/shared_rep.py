"""Shared-Rep: a shared body and a personal tail, the second rival of SPIRE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from personae.core import Arrays, Client, Select, State, Training, Update, Updates, divide, everything, pick
from personae.errors import ConfigError
from personae.local.fit import fit


@dataclass(frozen=True)
class SharedRep:
    """The last layers stay with their client; everything before them is trained by everybody.

    In a round, a client trains the tail alone, then tail and body, and sends the body. A new client trains a tail from
    fresh values, since an average of tails would need them to be sent.

    `personal_layers` are beginnings of parameter names, for example "up_blocks.1." and "conv_out."; with a "*" before
    them, endings: "*.lora_B" on adapters, and no steps for the tail alone, is FedSA-LoRA, where A is averaged and B
    never leaves.

    Source: the split of Collins et al. 2021 (FedRep); "Shared-Rep" as a baseline in arXiv:2506.12303, details ours.
    FedSA-LoRA: Guo et al. 2024, arXiv:2410.01463.
    """

    training: Training
    tail: Training
    adapt: Training
    personal_layers: tuple[str, ...]

    @property
    def personal(self) -> Select:
        return _of(self.personal_layers)

    def init(self, initial: Arrays) -> State:
        lost = [layer for layer in self.personal_layers if not pick(initial, _of([layer]))]
        if lost or not self.personal_layers:
            raise ConfigError(
                f"shared_rep: no parameter starts, or after a * ends, with {', '.join(lost) or '(nothing given)'}; "
                f"the model has {', '.join(sorted({name.split('.')[0] + '.' for name in initial}))}"
            )
        shared, _ = divide(initial, self.personal)
        return State(shared)

    def broadcast(self, server: State, client: str) -> State:
        return server

    def local(self, client: Client, got: State, kept: State) -> tuple[Update, State]:
        fit(client, self.personal, self.tail)
        fitted = fit(client, everything, self.training)
        shared, own = divide(client.model.params(), self.personal)
        return client.update(State(shared), loss=fitted.loss), State(own)

    def aggregate(self, server: State, updates: Updates) -> State:
        return State(updates.combined())

    def release(self, server: State) -> State:
        return server

    def personalize(self, client: Client, got: State, kept: State) -> State:
        if kept.params:
            return State(kept.params)
        fit(client, self.personal, self.adapt)
        return State(pick(client.model.params(), self.personal))


def _of(layers: Sequence[str]) -> Select:
    """True for a name that starts with one of these, or ends with what is behind a "*"."""
    begin = tuple(layer for layer in layers if not layer.startswith("*"))
    end = tuple(layer[1:] for layer in layers if layer.startswith("*"))
    return lambda name: name.startswith(begin) or name.endswith(end)
