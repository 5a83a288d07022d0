"""Orthogonal adapters: rows that no two concepts share, and that no step moves; room that runs out; a sum."""

import runpy
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from personae.continual import Orthogonal
from personae.continual.orthogonal import rows
from personae.core import State, everything, pick
from personae.errors import ConfigError
from personae.local.fit import fit
from personae.personal.delta import DELTA, is_delta
from personae.personal.lora import A, B, products
from personae.testing.contract import differing

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("small.py"))))

METHOD = Orthogonal(4, "cross_kv")  # layers read 16 numbers: four concepts


def ends_with(end):
    return lambda name: name.endswith(end)


def one_after_the_other(method, build, count):
    """What every concept learned, and what was kept after it."""
    learned, states = [], [State()]
    for number in range(1, count + 1):
        client = small.trained(method, build, number, states[-1])
        learned.append(client.model.params())
        states.append(method.end(client, states[-1]))
    return learned, states[1:]


@pytest.mark.parametrize(("width", "rank"), [(16, 4), (96, 20), (320, 20), (768, 4)])
def test_up_to_capacity_no_two_concepts_read_the_same(width, rank):
    each = [rows(0, width, number, rank) for number in range(width // rank)]
    assert {tuple(own.shape) for own in each} == {(rank, width)}
    together = torch.cat(each)
    assert torch.allclose(together @ together.T, torch.eye(len(together)), atol=1e-6)
    for one, other in combinations(each[:8], 2):
        assert (one @ other.T).abs().max() < 1e-6


def test_a_seed_has_one_basis_and_another_seed_another():
    assert torch.equal(rows(0, 16, 1, 4), rows(0, 16, 1, 4))
    assert not torch.allclose(rows(0, 16, 1, 4).abs(), rows(1, 16, 1, 4).abs(), atol=0.1)


def test_the_frozen_factor_keeps_its_bits_under_adamw_and_decay_and_is_its_concepts_own(build):
    learned, kept = [], State()
    for number in (1, 2, 3, 4):
        client = small.begun(METHOD, build, number, kept)
        frozen = pick(client.model.params(), ends_with(A))
        client = small.trained(METHOD, build, number, kept)
        after = client.model.params()
        assert differing(frozen, pick(after, ends_with(A))) == []
        assert all(value.any() for value in pick(after, ends_with(B)).values()), "the other factor is learned"
        learned.append(frozen)
        kept = METHOD.end(client, kept)
    for one, other in combinations(learned, 2):
        assert all((one[name] @ other[name].T).abs().max() < 1e-6 for name in one)


def test_the_frozen_factor_rests_on_a_model_that_has_drawn(build):
    model = build(METHOD.parts, small.TASKS[:2])
    first = small.client_for(METHOD, model, 1)
    fit(replace(first, plan=METHOD.begin(first, State())), everything, small.TRAINING)
    kept = METHOD.end(first, State())
    METHOD.compose(model, kept, ["rex"])
    small.predicted(model, ("a <rex>",))
    client = small.client_for(METHOD, model, 2)
    client = replace(client, plan=METHOD.begin(client, kept))
    frozen = pick(model.params(), ends_with(A))
    fit(client, everything, small.TRAINING)
    assert differing(frozen, pick(model.params(), ends_with(A))) == []
    assert not any(value.requires_grad for value in pick(model.live(), ends_with(A)).values())
    assert all(value.any() for value in pick(model.params(), ends_with(B)).values()), "the other factor is learned"


@pytest.mark.parametrize("factor", [1.0, 0.6])
def test_what_is_merged_is_the_sum_of_dense_products(factor, build):
    learned, states = one_after_the_other(replace(METHOD, factor=factor), build, 3)
    each = [products(params) for params in learned]
    assert states[-1].params.keys() >= {DELTA + name for name in each[0]}
    for name in each[0]:
        assert torch.allclose(states[-1].params[DELTA + name], factor * sum(own[name] for own in each), atol=1e-6)
        assert states[-1].params[DELTA + name].any()
    assert not any(name.endswith((A, B)) for name in states[-1].params)


def test_room_is_counted_down_and_the_concept_beyond_it_is_refused(build):
    _, states = one_after_the_other(METHOD, build, 4)
    assert [kept.facts["room"] for kept in states] == [3, 2, 1, 0]
    with pytest.raises(ConfigError, match=r"'ada' is number 5, and with rank 4 there is room for 4: .* reads 16"):
        small.begun(METHOD, build, 5, states[-1])


def test_a_rank_that_does_not_divide_leaves_rows_over(build):
    method = Orthogonal(6, "cross_kv")
    _, states = one_after_the_other(method, build, 2)
    assert [kept.facts["room"] for kept in states] == [1, 0]
    with pytest.raises(ConfigError, match="there is room for 2"):
        small.begun(method, build, 3, states[-1])


def test_the_narrowest_layer_decides(build):
    """Self-attention reads 8 numbers here, cross-attention's keys and values 16."""
    method = Orthogonal(4, "self+cross")
    learned, states = one_after_the_other(method, build, 2)
    assert [kept.facts["room"] for kept in states] == [1, 0]
    assert {value.shape[1] for value in pick(learned[0], ends_with(A)).values()} == {8, 16}
    for name in pick(learned[0], ends_with(A)):
        assert (learned[0][name] @ learned[1][name].T).abs().max() < 1e-6


def test_a_concept_reads_inputs_along_its_own_rows_only(build):
    """What the sum does to an input along one concept's rows is what that concept alone does to it."""
    learned, states = one_after_the_other(METHOD, build, 3)
    for name, own in products(learned[1]).items():
        along = learned[1][name.removesuffix(".weight") + A].T
        assert torch.allclose(states[-1].params[DELTA + name] @ along, own @ along, atol=1e-5)


def test_another_basis_than_that_of_earlier_concepts_is_refused(build):
    _, (kept,) = one_after_the_other(METHOD, build, 1)
    with pytest.raises(ConfigError, match="basis 16 here is not the one"):
        small.begun(replace(METHOD, basis_seed=1), build, 2, kept)
    assert any(is_delta(name) for name in kept.params)
