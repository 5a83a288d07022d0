"""CNS: which weights, that no other moves, what is kept, and the scores beside literal twins."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from personae.continual import cns, learn
from personae.continual.cns import (
    GENERAL,
    MASK,
    NUM_NEURONS,
    NUM_SHARED,
    OWNED,
    Cns,
    concept_mask,
    importances,
    jaccard,
    mask_of,
    top,
)
from personae.core import Batch, Given, Images, State, Training, pick, stream
from personae.errors import ConfigError
from personae.infer.sample import draw
from personae.objective.dc_score import noise_bank
from personae.personal.delta import DELTA, is_delta
from personae.personal.neurons import AT, NEURONS, is_neuron, packed, placed, unpacked
from personae.personal.tokens import is_word
from personae.testing import check_continual
from personae.testing.contract import differing, differing_states

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("small.py"))))

CNS = Cns(draws=4, general_draws=2, drawing_steps=2, keep_masks=True)
WEIGHTS = 24_556
"""Of the smallest U-Net; 1024 of them are keys and values, in 8 layers."""
BUDGET = 31
"""0.13 % of them."""


@pytest.fixture(autouse=True)
def forgotten():
    """What one test's model found general is no other's."""
    cns.general_bitmaps.cache_clear()


def effective(model):
    """What keys and values are computed with, by the weight's name."""
    modules = dict(model.named_modules())
    names = [name.removeprefix(DELTA) for name in model.live() if is_delta(name)]
    return {name: modules[name.removesuffix(".weight")].weight.detach().clone() for name in names}


def bitmaps(kept, front, shapes):
    return {name: unpacked(kept.extras[front + name], value.shape) for name, value in shapes.items()}


def count(masks):
    return sum(int(mask.sum()) for mask in masks.values())


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [CNS, replace(CNS, keep_masks=False, overlap_weight=100.0)], ids=["with masks", "without"]
)
def test_the_contract_of_continual_methods(method, build):
    check_continual(method, build)


def test_a_lesson_that_is_taken_up_again_ends_in_the_same_bits(build):
    (kept,), seen = small.taught(CNS, build, 1), []

    def lesson(**how):
        client = small.client_for(CNS, build(CNS.parts, small.TASKS[:2]), 2)
        return learn(CNS, replace(small.TRAINING, steps=1), client, kept, 7, stretches=3, **how)

    whole = lesson(after=lambda *reached: seen.append(reached))
    again = lesson(done=seen[0][0], reached=seen[0][1])
    assert not differing_states(whole, again)


# --- which weights move -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2])
def test_weights_that_are_not_chosen_keep_their_bits_under_adamw_with_decay(number, build):
    kept = ([State(), *small.taught(CNS, build, number - 1)])[-1]
    training = Training(steps=5, lr=0.02, batch_size=2, optimizer="adamw", weight_decay=0.5)
    client = small.begun(CNS, build, number, kept)
    before, chosen = effective(client.model), mask_of(client.model.params())
    small.fit(client, small.everything, training)
    trained = effective(client.model)
    after = CNS.end(client, kept)
    composed = build(CNS.parts, small.TASKS[:number])
    CNS.compose(composed, after, [])
    assert count(chosen) == BUDGET
    for name, mask in chosen.items():
        for now in (trained[name], effective(composed)[name]):
            assert torch.equal(now[~mask], before[name][~mask]), "these nobody chose"
            assert bool((now[mask] != before[name][mask]).all()), "these moved"
        assert torch.allclose(effective(composed)[name], trained[name], atol=1e-7), "what was learned is kept"
        change = after.params[DELTA + name] - kept.params.get(DELTA + name, torch.zeros(()))
        assert not change[~mask].any() and bool((change[mask] != 0).all())


