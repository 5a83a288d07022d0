"""Robust rules: small numbers by hand, slow literal twins, and what f attackers can do at most."""

import runpy
from pathlib import Path

import pytest
import torch

from personae.aggregate import NEEDED, RULES, fewest, geometric_median, median, rule_by_name, trimmed_mean
from personae.aggregate.robust import bulyan, krum, multi_krum
from personae.core import State, Update, stream
from personae.errors import ConfigError, EmptyRound, RefusedUpdate, TooFewClients

PLAIN = runpy.run_path(str(Path(__file__).parents[1] / "reference" / "plain_robust.py"))

pytestmark = pytest.mark.parametrize("name", NEEDED)


def sent(*rows, **more):
    """Clients "a", "b", ...; each row is one client's only tensor, called w."""
    return [Update(chr(97 + k), 1, State({"w": torch.as_tensor(row)}), **more) for k, row in enumerate(rows)]


def honest_and_attacked(num_clients, attackers, *, size=1e3, seed=0, width=20):
    """Rows of `num_clients`, of whom the first `attackers` send numbers of any size, and those that are honest."""
    rng = stream(seed, "robust")
    honest = torch.randn(num_clients - attackers, width, generator=rng) * 0.1 + 1.0
    wild = torch.randn(attackers, width, generator=rng) * size
    return torch.cat([wild, honest]), honest


# --- by hand -------------------------------------------------------------------------------------------------------


HAND = {
    "median": (median, [1.0, 2.0, 4.0, 100.0], 1, 3.0),
    "trimmed_mean": (trimmed_mean, [-50.0, 1.0, 2.0, 6.0, 100.0], 1, 3.0),
    # Two nearest others each: 0 has 1 + 4, 1 has 1 + 1, 2 has 1 + 1, 3.5 has 2.25 + 6.25: 1 and 2 tie, b is first.
    "krum": (krum, [0.0, 1.0, 2.0, 3.5, 90.0], 1, 1.0),
    # The four best of these are all but 90.
    "multi_krum": (multi_krum, [0.0, 1.0, 2.0, 3.5, 90.0], 1, 1.625),
    # Five of seven are chosen: 3 (whose four nearest give 10), 2, 5, 1, 4; nearest to their median 3 are 2, 3 and 4.
    "bulyan": (bulyan, [1.0, 2.0, 3.0, 4.0, 5.0, 900.0, 7.0], 1, 3.0),
    # On a line the geometric median is the median.
    "geometric_median": (geometric_median, [0.0, 1.0, 5.0], 1, 1.0),
}


def test_by_hand(name):
    rule, values, attackers, expected = HAND[name]
    assert rule(sent(*([v] for v in values)), attackers=attackers)["w"].item() == pytest.approx(expected, abs=2e-6)


def test_the_geometric_median_of_a_square_is_its_centre(name):
    corners = sent([0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 2.0])
    assert geometric_median(corners)["w"].tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


# --- beside the literal twin ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_clients", "attackers"), [(7, 1), (12, 2), (15, 3), (16, 0)])
def test_beside_the_literal_twin(name, num_clients, attackers):
    rows, _ = honest_and_attacked(num_clients, attackers, size=3.0, seed=num_clients, width=6)
    updates = sent(*rows.double())
    expected = torch.tensor(PLAIN[name](rows.double().tolist(), attackers), dtype=torch.float64)
    found = rule_by_name(name, attackers)(iter(updates))["w"]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_the_norm_is_over_all_tensors_together(name):
    rows, _ = honest_and_attacked(11, 2, seed=5, width=12)
    whole = rule_by_name(name, 2)(iter(sent(*rows)))["w"]
    parts = [Update(chr(97 + k), 1, State({"a": row[:5], "b": row[5:].view(7, 1)})) for k, row in enumerate(rows)]
    split = rule_by_name(name, 2)(iter(parts))
    torch.testing.assert_close(torch.cat([split["a"], split["b"].view(7)]), whole)
    assert split["b"].shape == (7, 1)


# --- what attackers can do at most -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e3, 1e30])
@pytest.mark.parametrize("seed", range(3))
def test_as_many_attackers_as_are_withstood(name, size, seed):
    attackers = 3
    rows, honest = honest_and_attacked(fewest(name, attackers), attackers, size=size, seed=seed)
    found = rule_by_name(name, attackers)(iter(sent(*rows)))["w"]
    low, high, mean = honest.amin(0), honest.amax(0), honest.mean(0)
    if name in ("median", "trimmed_mean"):
        assert bool(((found >= low) & (found <= high)).all())
    elif name == "krum" and size > 1.0:
        assert (honest == found).all(1).any()
    elif name == "bulyan":  # the numbers nearest to the median: none is farther than an honest one
        assert bool(((found >= 2 * low - high) & (found <= 2 * high - low)).all())
    share = attackers / len(rows)
    bound = 2 * (1 - share) / (1 - 2 * share) * (honest - mean).norm(dim=1).max()
    assert (found - mean).norm() <= bound


