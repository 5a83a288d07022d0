import weakref

import numpy as np
import pytest
import torch

from personae.aggregate import mean, uniform_mean
from personae.core import State, Update, stream
from personae.errors import EmptyRound

either = pytest.mark.parametrize("rule", [mean, uniform_mean])


def update(weight, **params):
    return Update(f"c{weight}", weight, State({name: torch.tensor(value) for name, value in params.items()}))


def test_clients_weigh_as_much_as_their_examples():
    averaged = mean([update(1, w=[0.0, 8.0], b=4.0), update(3, w=[4.0, 0.0], b=0.0)])
    assert averaged["w"].tolist() == [3.0, 2.0] and averaged["b"].item() == 1.0


def test_the_uniform_mean_does_not_look_at_examples():
    assert uniform_mean([update(1, w=[0.0, 8.0]), update(3, w=[4.0, 0.0])])["w"].tolist() == [2.0, 4.0]


@pytest.mark.parametrize(("rule", "weights"), [(mean, [5, 1, 17, 2, 900, 3, 40]), (uniform_mean, None)])
def test_many_clients_beside_numpy(rule, weights):
    values, counts = torch.randn(7, 50, generator=stream(1)), weights or [5, 1, 17, 2, 900, 3, 40]
    updates = [Update(str(i), n, State({"w": v})) for i, (n, v) in enumerate(zip(counts, values, strict=True))]
    expected = np.average(values.double().numpy(), axis=0, weights=weights)
    np.testing.assert_allclose(rule(updates)["w"].numpy(), expected, atol=1e-6)


@either
def test_equal_models_average_to_exactly_themselves(rule):
    value = torch.randn(1000, generator=stream(1)) * 10.0 ** torch.randint(-6, 6, (1000,), generator=stream(2))
    averaged = rule(Update(str(n), n, State({"w": value.clone()})) for n in (3, 1, 7, 11, 400))
    assert torch.equal(averaged["w"], value)


@either
def test_one_client_is_its_own_average_and_no_argument_is_changed(rule):
    updates = [update(2, w=[1.0, 2.0]), update(5, w=[3.0, 5.0])]
    alone = rule(updates[:1])
    assert alone["w"].tolist() == [1.0, 2.0] and alone["w"] is not updates[0].sent.params["w"]
    rule(updates)
    assert [u.sent.params["w"].tolist() for u in updates] == [[1.0, 2.0], [3.0, 5.0]]


@either
def test_an_update_is_gone_before_the_next_one_is_asked_for(rule):
    made = []

    def arriving():
        for n in range(1, 5):
            assert not any(reference() is not None for reference in made), "an earlier update is still held"
            value = torch.full((2,), float(n))
            made.append(weakref.ref(value))
            parcel = Update(str(n), 1, State({"w": value}))
            del value
            yield parcel
            del parcel

    assert rule(arriving())["w"].tolist() == [2.5, 2.5]


def test_shapes_and_types_are_kept():
    params = {"scalar": torch.tensor(1.0), "matrix": torch.ones(2, 3), "double": torch.ones(2, dtype=torch.float64)}
    averaged = mean([Update("a", 1, State(params)), Update("b", 2, State(params))])
    assert {n: (v.shape, v.dtype) for n, v in averaged.items()} == {n: (v.shape, v.dtype) for n, v in params.items()}


@either
def test_nothing_to_average_is_no_average(rule):
    with pytest.raises(EmptyRound, match="there are no updates to combine"):
        rule([])
