from types import SimpleNamespace

import pytest
import torch
from torch import nn

from personae.backbone.schedule import schedule
from personae.core import Images, stream
from personae.errors import ConfigError, DataError
from personae.evaluate.loss import denoising_loss


class Fixed:
    """Predicts what `rule` says of (x_t, t, unconditional), and notes every call."""

    def __init__(self, rule, prediction_type="epsilon", num_timesteps=20):
        self.rule, self.seen, self.training = rule, [], True
        self.schedule = schedule(num_timesteps, prediction_type=prediction_type)

    def live(self):
        return {"w": nn.Parameter(torch.zeros(1))}

    def encode(self, images):
        return images

    def condition(self, batch):
        return batch

    def forward(self, x_t, t, cond):
        self.seen.append(SimpleNamespace(x_t=x_t, t=t, cond=cond))
        return self.rule(x_t, t, cond.unconditional)

    def train(self, mode=True):
        self.training = mode


def images(count, value=0.0):
    return Images(torch.full((count, 1, 2, 2), value))


def silent(x_t, t, null):
    return torch.zeros_like(x_t)


def test_a_silent_model_that_should_name_the_image_loses_its_square():
    assert denoising_loss(Fixed(silent, "sample"), images(3, value=0.5)) == pytest.approx(0.25)


def test_every_image_is_seen_at_the_midpoint_of_every_interval():
    model = Fixed(lambda x_t, t, null: (t / 20).view(-1, 1, 1, 1).expand_as(x_t), "sample")
    # intervals [0, 5), [5, 10), [10, 15), [15, 20) of 20 steps: 2, 7, 12 and 17 are the steps at or below their middles
    assert denoising_loss(model, images(3), grid=4) == pytest.approx((0.1**2 + 0.35**2 + 0.6**2 + 0.85**2) / 4)
    assert torch.cat([call.t for call in model.seen]).tolist() == [2, 7, 12, 17] * 3


def test_the_noise_is_that_of_the_image_step_and_draw():
    expected = [
        torch.randn(1, 2, 2, generator=stream(7, "heldout", i, t, draw)).square().mean()
        for i in range(2)
        for t in (5, 15)
        for draw in range(3)
    ]
    found = denoising_loss(Fixed(silent), images(2), grid=2, draws=3, seed=7)
    assert found == pytest.approx(float(torch.stack(expected).mean()))


def test_equal_across_calls_and_batch_sizes_but_not_seeds():
    losses = [
        denoising_loss(Fixed(silent), images(5), batch_size=size, seed=seed)
        for size, seed in ((256, 0), (256, 0), (3, 0), (256, 1))
    ]
    assert losses[0] == losses[1] == pytest.approx(losses[2]) and losses[3] != pytest.approx(losses[0])


def test_an_image_keeps_its_noise_when_others_follow():
    few, many = Fixed(silent), Fixed(silent)
    denoising_loss(few, images(1), grid=3)
    denoising_loss(many, images(4), grid=3)
    assert torch.equal(few.seen[0].x_t, many.seen[0].x_t[:3])


def test_the_null_condition_is_asked_for():
    model = Fixed(lambda x_t, t, null: null.float().view(-1, 1, 1, 1).expand_as(x_t), "sample")
    assert denoising_loss(model, images(2)) == 0.0
    assert denoising_loss(model, images(2), unconditional=True) == 1.0


def test_evaluation_mode_and_no_global_randomness():
    model, before = Fixed(silent), torch.get_rng_state()
    denoising_loss(model, images(2))
    assert not model.training and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("wrong", [{"grid": 0}, {"grid": 21}, {"draws": 0}, {"batch_size": 0}])
def test_refuses(wrong):
    with pytest.raises(ConfigError):
        denoising_loss(Fixed(silent), images(1), **wrong)


def test_refuses_no_images():
    with pytest.raises(DataError, match="held-out"):
        denoising_loss(Fixed(silent), images(0))
