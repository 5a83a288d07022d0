import pytest
import torch
from torch import nn

from personae.core import Noised, stream
from personae.objective.overlap import overlap

X = torch.zeros(1, 1)
ANY = Noised(X, torch.zeros(1, dtype=torch.long), X, X, cond=None, prediction=X)
PAST = {"x.weight": torch.tensor([[2.0, 0.0], [-1.0, 3.0], [0.0, -5.0]])}


class Adapted:
    """One adapter of rank 1 and a word: all of a denoiser that the penalty looks at."""

    def __init__(self, a, b):
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))
        self.word = nn.Parameter(torch.ones(1, 2))

    def live(self):
        return {"x.lora_A": self.a, "x.lora_B": self.b, "tokens.<rex>": self.word}


@pytest.fixture
def model():
    return Adapted([[1.0, 2.0]], [[1.0], [0.5], [-1.0]])  # the product is [[1, 2], [0.5, 1], [-1, -2]]


def test_what_both_change_is_paid_for_and_nothing_else(model):
    penalty = overlap(PAST, 0.1)(model, ANY)
    assert penalty.item() == pytest.approx(0.1 * (2**2 + 0 + 0.5**2 + 3**2 + 0 + 10**2))
    penalty.backward()
    d_product = 0.2 * PAST["x.weight"].square() * torch.tensor([[1.0, 2.0], [0.5, 1.0], [-1.0, -2.0]])
    assert torch.allclose(model.a.grad, torch.tensor([[1.0, 0.5, -1.0]]) @ d_product)
    assert torch.allclose(model.b.grad, d_product @ torch.tensor([[1.0], [2.0]]))
    assert model.word.grad is None


def test_the_sign_of_what_was_changed_makes_no_difference(model):
    positive = {name: value.abs() for name, value in PAST.items()}
    assert torch.equal(overlap(PAST, 7.0)(model, ANY), overlap(positive, 7.0)(model, ANY))


def test_an_adapter_that_adds_nothing_or_meets_nothing_is_free(model):
    assert overlap({"x.weight": torch.zeros(3, 2)}, 7.0)(model, ANY).item() == 0
    assert overlap(PAST, 7.0)(Adapted([[1.0, 2.0]], [[0.0]] * 3), ANY).item() == 0
    apart = {"x.weight": torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0]])}
    assert overlap(apart, 7.0)(Adapted([[0.0, 2.0]], [[1.0], [0.5], [-1.0]]), ANY).item() == 0


def test_alone_it_drives_a_product_to_zero():
    rng = stream(0)
    past = torch.randn(3, 4, generator=rng)
    past += past.sign()  # nowhere near zero
    model = Adapted(torch.randn(1, 4, generator=rng).tolist(), torch.randn(3, 1, generator=rng).tolist())
    before = (model.b @ model.a).detach().norm()
    optimizer, penalty = torch.optim.Adam([model.a, model.b], 0.01), overlap({"x.weight": past}, 1.0)
    for _ in range(1000):
        optimizer.zero_grad()
        penalty(model, ANY).backward()
        optimizer.step()
    assert (model.b @ model.a).detach().norm() < 1e-2 * before
