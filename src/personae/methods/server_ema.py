"""An exponential moving average of the server's model, around any method."""

from __future__ import annotations

from dataclasses import dataclass, replace

from personae.core import Arrays, Client, Method, Select, State, Update, Updates, divide, under

AVERAGE = "average."


@dataclass(frozen=True)
class ServerEma:
    """Clients train on the running model; what is released is its average over rounds.

    average <- d * average + (1 - d) * model after each round, with d = min(decay, (1 + r) / (10 + r)) in round r, so
    that the untrained start is soon forgotten. The average lies in the server's extras under "average.".

    Source: Ho et al. 2020 average per step; per round, and the ramp, are our choice.
    """

    method: Method
    decay: float

    @property
    def personal(self) -> Select:
        return self.method.personal

    def init(self, initial: Arrays) -> State:
        server = self.method.init(initial)
        return _with_average(server, server.params, 0)

    def broadcast(self, server: State, client: str) -> State:
        return self.method.broadcast(_without_average(server), client)

    def local(self, client: Client, got: State, kept: State) -> tuple[Update, State]:
        return self.method.local(client, got, kept)

    def aggregate(self, server: State, updates: Updates) -> State:
        rounds = int(server.facts["ema_rounds"])
        after = self.method.aggregate(_without_average(server), updates)
        weight = 1 - min(self.decay, (1 + rounds) / (10 + rounds))
        average = {name: server.extras[AVERAGE + name].lerp(value, weight) for name, value in after.params.items()}
        return _with_average(after, average, rounds + 1)

    def release(self, server: State) -> State:
        average = {name: server.extras[AVERAGE + name] for name in server.params}
        return self.method.release(replace(_without_average(server), params=average))

    def personalize(self, client: Client, got: State, kept: State) -> State:
        return self.method.personalize(client, got, kept)


def _with_average(server: State, average: Arrays, rounds: int) -> State:
    extras = {**server.extras, **{AVERAGE + name: value for name, value in average.items()}}
    return replace(server, extras=extras, facts={**server.facts, "ema_rounds": rounds})


def _without_average(server: State) -> State:
    inner, _ = divide(server.extras, under(AVERAGE))
    return replace(server, extras=inner, facts={k: v for k, v in server.facts.items() if k != "ema_rounds"})
