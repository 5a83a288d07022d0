"""FedProx around any method."""

from __future__ import annotations

from dataclasses import dataclass, replace

from personae.core import Arrays, Client, Method, Select, State, Update, Updates
from personae.objective.proximal import proximal


@dataclass(frozen=True)
class Proximal:
    """Local training is pulled towards what the server sent, with weight `mu`.

    Source: Li et al. 2020, FedProx, Algorithm 2. Departure: a fixed number of steps instead of an inexactness test.
    """

    method: Method
    mu: float

    @property
    def personal(self) -> Select:
        return self.method.personal

    def init(self, initial: Arrays) -> State:
        return self.method.init(initial)

    def broadcast(self, server: State, client: str) -> State:
        return self.method.broadcast(server, client)

    def local(self, client: Client, got: State, kept: State) -> tuple[Update, State]:
        pull = (*client.plan.penalties, proximal(got.params, self.mu))
        return self.method.local(replace(client, plan=replace(client.plan, penalties=pull)), got, kept)

    def aggregate(self, server: State, updates: Updates) -> State:
        return self.method.aggregate(server, updates)

    def release(self, server: State) -> State:
        return self.method.release(server)

    def personalize(self, client: Client, got: State, kept: State) -> State:
        return self.method.personalize(client, got, kept)
