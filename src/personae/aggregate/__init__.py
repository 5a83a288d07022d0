"""Rules from a round's updates to tensors."""

from collections.abc import Callable, Mapping
from functools import partial

from personae.aggregate.clip import clipped
from personae.aggregate.mean import mean, uniform_mean
from personae.aggregate.robust import NEEDED, bulyan, fewest, geometric_median, krum, median, multi_krum, trimmed_mean
from personae.core import Arrays, Rule

RULES: Mapping[str, Callable[..., Arrays]] = {
    "mean": mean,
    "uniform_mean": uniform_mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "multi_krum": multi_krum,
    "bulyan": bulyan,
    "geometric_median": geometric_median,
}
"""By the name that a recipe uses. Those in `NEEDED` are robust and take `attackers`."""


def rule_by_name(name: str, attackers: int = 0) -> Rule:
    """The rule, told how many attackers to withstand where it can withstand any."""
    return partial(RULES[name], attackers=attackers) if name in NEEDED else RULES[name]


__all__ = [
    "NEEDED",
    "RULES",
    "bulyan",
    "clipped",
    "fewest",
    "geometric_median",
    "krum",
    "mean",
    "median",
    "multi_krum",
    "rule_by_name",
    "trimmed_mean",
    "uniform_mean",
]
