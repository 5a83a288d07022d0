"""Adapters as what they add: the same results whatever factors stand for a change, and as computed without tricks."""

import pytest
import torch

from personae.aggregate.low_rank import (
    LowRank,
    canonical,
    gram,
    inner,
    lost,
    overlap,
    read,
    recompressed,
    singular_values,
    stacked,
    written,
)
from personae.core import stream
from personae.errors import MismatchedNames, ShapeError

LAYERS = {"unet.a": (12, 9), "unet.b": (7, 16)}


def drawn(seed, rank=4, dtype=torch.float32):
    rng = stream(seed, "adapter")
    return {
        layer: LowRank(
            torch.randn(rows, rank, generator=rng, dtype=dtype), torch.randn(rank, columns, generator=rng, dtype=dtype)
        )
        for layer, (rows, columns) in LAYERS.items()
    }


def regauged(adapter, seed):
    """The same change by other factors."""
    changed = {}
    for layer, change in adapter.items():
        turn = torch.randn(change.rank, change.rank, generator=stream(seed, layer), dtype=torch.float64)
        turn += 3 * torch.eye(change.rank, dtype=torch.float64)
        changed[layer] = LowRank(
            (change.B.double() @ turn.inverse()).to(change.B), (turn @ change.A.double()).to(change.A)
        )
    return changed


def test_it_is_read_from_parameters_and_written_back():
    adapter = drawn(0)
    params = {**written(adapter), "tokens.<rex>": torch.zeros(1, 3)}
    assert set(params) == {f"{layer}.lora_{end}" for layer in LAYERS for end in "AB"} | {"tokens.<rex>"}
    assert all(torch.equal(written(read(params))[name], value) for name, value in written(adapter).items())
    with pytest.raises(MismatchedNames, match="one factor only"):
        read({name: value for name, value in params.items() if name != "unet.a.lora_B"})
    with pytest.raises(ShapeError, match=r"unet.a has B \[12, 4\] and A \[3, 9\]"):
        read({**params, "unet.a.lora_A": torch.zeros(3, 9)})


@pytest.mark.parametrize("ranks", [(4,), (1, 6), (2, 2, 2), (5, 1, 3, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_stacked_is_the_weighted_sum(ranks, seed):
    adapters = [drawn(seed + k, rank) for k, rank in enumerate(ranks)]
    weights = torch.randn(len(ranks), generator=stream(seed, "weights")).tolist()
    found = stacked(adapters, weights)
    for layer in LAYERS:
        expected = sum(w * adapter[layer].dense().double() for w, adapter in zip(weights, adapters, strict=True))
        assert torch.linalg.matrix_norm(found[layer].dense() - expected) <= 1e-6 * sum(
            abs(w) * torch.linalg.matrix_norm(a[layer].dense()) for w, a in zip(weights, adapters, strict=True)
        )
        assert found[layer].rank == sum(ranks)


def test_only_adapters_of_the_same_layers_are_put_together():
    with pytest.raises(MismatchedNames, match="differ in 1 layers"):
        stacked([drawn(0), {"unet.a": drawn(1)["unet.a"]}], [1, 1])
    with pytest.raises(MismatchedNames, match="no adapters"):
        stacked([], [])


@pytest.mark.parametrize("rank", [1, 3, 5, 9, 20])
def test_recompressing_loses_what_it_must(rank):
    change = stacked([drawn(k) for k in range(3)], [1.0, 0.5, -2.0])["unet.a"]
    dense = change.dense().double()
    values = torch.linalg.svdvals(dense)
    assert torch.allclose(singular_values(change)[:9], values, atol=1e-4)
    best = float(values[rank:].square().sum().sqrt() / values.norm())
    nearest = recompressed(change, rank)
    found = float(torch.linalg.matrix_norm(nearest.dense() - dense) / torch.linalg.matrix_norm(dense))
    assert nearest.rank == min(rank, 9)
    assert found == pytest.approx(best, abs=1e-5) and lost(change, rank) == pytest.approx(best, abs=1e-6)


def test_canonical_factors_depend_on_the_change_alone():
    one = drawn(0, dtype=torch.float64)["unet.b"]
    other = regauged({"unet.b": one}, 7)["unet.b"]
    assert not torch.allclose(one.B, other.B)
    first, second = canonical(one), canonical(other)
    assert torch.allclose(first.B, second.B) and torch.allclose(first.A, second.A)
    assert torch.allclose(first.dense(), one.dense())
    lengths = first.B.norm(dim=0)
    assert torch.allclose(first.B.T @ first.B, torch.diag(lengths**2), atol=1e-9)
    assert torch.allclose(first.A @ first.A.T, first.A.shape[1] / first.rank * torch.eye(first.rank).double())
    assert (lengths[:-1] > lengths[1:]).all()
    assert (first.B.gather(0, first.B.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_change_of_nothing_stays_nothing():
    nothing = LowRank(torch.zeros(5, 2), torch.ones(2, 3))
    assert not canonical(nothing).dense().any() and lost(nothing, 1) == 0 and overlap(nothing, nothing) == 0


def test_inner_products_are_those_of_the_full_matrices():
    adapters = [drawn(k, rank) for k, rank in enumerate((1, 4, 6))]
    for one in adapters:
        for other in adapters:
            for layer in LAYERS:
                dense = float((one[layer].dense().double() * other[layer].dense().double()).sum())
                assert inner(one[layer], other[layer]) == pytest.approx(dense, rel=1e-6, abs=1e-6)


def test_no_layer_outweighs_the_others():
    adapters = [drawn(k) for k in range(3)]
    larger = [
        {layer: LowRank((100 if layer == "unet.b" else 1) * change.B, change.A) for layer, change in adapter.items()}
        for adapter in adapters
    ]
    assert torch.allclose(gram(adapters), gram(larger), rtol=1e-5)
    still = [{**adapter, "unet.b": LowRank(0 * adapter["unet.b"].B, adapter["unet.b"].A)} for adapter in adapters]
    assert torch.allclose(gram(still), gram([{"unet.a": adapter["unet.a"]} for adapter in adapters]))
    alone = [*still[:2], {**still[2], "unet.b": adapters[2]["unet.b"]}]
    assert gram(alone)[2, 2] == pytest.approx(float(gram(still)[2, 2]) + 1), "a layer that one alone changes counts"


def test_room_that_is_not_needed_can_be_trained():
    one = recompressed(LowRank(torch.ones(5, 3), torch.ones(3, 4)), 3)
    assert torch.allclose(one.dense(), torch.full((5, 4), 3.0)) and not one.B[:, 1:].any()
    assert torch.allclose(one.A.norm(dim=1), torch.full((3,), (4 / 3) ** 0.5)), "as long as a fresh adapter's"


def test_overlap_is_that_of_the_spaces():
    basis = torch.linalg.qr(torch.randn(12, 12, generator=stream(0)))[0]
    rows = torch.randn(3, 9, generator=stream(1))
    one, same_space = LowRank(basis[:, :3], rows), LowRank(basis[:, :3] @ torch.randn(3, 3, generator=stream(2)), rows)
    beside, half = LowRank(basis[:, 3:6], rows), LowRank(basis[:, [0, 4]], rows[:2])
    assert overlap(one, same_space) == pytest.approx(1) and overlap(one, beside) == pytest.approx(0, abs=1e-9)
    assert overlap(one, half) == pytest.approx(0.5) and overlap(one, beside, "A") == pytest.approx(1)
    others = [regauged({"x": change}, k)["x"] for k, change in enumerate((one, half))]
    assert overlap(*others) == pytest.approx(0.5, abs=1e-5)
