import math

import pytest
import torch

from personae.aggregate import clipped
from personae.core import State, Update
from personae.errors import ConfigError, MismatchedNames, RefusedUpdate

START = {"w": torch.tensor([1.0, 1.0]), "b": torch.tensor(2.0)}


def update(w, b, **more):
    return Update("c0", 5, State({"w": torch.tensor(w), "b": torch.tensor(b)}, **more), {"loss": 0.5}, since=3)


def test_a_long_change_is_shortened_over_all_tensors_together():
    far = update([3.0, 1.0], 5.0 - 1e-9, extras={"m": torch.ones(1)}, facts={"k": 1})  # a change of (2, 0) and 3
    short = clipped(far, START, math.sqrt(13) / 2)
    assert short.sent.params["w"].tolist() == pytest.approx([2.0, 1.0])
    assert short.sent.params["b"].item() == pytest.approx(3.5)
    assert (short.client, short.num_examples, short.metrics, short.since) == ("c0", 5, {"loss": 0.5}, 3)
    assert short.sent.extras is far.sent.extras and short.sent.facts is far.sent.facts
    assert far.sent.params["w"].tolist() == [3.0, 1.0] and START["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("w", [[1.0, 1.0], [1.5, 1.0], [1.0, 2.0]])
def test_what_is_short_enough_keeps_its_bits(w):
    near = update(w, 2.0)
    assert clipped(near, START, 1.0) is near


def test_a_huge_change_too_ends_at_the_bound():
    short = clipped(update([1e30, 1.0], -1e25), START, 0.25)
    change = [short.sent.params["w"][0] - 1, short.sent.params["w"][1] - 1, short.sent.params["b"] - 2]
    assert math.hypot(*(float(c) for c in change)) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(RefusedUpdate, match=r"'c0' sent a change whose norm is (nan|inf)"):
        clipped(update([bad, 1.0], 2.0), START, 1.0)


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_that_is_none_is_refused(norm):
    with pytest.raises(ConfigError, match="max_norm is"):
        clipped(update([1.0, 1.0], 2.0), START, norm)


def test_a_name_without_a_start():
    with pytest.raises(MismatchedNames, match="'c0' sent names without a start: b"):
        clipped(update([1.0, 1.0], 2.0), {"w": START["w"]}, 1.0)


def test_types_are_kept():
    half = Update("c0", 1, State({"w": torch.tensor([4.0, 1.0], dtype=torch.float16)}))
    short = clipped(half, {"w": torch.ones(2, dtype=torch.float16)}, 1.5).sent.params["w"]
    assert short.dtype is torch.float16 and short.tolist() == [2.5, 1.0]
    fine = Update("c0", 1, State({"w": torch.tensor([1 + 1e-12], dtype=torch.float64)}))
    assert clipped(fine, {"w": torch.ones(1, dtype=torch.float64)}, 5e-13).sent.params["w"].item() == 1 + 5e-13
