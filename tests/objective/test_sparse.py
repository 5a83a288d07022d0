"""Prices for what neurons are moved by, beside sums written out."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from personae.objective.sparse import from_base, on_owned
from personae.personal.delta import DELTA
from personae.personal.neurons import AT, NEURONS

BATCH = SimpleNamespace(prediction=torch.zeros(1))


@pytest.fixture
def live():
    """Two weights of four numbers, of which three in all are chosen."""
    return {
        f"{NEURONS}x": nn.Parameter(torch.tensor([1.0, 2.0])),
        f"{AT}x": nn.Parameter(torch.tensor([0, 3]), requires_grad=False),
        f"{DELTA}x": nn.Parameter(torch.tensor([[0.5, 9.0], [9.0, 0.0]])),
        f"{NEURONS}y": nn.Parameter(torch.tensor([-3.0])),
        f"{AT}y": nn.Parameter(torch.tensor([2]), requires_grad=False),
        f"{DELTA}y": nn.Parameter(torch.tensor([[9.0, 9.0], [3.0, 9.0]])),
    }


def masks(x, y):
    return {name: torch.tensor(rows, dtype=torch.bool) for name, rows in (("x", x), ("y", y))}


def test_what_others_own_has_its_mean_square_as_its_price(live):
    model = SimpleNamespace(live=lambda: live)
    owned = masks([[0, 1], [1, 1]], [[0, 0], [1, 0]])
    price = on_owned(owned, 10.0)(model, BATCH)
    assert price.item() == pytest.approx(10 * (2**2 + 3**2) / 2)
    price.backward()
    assert live[f"{NEURONS}x"].grad.tolist() == [0.0, 20.0] and live[f"{NEURONS}y"].grad.tolist() == [-30.0]


def test_what_nobody_owns_is_free(live):
    model = SimpleNamespace(live=lambda: live)
    for owned in (masks([[0, 1], [1, 0]], [[1, 1], [0, 1]]), masks([[0, 0], [0, 0]], [[0, 0], [0, 0]])):
        price = on_owned(owned, 10.0)(model, BATCH)
        assert price.item() == 0.0
        price.backward()
        assert not live[f"{NEURONS}x"].grad.any() and not live[f"{NEURONS}y"].grad.any()


def test_how_far_neurons_are_from_the_base_counts_earlier_changes(live):
    model = SimpleNamespace(live=lambda: live)
    price = from_base(6.0)(model, BATCH)
    assert price.item() == pytest.approx(6 * (1.5**2 + 2**2 + 0) / 3)
    price.backward()
    assert live[f"{NEURONS}x"].grad.tolist() == [6.0, 8.0] and live[f"{NEURONS}y"].grad.tolist() == [0.0]


def test_the_base_may_be_changed_elsewhere(live):
    with torch.no_grad():
        live[f"{DELTA}x"][0, 1] = 1000.0
    assert from_base(6.0)(SimpleNamespace(live=lambda: live), BATCH).item() == pytest.approx(12.5)
