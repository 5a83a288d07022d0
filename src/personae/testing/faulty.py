"""Methods and denoisers with one planted fault each: what the contracts are there to catch.

Each wraps a sound one and hands on whatever it does not spoil. Never train with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from personae.core import Arrays, Client, Denoiser, Method, State, Update, Updates, divide, pick

# --- methods ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UploadsItsEmbedding:
    """The personal part travels: in the open, or disguised under `name` in the extras."""

    method: Method
    name: str | None = None

    def __getattr__(self, name: str) -> Any:
        return _handed_on(self, name)

    def local(self, client: Client, got: State, kept: State) -> tuple[Update, State]:
        update, kept = self.method.local(client, got, kept)
        own = pick(client.model.params(), self.method.personal)
        extras = own if self.name is None else {f"{self.name}{i}": value for i, value in enumerate(own.values())}
        return replace(update, sent=replace(update.sent, extras={**update.sent.extras, **extras})), kept


@dataclass(frozen=True)
class UploadsAPicture:
    """The first of the client's images travels, as one row of what looks like a table of statistics."""

    method: Method

    def __getattr__(self, name: str) -> Any:
        return _handed_on(self, name)

    def local(self, client: Client, got: State, kept: State) -> tuple[Update, State]:
        update, kept = self.method.local(client, got, kept)
        picture = client.data.train.floats()[0].flatten()
        extras = {**update.sent.extras, "statistics": torch.stack([torch.zeros_like(picture), picture])}
        return replace(update, sent=replace(update.sent, extras=extras)), kept


@dataclass(frozen=True)
class RemembersInAggregate:
    """Momentum on the server, held by the object and not by the state: gone after a restart."""

    method: Method
    last: dict[str, Tensor] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return _handed_on(self, name)

    def aggregate(self, server: State, updates: Updates) -> State:
        after = self.method.aggregate(server, updates)
        params = {name: value.lerp(self.last.get(name, value), 0.5) for name, value in after.params.items()}
        self.last.update(params)
        return replace(after, params=params)


@dataclass(frozen=True)
class DependsOnArrivalOrder:
    """A running average that halves at every update: the last to arrive counts most."""

    method: Method

    def __getattr__(self, name: str) -> Any:
        return _handed_on(self, name)

    def aggregate(self, server: State, updates: Updates) -> State:
        params: dict[str, Tensor] = {}
        for update in updates:
            params = {name: value.lerp(params.get(name, value), 0.5) for name, value in update.sent.params.items()}
        return replace(server, params=params)


@dataclass(frozen=True)
class MutatesServerState:
    """The new model is written over the old one, which somebody may still hold."""

    method: Method

    def __getattr__(self, name: str) -> Any:
        return _handed_on(self, name)

    def aggregate(self, server: State, updates: Updates) -> State:
        after = self.method.aggregate(server, updates)
        for name, value in after.params.items():
            server.params[name].copy_(value)
        return after


@dataclass(frozen=True)
class LeaksBetweenClients:
    """A client without a part of its own starts from that of the client before."""

    method: Method
    left: dict[str, Tensor] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return _handed_on(self, name)

    def local(self, client: Client, got: State, kept: State) -> tuple[Update, State]:
        if not kept.params:
            client.model.load({**client.model.params(), **self.left})
        update, kept = self.method.local(client, got, kept)
        self.left.update(divide(kept.params, self.method.personal)[1])
        return update, kept


@dataclass(frozen=True)
class MixesUpNewcomers:
    """Clients that personalize in one batch get each other's parts."""

    method: Method

    def __getattr__(self, name: str) -> Any:
        return _handed_on(self, name)

    def personalize(self, client: Client, got: State, kept: State) -> State:
        personal = self.method.personalize(client, got, kept)
        return replace(personal, params={name: value.flip(0) for name, value in personal.params.items()})


# --- denoisers -------------------------------------------------------------------------------------------------------


class LoadsOnTop:
    """`load` adds to what is there, as adapters do that are merged and never taken out."""

    def __init__(self, model: Denoiser) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def load(self, params: Arrays, num_clients: int = 1) -> None:
        before = self.model.params()
        self.model.load(params, num_clients)
        self.model.load({name: before[name] + value for name, value in params.items()}, num_clients)


class SharesItsTensors:
    """`params` are the model's own tensors: what one client sent changes while the next one trains."""

    def __init__(self, model: Denoiser) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def params(self) -> Arrays:
        live: Mapping[str, nn.Parameter] = self.model.live()
        return {name: value.detach() for name, value in live.items()}


def _handed_on(faulty: Any, name: str) -> Any:
    # Before its fields are there (while it is copied), it has nothing to hand on.
    if name.startswith("__") or "method" not in vars(faulty):
        raise AttributeError(name)
    return getattr(faulty.method, name)
