"""EWC beside its formulas: the spring, and importances as means of squared gradients of single draws."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import log_softmax

from personae.continual import Ewc, SequentialLora
from personae.continual.contract import caption
from personae.continual.ewc import IMPORTANCE, TEMPERATURE, importances, temperature
from personae.core import Batch, State, pick, stream
from personae.errors import ConfigError
from personae.personal.lora import is_lora
from personae.personal.tokens import is_word
from personae.testing.contract import differing

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("small.py"))))

LORA = (2, "cross_kv")
EWC = Ewc(*LORA, draws=4)
PLAIN = Ewc(*LORA, dc_weight=0.0, draws=4)


def literal(method, client, heat):
    """E g^2 as the class has it, one caption, one draw and one sum after the other."""
    model, train = client.model, client.data.train
    rng = torch.Generator().set_state(client.rng.get_state())
    live = {name: parameter.requires_grad_(True) for name, parameter in model.live().items() if is_lora(name)}
    total = {name: torch.zeros_like(parameter) for name, parameter in live.items()}
    for _ in range(method.draws):
        index = int(torch.randint(len(train), (1,), generator=rng))
        t = torch.randint(model.schedule.num_timesteps, (1,), generator=rng)
        noise = torch.randn(1, *model.sample_shape, generator=rng)
        past = torch.randperm(len(client.tasks) - 1, generator=rng)[: method.candidates] if method.dc_weight else []
        others = [caption(client.tasks[at], client.tasks[at].word) for at in past]
        captions = [train.captions[index], caption(client.task, client.task.noun), *others]
        x_0 = train.pixels[index : index + 1]
        x_t, target = model.schedule.add_noise(x_0, noise, t), model.schedule.target(x_0, noise, t)
        plain = torch.zeros(1, dtype=torch.bool)
        said = [model.forward(x_t, t, model.condition(Batch(x_t, plain, (text,)))) for text in captions]
        errors = torch.stack([(each - target).square().mean() for each in said])
        loss = errors[0] - method.dc_weight * log_softmax(-errors / heat, 0)[0]
        for name, gradient in zip(live, torch.autograd.grad(loss, list(live.values())), strict=True):
            total[name] += gradient.square() / method.draws
    return total


def scaled(found):
    mean = sum(float(value.sum()) for value in found.values()) / sum(value.numel() for value in found.values())
    return {name: value / mean for name, value in found.items()}


def mean_of(found):
    return float(torch.cat([value.flatten() for value in found.values()]).mean())


@pytest.mark.parametrize(("method", "heat"), [(PLAIN, 1.0), (EWC, 0.01), (replace(EWC, candidates=1), 0.01)])
def test_importances_are_means_of_squared_gradients_scaled_and_added_with_decay(method, heat, build):
    method = replace(method, decay=0.5)
    facts = {TEMPERATURE: heat}
    client = small.trained(method, build, 3, State())
    expected = scaled(literal(method, client, heat))
    before = {IMPORTANCE + n: torch.rand(v.shape, generator=stream(0, n)) for n, v in expected.items()}
    alone = method.consolidated(client, State(), facts)
    assert alone.keys() == before.keys()
    assert all(torch.allclose(alone[IMPORTANCE + n], value, rtol=1e-3, atol=1e-5) for n, value in expected.items())
    assert mean_of(alone) == pytest.approx(1.0, abs=1e-5)

    client = small.trained(method, build, 3, State())
    added = method.consolidated(client, State(extras=before), facts)
    for name, value in alone.items():
        assert torch.allclose(added[name], value + 0.5 * before[name], atol=1e-5)


def test_the_score_changes_what_matters(build):
    client = small.trained(EWC, build, 2, State())
    with_score = EWC.consolidated(client, State(), {TEMPERATURE: 0.01})
    client = small.trained(PLAIN, build, 2, State())
    without = PLAIN.consolidated(client, State(), {})
    assert not any(torch.allclose(with_score[name], without[name], rtol=0.01) for name in without)


def test_there_is_no_spring_for_the_first_concept(build):
    assert small.begun(EWC, build, 1, State()).plan.penalties == ()


def test_at_the_anchor_there_is_no_pull_and_away_from_it_that_of_the_formula(build):
    (kept,) = small.taught(EWC, build, 1)
    client = small.begun(EWC, build, 2, kept)
    (spring,) = client.plan.penalties
    model, batch = client.model, small.noised_with(client.model, ["a <tom>"])
    at = spring(model, batch)
    at.backward()
    pulled = {name: parameter for name, parameter in model.live().items() if parameter.grad is not None}
    assert at.item() == 0 and pulled.keys() == importances(kept).keys()
    assert not any(parameter.grad.any() for parameter in pulled.values())

    moved = small.scattered(model)
    weights = {name: kept.extras[IMPORTANCE + name] for name in pulled}
    by_hand = sum(float((weights[n] * (moved[n] - kept.params[n]).square()).sum()) for n in weights)
    away = spring(model, batch)
    away.backward()
    assert away.item() == pytest.approx(EWC.weight / 2 * by_hand, rel=1e-4) and by_hand > 0
    for name, parameter in pulled.items():
        assert torch.allclose(parameter.grad, EWC.weight * weights[name] * (moved[name] - kept.params[name]), rtol=1e-3)


def test_the_spring_holds_and_without_a_weight_there_is_none(build):
    (kept,) = small.taught(PLAIN, build, 1)
    training = replace(small.TRAINING, steps=12, weight_decay=0.0)

    def after(method):
        params = small.trained(method, build, 2, kept, training).model.params()
        away = {name: (params[name] - kept.params[name]).square() for name in importances(kept)}
        return params, sum(float((importances(kept)[name] * value).sum()) for name, value in away.items())

    free, far = after(replace(PLAIN, weight=0.0))
    _, near = after(replace(PLAIN, weight=1000.0))
    sequential, _ = after(SequentialLora(*LORA))
    assert near < far / 4
    assert differing(free, sequential) == []


def test_what_is_kept_does_not_grow_but_for_words(build):
    states = small.taught(replace(EWC, draws=1), build, 5)
    sizes = [replace(kept, params=pick(kept.params, is_lora)).num_bytes() for kept in states]
    assert len(set(sizes)) == 1
    assert [sum(map(is_word, kept.params)) for kept in states] == [1, 2, 3, 4, 5]
    assert len({tuple(sorted(kept.extras)) for kept in states}) == 1
    assert len({kept.facts[TEMPERATURE] for kept in states}) == 1, "the temperature is that of the first concept"
    for number, kept in enumerate(states, start=1):
        assert mean_of(importances(kept)) == pytest.approx(number, rel=1e-4), "each concept adds 1 in the mean"


def test_the_temperature_is_that_of_the_untaught_model_which_comes_back(build):
    client = small.trained(EWC, build, 1, State())
    learned, first = client.model.params(), temperature(client, State(), EWC.said)
    assert first > 0 and differing(learned, client.model.params()) == []
    small.scattered(client.model)
    assert temperature(client, State(), EWC.said) == first, "what was learned since makes no difference"
    assert temperature(client, State(facts={TEMPERATURE: 0.25}), EWC.said) == 0.25


def test_what_moves_nothing_is_refused(build):
    client = small.begun(PLAIN, build, 1, State())
    client.model.load({n: torch.zeros_like(v) if is_lora(n) else v for n, v in client.model.params().items()})
    with pytest.raises(ConfigError, match="'rex' moves nothing that could matter"):
        PLAIN.consolidated(client, State(), {})
