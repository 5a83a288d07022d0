"""What a server accepts from a client, checked before anything is added up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from personae.core import Arrays, Select, Update
from personae.errors import MismatchedNames, PrivacyError, RefusedUpdate

DTYPES = frozenset(
    {torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool}
    | {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
)
"""What an update may hold."""


def check_privacy(update: Update, *, round: int, personal: Select) -> None:
    """Raises: PrivacyError, when an update holds a name that is personal."""
    private = [name for name in update.sent.params if personal(name)]
    private += [name for name in update.sent.extras if any(personal(part) for part in _endings(name))]
    if private:
        raise PrivacyError(
            f"client {update.client!r} was about to send {len(private)} personal tensors: "
            f"{', '.join(sorted(private)[:3])} (round {round}). Nothing was sent; the method must keep them in the "
            "State that `local` returns second."
        )


def check_update(update: Update, *, round: int, personal: Select, known: Arrays, max_examples: int) -> None:
    """Raise unless the update may be added up. `known` are the server's own parameters: names, shapes and types.

    Raises: PrivacyError, when a personal name was sent; MismatchedNames, when names are not the server's;
    RefusedUpdate, for shapes, types, values that are not finite, or an unusable weight.
    """
    check_privacy(update, round=round, personal=personal)
    who, sent = f"client {update.client!r}", update.sent
    if sent.params.keys() != known.keys():
        more, less = sorted(sent.params.keys() - known.keys()), sorted(known.keys() - sent.params.keys())
        found = [
            f"{len(names)} {what}: {', '.join(names[:3])}" for names, what in ((more, "more"), (less, "less")) if names
        ]
        raise MismatchedNames(
            f"{who} sent other names than the server has: {'; '.join(found)} (round {round}). "
            "All clients of one method send the same names; was this one started with another recipe?"
        )
    for name, value in sent.params.items():
        expected = known[name]
        if value.shape != expected.shape or value.dtype != expected.dtype:
            raise RefusedUpdate(
                f"{who} sent {name} as {value.dtype} {list(value.shape)}, expected {expected.dtype} "
                f"{list(expected.shape)} (round {round})"
            )
    for name, value in [*sent.params.items(), *sent.extras.items()]:
        if value.dtype not in DTYPES:
            raise RefusedUpdate(f"{who} sent {name} as {value.dtype}, which nobody adds up (round {round})")
        if not is_finite(value):
            raise RefusedUpdate(
                f"{who} sent values in {name} that are not finite (round {round}); "
                "its training diverged: lower the learning rate"
            )
    weight = update.num_examples
    if isinstance(weight, bool) or not isinstance(weight, int) or not 0 < weight <= max_examples:
        raise RefusedUpdate(
            f"{who} claims {weight!r} examples, expected a whole number from 1 to {max_examples} (round {round})"
        )


def _endings(name: str) -> list[str]:
    """The name and every part of it after a dot or slash: "moments.x.embedding.weight" ends in "embedding.weight"."""
    parts = name.replace("/", ".").split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def is_finite(value: Tensor) -> bool:
    """A finite sum proves it in one pass; only a sum that is not may be an overflow of finite values."""
    return not value.is_floating_point() or math.isfinite(value.sum().item()) or bool(torch.isfinite(value).all())
