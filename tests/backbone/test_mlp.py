import pytest
import torch

from personae.backbone.mlp import MLPDenoiser
from personae.backbone.schedule import schedule
from personae.core import Batch, Client, ClientData, Images, Training, everything, pick, stream, under
from personae.errors import ConfigError, MismatchedNames, ShapeError
from personae.local.fit import fit
from personae.personal.embedding import EMBEDDING, NULL_EMBEDDING


def made(embedding_width=3, sample_shape=(1, 2, 2)):
    model = MLPDenoiser(sample_shape, schedule(), width=8, num_blocks=2, embedding_width=embedding_width)
    model.load(model.initial(stream(0)))
    return model


def predicted(model, x_t, t, unconditional=False):
    with torch.no_grad():
        cond = model.condition(Batch(x_t, torch.full((len(x_t),), unconditional)))
        return model.forward(x_t, t, cond)


def test_a_single_linear_path_can_be_computed_by_hand():
    """Without blocks the network is output(input(x)); time and vector reach only the blocks."""
    model = MLPDenoiser((2,), schedule(), width=4, num_blocks=0)
    values = model.initial(stream(0))
    model.load(values)
    x_t = torch.tensor([[1.0, -2.0]])
    expected = x_t @ values["input.weight"].T @ values["output.weight"].T
    assert torch.allclose(predicted(model, x_t, torch.tensor([5])), expected, atol=1e-6)


@pytest.mark.parametrize("sample_shape", [(5,), (1, 2, 3)])
def test_predictions_have_the_shape_of_the_sample(sample_shape):
    model, x_t = made(sample_shape=sample_shape), torch.randn(4, *sample_shape, generator=stream(1))
    assert model.sample_shape == sample_shape
    assert predicted(model, x_t, torch.tensor([0, 1, 500, 999])).shape == x_t.shape


def test_images_do_not_see_each_other():
    model, x_t, t = made(), torch.randn(3, 1, 2, 2, generator=stream(1)), torch.tensor([0, 400, 999])
    together = predicted(model, x_t, t)
    for i in range(3):
        assert torch.allclose(predicted(model, x_t[i : i + 1], t[i : i + 1])[0], together[i], atol=1e-6)


def test_time_and_vector_change_the_prediction():
    model, x_t = made(), torch.randn(1, 1, 2, 2, generator=stream(1))
    early = predicted(model, x_t, torch.tensor([10]))
    assert not torch.allclose(early, predicted(model, x_t, torch.tensor([900])), atol=1e-3)
    assert not torch.allclose(early, predicted(model, x_t, torch.tensor([10]), unconditional=True), atol=1e-3)


def test_the_null_vector_is_no_vector_at_the_start():
    model, plain = made(), made(embedding_width=None)
    plain.load({name: model.params()[name] for name in plain.live()})
    x_t, t = torch.randn(3, 1, 2, 2, generator=stream(1)), torch.tensor([1, 2, 3])
    assert torch.equal(predicted(model, x_t, t, unconditional=True), predicted(plain, x_t, t))


def test_initial_values_name_every_parameter_and_come_from_the_stream():
    model, state = made(), torch.get_rng_state()
    first, again = model.initial(stream(1)), model.initial(stream(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: v.shape for n, v in first.items()} == {n: p.shape for n, p in model.live().items()}
    assert all(torch.equal(first[name], again[name]) for name in first)
    alone = model.initial(stream(1), under("embedding."))
    assert alone.keys() == {EMBEDDING} and torch.equal(alone[EMBEDDING], first[EMBEDDING])


def test_the_parts_stand_beside_the_network_by_name():
    assert pick(made(8).live(), under("embedding", "null")).keys() == {EMBEDDING, NULL_EMBEDDING}
    assert pick(made(3).live(), under("embedding_")).keys() == {"embedding_projection.weight"}
    with pytest.raises(MismatchedNames, match="3 missing"):
        made(3).load(made(None).params())


def test_an_odd_width_is_refused():
    with pytest.raises(ConfigError, match="width is 7, expected an even number"):
        MLPDenoiser((2,), schedule(), width=7)


def test_it_learns_a_point():
    model, images = made(), Images(torch.full((4, 1, 2, 2), 0.5))
    client = Client("c0", ClientData(images, images), model, stream(2))
    how = Training(steps=150, lr=0.01, batch_size=64)
    first = fit(client, everything, how).loss
    assert fit(client, everything, how).loss < 0.25 < first


# --- several clients in one model --------------------------------------------------------------------------------


def test_several_clients_are_held_until_one_is_loaded_again():
    model = made()
    one, three = model.params(), torch.arange(9.0).view(3, 3)
    model.load({**one, EMBEDDING: three}, 3)
    assert torch.equal(model.params()[EMBEDDING], three) and torch.equal(model.live()[EMBEDDING], three)
    assert model.live()[EMBEDDING] is model.part.embedding.weight
    model.load(one)
    assert torch.equal(model.params()[EMBEDDING], one[EMBEDDING])


@pytest.mark.parametrize(("rows", "told"), [(3, 1), (1, 3), (2, 3)])
def test_the_number_of_clients_must_be_said(rows, told):
    model = made()
    before = model.params()
    with pytest.raises(ShapeError, match=rf"embedding.weight is \[{rows}, 3\], expected \[{told}, 3\]"):
        model.load({**{n: v + 1 for n, v in before.items()}, EMBEDDING: torch.zeros(rows, 3)}, told)
    assert all(torch.equal(before[name], value) for name, value in model.params().items())


def test_a_graph_that_is_still_held_does_not_cut_the_gradient_of_more_clients():
    """Were the parameter kept and given more rows, torch would sum them up to the one row that it still expects."""
    model = made()
    batch = Batch(torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.bool), clients=torch.arange(3))
    held = model.condition(Batch(batch.images, batch.unconditional))
    model.load({**model.params(), EMBEDDING: torch.zeros(3, 3)}, 3)
    model.condition(batch).sum().backward()
    assert held.requires_grad and model.live()[EMBEDDING].grad.shape == (3, 3)
