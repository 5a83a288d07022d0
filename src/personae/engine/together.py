"""Many new clients in one batch, each as if it had personalized alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from personae.core import Client, Denoiser, Job, Method, State, pick, stream
from personae.errors import ClientFailed, ConfigError, Diverged, ShapeError
from personae.personal.embedding import is_per_client


def personalize_many(job: Job, released: State, names: Sequence[str]) -> Mapping[str, State]:
    """What clients that are met for the first time sample with, by name: for each that of `personalize_one`, up to
    rounding.

    A step's batch holds the examples of all of them, so memory grows with their number.

    Raises: ConfigError, when the method's personal part is not per client; ClientFailed, which names the client.
    """
    if not names:
        return {}
    clients = [_client(job, name) for name in names]
    model = clients[0].model
    check_per_client(job.method, model)
    drawn = [model.initial(stream(job.seed, name, "init"), is_per_client) for name in names]
    rows = {part: torch.cat([values[part] for values in drawn]) for part in drawn[0]}
    model.load({**released.params, **rows}, len(names))
    try:
        personal = job.method.personalize(replace(clients[0], beside=tuple(clients[1:])), released, State())
    except Diverged as error:
        raise ClientFailed(error.client, job.rounds, "personalize", error) from error
    _check_rows(personal, {part: value.shape for part, value in rows.items()})
    return {
        name: replace(personal, params={part: value[row : row + 1].clone() for part, value in personal.params.items()})
        for row, name in enumerate(names)
    }


def check_per_client(method: Method, model: Denoiser) -> None:
    """Raises: ConfigError, unless a client's own part has a row of its own beside the other clients'."""
    live = model.live()
    own = sorted(pick(live, method.personal))
    if own and all(map(is_per_client, own)):
        return
    inner: Any = method
    while (wrapped := getattr(inner, "method", None)) is not None:
        inner = wrapped
    part = "the whole model" if len(own) in (0, len(live)) else f"{', '.join(own[:3])}{', ...' if len(own) > 3 else ''}"
    raise ConfigError(
        f"{type(inner).__name__} gives every client a part of its own that cannot share a batch with another client's: "
        f"{part}. Only a client embedding can; take these clients one after the other"
    )


def _client(job: Job, name: str) -> Client:
    try:
        return job.site.client(name, "personalize", job.seed)
    except Exception as error:
        raise ClientFailed(name, job.rounds, "personalize", error) from error


def _check_rows(personal: State, expected: Mapping[str, torch.Size]) -> None:
    """Nobody may be given what belongs to somebody else."""
    found = {name: value.shape for name, value in personal.params.items()}
    if found != expected or personal.extras:
        raise ShapeError(
            f"`personalize` returned {_told(found)}{' and extras' if personal.extras else ''} for several clients, "
            f"expected {_told(expected)} alone: a row for each"
        )


def _told(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "nothing"