def test_only_neurons_and_the_concepts_own_word_move(build):
    client = small.begun(CNS, build, 2, *small.taught(CNS, build, 1))
    before = client.model.params()
    small.fit(client, small.everything, small.TRAINING)
    moved = set(differing(before, client.model.params()))
    assert moved == {name for name in before if is_neuron(name) and len(before[name])} | {"tokens.<tom>"}
    rate = replace(CNS, word_rate=50.0).begin(client, State()).rate
    assert rate("tokens.<tom>") == 50.0 and rate(f"{NEURONS}x") == 1.0


def test_a_concepts_neurons_are_not_general_and_of_the_budgets_number(build):
    first, second = small.taught(CNS, build, 2)
    shapes = {name.removeprefix(DELTA): value for name, value in first.params.items() if is_delta(name)}
    general, owned = bitmaps(first, GENERAL, shapes), bitmaps(first, OWNED, shapes)
    assert count(general) > 0 and sum(value.numel() for value in shapes.values()) == 1024
    for kept in (first, second):
        assert kept.facts[NUM_NEURONS] == BUDGET == int(0.0013 * WEIGHTS)
    for number, kept in ((1, first), (2, second)):
        own = bitmaps(kept, f"{MASK}{small.TASKS[number - 1].name}/", shapes)
        assert count(own) == BUDGET and not any(bool((own[name] & general[name]).any()) for name in own)
    own = bitmaps(second, f"{MASK}tom/", shapes)
    assert all(torch.equal(bitmaps(second, OWNED, shapes)[name], owned[name] | own[name]) for name in own)
    assert second.facts[NUM_SHARED] == count({name: owned[name] & own[name] for name in own})
    assert not any(map(is_neuron, second.params)) and not any(name.startswith(AT) for name in second.params)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 9])
def test_of_what_is_base_and_not_general_the_largest_are_kept(most):
    """Three of six are base in either layer; of the first one is general, and in the second one scores nothing."""
    scores = {"x": torch.tensor([[6.0, 1.0, 5.0], [4.0, 2.0, 3.0]]), "y": torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0, 4.5])}
    general = {"x": torch.tensor([[True, False, False], [False] * 3]), "y": torch.zeros(6, dtype=torch.bool)}
    found = concept_mask(scores, general, 0.5, most)
    ranked = [("y", 3), ("x", 2), ("y", 5), ("x", 3)]
    chosen = {(name, at) for name, mask in found.items() for at in mask.flatten().nonzero()[:, 0].tolist()}
    assert chosen == set(ranked[:most])


def test_a_concept_without_neurons_is_refused(build):
    with pytest.raises(ConfigError, match="concept 'rex' has no neurons"):
        small.begun(replace(CNS, budget=1e-6), build, 1, State())
    with pytest.raises(ConfigError, match="concept 'rex' has no neurons"):
        small.begun(replace(CNS, base_share=0.01, general_share=1.0), build, 1, State())
    with pytest.raises(ConfigError, match="agreement is 0, expected a share"):
        Cns(agreement=0)


# --- scores -----------------------------------------------------------------------------------------------------------


def gradients(model, images, draws):
    """dL/dw of every draw of the bank, for the weights that layers compute with."""
    bank, found = noise_bank(model, draws, stream(0, "neurons")), []
    leaves = [value.requires_grad_(True) for name, value in model.live().items() if is_delta(name)]
    for at in range(draws):
        row = at % len(images)
        x_0, t, noise = images.pixels[row : row + 1], bank.t[at : at + 1], bank.noise[at : at + 1]
        cond = model.condition(Batch(x_0, torch.tensor([False]), (images.captions[row],)))
        prediction = model.forward(model.schedule.add_noise(x_0, noise, t), t, cond)
        loss = (prediction - model.schedule.target(x_0, noise, t)).square().mean()
        found.append(torch.autograd.grad(loss, leaves))
    return [torch.stack(each) for each in zip(*found, strict=True)]


