"""Summaries of a sequence, beside numbers worked out by hand."""

import pytest
import torch

from personae.errors import ConfigError, DataError, ShapeError
from personae.evaluate.forgetting import confusion, drift_of_predictions, forgetting

SCORES = [
    [0.8, None, None],
    [0.9, 0.6, None],
    [0.5, 0.7, 0.4],
]


def test_three_concepts_by_hand():
    found = forgetting(SCORES, oracles=[0.9, 0.6, 0.7])
    assert found.averages == pytest.approx((0.8, 0.75, 1.6 / 3))
    assert found.average == found.averages[-1]
    assert found.learning == pytest.approx((0.8 + 0.6 + 0.4) / 3)
    assert found.intransigence == pytest.approx((0.1 + 0.0 + 0.3) / 3)
    assert found.forgetting == pytest.approx(((0.9 - 0.5) + (0.6 - 0.7)) / 2), "the best was after the second concept"
    assert found.backward_transfer == pytest.approx(((0.5 - 0.8) + (0.7 - 0.6)) / 2)


def test_the_last_model_is_not_in_the_maximum():
    assert forgetting([[0.2, None], [0.5, 0.9]]).forgetting == pytest.approx(-0.3)


def test_what_never_changes_is_not_forgotten():
    found = forgetting([[0.3, None, None], [0.3, 0.4, None], [0.3, 0.4, 0.5]])
    assert found.forgetting == found.backward_transfer == 0.0


def test_one_concept_has_nothing_to_forget():
    found = forgetting([[2]])
    assert found.averages == (2.0,) and found.learning == 2.0
    assert found.forgetting is found.backward_transfer is found.intransigence is None
    assert forgetting([[2]], oracles=[5]).intransigence == 3.0


def test_smaller_is_better_with_the_sign_changed():
    """A distance that grows from 1 to 4 is forgetting, and two above that of the oracle intransigence."""
    found = forgetting([[-1.0, None], [-4.0, -2.0]], oracles=[-1.0, -0.0])
    assert found.forgetting == 3.0 and found.backward_transfer == -3.0 and found.intransigence == 1.0


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ([], "no row"),
        ([[0.1, None], [0.2]], r"scores\[1\] has 1 entries, expected 2"),
        ([[0.1]] * 2, r"scores\[0\] has 1 entries, expected 2"),
        ([[0.1, 0.2], [0.2, 0.3]], r"scores\[0\]\[1\] is 0\.2, expected None: concept 1"),
        ([[0.1, None], [None, 0.3]], r"scores\[1\]\[0\] is None, expected a finite number"),
        ([[0.1, None], [0.2, float("nan")]], r"scores\[1\]\[1\] is nan"),
        ([[0.1, None], [float("-inf"), 0.2]], r"scores\[1\]\[0\] is -inf"),
    ],
)
def test_what_is_no_lower_triangle_is_refused_by_its_entry(scores, told):
    with pytest.raises(ConfigError, match=told):
        forgetting(scores)


@pytest.mark.parametrize("oracles", [[], [1.0], [1.0, float("nan"), 2.0]])
def test_oracles_of_other_concepts_are_refused(oracles):
    with pytest.raises(ConfigError, match="expected 3 finite numbers"):
        forgetting(SCORES, oracles)


def test_concepts_that_turn_into_each_other_are_seen():
    chances = torch.tensor([[0.6, 0.4], [0.2, 0.8], [0.9, 0.1], [0.1, 0.9]])
    found = confusion(chances, torch.tensor([0, 1, 1, 1]), 2)
    assert torch.allclose(found, torch.tensor([[1, 0], [1 / 3, 2 / 3]], dtype=torch.float64))


def test_more_captions_than_concepts_may_be_asked():
    """The last column is the plain noun: half of the second concept's pictures are taken for no concept."""
    chances = torch.tensor([[0.5, 0.2, 0.3], [0.3, 0.3, 0.4], [0.4, 0.5, 0.1]])
    found = confusion(chances, torch.tensor([0, 1, 1]), 2)
    assert found.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]


def test_of_equals_the_first_is_taken():
    assert confusion(torch.ones(2, 2), torch.tensor([0, 1]), 2).tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_pictures_of_no_concept_and_concepts_without_pictures_are_refused():
    with pytest.raises(ShapeError, match="2 columns, expected at least 3"):
        confusion(torch.ones(3, 2), torch.tensor([0, 1, 2]), 3)
    with pytest.raises(DataError, match="concept 2 is no concept or has no picture"):
        confusion(torch.ones(2, 3), torch.tensor([0, 1]), 3)
    with pytest.raises(DataError, match="concept 3 is no concept"):
        confusion(torch.ones(4, 3), torch.tensor([0, 1, 2, 3]), 3)


def test_drift_is_the_mean_squared_difference():
    before, after = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 4.0], [0.0, 4.0]])
    assert drift_of_predictions(before, after) == (4 + 9) / 4 and drift_of_predictions(before, before) == 0.0
