"""Means with their uncertainty, paired differences and slopes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from personae.errors import DataError

BySeed = Mapping[tuple[int, Any], float]
"""Values by seed, and by a client or whatever else tells them apart."""


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval; without an interval (nan) when there is one value only."""

    mean: float
    low: float
    high: float
    num: int

    def excludes(self, value: float) -> bool:
        return self.low > value or self.high < value

    def told(self, form: str) -> str:
        """With each number in this form, such as "+.3g"; a single value without an interval."""
        return f"{self.mean:{form}}" + (f" ({self.low:{form}} to {self.high:{form}})" if self.num > 1 else "")

    def starred(self, form: str) -> str:
        """The same, with a star where 0 is excluded."""
        return self.told(form) + "*" * self.excludes(0)


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs: over all values, and over the means of each seed's values.

    Values of a seed share its trained models, which the first takes for independent and the second does not; with few
    seeds that errs to the other side. With one seed the second is no interval.
    """

    pooled: Interval
    over_seeds: Interval

    @property
    def numbers(self) -> dict[str, Any]:
        """As summaries hold it: the pooled interval's, and beside them those over seeds."""
        return {**vars(self.pooled), "over_seeds": vars(self.over_seeds)}

    @property
    def holds_over_seeds(self) -> bool:
        return self.pooled.excludes(0) and self.over_seeds.excludes(0)

    @property
    def reservation(self) -> str:
        """What has to be said beside a pooled interval that excludes 0."""
        if self.holds_over_seeds or not self.pooled.excludes(0):
            return ""
        return " (of one seed)" if self.over_seeds.num == 1 else " (not over seeds alone)"


def interval(values: Sequence[float]) -> Interval:
    """Student's t on the values, taken as independent. Raises: DataError, when there are none."""
    if not values:
        raise DataError("an interval was asked for without values")
    mean, num = float(np.mean(values)), len(values)
    if num == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf(0.975, num - 1) * np.std(values, ddof=1) / math.sqrt(num))
    return Interval(mean, mean - half, mean + half, num)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The mean of ours - theirs over pairs that share everything but the method."""
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])


def difference(apart: BySeed) -> Difference:
    """From ours minus theirs, one by one. Raises: DataError, when there are none."""
    return Difference(interval(list(apart.values())), interval(_means(apart)))


def by_seeds(ours: BySeed, theirs: BySeed) -> Difference | None:
    """The same over values by seed and whatever else they share, of what both have; None where that is nothing."""
    apart = {at: ours[at] - theirs[at] for at in ours if at in theirs}
    return difference(apart) if apart else None


def unpaired_by_seeds(ours: BySeed, theirs: BySeed) -> Difference | None:
    """Of values that are not one another's: Welch's interval, and the differences of the seeds' means.

    None, where a side has fewer than two values, or there is no seed that both have.
    """
    seeds = {seed for seed, _ in ours} & {seed for seed, _ in theirs}
    ours, theirs = ({at: value for at, value in side.items() if at[0] in seeds} for side in (ours, theirs))
    if min(len(ours), len(theirs)) < 2:
        return None
    return Difference(unpaired(list(ours.values()), list(theirs.values())), paired(_means(ours), _means(theirs)))


def _means(values: BySeed) -> list[float]:
    """Of each seed, in their order."""
    seeds = sorted({seed for seed, _ in values})
    return [float(np.mean([value for at, value in values.items() if at[0] == seed])) for seed in seeds]


def unpaired(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The difference of two means, with Welch's interval. Raises: DataError, below two values on a side."""
    if min(len(ours), len(theirs)) < 2:
        raise DataError(f"{len(ours)} and {len(theirs)} values were compared, expected two or more on each side")
    found = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    difference = float(np.mean(ours) - np.mean(theirs))
    return Interval(difference, float(found.low), float(found.high), len(ours) + len(theirs))


def log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of the straight line that fits log y against log x best. Raises: DataError, below two points."""
    if len(x) < 2 or min(*x, *y) <= 0:
        raise DataError(f"a slope needs two points or more with values above 0, got {list(zip(x, y, strict=False))}")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
