"""Intervals and slopes, on numbers that a reader can check."""

import math

import pytest

from personae.core import stream
from personae.errors import DataError
from personae.study.stats import interval, log_slope, paired


def test_interval_of_four_numbers():
    found = interval([1.0, 2.0, 3.0, 4.0])  # sd 1.29099, t(3) 3.18245
    assert (found.mean, found.num) == (2.5, 4)
    assert found.high - found.mean == pytest.approx(3.18245 * 1.29099 / 2, rel=1e-4)
    assert not found.excludes(1.0) and found.excludes(0.3) and found.excludes(5.0)


def test_one_value_has_no_interval():
    found = interval([2.0])
    assert math.isnan(found.low) and not found.excludes(0)
    with pytest.raises(DataError):
        interval([])


def test_pairs_take_away_what_they_share():
    luck = [0.1, 5.0, -3.0, 2.0]
    found = paired([x + 0.5 + e for x, e in zip(luck, [0.01, -0.01, 0.0, 0.0], strict=True)], luck)
    assert found.mean == pytest.approx(0.5) and found.high - found.low < 0.05


def test_an_interval_holds_the_truth_nineteen_times_of_twenty():
    import torch

    draws = torch.randn(400, 6, generator=stream(0)).tolist()
    held = sum(not interval(values).excludes(0.0) for values in draws)
    assert 365 <= held <= 395


def test_slope():
    assert log_slope([10, 100, 1000], [5, 0.5, 0.05]) == pytest.approx(-1)
    with pytest.raises(DataError):
        log_slope([1, 2], [1, 0])