def test_importance_is_the_mean_of_weight_times_gradient_of_the_weight_as_it_is_now(build):
    """Not of the base's weight, nor of the change alone; every image in turn."""
    model = build(CNS.parts, small.TASKS[:1])
    changed = {n: torch.randn(v.shape, generator=stream(1, n)) * is_delta(n) for n, v in model.params().items()}
    model.load({**model.params(), **pick(changed, is_delta)})
    images = small.images(model, "rex", "a <rex>", count=3)
    found, weights = importances(model, images, 5), effective(model)
    for (name, score), gradient in zip(found.items(), gradients(model, images, 5), strict=True):
        assert torch.allclose(score, (weights[name] * gradient).abs().mean(0), atol=1e-7), name


def test_general_is_what_enough_prompts_find_important_on_pictures_of_the_untaught_model(build):
    method = replace(CNS, agreement=0.75)
    model, untaught = build(CNS.parts, small.TASKS[:1]), build(CNS.parts, small.TASKS[:1])
    model.load(
        {name: value + 0.3 if is_delta(name) or is_word(name) else value for name, value in model.params().items()}
    )
    before, votes = model.params(), {}
    found = method._general(replace(small.client_for(CNS, model, 1), given=Given(None, small.PROMPTS)), State())
    assert not differing(before, model.params()), "the model is left as it was"
    drawn = draw(untaught, small.PROMPTS, stream(0, "calibration pictures"), steps=2)
    for picture, said in zip(drawn, small.PROMPTS, strict=True):
        latents = untaught.encode(Images(picture[None]).floats())
        for (name, weight), gradient in zip(
            effective(untaught).items(), gradients(untaught, Images(latents, captions=(said,)), 2), strict=True
        ):
            mask = top((weight * gradient).abs().mean(0), 0.1)
            assert int(mask.sum()) == 13, "a tenth of 128"
            votes[name] = votes.get(name, 0) + mask.long()
    assert set(found) == {GENERAL + name for name in votes}
    assert all(torch.equal(found[GENERAL + name], packed(number >= 3)) for name, number in votes.items())
    assert any(bool((number == 3).any()) for number in votes.values()) and count(votes) > 0


def test_general_is_found_once_and_kept(build, monkeypatch):
    asked = []
    monkeypatch.setattr(cns, "draw", lambda *args, **how: asked.append(args[1]) or draw(*args, **how))
    first, *others = small.taught(CNS, build, 3)
    assert asked == [small.PROMPTS], "at neither end of the first lesson again, nor with a new model later"
    general = pick(first.extras, lambda name: name.startswith(GENERAL))
    assert general and not any(differing(general, pick(kept.extras, general.__contains__)) for kept in others)
    other = small.client_for(CNS, build(CNS.parts, small.TASKS[:1]), 1)
    CNS.begin(replace(other, given=Given(None, ("a tree",))), State())
    assert asked == [small.PROMPTS, ("a tree",)], "another model or other prompts are asked for themselves"
    with pytest.raises(ConfigError, match="needs calibration prompts, and was given none"):
        CNS.begin(replace(other, given=Given()), State())


# --- penalties --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def prices(client):
    batch = small.noised_with(client.model, ("a dog",))
    return [penalty(client.model, batch).item() for penalty in client.plan.penalties]


def moved(client, by):
    """Every neuron by the same number."""
    params = client.model.params()
    client.model.load({name: value + by if is_neuron(name) else value for name, value in params.items()})


def test_what_earlier_concepts_own_and_how_far_from_the_base_have_their_price(build):
    method = replace(CNS, overlap_weight=3.0, distance_weight=5.0)
    kept = small.taught(method, build, 1)[0]
    client = small.begun(method, build, 2, kept)
    moved(client, 0.5)
    params, owned = client.model.params(), mask_of(client.model.params())
    earlier = torch.cat([kept.params[DELTA + name][mask] for name, mask in owned.items()])
    before = {name: unpacked(kept.extras[OWNED + name], mask.shape) for name, mask in owned.items()}
    assert count({name: owned[name] & before[name] for name in owned}) > 0 and earlier.any()
    assert prices(client) == pytest.approx([3 * 0.25, 5 * float((earlier + 0.5).square().mean())])
    apart = {name: torch.zeros_like(mask) for name, mask in owned.items()}
    for name, mask in apart.items():
        mask.view(-1)[(~before[name] & ~owned[name]).flatten().nonzero()[:4, 0]] = True
    client.model.load({**params, **placed(apart)})
    moved(client, 0.5)
    assert prices(client) == pytest.approx([0.0, 5 * 0.25]), "where nobody was before, and wherever neurons now are"


