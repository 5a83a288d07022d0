import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from personae.backbone.mixture import MixtureDenoiser
from personae.backbone.mlp import MLPDenoiser
from personae.backbone.schedule import schedule
from personae.core import Batch, Images, stream
from personae.errors import ConfigError
from personae.infer.sample import sample, sample_together, to_bytes
from personae.infer.samplers import SAMPLERS, check_steps, scheduler_for
from personae.personal.embedding import EMBEDDING, NULL_EMBEDDING

# diffusers' DPM-Solver hands torch tensors to numpy in a way that numpy is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


PLAIN = ("ddpm", "ddim", "dpmsolver++")
"""Those that call the model once a step, at whole times."""

ANY_SCHEDULE = [name for name, kind in SAMPLERS.items() if kind.most is None]


def made(num_timesteps=40, *, prediction_type="epsilon", clip_sample=True):
    noise_schedule = schedule(num_timesteps, prediction_type=prediction_type, clip_sample=clip_sample)
    model = MLPDenoiser((1, 2, 2), noise_schedule, width=8, num_blocks=1, embedding_width=3)
    model.load({**model.initial(stream(0)), NULL_EMBEDDING: torch.tensor([[1.0, 0.0, -1.0]])})
    return model


def by_hand(model, scheduler, steps, count, rng):
    """diffusers' own loop for the client's vector."""
    scheduler.set_timesteps(steps)
    x_t = torch.randn(count, 1, 2, 2, generator=rng)
    for t in scheduler.timesteps:
        with torch.no_grad():
            cond = model.condition(Batch(x_t, torch.zeros(count, dtype=torch.bool)))
            prediction = model.forward(x_t, t.repeat(count), cond)
        options = {"generator": rng} if isinstance(scheduler, DDPMScheduler) else {}
        x_t = scheduler.step(prediction, t, x_t, **options).prev_sample
    return x_t


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 40), ("ddpm", 8), ("ddim", 8), ("dpmsolver++", 8)])
def test_every_sampler_is_the_one_of_diffusers(sampler, steps, prediction_type):
    common = {"num_train_timesteps": 40, "prediction_type": prediction_type, "timestep_spacing": "trailing"}
    scheduler = {
        "ddpm": lambda: DDPMScheduler(**common),
        "ddim": lambda: DDIMScheduler(**common),
        "dpmsolver++": lambda: DPMSolverMultistepScheduler(**common, final_sigmas_type="zero"),
    }[sampler]()
    model = made(prediction_type=prediction_type)
    expected = by_hand(model, scheduler, steps, 3, stream(1))
    assert torch.equal(sample(model, 3, stream(1), sampler=sampler, steps=steps), expected)


@pytest.mark.parametrize("sampler", PLAIN)
@pytest.mark.parametrize("steps", [1, 8, 40])
def test_sampling_starts_where_training_is_noisiest(monkeypatch, sampler, steps):
    model, seen = made(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x_t, t, cond: seen.append(int(t[0])) or forward(x_t, t, cond))
    sample(model, 1, stream(0), sampler=sampler, steps=steps)
    assert seen[0] == 39 and len(seen) == steps and seen == sorted(set(seen), reverse=True)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize(
    ("steps", "near"), [(61, "50 or 40"), (600, "500 or 250"), (999, "1000 or 500"), (7, "8 or 5")]
)
def test_steps_that_leave_a_remainder_are_refused(sampler, steps, near):
    with pytest.raises(ConfigError, match=f"{steps} sampling steps do not divide the 1000 timesteps.*take {near}"):
        check_steps(sampler, steps, 1000)


OTHERS = {
    "ddim_eta1": lambda: DDIMScheduler(**COMMON, clip_sample=False),
    "euler": lambda: EulerDiscreteScheduler(**COMMON),
    "euler_ancestral": lambda: EulerAncestralDiscreteScheduler(**COMMON),
    "heun": lambda: HeunDiscreteScheduler(**COMMON),
    "lms": lambda: LMSDiscreteScheduler(**COMMON),
    "pndm": lambda: PNDMScheduler(**COMMON, skip_prk_steps=True),
    "lcm": lambda: LCMScheduler(**BETAS),
    "deis": lambda: DEISMultistepScheduler(**COMMON),
    "unipc": lambda: UniPCMultistepScheduler(**COMMON),
    "dpmsolver++_karras": lambda: DPMSolverMultistepScheduler(**COMMON, use_karras_sigmas=True),
    "dpmsolver++_2s": lambda: DPMSolverSinglestepScheduler(**BETAS, lower_order_final=True),
    "dpmsolver++_3m": lambda: DPMSolverMultistepScheduler(**COMMON, solver_order=3),
    "sde-dpmsolver++": lambda: DPMSolverMultistepScheduler(**COMMON, algorithm_type="sde-dpmsolver++"),
}
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
COMMON = {**BETAS, "timestep_spacing": "trailing"}


