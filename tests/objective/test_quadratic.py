import pytest
import torch

from personae.backbone.mixture import MixtureDenoiser
from personae.backbone.schedule import schedule
from personae.core import Noised, stream
from personae.errors import MismatchedNames
from personae.objective.quadratic import quadratic
from personae.personal.embedding import EMBEDDING

X = torch.zeros(1, 1)
ANY = Noised(X, torch.zeros(1, dtype=torch.long), X, X, cond=None, prediction=X)
STIFF = {"means": torch.tensor([[4.0], [0.5]]), EMBEDDING: torch.tensor([[0.0, 3.0]])}
ANCHOR = {"means": torch.tensor([[0.0], [4.0]]), EMBEDDING: torch.tensor([[7.0, 2.0]])}


@pytest.fixture
def model():
    made = MixtureDenoiser(torch.tensor([[1.0], [2.0]]), schedule())
    made.load({**made.initial(stream(0)), EMBEDDING: torch.tensor([[3.0, 5.0]])})
    return made


def test_every_number_has_a_spring_of_its_own(model):
    penalty = quadratic(STIFF, ANCHOR, 0.5)(model, ANY)
    assert penalty.item() == 0.25 * (4 * 1 + 0.5 * 4 + 0 * 16 + 3 * 9)
    penalty.backward()
    assert model.live()["means"].grad.tolist() == [[0.5 * 4 * 1], [0.5 * 0.5 * -2]]
    assert model.live()[EMBEDDING].grad.tolist() == [[0.0, 0.5 * 3 * 3]]


def test_names_that_are_not_given_are_free(model):
    quadratic({"means": STIFF["means"]}, {"means": ANCHOR["means"]}, 0.5)(model, ANY).backward()
    assert model.live()["means"].grad.any() and model.live()[EMBEDDING].grad is None


def test_at_the_anchor_there_is_no_pull_however_stiff(model):
    anchor = {name: model.params()[name] for name in STIFF}
    penalty = quadratic({name: 1e6 * value for name, value in STIFF.items()}, anchor, 10.0)(model, ANY)
    penalty.backward()
    assert penalty.item() == 0
    assert not any(model.live()[name].grad.any() for name in STIFF)
    assert quadratic({}, {}, 10.0)(model, ANY).item() == 0


@pytest.mark.parametrize(("stiff", "anchor"), [(STIFF, {}), ({"means": STIFF["means"]}, ANCHOR)])
def test_importances_of_other_parameters_are_refused(stiff, anchor):
    with pytest.raises(MismatchedNames, match=r"of different parameters: .*embedding"):
        quadratic(stiff, anchor, 1.0)
