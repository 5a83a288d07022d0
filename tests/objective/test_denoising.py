import pytest
import torch

from personae.backbone.mlp import MLPDenoiser
from personae.backbone.schedule import PREDICTION_TYPES, Schedule, schedule
from personae.core import Noised, stream
from personae.objective.denoising import denoising, noised


def model_with(noise_schedule):
    model = MLPDenoiser((2,), noise_schedule, width=4, num_blocks=1)
    model.load(model.initial(stream(0)))
    return model


@pytest.mark.parametrize(
    ("prediction_type", "loss"),
    [
        ("epsilon", (1**2 + 2**2) / 2),  # the noise is 0, 0
        ("sample", (0**2 + 12**2) / 2),  # x_0 is 1, -10
        ("v_prediction", (1.6**2 + 4**2) / 2),  # v = 0.8 noise - 0.6 x_0 is -0.6, 6
    ],
)
def test_the_loss_is_the_mean_square_of_two_numbers(prediction_type, loss):
    model = model_with(Schedule(torch.tensor([0.64]), prediction_type, {}))
    x_0, noise, prediction = torch.tensor([[1.0, -10.0]]), torch.zeros(1, 2), torch.tensor([[1.0, 2.0]])
    batch = Noised(x_0, torch.tensor([0]), noise, x_0, None, prediction)
    assert denoising(model, batch).item() == pytest.approx(loss)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_costs_nothing(prediction_type):
    model = model_with(schedule(prediction_type=prediction_type))
    x_0, noise = torch.randn(2, 3, 2, generator=stream(1))
    t = torch.tensor([0, 500, 999])
    assert denoising(model, Noised(x_0, t, noise, x_0, None, model.schedule.target(x_0, noise, t))) == 0


def test_the_model_is_asked_about_the_noised_image():
    model = model_with(schedule())
    x_0, noise = torch.randn(2, 3, 2, generator=stream(1))
    t = torch.tensor([0, 500, 999])
    batch = noised(model, x_0, t, noise, None)
    alpha_bar = model.schedule.alpha_bar[t][:, None]
    assert torch.allclose(batch.x_t, alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise)
    assert torch.equal(batch.prediction, model.forward(batch.x_t, t, None))
    assert batch.x_0 is x_0 and batch.noise is noise and batch.t is t


def test_a_half_precision_prediction_is_compared_in_float32():
    model = model_with(schedule())
    noise = torch.tensor([[1.0 + 2**-10, 0.0]])  # lost in bfloat16
    batch = Noised(noise, torch.tensor([0]), noise, noise, None, torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16))
    assert denoising(model, batch).item() == pytest.approx(2**-20 / 2)
