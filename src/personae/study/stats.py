"""Means with their uncertainty, paired differences and slopes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from personae.errors import DataError


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval; without an interval (nan) when there is one value only."""

    mean: float
    low: float
    high: float
    num: int

    def excludes(self, value: float) -> bool:
        return self.low > value or self.high < value


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
