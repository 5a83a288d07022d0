import pytest
import torch

from personae.core import stream
from personae.errors import ShapeError
from personae.personal.embedding import EMBEDDING, NULL_EMBEDDING, ClientEmbedding, clients_in, is_per_client


def loaded(width, out_width, **values):
    part = ClientEmbedding(width, out_width)
    with torch.no_grad():
        for name, value in part.named_parameters():
            value.copy_(torch.tensor(values[name.split(".")[0]]))
    return part


def test_each_example_gets_the_clients_or_the_null_vector():
    part = loaded(2, 2, embedding=[[1.0, 2.0]], null_embedding=[[-3.0, 0.5]])
    vectors = part(torch.tensor([False, True, False]))
    assert vectors.tolist() == [[1.0, 2.0], [-3.0, 0.5], [1.0, 2.0]]


def test_both_go_through_one_projection_where_widths_differ():
    part = loaded(
        2,
        3,
        embedding=[[1.0, 2.0]],
        null_embedding=[[0.0, 1.0]],
        embedding_projection=[[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]],
    )
    assert part(torch.tensor([False, True])).tolist() == [[1.0, 2.0, -1.0], [0.0, 1.0, -1.0]]


def test_the_projection_exists_only_where_it_is_needed():
    assert {n for n, _ in ClientEmbedding(4, 4).named_parameters()} == {EMBEDDING, NULL_EMBEDDING}
    assert {n for n, _ in ClientEmbedding(4, 6).named_parameters()} == {
        EMBEDDING,
        NULL_EMBEDDING,
        "embedding_projection.weight",
    }


def test_a_dropped_example_moves_the_null_vector_alone():
    part = loaded(2, 2, embedding=[[1.0, 2.0]], null_embedding=[[0.0, 0.0]])
    part(torch.tensor([False, True, True])).sum().backward()
    assert part.embedding.weight.grad.tolist() == [[1.0, 1.0]]
    assert part.null_embedding.weight.grad.tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize("out_width", [5, 7])
def test_initial_values_name_every_parameter_in_its_shape(out_width):
    part = ClientEmbedding(5, out_width)
    values = part.initial(stream(0))
    assert {n: v.shape for n, v in values.items()} == {n: p.shape for n, p in part.named_parameters()}


def test_a_client_starts_at_a_random_code_or_at_zero_and_the_null_vector_always_at_zero():
    noise, zero = ClientEmbedding(4096, 4096).initial(stream(0)), ClientEmbedding(4096, 4096, "zero").initial(stream(0))
    assert noise[EMBEDDING].mean().abs() < 0.07 and abs(noise[EMBEDDING].std() - 1) < 0.05
    assert not zero[EMBEDDING].any() and not zero[NULL_EMBEDDING].any() and not noise[NULL_EMBEDDING].any()


def test_the_projection_keeps_the_variance_of_a_random_code():
    values = ClientEmbedding(16, 4096).initial(stream(0))
    projected = values[EMBEDDING] @ values["embedding_projection.weight"].T
    assert projected.var() / values[EMBEDDING].square().mean() == pytest.approx(1, abs=0.1)


def test_equal_streams_give_equal_values_and_others_do_not():
    part = ClientEmbedding(4, 6)
    first, again, other = (part.initial(stream(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first[EMBEDDING], other[EMBEDDING])


# --- several clients ---------------------------------------------------------------------------------------------


def three_clients():
    part = loaded(2, 2, embedding=[[0.0, 0.0]], null_embedding=[[-3.0, 0.5]])
    part.make_room(3)
    with torch.no_grad():
        part.embedding.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    return part


def test_each_example_gets_its_own_clients_vector():
    vectors = three_clients()(torch.tensor([False, False, True, False]), torch.tensor([2, 0, 1, 0]))
    assert vectors.tolist() == [[5.0, 6.0], [1.0, 2.0], [-3.0, 0.5], [1.0, 2.0]]


def test_each_row_is_moved_by_its_own_examples():
    part = three_clients()
    part(torch.tensor([False, False, True]), torch.tensor([2, 2, 1])).sum().backward()
    assert part.embedding.weight.grad.tolist() == [[0.0, 0.0], [0.0, 0.0], [2.0, 2.0]]


def test_nobodys_vector_is_taken_by_default():
    with pytest.raises(ShapeError, match=r"holds 3 clients.*set Batch\.clients"):
        three_clients()(torch.tensor([False]))


def test_the_clients_in_a_model_are_counted_by_its_parameters():
    assert clients_in(dict(three_clients().named_parameters())) == 3
    assert clients_in(dict(ClientEmbedding(4, 6).named_parameters())) == 1
    assert clients_in({"conv_in.weight": torch.zeros(7)}) == 1
    assert [name for name in (EMBEDDING, NULL_EMBEDDING, "embedding_projection.weight") if is_per_client(name)] == [
        EMBEDDING
    ]
