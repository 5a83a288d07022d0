"""FedAvg, then fine-tuning: the first rival of SPIRE."""

from __future__ import annotations

from dataclasses import dataclass

from personae.core import Arrays, Client, Select, State, Training, Update, Updates, everything, nothing
from personae.local.fit import fit


@dataclass(frozen=True)
class FedAvgFT:
    """Everybody trains one whole model; afterwards each client continues alone on all weights.

    With `adapt.steps` 0 it is plain FedAvg. Moments start afresh in every round.

    Source: McMahan et al. 2017, Algorithm 1; "FedAvg+FT" as a baseline in arXiv:2506.12303, details ours.
    """

    training: Training
    adapt: Training

    @property
    def personal(self) -> Select:
        return nothing

    def init(self, initial: Arrays) -> State:
        return State(initial)

    def broadcast(self, server: State, client: str) -> State:
        return server

    def local(self, client: Client, got: State, kept: State) -> tuple[Update, State]:
        fitted = fit(client, everything, self.training)
        return client.update(State(client.model.params()), loss=fitted.loss), kept

    def aggregate(self, server: State, updates: Updates) -> State:
        return State(updates.combined())

    def release(self, server: State) -> State:
        return server

    def personalize(self, client: Client, got: State, kept: State) -> State:
        if self.adapt.steps == 0:
            return State()
        fit(client, everything, self.adapt)
        return State(client.model.params())
