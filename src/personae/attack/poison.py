"""Some clients send poison, around any method: to measure what a rule withstands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from personae.core import Arrays, Client, Method, Select, State, Update, Updates, stream
from personae.errors import ConfigError

Attack = Literal["sign_flip", "scale", "noise", "shift", "nan"]


@dataclass(frozen=True)
class Poisoned:
    """The named `clients` train as honest ones do, and then send something else in place of their `params`.

    With d = sent - got, what an honest client would change:
    - "sign_flip" sends got - strength d, away from where training leads;
    - "scale" sends got + strength d;
    - "noise" sends got + strength rms(d) N(0, 1), tensor by tensor, from the client's own generator;
    - "shift" sends sent + strength std(d) s, tensor by tensor, with random signs s that are the same for every attacker
      and every round: too small a step to stand out, and never averaged away;
    - "nan" sends nan.

    Goes inside all other wrappers, since those on the server must see what arrives. What attackers keep, their metrics
    and their claimed number of examples are an honest client's.

    Raises: ConfigError, for a client that is named twice, or a `strength` that the attack lacks or does not take.
    Source: "shift" after Baruch, Baruch, Goldberg 2019, "A little is enough", arXiv:1902.06156, whose attackers send
    mean - z std, both over the attackers' updates, number by number. Departures: no attacker sees another's update, so
    the mean is its own update and the deviation that of its own change within a tensor; signs are random instead of
    all equal; z is `strength`, not derived from the number of clients. The others are common knowledge.
    """

    method: Method
    attack: Attack
    clients: tuple[str, ...]
    strength: float | None = None

    def __post_init__(self) -> None:
        problems = []
        if len(set(self.clients)) != len(self.clients):
            problems.append(f"clients names some twice: {', '.join(self.clients)}")
        if self.attack == "nan" and self.strength is not None:
            problems.append("strength: 'nan' has none; leave it out")
        if self.attack != "nan" and (self.strength is None or not 0 < self.strength < math.inf):
            problems.append(f"strength is {self.strength}, expected a number above 0 for {self.attack!r}")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def personal(self) -> Select:
        return self.method.personal

    def init(self, initial: Arrays) -> State:
        return self.method.init(initial)

    def broadcast(self, server: State, client: str) -> State:
        return self.method.broadcast(server, client)

    def local(self, client: Client, got: State, kept: State) -> tuple[Update, State]:
        update, kept = self.method.local(client, got, kept)
        if client.name not in self.clients:
            return update, kept
        strength, send = self.strength or 0.0, ATTACKS[self.attack]
        # By name, so that draws do not depend on the order in which a method lists its tensors.
        poison = {n: send(n, v, got.params[n], strength, client.rng) for n, v in sorted(update.sent.params.items())}
        return replace(update, sent=replace(update.sent, params=poison)), kept

    def aggregate(self, server: State, updates: Updates) -> State:
        return self.method.aggregate(server, updates)

    def release(self, server: State) -> State:
        return self.method.release(server)

    def personalize(self, client: Client, got: State, kept: State) -> State:
        return self.method.personalize(client, got, kept)


# --- what is sent in place of one tensor: (name, honest value, value got, strength, the client's generator) ----------

Send = Callable[[str, Tensor, Tensor, float, torch.Generator], Tensor]


def _sign_flip(name: str, sent: Tensor, got: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    return got - strength * (sent - got)


def _scale(name: str, sent: Tensor, got: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    return got + strength * (sent - got)


def _noise(name: str, sent: Tensor, got: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    drawn = torch.randn(got.shape, generator=rng).to(got)
    return got + strength * (sent - got).square().mean().sqrt() * drawn


def _shift(name: str, sent: Tensor, got: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    signs = torch.randint(2, got.shape, generator=stream(0, "poisoned", name)).to(got) * 2 - 1
    return sent + strength * (sent - got).std(correction=0) * signs


def _nan(name: str, sent: Tensor, got: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    return torch.full_like(sent, math.nan)


ATTACKS: Mapping[Attack, Send] = {
    "sign_flip": _sign_flip,
    "scale": _scale,
    "noise": _noise,
    "shift": _shift,
    "nan": _nan,
}
