"""Everybody alone: what federation has to beat."""

from __future__ import annotations

from dataclasses import dataclass, replace

from personae.core import Arrays, Client, Select, State, Training, Update, Updates, everything
from personae.errors import ConfigError
from personae.local.fit import Fitted, fit
from personae.personal.embedding import EMBEDDING
from personae.personal.tokens import TOKENS


@dataclass(frozen=True)
class LocalOnly:
    """Each client trains a whole model on its own images and sends nothing.

    Everyone starts from values of its own. A new client trains for `adapt`. `vector_rate` is the learning rate of new
    words and of the client's vector over that of all else: vectors want larger steps than weights.
    """

    training: Training
    adapt: Training
    vector_rate: float = 1.0

    def __post_init__(self) -> None:
        if not self.vector_rate > 0:
            raise ConfigError(f"vector_rate is {self.vector_rate}, expected above 0")

    @property
    def personal(self) -> Select:
        return everything

    def init(self, initial: Arrays) -> State:
        return State()

    def broadcast(self, server: State, client: str) -> State:
        return server

    def local(self, client: Client, got: State, kept: State) -> tuple[Update, State]:
        fitted = self._fit(client, self.training, kept.extras)
        return client.update(State(), loss=fitted.loss), State(client.model.params(), fitted.moments)

    def aggregate(self, server: State, updates: Updates) -> State:
        return server

    def release(self, server: State) -> State:
        return server

    def personalize(self, client: Client, got: State, kept: State) -> State:
        if kept.params:
            return State(kept.params)
        self._fit(client, self.adapt)
        return State(client.model.params())

    def _fit(self, client: Client, how: Training, moments: Arrays | None = None) -> Fitted:
        rate = client.plan.rate
        bent = replace(client, plan=replace(client.plan, rate=lambda name: rate(name) * self._rate(name)))
        return fit(bent, everything, how, moments)

    def _rate(self, name: str) -> float:
        return self.vector_rate if name == EMBEDDING or name.startswith(TOKENS) else 1.0
