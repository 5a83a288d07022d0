"""Intervals and slopes, on numbers that a reader can check."""

import math

import pytest

from personae.core import stream
from personae.errors import DataError
from personae.study.stats import by_seeds, difference, interval, log_slope, paired, unpaired_by_seeds


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


def test_clients_of_one_seed_are_not_taken_for_independent_over_seeds():
    same = {(seed, client): 0.1 + client / 1000 for seed in range(3) for client in range(8)}
    found = difference(same)
    assert found.pooled.num == 24 and found.over_seeds.num == 3
    assert found.holds_over_seeds and found.reservation == ""
    turning = {(seed, client): value - 0.08 * seed for (seed, client), value in same.items()}
    found = difference(turning | {(0, 8 + client): 0.1 for client in range(40)})
    assert found.pooled.excludes(0) and found.reservation == " (not over seeds alone)"
    found = difference({at: value for at, value in same.items() if at[0] == 0})
    assert found.reservation == " (of one seed)" and not found.holds_over_seeds
    assert difference({at: value * (-1) ** at[1] for at, value in same.items()}).reservation == ""


def test_only_what_both_have_is_compared():
    ours, theirs = {(0, "a"): 1.0, (0, "b"): 2.0, (1, "a"): 3.0}, {(0, "a"): 0.5, (1, "a"): 2.5, (2, "a"): 9.0}
    found = by_seeds(ours, theirs)
    assert found.pooled.num == 2 and found.pooled.mean == 0.5 and found.over_seeds.mean == 0.5
    assert by_seeds(ours, {}) is None
    found = unpaired_by_seeds(ours, theirs)
    assert found.pooled.mean == pytest.approx(2.0 - 1.5) and found.over_seeds.mean == pytest.approx((1.0 + 0.5) / 2)
    assert unpaired_by_seeds(ours, {(0, "a"): 1.0}) is None
