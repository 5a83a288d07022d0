"""Mix-of-Show: what layers read, sums that run, and what is solved from them."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from personae.continual.closed_form import gram
from personae.continual.features import CAPTION, by_source, picture_grams, text_vectors
from personae.continual.mix_of_show import GRAM, PULL, MixOfShow
from personae.core import Batch, Given, State, stream
from personae.errors import ConfigError
from personae.infer.sample import draw
from personae.personal.delta import DELTA, is_delta
from personae.personal.lora import is_lora, products
from personae.testing import check_continual

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("small.py"))))

LORA = (2, "self+cross")
METHOD = MixOfShow(*LORA, sampling_steps=2)
PAPER = replace(METHOD, general_weight=0.0)
BLOCK = "unet.mid_block.attentions.0.transformer_blocks.0."


@pytest.mark.parametrize(
    "method", [METHOD, PAPER, replace(METHOD, rank=2, layers="cross_kv")], ids=["general", "paper", "cross_kv"]
)
def test_contract(method, build):
    check_continual(method, build)


# --- what layers read ----------------------------------------------------------------------------------------------


def test_layers_that_read_the_same_are_told_by_their_names(build):
    """The hook sees it: whichever of them is asked, the sums have the same bits."""
    model = build(PAPER.parts, small.TASKS[:1])
    small.scattered(model)
    names = list(products(model.params()))
    seen = picture_grams(model, {name: name for name in names}, ("a <rex>",), stream(0, "x"), 2)
    readers = by_source(names)
    assert sorted(name for each in readers.values() for name in each) == sorted(names)
    for together in readers.values():
        assert all(torch.equal(seen[together[0]], seen[name]) for name in together)
    firsts = [seen[together[0]] for together in readers.values()]
    assert not any(torch.equal(left, right) for at, left in enumerate(firsts) for right in firsts[:at])
    assert readers[f"{BLOCK}attn1"] == [f"{BLOCK}attn1.to_{each}.weight" for each in "kqv"]
    assert {name.split(".attn2.")[1] for name in readers[CAPTION]} == {"to_k.weight", "to_v.weight"}


def test_keys_and_values_read_the_caption_and_queries_the_picture(build):
    model = build(PAPER.parts, small.TASKS[:1])
    small.scattered(model)
    key, query = f"{BLOCK}attn2.to_k.weight", f"{BLOCK}attn2.to_q.weight"
    read = []
    hook = model.unet.get_submodule(query.removeprefix("unet.").removesuffix(".weight")).register_forward_pre_hook(
        lambda module, inputs: read.append(inputs[0].flatten(0, -2))
    )
    grams = picture_grams(model, {"text": key, "picture": query}, ("a <rex>",), stream(0, "x"), 2)
    hook.remove()
    assert len(read) == 4  # two steps, each with guidance
    assert torch.allclose(grams["picture"], gram(torch.cat(read)), rtol=1e-5)
    told = Batch(torch.zeros(2), torch.tensor([False, True]), ("a <rex>", ""))
    assert torch.allclose(grams["text"], gram(model.condition(told).text.detach().flatten(0, 1)), rtol=1e-5)


def test_nothing_watches_afterwards(build):
    model = build(PAPER.parts, small.TASKS[:1])
    before = draw(model, ("a <rex>",), stream(0, "x"), steps=2)
    picture_grams(model, {"one": f"{BLOCK}attn1.to_q.weight"}, ("a <rex>",), stream(0, "x"), 2)
    assert torch.equal(before, draw(model, ("a <rex>",), stream(0, "x"), steps=2))
    assert not any(module._forward_pre_hooks for name, module in model.unet.named_modules() if "attn" in name)


# --- fusion --------------------------------------------------------------------------------------------------------


def output(change, total):
    """The root of the mean square of what a change does on what is read, given its Gram matrix."""
    return float((change.double() @ total @ change.double().T).trace().clamp(min=0)) ** 0.5


def test_one_concept_fused_does_what_its_own_adapter_does(build):
    method = replace(PAPER, ridge=1e-9)
    client = small.trained(method, build, 1, State())
    own = products(client.model.params())
    read = text_vectors(client.model, ("<rex>", "a <rex>")).flatten(0, 1).double()
    kept = method.end(client, State())
    assert len(read) == 2 * 12  # with the padding
    for source, names in by_source(own).items():
        for name in names:
            change, total = kept.params[DELTA + name].double(), kept.extras[GRAM + source]
            assert output(own[name], total) > 0
            assert output(change - own[name], total) < 1e-4 * output(own[name], total)
            if source == CAPTION:
                wanted = read @ own[name].double().T
                assert (read @ change.T - wanted).norm() < 1e-4 * wanted.norm()


def test_with_ridge_0_it_is_the_adapter_itself_where_what_is_read_spans_the_width(build):
    method = replace(PAPER, ridge=0.0)
    client = small.trained(method, build, 1, State())
    own = products(client.model.params())
    kept = method.end(client, State())
    spanned = [
        name
        for source, names in by_source(own).items()
        for name in names
        if torch.linalg.cond(kept.extras[GRAM + source]) < 1e6
    ]
    assert spanned
    for name in spanned:
        assert torch.allclose(kept.params[DELTA + name], own[name], rtol=0, atol=1e-6 * float(own[name].norm()))


def test_the_sums_are_those_of_every_concept_taught_alone(build):
    first, second = small.taught(PAPER, build, 2)
    alone = PAPER.end(small.trained(PAPER, build, 2, State()), State())
    for name, value in second.extras.items():
        assert torch.allclose(value, first.extras[name] + alone.extras[name], rtol=1e-12, atol=0)


def test_the_order_of_concepts_does_not_matter(build):
    """Each trains from the untaught weights, and sums do not mind."""
    both, kept = small.taught(PAPER, build, 2)[-1], State()
    for count in (2, 1):
        client = small.trained(PAPER, build, count, replace(kept, params={}))
        kept = PAPER.end(client, kept)
    for name in filter(is_delta, both.params):
        assert torch.allclose(kept.params[name], both.params[name], rtol=0, atol=1e-6)


def test_training_begins_at_the_untaught_weights(build):
    (first,) = small.taught(METHOD, build, 1)
    client = small.begun(METHOD, build, 2, first)
    changes = {name: value for name, value in client.model.params().items() if is_delta(name)}
    assert any(first.params[name].abs().max() > 0 for name in changes)
    assert all(value.abs().max() == 0 for value in changes.values())


def test_what_is_kept_does_not_grow_but_for_words(build):
    states = small.taught(METHOD, build, 3)
    shapes = [{name: value.shape for name, value in state.extras.items()} for state in states]
    assert shapes[0] == shapes[1] == shapes[2]
    assert not any(is_lora(name) for state in states for name in state.params)
    assert [len(state.params) - len(states[0].params) for state in states] == [0, 1, 2]
    readers = by_source(name.removeprefix(DELTA) for name in states[0].params if is_delta(name))
    assert shapes[0].keys() == {front + source for front in (GRAM, PULL) for source in readers}
    assert all(value.dtype == torch.float64 for value in states[0].extras.values())


# --- captions of other things --------------------------------------------------------------------------------------


def test_captions_of_other_things_hold_the_weights_where_they_read(build):
    moved = {}
    for weight in (0.0, 1.0, 1e4):
        method = replace(METHOD, general_weight=weight, ridge=1e-9)
        client = small.trained(method, build, 1, State())
        others = gram(text_vectors(client.model, small.PROMPTS).flatten(0, 1))
        params = method.end(client, State()).params
        moved[weight] = sum(
            output(params[DELTA + name], others) for name in by_source(products(client.model.params()))[CAPTION]
        )
    assert moved[1e4] < 0.1 * moved[1.0] < 0.1 * moved[0.0]


def test_they_are_read_once_by_the_untaught_model(build):
    sums = []
    for count in (1, 2):  # whichever concept is the first
        client = small.trained(METHOD, build, count, State())
        before = client.model.params()
        sums.append(METHOD._general(client, by_source(products(before))))
        assert all(torch.equal(value, before[name]) for name, value in client.model.params().items())
    assert all(torch.allclose(sums[0][name], sums[1][name], rtol=1e-6) for name in sums[0])
    first, second = small.taught(METHOD, build, 2)
    alone = PAPER.end(small.trained(PAPER, build, 2, State()), State())
    for name, value in alone.extras.items():
        assert torch.allclose(second.extras[name] - first.extras[name], value, rtol=1e-9, atol=1e-12)


def test_what_is_missing_is_said(build):
    assert PAPER.needs == frozenset() and METHOD.needs == {"calibration_prompts"}
    client = replace(small.client_for(METHOD, build(METHOD.parts, small.TASKS[:1]), 1), given=Given())
    with pytest.raises(ConfigError, match="captions of other things"):
        METHOD.end(client, State())
