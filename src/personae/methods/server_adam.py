"""Adam on the server, around any method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from personae.core import Arrays, Client, Method, Select, State, Update, Updates, divide, under
from personae.errors import ConfigError
from personae.methods.server_ema import ServerEma

FIRST, SECOND = "server_adam.first.", "server_adam.second."


@dataclass(frozen=True)
class ServerAdam:
    """The round's change of the model is taken as a gradient by Adam on the server.

    With g = model - combined: m <- beta1 m + (1 - beta1) g and v <- beta2 v + (1 - beta2) g^2, both corrected for their
    zero start, and model <- model - lr m / (sqrt(v) + eps). Few local steps then suffice, so that clients drift little
    apart and the backbone learns to listen to their embeddings.

    Raises: ConfigError, around a ServerEma, which would average models that Adam then replaces.
    Source: Reddi et al. 2021, FedAdam, Algorithm 2, whose adaptivity tau is `eps` here. Departures: m and v start from
    zero with Adam's correction instead of from v_0 = tau^2; the small `eps` is Adam's, the paper tunes 1e-9 to 1e-1.
    """

    method: Method
    lr: float
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        inner: Any = self.method
        while inner is not None:
            if isinstance(inner, ServerEma):
                raise ConfigError("server_adam goes inside server_ema: ServerEma(ServerAdam(method, ...), ...)")
            inner = getattr(inner, "method", None)

    @property
    def personal(self) -> Select:
        return self.method.personal

    def init(self, initial: Arrays) -> State:
        server = self.method.init(initial)
        return replace(server, facts={**server.facts, "adam_rounds": 0})

    def broadcast(self, server: State, client: str) -> State:
        return self.method.broadcast(_without_moments(server), client)

    def local(self, client: Client, got: State, kept: State) -> tuple[Update, State]:
        return self.method.local(client, got, kept)

    def aggregate(self, server: State, updates: Updates) -> State:
        rounds = int(server.facts["adam_rounds"]) + 1
        after = self.method.aggregate(_without_moments(server), updates)
        params, extras = {}, dict(after.extras)
        for name, value in server.params.items():
            gradient = value - after.params[name]
            first = (1 - self.beta1) * gradient
            second = (1 - self.beta2) * gradient.square()
            if FIRST + name in server.extras:
                first += self.beta1 * server.extras[FIRST + name]
                second += self.beta2 * server.extras[SECOND + name]
            extras[FIRST + name], extras[SECOND + name] = first, second
            step = first / (1 - self.beta1**rounds)
            params[name] = value - self.lr * step / ((second / (1 - self.beta2**rounds)).sqrt() + self.eps)
        return State(params, extras, {**after.facts, "adam_rounds": rounds})

    def release(self, server: State) -> State:
        return self.method.release(_without_moments(server))

    def personalize(self, client: Client, got: State, kept: State) -> State:
        return self.method.personalize(client, got, kept)


def _without_moments(server: State) -> State:
    inner, _ = divide(server.extras, under(FIRST, SECOND))
    return replace(server, extras=inner, facts={k: v for k, v in server.facts.items() if k != "adam_rounds"})
