"""Captions told apart by denoising: paired noise, a temperature, the gradient of the cross-entropy, halving."""

import math

import pytest
import torch
from torch import nn

from personae.backbone.schedule import schedule
from personae.core import stream
from personae.errors import ConfigError
from personae.objective.dc_score import (
    Stage,
    calibrated,
    candidate_errors,
    classify,
    cross_entropy,
    dc_errors,
    noise_bank,
    probabilities,
)

WIDTH, CLASSES, SPREAD = 1024, 5, 0.5
CAPTIONS = tuple(f"class {k}" for k in range(CLASSES))


class Classes(nn.Module):
    """The exact denoiser of Gaussians N(mean_k, SPREAD^2 I), whose caption says k."""

    reads_captions = True

    def __init__(self):
        super().__init__()
        self.schedule = schedule(clip_sample=False)
        self.means = nn.Parameter(0.06 * torch.randn(CLASSES, WIDTH, generator=stream(0, "means")))
        self.asked = 0

    @property
    def sample_shape(self):
        return (WIDTH,)

    def live(self):
        return {"means": self.means}

    def base(self):
        return {}

    def condition(self, batch):
        return self.means[[CAPTIONS.index(caption) for caption in batch.captions]]

    def forward(self, x_t, t, cond):
        self.asked += len(x_t)
        alpha_bar = self.schedule.alpha_bar[t][:, None]
        centred = x_t - alpha_bar.sqrt() * cond
        return (1 - alpha_bar).sqrt() * centred / (alpha_bar * SPREAD**2 + 1 - alpha_bar)


@pytest.fixture
def model():
    return Classes()


def pictures(model, count, name="pictures"):
    true = torch.arange(count) % CLASSES
    noise = torch.randn(count, WIDTH, generator=stream(0, name))
    return model.means.detach()[true] + SPREAD * noise, true


def test_paired_noise_tells_apart_what_noise_of_ones_own_drowns(model):
    x_0, true = pictures(model, 60)
    other = (true + 1) % CLASSES
    rows = torch.arange(60)
    gaps = {"paired": [], "unpaired": []}
    with torch.no_grad():
        for draw in range(40):
            rng = stream(1, draw)
            t, noise = torch.randint(1000, (60,), generator=rng), torch.randn(60, WIDTH, generator=rng)
            t2, noise2 = torch.randint(1000, (60,), generator=rng), torch.randn(60, WIDTH, generator=rng)
            first, second = (candidate_errors(model, x_0, *which, CAPTIONS) for which in ((t, noise), (t2, noise2)))
            gaps["paired"].append(first[rows, other] - first[rows, true])
            gaps["unpaired"].append(second[rows, other] - first[rows, true])
    paired, unpaired = (float(torch.cat(gaps[kind]).std()) for kind in ("paired", "unpaired"))
    assert paired < unpaired / 10


def test_sixteen_draws_name_nine_of_ten(model):
    x_0, true = pictures(model, 60)
    errors = dc_errors(model, x_0, CAPTIONS, noise_bank(model, 16, stream(2)))
    assert float((errors.argmin(1) == true).float().mean()) > 0.9


def test_the_mean_over_a_bank_is_that_of_its_draws_whatever_goes_together(model):
    x_0, _ = pictures(model, 3)
    bank = noise_bank(model, 5, stream(3))
    one_by_one = torch.stack(
        [
            candidate_errors(model, x_0, t.expand(3), noise.expand(3, -1), CAPTIONS).detach()
            for t, noise in zip(bank.t, bank.noise, strict=True)
        ]
    ).mean(0)
    for together in (1, 7, 1000):
        assert torch.allclose(dc_errors(model, x_0, CAPTIONS, bank, batch_size=together), one_by_one, atol=1e-6)


def test_timesteps_are_evenly_spread_and_a_part_of_a_bank_spreads_too(model):
    bank = noise_bank(model, 10, stream(4))
    assert sorted(bank.t.tolist()) == [50 + 100 * k for k in range(10)]
    assert bank.t.tolist() != sorted(bank.t.tolist())
    assert torch.equal(noise_bank(model, 10, stream(4)).noise, bank.noise)
    assert len(noise_bank(model, 1000, stream(4)).t.unique()) == 1000


def test_without_a_temperature_the_scores_are_flat_and_with_it_neither_flat_nor_one_hot(model):
    x_0, true = pictures(model, 60)
    errors = dc_errors(model, x_0, CAPTIONS, noise_bank(model, 64, stream(5)))
    flat = cross_entropy(errors, true, 1.0)
    assert float(flat) == pytest.approx(math.log(CLASSES), abs=5e-3)
    temperature = calibrated(errors)
    told = probabilities(errors, temperature)[torch.arange(60), true]
    assert 0.35 < float(told.median()) < 0.98


def test_the_gradient_of_the_cross_entropy_is_its_formula(model):
    x_0, true = pictures(model, 1)
    bank, temperature = noise_bank(model, 1, stream(6)), 0.01
    errors = candidate_errors(model, x_0, bank.t, bank.noise, CAPTIONS)
    (found,) = torch.autograd.grad(cross_entropy(errors, true, temperature), model.means, retain_graph=True)
    each = [torch.autograd.grad(errors[0, k], model.means, retain_graph=True)[0] for k in range(CLASSES)]
    chances = probabilities(errors.detach(), temperature)[0]
    signed = [(float(k == int(true[0])) - chances[k]) * gradient for k, gradient in enumerate(each)]
    expected = sum(signed) / temperature
    assert torch.allclose(found, expected, atol=1e-6 * float(expected.abs().max()))
    assert expected.abs().max() > 1e-4


def test_halving_agrees_and_asks_less(model):
    x_0, _ = pictures(model, 10)
    bank = noise_bank(model, 32, stream(7))
    whole = classify(model, x_0, CAPTIONS, bank)
    asked, model.asked = model.asked, 0
    halved = classify(model, x_0, CAPTIONS, bank, [Stage(8, 3), Stage(16, 2)])
    assert torch.equal(whole, halved)
    assert model.asked == 10 * (8 * 5 + 8 * 3 + 16 * 2) < asked == 10 * 32 * 5
    model.asked = 0
    classify(model, x_0, CAPTIONS, bank, [Stage(4, 1)])
    assert model.asked == 10 * 4 * 5, "who is alone is asked no more"


@pytest.mark.parametrize("stages", [[Stage(8, 6)], [Stage(8, 2), Stage(8, 1)], [Stage(33, 1)], [Stage(4, 0)]])
def test_stages_that_go_nowhere_are_refused(model, stages):
    with pytest.raises(ConfigError, match="expected more draws each, 32 at most"):
        classify(model, pictures(model, 1)[0], CAPTIONS, noise_bank(model, 32, stream(8)), stages)


def test_problems_are_named(model):
    x_0, bank = pictures(model, 1)[0], noise_bank(model, 2, stream(9))
    for captions in ((), "class 0", ("class 0", "class 0")):
        with pytest.raises(ConfigError, match="expected one or more, each once"):
            dc_errors(model, x_0, captions, bank)
    with pytest.raises(ConfigError, match="tells none"):
        calibrated(torch.ones(3, 4))
    for draws in (0, 1001):
        with pytest.raises(ConfigError, match="expected 1 to 1000"):
            noise_bank(model, draws, stream(0))
