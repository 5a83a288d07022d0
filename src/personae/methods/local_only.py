"""Everybody alone: what federation has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from personae.core import Arrays, Client, Select, State, Training, Update, Updates, everything
from personae.local.fit import fit


@dataclass(frozen=True)
class LocalOnly:
    """Each client trains a whole model on its own images and sends nothing.

    Everyone starts from values of its own. A new client trains for `adapt`.
    """

    training: Training
    adapt: Training

    @property
    def personal(self) -> Select:
        return everything

    def init(self, initial: Arrays) -> State:
        return State()

    def broadcast(self, server: State, client: str) -> State:
        return server

    def local(self, client: Client, got: State, kept: State) -> tuple[Update, State]:
        fitted = fit(client, everything, self.training, kept.extras)
        return client.update(State(), loss=fitted.loss), State(client.model.params(), fitted.moments)

    def aggregate(self, server: State, updates: Updates) -> State:
        return server

    def release(self, server: State) -> State:
        return server

    def personalize(self, client: Client, got: State, kept: State) -> State:
        if kept.params:
            return State(kept.params)
        fit(client, everything, self.adapt)
        return State(client.model.params())
