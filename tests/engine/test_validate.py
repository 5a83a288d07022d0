"""Whatever may not be added up is refused with the client, the round, and what was wrong."""

import math
import re

import pytest
import torch

from personae.core import State, Update, under
from personae.engine.validate import check_update
from personae.errors import MismatchedNames, PrivacyError, RefusedUpdate

KNOWN = {"a": torch.zeros(2), "b": torch.zeros(3)}
GOOD = {"a": torch.ones(2), "b": torch.ones(3)}


def check(params=GOOD, *, extras=None, weight=5, known=KNOWN):
    update = Update("c07", weight, State(params, extras or {}))
    check_update(update, round=4, personal=under("own."), known=known, max_examples=10)


def test_a_good_update_passes():
    check()
    check(weight=1)
    check(weight=10, extras={"fisher": torch.ones(7)})


@pytest.mark.parametrize(
    ("change", "error", "found"),
    [
        ({"a": torch.tensor([1.0, math.nan])}, RefusedUpdate, "values in a that are not finite"),
        ({"a": torch.tensor([1.0, -math.inf])}, RefusedUpdate, "values in a that are not finite"),
        ({"a": torch.ones(1, 2)}, RefusedUpdate, "a as torch.float32 [1, 2], expected torch.float32 [2]"),
        ({"a": torch.ones(3)}, RefusedUpdate, "a as torch.float32 [3], expected torch.float32 [2]"),
        (
            {"a": torch.ones(2, dtype=torch.float64)},
            RefusedUpdate,
            "a as torch.float64 [2], expected torch.float32 [2]",
        ),
        ({"a": torch.ones(2, dtype=torch.int64)}, RefusedUpdate, "a as torch.int64 [2], expected torch.float32 [2]"),
        ({"c": torch.ones(2)}, MismatchedNames, "1 more: c"),
        ({"own.vector": torch.ones(2)}, PrivacyError, "1 personal tensors: own.vector"),
    ],
)
def test_a_bad_tensor_is_refused(change, error, found):
    with pytest.raises(error, match=re.escape(found)) as caught:
        check({**GOOD, **change})
    assert "client 'c07'" in str(caught.value) and "(round 4)" in str(caught.value)


@pytest.mark.parametrize(
    ("extras", "error"),
    [
        ({"fisher": torch.tensor([math.nan])}, RefusedUpdate),
        ({"own.vector": torch.ones(2)}, PrivacyError),
        ({"moments/own.vector": torch.ones(2)}, PrivacyError),
        ({"moments.exp_avg.own.vector": torch.ones(2)}, PrivacyError),
    ],
)
def test_extras_are_looked_at_too(extras, error):
    with pytest.raises(error, match=r"client 'c07'.*\(round 4\)"):
        check(extras=extras)


@pytest.mark.parametrize("weight", [0, -3, 11, True, 5.0, math.nan, math.inf, "5", None])
def test_a_weight_that_is_no_number_of_examples_is_refused(weight):
    with pytest.raises(RefusedUpdate, match=r"client 'c07' claims .* expected a whole number from 1 to 10 \(round 4\)"):
        check(weight=weight)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({"a"}, "1 less: b"),
        ({"a", "b", "c"}, "1 more: c"),
        ({"a", "c"}, "1 more: c; 1 less: b"),
        (set(), "2 less: a, b"),
    ],
)
def test_other_names_than_the_server_has_are_refused(names, found):
    """A subset too: the rest of the model would be lost."""
    with pytest.raises(MismatchedNames, match=rf"client 'c07' sent other names .*: {found} \(round 4\)"):
        check({name: torch.ones(2) for name in names})


def test_values_whose_sum_overflows_are_finite():
    check({"a": torch.full((2,), 3e38), "b": torch.ones(3)})
