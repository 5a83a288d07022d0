import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from personae.backbone.schedule import PREDICTION_TYPES, Schedule, from_scheduler, load_schedule, schedule
from personae.core import stream
from personae.errors import ArtefactError, ConfigError

BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2"]


@pytest.fixture
def draws():
    rng = stream(1)
    x_0, noise = (torch.randn(5, 1, 2, 2, generator=rng) for _ in range(2))
    return x_0, noise, torch.tensor([0, 1, 50, 98, 99])


@pytest.mark.parametrize("betas", BETAS)
def test_noise_and_velocity_are_those_of_diffusers(draws, betas):
    x_0, noise, t = draws
    theirs = DDPMScheduler(num_train_timesteps=100, beta_schedule=betas)
    ours = schedule(100, betas, "v_prediction")
    assert ours.num_timesteps == 100
    assert torch.allclose(ours.add_noise(x_0, noise, t), theirs.add_noise(x_0, noise, t), atol=1e-6)
    assert torch.allclose(ours.target(x_0, noise, t), theirs.get_velocity(x_0, noise, t), atol=1e-6)


def test_the_linear_schedule_is_that_of_the_paper():
    """beta from 1e-4 to 0.02 in 1000 steps, alpha_bar the running product of 1 - beta."""
    expected = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    assert torch.allclose(schedule().alpha_bar.double(), expected, rtol=1e-4)


def test_numbers_that_can_be_computed_by_hand():
    ours = Schedule(torch.tensor([0.64]), "v_prediction", {})
    x_0, noise, t = torch.tensor([[10.0]]), torch.tensor([[1.0]]), torch.tensor([0])
    assert ours.add_noise(x_0, noise, t).item() == pytest.approx(0.8 * 10 + 0.6 * 1)
    assert ours.target(x_0, noise, t).item() == pytest.approx(0.8 * 1 - 0.6 * 10)


@pytest.mark.parametrize("betas", BETAS)
def test_every_target_leads_back_to_the_same_clean_image(draws, betas):
    x_0, noise, t = draws
    kinds = {kind: schedule(100, betas, kind) for kind in PREDICTION_TYPES}
    alpha_bar = kinds["epsilon"].alpha_bar.double()[t].view(-1, 1, 1, 1)
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t = kinds["epsilon"].add_noise(x_0, noise, t).double()
    targets = {kind: kinds[kind].target(x_0, noise, t).double() for kind in kinds}
    recovered = {
        "epsilon": (x_t - sigma * targets["epsilon"]) / signal,
        "sample": targets["sample"],
        "v_prediction": signal * x_t - sigma * targets["v_prediction"],
    }
    for kind, found in recovered.items():
        # At the last steps of the cosine schedule nearly no signal is left, and division magnifies rounding.
        assert ((found - x_0) * (signal if kind == "epsilon" else 1)).abs().max() < 1e-6, kind


def test_flat_vectors_and_images_are_noised_alike(draws):
    x_0, noise, t = draws
    ours = schedule(100)
    assert torch.equal(ours.add_noise(x_0, noise, t).flatten(1), ours.add_noise(x_0.flatten(1), noise.flatten(1), t))


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_any_saved_discrete_scheduler_can_be_read(tmp_path, kind):
    saved = kind(num_train_timesteps=30, beta_schedule="scaled_linear", prediction_type="v_prediction")
    saved.save_pretrained(tmp_path)
    ours = load_schedule(tmp_path)
    assert torch.equal(ours.alpha_bar, saved.alphas_cumprod.float()) and ours.prediction_type == "v_prediction"


def test_the_config_rebuilds_the_schedule():
    ours = schedule(40, "squaredcos_cap_v2", "sample", clip_sample=False)
    again = from_scheduler(DDIMScheduler.from_config(dict(ours.config)))
    assert torch.equal(again.alpha_bar, ours.alpha_bar) and again.prediction_type == "sample"
    assert again.config["clip_sample"] is False


def test_what_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match=r"no scheduler_config\.json"):
        load_schedule(tmp_path)
    with pytest.raises(ConfigError, match="expected one of epsilon, sample, v_prediction"):
        schedule(prediction_type="flow")
    with pytest.raises(ConfigError, match="FlowMatchEulerDiscreteScheduler has no discrete noise schedule"):
        from_scheduler(FlowMatchEulerDiscreteScheduler())
