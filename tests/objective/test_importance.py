"""Importance of single parameters, beside sums written out."""

import pytest
import torch
from torch import nn

from personae.core import stream
from personae.errors import ConfigError
from personae.objective.importance import first_order, squared_gradients

X = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.0, 3.0]])


def of(parameters):
    """One example after the other: the gradient of (w.x)^2 / 2 + 0 b is (w.x) x."""
    rows = iter(X)
    return lambda: (parameters["w"] @ next(rows)).square() / 2


@pytest.fixture
def parameters():
    return {"w": nn.Parameter(torch.tensor([2.0, -1.0]), requires_grad=False), "b": nn.Parameter(torch.ones(1))}


def test_squares_of_single_gradients_are_averaged(parameters):
    found = squared_gradients(parameters, of(parameters), 3)
    gradients = torch.stack([(parameters["w"].detach() @ x) * x for x in X])
    assert torch.allclose(found["w"], gradients.square().mean(0))
    assert not torch.allclose(found["w"], gradients.mean(0).square()), "which would be another thing"
    assert torch.equal(found["b"], torch.zeros(1)), "the loss does not depend on it"


def test_first_order_is_weight_times_gradient(parameters):
    gradients = torch.stack([(parameters["w"].detach() @ x) * x for x in X])
    found = first_order(parameters, of(parameters), 3)["w"]
    assert torch.allclose(found, (parameters["w"].detach() * gradients).abs().mean(0))


def test_parameters_are_left_as_they_were(parameters):
    before = {name: value.detach().clone() for name, value in parameters.items()}
    squared_gradients(parameters, of(parameters), 2)
    assert [p.requires_grad for p in parameters.values()] == [False, True]
    assert all(p.grad is None and torch.equal(p.detach(), before[name]) for name, p in parameters.items())

    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        squared_gradients(parameters, fails, 1)
    assert [p.requires_grad for p in parameters.values()] == [False, True]


def test_a_batchs_mean_gradient_squared_is_smaller_by_the_batch():
    """Four draws in a batch and a small common mean: 0.28 against 1.04 in the mean."""
    weight = nn.Parameter(torch.zeros(2000))
    noise = torch.randn(400, 2000, generator=stream(0)) + 0.2
    rows, batches = iter(noise), iter(noise.view(100, 4, 2000).mean(1))
    one = squared_gradients({"w": weight}, lambda: weight @ next(rows), 400)["w"].mean()
    four = squared_gradients({"w": weight}, lambda: weight @ next(batches), 100)["w"].mean()
    assert float(one) == pytest.approx(1.04, abs=0.02) and float(four) == pytest.approx(0.29, abs=0.02)


def test_no_draws_are_refused(parameters):
    with pytest.raises(ConfigError, match="draws is 0"):
        first_order(parameters, lambda: torch.zeros(()), 0)
