"""Merging: folding changes no prediction; the sum; the larger of two changes."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from personae.continual import MergedLora
from personae.continual.contract import load_kept
from personae.continual.merged_lora import larger
from personae.core import State, pick, stream
from personae.personal.delta import DELTA, is_delta
from personae.personal.lora import A, B, is_lora, products
from personae.testing.contract import differing

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("small.py"))))

SUM = MergedLora(2, "cross_kv")
LARGER = replace(SUM, merge="larger")
CAPTIONS = ("a <rex>", "a <tom>", "a dog", "")


def one_after_the_other(method, build, count):
    """What every concept learned, and what was kept after it."""
    learned, states = [], [State()]
    for number in range(1, count + 1):
        client = small.trained(method, build, number, states[-1])
        learned.append(client.model.params())
        states.append(method.end(client, states[-1]))
    return learned, states[1:]


@pytest.mark.parametrize("targets", ["cross_kv", "self+cross"])
def test_a_folded_adapter_says_what_it_said_before(targets, build):
    method = MergedLora(2, targets)
    _, (first,) = one_after_the_other(method, build, 1)
    client = small.trained(method, build, 2, first)
    client.model.load({n: v + 0.3 * torch.randn(v.shape, generator=stream(1, n)) if is_lora(n) else v
                       for n, v in client.model.params().items()})  # fmt: skip
    with_adapter = small.predicted(client.model, CAPTIONS)
    kept = method.end(client, first)
    assert not any(is_lora(name) for name in kept.params)
    folded, before = (build(method.parts, small.TASKS[:2]) for _ in range(2))
    load_kept(folded, kept, stream(9))
    load_kept(before, State({**kept.params, **pick(first.params, is_delta)}), stream(9))
    assert torch.allclose(small.predicted(folded, CAPTIONS), with_adapter, atol=1e-5)
    assert not torch.allclose(small.predicted(before, CAPTIONS), with_adapter, atol=1e-2)
    method.compose(before, kept, ["rex", "tom"])
    assert torch.allclose(small.predicted(before, CAPTIONS), with_adapter, atol=1e-5)


def test_a_sum_of_products_is_no_product_of_sums(build):
    learned, states = one_after_the_other(SUM, build, 3)
    for name in products(learned[0]):
        bare = name.removesuffix(".weight")
        of_sums = sum(params[bare + B] for params in learned) @ sum(params[bare + A] for params in learned)
        kept = states[-1].params[DELTA + name]
        assert torch.allclose(kept, sum(products(params)[name] for params in learned), atol=1e-6)
        assert not torch.allclose(kept, of_sums, rtol=0.1)


def test_of_the_first_concept_the_larger_is_all_of_its_change(build):
    learned, (kept,) = one_after_the_other(LARGER, build, 1)
    added = {DELTA + name: value for name, value in products(learned[0]).items()}
    assert differing(added, pick(kept.params, is_delta)) == [] and all(value.any() for value in added.values())


def test_later_concepts_replace_what_is_smaller(build):
    learned, states = one_after_the_other(LARGER, build, 2)
    for name, new in products(learned[1]).items():
        old = states[0].params[DELTA + name]
        kept = states[1].params[DELTA + name]
        assert torch.allclose(kept, torch.where(new.abs() >= old.abs(), new, old), atol=1e-6)
        assert 0 < int((kept == old).sum()) < kept.numel(), "some of both"


def test_larger_by_hand():
    before = {"delta.x": torch.tensor([2.0, -1.0, 3.0, 0.0, -0.5]), "tokens.<rex>": torch.ones(2)}
    added = torch.tensor([-2.0, 0.5, 4.0, 0.25, -0.5])
    after = {"delta.x": before["delta.x"] + added, "tokens.<rex>": torch.ones(2), "tokens.<tom>": torch.zeros(2)}
    found = larger(before, after)
    assert found["delta.x"].tolist() == [-2.0, -1.0, 4.0, 0.25, -0.5], "of two as large, the later one"
    assert differing(found, {**after, "delta.x": found["delta.x"]}) == []
    zero = {"delta.x": torch.zeros(5)}
    assert torch.equal(larger(zero, {"delta.x": added})["delta.x"], added)
    assert differing(larger({}, after), after) == []


def test_larger_depends_on_the_order():
    def merged(*changes):
        so_far = {"delta.x": torch.zeros(1)}
        for change in changes:
            so_far = larger(so_far, {"delta.x": so_far["delta.x"] + change})
        return float(so_far["delta.x"])

    assert merged(1.0, -1.0) == -1.0 and merged(-1.0, 1.0) == 1.0