def test_nobody_is_left_out():
    assert {*PLAIN, *OTHERS} == set(SAMPLERS)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_every_sampler_has_the_noise_levels_of_training(sampler, beta_schedule):
    trained = schedule(beta_schedule=beta_schedule, prediction_type="v_prediction", clip_sample=False)
    scheduler = scheduler_for(sampler, trained, 20)
    assert torch.equal(scheduler.alphas_cumprod, trained.alpha_bar)
    assert scheduler.config.prediction_type == "v_prediction" and not scheduler.config.get("clip_sample")


@pytest.mark.parametrize("sampler", OTHERS)
def test_the_others_are_those_of_diffusers_too(sampler):
    """On a mixture whose score is known they also find its points."""
    model = MixtureDenoiser(torch.tensor([[4.0, 0.0], [-4.0, 0.0]]), schedule(clip_sample=False))
    model.load(model.initial(stream(0)))
    found, rng, scheduler = sample(model, 200, stream(1), sampler=sampler, steps=20), stream(1), OTHERS[sampler]()
    scheduler.set_timesteps(20)
    x_t = torch.randn(200, 2, generator=rng) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        cond = model.condition(Batch(x_t, torch.zeros(200, dtype=torch.bool)))
        scaled = scheduler.scale_model_input(x_t, t)
        options = {"generator": rng} if SAMPLERS[sampler].draws else {}
        options |= {"eta": 1.0} if sampler == "ddim_eta1" else {}
        x_t = scheduler.step(model.forward(scaled, t.long().repeat(200), cond), t, x_t, **options).prev_sample
    assert torch.allclose(found, x_t, atol=1e-4)
    near = 1.5 if sampler == "lcm" else 0.4  # made for models that were distilled
    assert found[:, 0].abs().mean() == pytest.approx(4, abs=near) and abs((found[:, 0] > 0).float().mean() - 0.5) < 0.15


def test_a_count_of_steps_that_diffusers_rounds_below_zero_still_ends_in_images():
    """61 steps of 1000: without care the mixture's points all end near 0."""
    means = torch.tensor([[4.0, 0.0], [-4.0, 0.0]])
    model = MixtureDenoiser(means, schedule(clip_sample=False))
    model.load(model.initial(stream(0)))
    images = sample(model, 400, stream(1), sampler="dpmsolver++", steps=61, batch_size=400)
    assert abs((images[:, 0] > 0).float().mean() - 0.5) < 0.1
    assert images[:, 0].abs().mean() == pytest.approx(4, abs=0.2)
    assert images[:, 1].std() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("sampler", ANY_SCHEDULE)
def test_the_generator_decides_and_the_global_one_is_left_alone(sampler):
    model = made()
    state = torch.get_rng_state()
    first, again, other = (sample(model, 2, stream(seed), sampler=sampler, steps=5) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=1e-3)


@pytest.mark.parametrize("sampler", ANY_SCHEDULE)
def test_batches_follow_each_other_from_one_generator(sampler):
    model, rng = made(), stream(1)
    whole = sample(model, 5, stream(1), sampler=sampler, steps=5, batch_size=2)
    parts = [sample(model, count, rng, sampler=sampler, steps=5) for count in (2, 2, 1)]
    assert whole.shape == (5, 1, 2, 2) and torch.equal(whole, torch.cat(parts))


def test_unconditional_draws_do_not_know_the_client():
    model = made()
    before = sample(model, 3, stream(1), steps=5, unconditional=True)
    assert not torch.allclose(before, sample(model, 3, stream(1), steps=5), atol=1e-3)
    model.load({**model.params(), EMBEDDING: torch.full((1, 3), 9.0)})
    assert torch.equal(sample(model, 3, stream(1), steps=5, unconditional=True), before)


