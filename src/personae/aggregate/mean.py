"""Averages of updates, added up as they come, so that one update is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from personae.core import Arrays, Update
from personae.errors import EmptyRound


def mean(updates: Iterable[Update]) -> Arrays:
    """Each client weighted by its number of examples. Source: McMahan et al. 2017, Algorithm 1.

    Raises: EmptyRound.
    """
    return _average(updates, lambda update: float(update.num_examples))


def uniform_mean(updates: Iterable[Update]) -> Arrays:
    """Every client weighted alike. Raises: EmptyRound."""
    return _average(updates, lambda update: 1.0)


def _average(updates: Iterable[Update], weight: Callable[[Update], float]) -> Arrays:
    """The running mean m <- m + (w / sum of w so far) (x - m): equal models average to exactly themselves."""
    total, averaged = 0.0, dict[str, Tensor]()
    for update in updates:
        total += weight(update)
        share = weight(update) / total
        averaged = {
            name: averaged[name].lerp_(value, share) if name in averaged else value.clone()
            for name, value in update.sent.params.items()
        }
        del update  # before the next client trains
    if not total:
        raise EmptyRound("there are no updates to combine; check the cohort, or which clients were asked for")
    return averaged
