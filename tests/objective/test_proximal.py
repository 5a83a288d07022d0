import torch

from personae.backbone.mixture import MixtureDenoiser
from personae.backbone.schedule import schedule
from personae.core import Noised, stream
from personae.objective.proximal import proximal
from personae.personal.embedding import EMBEDDING

X = torch.zeros(1, 1)
ANY = Noised(X, torch.zeros(1, dtype=torch.long), X, X, cond=None, prediction=X)


def made():
    model = MixtureDenoiser(torch.tensor([[1.0], [2.0]]), schedule())
    model.load({**model.initial(stream(0)), EMBEDDING: torch.tensor([[3.0, 5.0]])})
    return model


def test_the_pull_is_half_mu_times_the_squared_distance():
    anchor = {"means": torch.tensor([[0.0], [4.0]]), EMBEDDING: torch.tensor([[3.0, 2.0]])}
    assert proximal(anchor, 0.5)(made(), ANY).item() == 0.25 * (1 + 4 + 0 + 9)


def test_names_outside_the_anchor_are_free():
    model = made()
    proximal({"means": torch.tensor([[0.0], [4.0]])}, 0.5)(model, ANY).backward()
    assert model.live()["means"].grad.tolist() == [[0.5], [-1.0]]
    assert model.live()[EMBEDDING].grad is None


def test_at_the_anchor_there_is_no_pull():
    model = made()
    penalty = proximal(model.params(), 10.0)(model, ANY)
    penalty.backward()
    assert penalty == 0 and not model.live()["means"].grad.any()
    assert proximal({}, 10.0)(model, ANY) == 0
