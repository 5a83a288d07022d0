"""A federation small enough to run dozens of times in a test."""

from __future__ import annotations

from pathlib import Path

import torch

from personae.aggregate.mean import mean
from personae.backbone.mlp import MLPDenoiser
from personae.backbone.schedule import schedule
from personae.core import ClientData, Images, Job, Method, Rule, stream
from personae.engine.population import Population


def tiny_population(
    num_clients: int = 3, *, num_new: int = 1, cohort_size: int | None = None, num_examples: int = 8, seed: int = 0
) -> Population:
    """Clients "c0", "c1", ... that train and "n0", ... that come afterwards, on a two-dimensional mixture.

    Each draws from bumps at (-2, 0) and (2, 0) in shares of its own; client k has `num_examples` + 4 k of them, so that
    weights matter. They share one `MLPDenoiser` with a client embedding of width 4, whose layers are "input.", "time.",
    "norm0.", "modulate0.", "widen0.", "narrow0." and "output.".
    """
    train = [f"c{k}" for k in range(num_clients)]
    new = [f"n{k}" for k in range(num_new)]
    data = {}
    for k, name in enumerate(train + new):
        share = (k + 1) / (len(train + new) + 1)
        data[name] = ClientData(
            _bumps(num_examples + 4 * k, share, stream(seed, "tiny", name, "train")),
            _bumps(8, share, stream(seed, "tiny", name, "heldout")),
        )
    model = MLPDenoiser((2,), schedule(20, clip_sample=False), width=16, num_blocks=1, embedding_width=4)
    return Population(model, data, train, new, cohort_size)


def tiny_job(
    method: Method,
    population: Population | None = None,
    *,
    rounds: int = 2,
    seed: int = 0,
    rule: Rule = mean,
    folder: Path | None = None,
    checkpoint_every: int = 1,
) -> Job:
    """A job for `method` on `population`, by default `tiny_population()`."""
    population = population or tiny_population()
    return Job(method, population, population, rounds, seed, rule, folder=folder, checkpoint_every=checkpoint_every)


def _bumps(num_examples: int, share: float, rng: torch.Generator) -> Images:
    """Shapes: pixels float32 [num_examples, 2]. `share` of them lie on the right."""
    points = torch.randn(num_examples, 2, generator=rng) * 0.3
    right = torch.arange(num_examples) < share * num_examples
    points[:, 0] += torch.where(right, 2.0, -2.0)
    return Images(points, right.long())
