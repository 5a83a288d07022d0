"""Double distillation: a minimum where student and teachers agree, the formula where they do not, a pool that grows."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import log_softmax, softmax

from personae.continual import Dsc, Ewc
from personae.continual.dsc import POOL, predictions
from personae.continual.ewc import IMPORTANCE, importances
from personae.core import Batch, Plan, State, Training, pick
from personae.errors import ConfigError
from personae.local.fit import fit
from personae.personal.lora import is_lora
from personae.personal.tokens import is_word
from personae.testing.contract import differing

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("small.py"))))

LORA = (2, "cross_kv")
CONSOLIDATION = Training(steps=4, lr=0.01, batch_size=2, optimizer="adamw", weight_decay=0.1)
DSC = Dsc(CONSOLIDATION, *LORA)
HEAT = 0.01


def pooled(adapters):
    """Adapters by concept, as they are kept."""
    return {f"{POOL}{concept}/{name}": value for concept, each in adapters.items() for name, value in each.items()}


def elsewhere(params, seed):
    """Another adapter of the same shapes."""
    return {name: value + 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
            for name, value in pick(params, is_lora).items()}  # fmt: skip


def asked(client, loss):
    """A loss of the same noised images, and the gradients that reach adapters."""
    live = pick(client.model.live(), is_lora)
    for parameter in live.values():
        parameter.requires_grad_(True)
    found = loss(client.model, small.noised_with(client.model, ["a <tom>"] * 3))
    return found.detach(), torch.cat([each.flatten() for each in torch.autograd.grad(found, list(live.values()))])


def agreeing(method, build):
    """A client whose earlier concept's adapter is the present one."""
    client = small.trained(method, build, 2, State())
    small.scattered(client.model)
    pool = pooled({"rex": pick(client.model.params(), is_lora)})
    return client, method._distilled(client, pool, HEAT)


def test_noise_terms_and_their_gradient_are_zero_where_all_three_agree(build):
    client, loss = agreeing(replace(DSC, score_weight=0.0), build)
    value, gradient = asked(client, loss)
    assert value == 0 and not gradient.any()
    client.model.load({**client.model.params(), **elsewhere(client.model.params(), 1)})
    value, gradient = asked(client, loss)
    assert value > 1e-4 and gradient.abs().max() > 1e-4


def test_cross_entropies_are_least_where_all_three_agree(build):
    client, loss = agreeing(replace(DSC, noise_weight=0.0), build)
    least, gradient = asked(client, loss)
    agreed = client.model.params()
    assert gradient.abs().max() < 1e-5
    steepest = 0.0
    for seed in range(5):
        client.model.load({**agreed, **elsewhere(agreed, seed)})
        value, gradient = asked(client, loss)
        assert value > least + 1e-3
        steepest = max(steepest, float(gradient.abs().max()))
    assert steepest > 1e-2


def test_the_loss_is_its_formula(build):
    """Every model asked by itself, one caption after the other."""
    method = replace(DSC, score_weight=0.3, noise_weight=0.7)
    client = small.trained(method, build, 2, State())
    learned, other = small.scattered(client.model), elsewhere(client.model.params(), 1)
    loss = method._distilled(client, pooled({"rex": other}), HEAT)
    student = {**learned, **elsewhere(learned, 2)}
    client.model.load(student)
    value, _ = asked(client, loss)

    model = build(method.parts, small.TASKS[:2])
    said, errors = {}, {}
    for name, params in {"student": student, "first": learned, "second": {**learned, **other}}.items():
        model.load(params)
        batch = small.noised_with(model, ["a <tom>"] * 3)
        target = model.schedule.target(batch.x_0, batch.noise, batch.t)
        plain = torch.zeros(3, dtype=torch.bool)
        with torch.no_grad():
            said[name] = {
                text: model.forward(batch.x_t, batch.t, model.condition(Batch(batch.x_t, plain, (text,) * 3)))
                for text in ("a cat", "a <rex>", "a <tom>")
            }
        errors[name] = torch.stack([(each - target).square().mean((1, 2, 3)) for each in said[name].values()], 1)
    own = log_softmax(-errors["student"] / HEAT, 1)
    scores = -sum((softmax(-errors[name] / HEAT, 1) * own).sum(1).mean() for name in ("first", "second"))
    noises = (said["first"]["a <tom>"] - said["student"]["a <tom>"]).square().mean()
    noises = noises + (said["second"]["a <rex>"] - said["student"]["a <rex>"]).square().mean()
    assert float(value) == pytest.approx(float(0.3 * scores + 0.7 * noises), rel=1e-4)


