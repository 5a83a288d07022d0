"""SPIRE: one shared backbone, one private embedding per client."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch

from personae.core import (
    Arrays,
    Client,
    OptimizerName,
    Select,
    State,
    Training,
    Update,
    Updates,
    divide,
    everything,
    neither,
    pick,
    stream,
    under,
)
from personae.errors import ConfigError
from personae.local.fit import fit, fit_together
from personae.personal.embedding import EMBEDDING, NULL_EMBEDDING


@dataclass(frozen=True)
class Spire:
    """One shared backbone trained by everybody, one vector per client that never leaves it.

    In a round, a client trains the backbone and its vector in one backward pass, sends the backbone, and keeps the
    vector with its Adam moments. A new client downloads the backbone once and trains its vector alone.

    `embedding_rate` is the vector's learning rate over the backbone's, under `embedding_optimizer`; for the first
    `embedding_warmup_rounds` rounds vectors stay at their random codes, since fast vectors under a young backbone can
    starve a mode for good. `embedding_noise` is the standard deviation of what is added to the vector while it trains
    in one round, and taken off afterwards, so that the backbone comes to know what lies around its clients' vectors;
    they begin as N(0, 1). The noise is our own.

    Source: Ozkara, Zhou, Diggavi 2025, arXiv:2506.12303. Its pseudocode and settings were not available to us: the
    joint step, the null vector, the warm-up and every default are ours. Expected numbers: docs/papers.md.
    """

    training: Training
    adapt: Training
    embedding_rate: float = 3.0
    embedding_optimizer: OptimizerName = "adam"
    embedding_warmup_rounds: int = 0
    embedding_noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.embedding_noise < math.inf:
            raise ConfigError(f"embedding_noise is {self.embedding_noise}, expected 0 or more")

    @property
    def personal(self) -> Select:
        return under("embedding.")

    def init(self, initial: Arrays) -> State:
        if EMBEDDING not in initial:
            raise ConfigError(
                "spire needs a backbone with a client embedding; add a [backbone.embedding] table to the recipe"
            )
        shared, _ = divide(initial, self.personal)
        return State(shared, facts={"round": 0})

    def broadcast(self, server: State, client: str) -> State:
        return server

    def local(self, client: Client, got: State, kept: State) -> tuple[Update, State]:
        warm = int(got.facts["round"]) >= self.embedding_warmup_rounds
        bent = replace(client, plan=replace(client.plan, rate=self._rate, optimizer=self._optimizer))
        with self._noise(client) if warm and self.embedding_noise else nullcontext():
            fitted = fit(bent, everything if warm else neither(self.personal), self.training, kept.extras)
        shared, own = divide(client.model.params(), self.personal)
        moments = pick(fitted.moments, lambda name: name.endswith(EMBEDDING) and not name.endswith(NULL_EMBEDDING))
        trained = warm or bool(kept.facts.get("trained", False))
        return client.update(State(shared), loss=fitted.loss), State(own, moments, {"trained": trained})

    def aggregate(self, server: State, updates: Updates) -> State:
        return State(updates.combined(), facts={"round": int(server.facts["round"]) + 1})

    def release(self, server: State) -> State:
        return server

    def personalize(self, client: Client, got: State, kept: State) -> State:
        if kept.facts.get("trained"):
            return State(kept.params)
        start = got.params[NULL_EMBEDDING].expand(len(client.together), -1)
        client.model.load({**client.model.params(), EMBEDDING: start}, len(start))
        fit_together(client.together, self.personal, self.adapt)  # the backbone is at rest: vectors do not meet
        return State(pick(client.model.params(), self.personal))

    @contextmanager
    def _noise(self, client: Client) -> Iterator[None]:
        vector, rng = client.model.live()[EMBEDDING], stream(client.rng.initial_seed(), "embedding noise")
        added = (self.embedding_noise * torch.randn(vector.shape, generator=rng)).to(vector)
        vector.data += added
        try:
            yield
        finally:
            vector.data -= added

    def _rate(self, name: str) -> float:
        return self.embedding_rate if self.personal(name) else 1.0

    def _optimizer(self, name: str) -> OptimizerName | None:
        return self.embedding_optimizer if self.personal(name) else None
