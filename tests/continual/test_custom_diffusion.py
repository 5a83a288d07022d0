"""Custom Diffusion: which words become constraints, what is kept of them, and that all of them hold."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from personae.continual.custom_diffusion import CHANGE, PAIR, CustomDiffusion, pairs
from personae.continual.features import text_features
from personae.core import Batch, Given, State
from personae.errors import ConfigError
from personae.personal.delta import DELTA, is_delta
from personae.testing import check_continual

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("small.py"))))

METHOD = CustomDiffusion()
ROWS = 6  # "<rex> dog end" of two captions
KEY = "delta.unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def stacked(params):
    """All changes of keys and values, one below the other, in the order of their names."""
    return torch.cat([params[name] for name in sorted(filter(is_delta, params))]).double()


def missed(kept, concept):
    """How far what is kept is from what this concept wants, over what it wants."""
    features, values = (kept.extras[f"{PAIR}{concept}/{what}"].double() for what in ("features", "values"))
    return float((features @ stacked(kept.params).T - values).norm() / values.norm())


def test_contract(build):
    check_continual(METHOD, build)


def test_all_constraints_so_far_are_met(build):
    first, second = small.taught(METHOD, build, 2)
    assert missed(first, "rex") < 1e-5
    assert missed(second, "rex") < 1e-5 and missed(second, "tom") < 1e-5
    wrong = replace(second, params=first.params)
    assert missed(wrong, "tom") > 0.1


def test_without_what_was_kept_of_it_an_earlier_concept_is_lost(build):
    first, second = small.taught(METHOD, build, 2)
    forgetful = METHOD.end(small.trained(METHOD, build, 2, first), replace(first, extras={}))
    assert missed(replace(second, params=forgetful.params), "tom") < 1e-5
    assert missed(replace(second, params=forgetful.params), "rex") > 0.1


def test_a_concept_trains_from_the_untaught_weights_and_wants_what_it_would_want_alone(build):
    first, second = small.taught(METHOD, build, 2)
    client = small.begun(METHOD, build, 2, first)
    assert stacked(first.params).abs().max() > 0 and stacked(client.model.params()).abs().max() == 0
    alone = METHOD.end(small.trained(METHOD, build, 2, State()), State())
    for what in ("features", "values"):
        assert torch.equal(alone.extras[f"{PAIR}tom/{what}"], second.extras[f"{PAIR}tom/{what}"])


def test_a_pair_is_what_the_trained_weights_make_of_the_concept_s_words(build):
    client = small.trained(METHOD, build, 1, State())
    model, change = client.model, stacked(client.model.params())
    kept = METHOD.end(client, State())
    features, values = (kept.extras[f"{PAIR}rex/{what}"] for what in ("features", "values"))
    told = ("<rex> dog", "a <rex> dog")
    text = model.condition(Batch(torch.zeros(2), torch.zeros(2).bool(), told)).text.detach()
    # begin, <rex>, dog, end, and with "a" in front of the word one more
    assert torch.equal(features, torch.cat([text[0, 1:4], text[1, 2:5]])) and len(features) == ROWS
    assert torch.allclose(values.double(), features.double() @ change.T, rtol=1e-6, atol=1e-9)


def test_pairs_come_in_the_order_of_names_whatever_the_order_of_what_was_read(build):
    second = small.taught(METHOD, build, 2)[-1].extras
    found, again = pairs(second), pairs(dict(sorted(second.items(), reverse=True)))
    assert all(
        torch.equal(a, b) for pair, other in zip(found, again, strict=True) for a, b in zip(pair, other, strict=True)
    )
    assert torch.equal(found[0][0], second[f"{PAIR}rex/features"])


def test_words_of_captions_without_a_new_one_are_all_read(build):
    model = build(METHOD.parts, small.TASKS[:1])
    text = model.condition(Batch(torch.zeros(2), torch.zeros(2).bool(), ("a tree", "a drawing of a cat"))).text
    found = text_features(model, ("a tree", "a drawing of a cat"))
    assert torch.equal(found, torch.cat([text[0, :4], text[1, :7]]).detach())  # with both marks, and no padding
    assert not found.requires_grad


def test_what_is_kept_grows_by_the_pairs_alone(build):
    states = small.taught(METHOD, build, 3)
    tall, wide = len(stacked(states[0].params)), states[0].params[KEY].shape[1]
    for count, state in enumerate(states, start=1):
        assert sum(value.numel() for value in state.extras.values()) == count * ROWS * (wide + tall)
        assert len(pairs(state.extras)) == count
    words = [{name for name in state.params if not is_delta(name)} for state in states]
    assert words[0] == {"tokens.<rex>"} and words[2] == {"tokens.<rex>", "tokens.<tom>", "tokens.<pip>"}


def test_what_is_told_of_other_things_changes_least(build):
    """What constraints leave open goes where other captions do not look."""
    client = small.trained(METHOD, build, 1, State())
    trained, others = stacked(client.model.params()), text_features(client.model, small.PROMPTS).double()
    kept = METHOD.end(client, State())
    assert (others @ stacked(kept.params).T).norm() < (others @ trained.T).norm()
    weights = torch.cat([client.model.base()[n.removeprefix(DELTA)] for n in sorted(filter(is_delta, kept.params))])
    assert kept.facts[CHANGE] == pytest.approx(float(stacked(kept.params).norm() / weights.norm()))


def test_without_a_prior_weight_it_is_plain_training(build):
    assert small.begun(replace(METHOD, prior_weight=0.0), build, 1, State()).plan.loss is None
    assert small.begun(METHOD, build, 1, State()).plan.loss is not None


def test_what_is_missing_is_said(build):
    client = small.client_for(METHOD, build(METHOD.parts, small.TASKS[:1]), 1)
    with pytest.raises(ConfigError, match="prior_weight needs pictures"):
        METHOD.begin(replace(client, given=Given(None, small.PROMPTS)), State())
    with pytest.raises(ConfigError, match="captions of other things"):
        METHOD.end(replace(client, given=Given(client.given.prior)), State())
