"""One concept, learned."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from personae.continual.contract import Continual, load_kept
from personae.core import Client, State, Training, everything, stream
from personae.local.fit import fit


@dataclass(frozen=True)
class Learned:
    """What survives, the mean training loss, and what it took."""

    kept: State
    loss: float
    seconds: float


def learn(method: Continual, training: Training, client: Client, kept: State, seed: int) -> Learned:
    """Teach the concept that the client's tasks end with.

    What is new in the model starts from the seed, the client and the concept's name alone, so that a concept learned
    later, or again after a stop, gets the same bits.

    Raises: ConfigError, Diverged.
    """
    started = time.perf_counter()
    load_kept(client.model, kept, stream(seed, client.name, "init", client.task.name))
    bent = replace(client, plan=method.begin(client, kept))
    fitted = fit(bent, everything, training)
    after = method.end(replace(client, plan=client.plan), kept)
    return Learned(after, fitted.loss, time.perf_counter() - started)