def test_the_first_concept_overlaps_with_nobody(build):
    client = small.begun(CNS, build, 1, State())
    assert prices(client) == [0.0, 0.0]
    moved(client, 2.0)
    assert prices(client) == pytest.approx([0.0, 4.0])


def test_the_price_of_overlap_holds_neurons_back(build):
    kept = small.taught(CNS, build, 1)[0]

    def by(weight):
        client = small.begun(replace(CNS, overlap_weight=weight), build, 2, kept)
        training = Training(20, 0.01, 2, optimizer="adamw", weight_decay=0.0)
        small.fit(client, small.everything, training)
        params = client.model.params()
        owned = {name: unpacked(kept.extras[OWNED + name], mask.shape) for name, mask in mask_of(params).items()}
        own = [params[NEURONS + name][mask.flatten()[params[AT + name]]] for name, mask in owned.items()]
        return float(torch.cat(own).abs().mean())

    assert by(1e6) < 0.5 * by(0.0)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_the_second_concept_starts_from_what_the_first_changed(build):
    kept = small.taught(CNS, build, 1)[0]
    client, composed, bare = small.begun(CNS, build, 2, kept), *(build(CNS.parts, small.TASKS[:2]) for _ in range(2))
    CNS.compose(composed, kept, [])
    assert not differing(effective(client.model), effective(composed))
    says = ("a <rex>", "a dog")
    assert torch.equal(small.predicted(client.model, says), small.predicted(composed, says))
    assert not torch.allclose(small.predicted(composed, says), small.predicted(bare, says), atol=1e-5)


def test_two_bitmaps_words_and_changes_are_kept_and_only_words_grow(build):
    sizes = []
    for number, kept in enumerate(small.taught(replace(CNS, keep_masks=False), build, 3), 1):
        params, extras = (State(part).num_bytes() for part in (kept.params, kept.extras))
        words = State(pick(kept.params, is_word)).num_bytes()
        assert words == number * 16 * 4 and params - words == 1024 * 4 and extras == 2 * 1024 / 8
        assert {name.split(".")[0] for name in kept.extras} == {"owned", "general"}
        sizes.append(params + extras)
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] == 16 * 4
    assert 2 * packed(torch.zeros(19_169_280, dtype=torch.bool)).nbytes / 2**20 == pytest.approx(2 * 2.285, abs=0.001)


def test_how_many_neurons_two_concepts_have_in_common():
    masks = {"rex": [1, 1, 0, 0, 1, 0, 0, 0, 1], "tom": [1, 0, 0, 0, 1, 0, 0, 0, 0], "tommy": [0] * 9}
    extras = {f"{MASK}{name}/{key}": packed(torch.tensor(mask).bool()) for name, mask in masks.items() for key in "xy"}
    assert jaccard(State(extras=extras), "rex", "tom") == 2 / 4 == jaccard(State(extras=extras), "tom", "rex")
    assert jaccard(State(extras=extras), "rex", "rex") == 1.0
    with pytest.raises(ConfigError, match="the mask of concept 'ada' was not kept; teach it with keep_masks"):
        jaccard(State(extras=extras), "rex", "ada")


def test_masks_are_kept_where_they_are_asked_for(build):
    kept = small.taught(CNS, build, 3)[-1]
    assert 0 <= jaccard(kept, "rex", "tom") < 1 == jaccard(kept, "pip", "pip")
    assert State(pick(kept.extras, lambda name: name.startswith(MASK))).num_bytes() == 3 * 1024 / 8
