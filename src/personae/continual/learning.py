"""One concept, learned: stretches of training, after each of which it can be taken up again, and what survives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from personae.continual.contract import Continual, load_kept
from personae.core import Client, State, Training, everything, stream
from personae.local.fit import fit

LOSS = "loss"
"""A stretch's mean training loss, among the facts of what it leaves."""


def learn(
    method: Continual,
    training: Training,
    client: Client,
    kept: State,
    seed: int,
    *,
    stretches: int = 1,
    done: int = 0,
    reached: State | None = None,
    after: Callable[[int, State], None] = lambda number, state: None,
) -> State:
    """Teach the concept that the client's tasks end with, in `stretches` of `training`. Returns what survives.

    All draws come from the seed, the client, the concept and the stretch, so that a concept learned later, or taken up
    after `done` stretches from what `after` was last told, ends in the same bits.

    Raises: ConfigError, Diverged.
    """
    load_kept(client.model, kept, _draws(client, seed, "init"))
    client.rng.set_state(_draws(client, seed, "begin").get_state())
    bent = replace(client, plan=method.begin(client, kept))
    if reached is not None:
        client.model.load(reached.params)
    for number in range(done, stretches):
        client.rng.set_state(_draws(client, seed, "stretch", number).get_state())
        fitted = fit(bent, everything, training, reached.extras if reached is not None else None)
        reached = State(client.model.params(), fitted.moments, {LOSS: fitted.loss})
        after(number + 1, reached)
    client.rng.set_state(_draws(client, seed, "end").get_state())
    return method.end(client, kept)


def _draws(client: Client, seed: int, *keys: str | int) -> torch.Generator:
    return stream(seed, client.name, client.task.name, *keys)