def test_guidance_runs_from_the_population_to_the_client_and_beyond():
    """In one step the image is linear in the prediction, so guidance g gives null + g (own - null)."""
    model = made(num_timesteps=5, prediction_type="sample", clip_sample=False)
    null = sample(model, 3, stream(1), steps=1, unconditional=True)
    own = sample(model, 3, stream(1), steps=1)
    assert not torch.allclose(own, null, atol=1e-2)
    assert torch.equal(sample(model, 3, stream(1), steps=1, guidance=0.0), null)
    assert torch.equal(sample(model, 3, stream(1), steps=1, guidance=1.0), own)
    assert torch.allclose(sample(model, 3, stream(1), steps=1, guidance=3.0), null + 3 * (own - null), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "passes"), [({}, 4), ({"unconditional": True, "guidance": 2.0}, 4), ({"guidance": 2.0}, 8)]
)
def test_only_guidance_costs_a_second_pass(monkeypatch, options, passes):
    model, seen = made(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *given: seen.append(1) or forward(*given))
    sample(model, 2, stream(0), steps=4, **options)
    assert len(seen) == passes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "eular"}, r"'eular'; expected one of ddpm, ddim, .*, sde-dpmsolver\+\+"),
        ({"num_images": 0}, "0 images were asked for, expected at least 1"),
        ({"steps": 0}, "0 sampling steps were asked for, expected 1 to 40"),
        ({"steps": 41}, "41 sampling steps were asked for, expected 1 to 40"),
        ({"sampler": "lcm"}, "lcm takes at most 50 steps, of at least 50 timesteps"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        sample(**{"model": made(), "num_images": 1, "rng": stream(0), "steps": 5} | options)


def test_every_byte_survives_the_way_to_floats_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(Images(pixels).floats()), pixels)


def test_bytes_are_rounded_and_clamped():
    values = torch.tensor([-2.0, -1.0, 1.4 / 127.5 - 1, 1.6 / 127.5 - 1, 0.999, 1.0, 7.0])
    assert to_bytes(values).tolist() == [0, 0, 1, 2, 255, 255, 255]
    assert to_bytes(values).dtype == torch.uint8


# --- several clients in one batch --------------------------------------------------------------------------------

ROWS = torch.tensor([[1.0, -1.0, 2.0], [0.0, 3.0, -2.0], [-2.0, 0.5, 0.0]])


def alone_and_together(model, count, seeds=(1, 2, 3), **options):
    """Both [3, count, ...]: one client loaded after the other, and all of them at once."""
    alone, values = [], model.params()
    for row, seed in zip(ROWS, seeds, strict=True):
        model.load({**values, EMBEDDING: row[None]})
        alone.append(sample(model, count, stream(seed), **options))
    model.load({**values, EMBEDDING: ROWS}, 3)
    return torch.stack(alone), sample_together(model, count, [stream(seed) for seed in seeds], **options)


@pytest.mark.parametrize("options", [{}, {"guidance": 2.0}, {"unconditional": True}], ids=["own", "guided", "null"])
@pytest.mark.parametrize("sampler", ANY_SCHEDULE)
def test_every_client_draws_what_it_would_draw_alone(sampler, options):
    alone, together = alone_and_together(made(), 4, sampler=sampler, steps=8, **options)
    assert together.shape == (3, 4, 1, 2, 2)
    assert torch.allclose(together, alone, atol=1e-4)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 8, 13, 256])
def test_a_batch_holds_as_many_clients_as_it_has_room_for(monkeypatch, sampler, batch_size):
    """5 images each: 1 to 4 in several parts of a client, 5 to 9 one client at once, 10 to 14 two, 15 three."""
    model, seen = made(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x_t, t, cond: seen.append(len(x_t)) or forward(x_t, t, cond))
    alone, together = alone_and_together(model, 5, sampler=sampler, steps=5, batch_size=batch_size)
    assert torch.allclose(together, alone, atol=1e-4)
    assert max(seen) == {1: 1, 2: 2, 5: 5, 8: 5, 13: 10, 256: 15}[batch_size]


def test_the_same_generators_draw_different_images_of_different_clients():
    _, together = alone_and_together(made(), 2, seeds=(1, 1, 1), steps=5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("generators", [1, 2, 4])
def test_there_is_one_generator_per_client(generators):
    model = made()
    model.load({**model.params(), EMBEDDING: ROWS}, 3)
    with pytest.raises(ConfigError, match=f"the model holds 3 clients, and {generators} generators were given"):
        sample_together(model, 1, [stream(seed) for seed in range(generators)], steps=5)