def test_a_wild_minority_moves_the_mean_anywhere_and_these_nowhere(name):
    rows, honest = honest_and_attacked(15, 3, size=1e6)
    assert (RULES["mean"](sent(*rows))["w"] - honest.mean(0)).abs().max() > 1e3
    assert (rule_by_name(name, 3)(iter(sent(*rows)))["w"] - honest.mean(0)).abs().max() < 0.5


def test_one_huge_number_in_a_model_that_is_close_otherwise(name):
    """What Bulyan is for. The median of every number stops it too."""
    rows, honest = honest_and_attacked(15, 3, width=2000)
    rows[:3] = honest.mean(0)
    rows[:3, 7] = 3.0
    found = rule_by_name(name, 3)(iter(sent(*rows)))["w"][7]
    stops = honest[:, 7].amin() <= found <= honest[:, 7].amax()
    assert stops == (name not in ("krum", "multi_krum", "geometric_median"))


def test_finite_numbers_whose_squares_are_not(name):
    rows, honest = honest_and_attacked(15, 3)
    rows, honest = rows.double(), honest.double()
    rows[:3] *= 1e300
    found = rule_by_name(name, 3)(iter(sent(*rows)))["w"]
    assert bool(((found >= honest.amin(0)) & (found <= honest.amax(0))).all())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_one_client_that_sends_no_numbers(name, poison):
    rows, honest = honest_and_attacked(15, 1)
    rows[0, 3] = poison
    found = rule_by_name(name, 1)(iter(sent(*rows)))["w"]
    assert bool(((found >= honest.amin(0)) & (found <= honest.amax(0))).all())


def test_more_clients_without_numbers_than_attackers_are_named(name):
    rows, _ = honest_and_attacked(15, 2)
    rows[:2] = float("nan")
    with pytest.raises(RefusedUpdate, match=r"2 clients sent values that are not finite, and only 1 attackers.*: a, b"):
        rule_by_name(name, 1)(iter(sent(*rows)))


def test_claimed_examples_buy_nothing(name):
    rows, _ = honest_and_attacked(11, 2)
    plain = rule_by_name(name, 2)(iter(sent(*rows)))["w"]
    greedy = [Update(u.client, 10**9 if k < 2 else 1, u.sent) for k, u in enumerate(sent(*rows))]
    assert torch.equal(rule_by_name(name, 2)(iter(greedy))["w"], plain)


# --- conditions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attackers", [1, 3])
def test_too_few_clients_are_refused_with_the_numbers(name, attackers):
    least = fewest(name, attackers)
    rows, _ = honest_and_attacked(least, 0)
    rule = rule_by_name(name, attackers)
    rule(iter(sent(*rows)))
    expected = (
        rf"'{name}' has {least - 1} updates.*{attackers} attackers it needs at least \d x {attackers} \+ . = {least}"
    )
    with pytest.raises(TooFewClients, match=expected):
        rule(iter(sent(*rows[1:])))


def test_nothing_to_combine(name):
    with pytest.raises(EmptyRound, match="there are no updates to combine"):
        rule_by_name(name, 0)(iter([]))


def test_fewer_than_no_attackers(name):
    with pytest.raises(ConfigError, match="attackers is -1"):
        rule_by_name(name, -1)(iter(sent([1.0])))


# --- what every rule keeps to ----------------------------------------------------------------------------------------


def test_the_order_of_arrival_changes_no_bit(name):
    rows, _ = honest_and_attacked(11, 2)
    rows[5] = rows[6]  # a tie
    updates = sent(*rows)
    first = rule_by_name(name, 2)(iter(updates))["w"]
    for seed in range(5):
        order = torch.randperm(11, generator=stream(seed)).tolist()
        assert torch.equal(rule_by_name(name, 2)(iter([updates[k] for k in order]))["w"], first)


def test_equal_models_combine_to_exactly_themselves_and_none_is_changed(name):
    value = torch.randn(1000, generator=stream(1)) * 10.0 ** torch.randint(-6, 6, (1000,), generator=stream(2))
    updates = sent(*(value.clone() for _ in range(11)))
    found = rule_by_name(name, 2)(iter(updates))["w"]
    assert torch.equal(found, value)
    found.zero_()
    assert all(torch.equal(u.sent.params["w"], value) for u in updates)


def test_without_attackers_the_mean_is_the_mean(name):
    if name in ("trimmed_mean", "multi_krum", "bulyan"):
        rows, _ = honest_and_attacked(9, 0)
        torch.testing.assert_close(rule_by_name(name, 0)(iter(sent(*rows)))["w"], rows.mean(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_are_kept_and_half_precision_is_summed_in_float32(name, dtype):
    rows, _ = honest_and_attacked(11, 2, size=2.0)
    rows = rows.to(dtype)
    found = rule_by_name(name, 2)(iter(sent(*rows)))["w"]
    wide = rule_by_name(name, 2)(iter(sent(*rows.to(torch.promote_types(dtype, torch.float32)))))["w"]
    assert found.dtype is dtype and torch.equal(found, wide.to(dtype))


def test_shapes_are_kept(name):
    updates = [Update(str(k), 1, State({"s": torch.tensor(float(k)), "m": torch.ones(2, 0, 3)})) for k in range(7)]
    found = rule_by_name(name, 1)(iter(updates))
    assert found["s"].shape == () and found["m"].shape == (2, 0, 3)