@pytest.mark.parametrize("targets", ["cross_kv", "self+cross"])
def test_a_teacher_says_what_a_model_with_its_adapter_would(targets, build):
    parts = Dsc(CONSOLIDATION, 2, targets).parts
    model, teacher = (build(parts, small.TASKS[:1]) for _ in range(2))
    values = small.scattered(model)
    other = elsewhere(values, 1)
    teacher.load({**values, **other})
    captions = ["a dog", "a <rex>"]
    with torch.no_grad():
        batch = small.noised_with(model, ["a <rex>"] * 2)
        found, student = predictions(model, batch, captions, other), predictions(model, batch, captions)
        expected = predictions(teacher, batch, captions)
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(student, expected, atol=1e-2)


def test_teachers_stay_as_they_are_while_the_student_moves(build):
    client = small.trained(DSC, build, 2, State())
    pool = pooled({"rex": elsewhere(client.model.params(), 1)})
    before, learned = {name: value.clone() for name, value in pool.items()}, client.model.params()
    loss = DSC._distilled(client, pool, HEAT)
    value, _ = asked(client, loss)
    fit(replace(client, plan=Plan(is_lora, loss=loss)), is_lora, CONSOLIDATION)
    moved = client.model.params()
    assert set(differing(learned, moved)) == set(pick(learned, is_lora)), "all of the adapter, and no word"
    assert differing(before, pool) == []
    client.model.load(learned)
    assert asked(client, loss)[0] == value


def test_consolidation_brings_the_student_to_its_teachers(build):
    method = replace(DSC, score_weight=0.0)
    client = small.trained(method, build, 2, State())
    loss = method._distilled(client, pooled({"rex": elsewhere(client.model.params(), 1)}), HEAT)
    before, _ = asked(client, loss)
    fit(replace(client, plan=Plan(is_lora, loss=loss)), is_lora, replace(CONSOLIDATION, steps=30))
    after = asked(client, loss)[0]
    assert after < 0.8 * before, (before, after)


def test_an_earlier_concept_is_drawn_anew_for_every_step(build):
    client = small.trained(DSC, build, 3, State())
    params = client.model.params()
    loss = DSC._distilled(client, pooled({"rex": elsewhere(params, 1), "tom": elsewhere(params, 2)}), HEAT)
    values = [round(float(asked(client, loss)[0]), 5) for _ in range(12)]
    assert len(set(values)) == 2 and 2 <= values.count(values[0]) <= 10


def test_the_pool_grows_by_one_adapter_a_concept_and_the_last_one_goes_on(build):
    states = small.taught(DSC, build, 4)
    size = len(pick(states[0].params, is_lora))
    for number, (before, kept) in enumerate(zip([State(), *states], states, strict=False), start=1):
        pool = pick(kept.extras, lambda name: name.startswith(POOL))
        assert len(pool) == number * size
        assert differing(before.extras, {name: pool[name] for name in before.extras}) == []
        new = pick(kept.extras, lambda name, old=before: name not in old.extras)
        own = pooled({small.TASKS[number - 1].name: pick(kept.params, is_lora)})
        assert differing(own, new) == []


def test_the_first_concept_is_kept_as_it_was_learned_and_later_words_too(build):
    client = small.trained(DSC, build, 1, State())
    learned = client.model.params()
    first = DSC.end(client, State())
    assert differing(learned, first.params) == []
    client = small.trained(DSC, build, 2, first)
    learned = client.model.params()
    second = DSC.end(client, first)
    assert set(differing(learned, second.params)) == set(pick(learned, is_lora))
    assert differing(pick(learned, is_word), pick(second.params, is_word)) == []


def test_with_ewc_springs_hold_in_both_stretches(build):
    """What ties is what EWC alone keeps; a strong spring leaves the adapter nearer in the second stretch, too."""
    found = {}
    for weight in (0.0, 1000.0):
        method = replace(DSC, ewc=Ewc(*LORA, draws=2, weight=weight), consolidation=replace(CONSOLIDATION, steps=10))
        (kept,) = small.taught(method, build, 1)
        assert importances(kept).keys() == pick(kept.params, is_lora).keys()
        client = small.begun(method, build, 2, kept)
        assert len(client.plan.penalties) == 1
        after = method.end(client, kept)  # nothing was learned: all that moves is consolidation
        away = {name: (after.params[name] - kept.params[name]).square() for name in importances(kept)}
        found[weight] = sum(float((importances(kept)[name] * value).sum()) for name, value in away.items())
        assert {name for name in after.extras if name.startswith(IMPORTANCE)} == {
            IMPORTANCE + name for name in pick(kept.params, is_lora)
        }
    assert found[1000.0] < found[0.0] / 2


def test_two_adapters_in_one_recipe_are_refused():
    with pytest.raises(ConfigError, match="ewc's rank, layers, word_rate are not those of dsc itself"):
        Dsc(CONSOLIDATION, *LORA, ewc=Ewc(3, "cross_kv"))
