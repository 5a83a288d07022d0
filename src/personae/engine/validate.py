"""What a server accepts from a client, checked before anything is added up."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from personae.core import Arrays, Select, Update
from personae.errors import MismatchedNames, PrivacyError, RefusedUpdate


def check_update(
    update: Update, *, round: int, personal: Select, known: Arrays, names: Collection[str] | None, max_examples: int
) -> None:
    """Raise unless the update may be added up.

    `known` are the server's own parameters, for shapes and types; `names` is what the round's first client sent.

    Raises: PrivacyError, when a personal name was sent; MismatchedNames, when names differ from the first client's or
    the server's; RefusedUpdate, for shapes, types, values that are not finite, or an unusable weight.
    """
    who = f"client {update.client!r}"
    private = sorted(name for name in [*update.sent.params, *update.sent.extras] if personal(name.split("/")[-1]))
    if private:
        raise PrivacyError(
            f"{who} was about to send {len(private)} personal tensors: {', '.join(private[:3])} (round {round}). "
            "Nothing was sent; the method must keep them in the State that `local` returns second."
        )
    if names is not None and update.sent.params.keys() != set(names):
        extra, missing = sorted(update.sent.params.keys() - set(names)), sorted(set(names) - update.sent.params.keys())
        differences = [f"{len(n)} {what}: {', '.join(n[:3])}" for n, what in ((extra, "more"), (missing, "less")) if n]
        raise MismatchedNames(
            f"{who} sent other names than the round's first client: {'; '.join(differences)} (round {round}). "
            "All clients of one method send the same names; was this one started with another recipe?"
        )
    unknown = sorted(update.sent.params.keys() - known.keys())
    if unknown:
        raise MismatchedNames(
            f"{who} sent {len(unknown)} names that the server does not have: {', '.join(unknown[:3])} (round {round})"
        )
    for name, value in update.sent.params.items():
        expected = known[name]
        if value.shape != expected.shape or value.dtype != expected.dtype:
            raise RefusedUpdate(
                f"{who} sent {name} as {value.dtype} {list(value.shape)}, expected {expected.dtype} "
                f"{list(expected.shape)} (round {round})"
            )
    for name, value in [*update.sent.params.items(), *update.sent.extras.items()]:
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise RefusedUpdate(
                f"{who} sent values in {name} that are not finite (round {round}); "
                "its training diverged: lower the learning rate"
            )
    weight = update.num_examples
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int)
        or not math.isfinite(weight)
        or not 0 < weight <= max_examples
    ):
        raise RefusedUpdate(
            f"{who} claims {weight!r} examples, expected a whole number from 1 to {max_examples} (round {round})"
        )
