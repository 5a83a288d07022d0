"""DreamBooth beside plain training, and its prior term beside the sum written out."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from personae.continual import DreamBooth, SequentialLora
from personae.core import Batch, ClientData, Given, Images, State, everything, stream
from personae.errors import ConfigError
from personae.local.fit import fit
from personae.testing.contract import differing

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("small.py"))))

LORA = (2, "cross_kv")
METHOD = DreamBooth(*LORA)


def test_without_a_weight_it_is_plain_training(build):
    found = []
    for method in (replace(METHOD, prior_weight=0.0), SequentialLora(*LORA), METHOD):
        client = small.begun(method, build, 1, State())
        said = small.client_for(METHOD, client.model, 1).data  # the same captions for all
        client = replace(client, data=said)
        fit(client, everything, small.TRAINING)
        found.append(method.end(client, State()).params)
    without, plain, with_prior = found
    assert differing(without, plain) == []
    assert differing(with_prior, plain) != []


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_loss_is_that_of_the_images_and_so_many_times_that_of_the_prior(weight, build):
    method = replace(METHOD, prior_weight=weight)
    client = small.begun(method, build, 1, State())
    prior = small.images(client.model, "others", "a dog", count=7)
    client = replace(client, given=Given(prior))
    model, loss = client.model, method.begin(client, State()).loss
    small.scattered(model)
    batch = small.noised_with(model, ["a <rex> dog"] * 3)
    rng = torch.Generator().set_state(client.rng.get_state())
    found = loss(model, batch)

    index = torch.randint(7, (3,), generator=rng)
    t = torch.randint(model.schedule.num_timesteps, (3,), generator=rng)
    noise = torch.randn(batch.x_0.shape, generator=rng)
    x_0 = prior.pixels[index]
    cond = model.condition(Batch(x_0, torch.zeros(3, dtype=torch.bool), ("a dog",) * 3))
    said = model.forward(model.schedule.add_noise(x_0, noise, t), t, cond)
    others = (said - model.schedule.target(x_0, noise, t)).square().mean()
    own = (batch.prediction - model.schedule.target(batch.x_0, batch.noise, batch.t)).square().mean()
    assert found.item() == pytest.approx((own + weight * others).item(), rel=1e-5)


def test_the_prior_is_learned_from_under_its_own_captions(build):
    """Training lowers the loss on it, though the concept's own images say nothing of a plain dog."""
    training = replace(small.TRAINING, steps=40, lr=0.01, weight_decay=0.0)

    def loss_on_prior(weight):
        method = replace(METHOD, prior_weight=weight)
        client = small.trained(method, build, 1, State(), training)
        model, prior = client.model, client.given.prior
        t = torch.tensor([100, 300, 500, 700])
        noise = small.images(model, "noise", "").pixels
        with torch.no_grad():
            cond = model.condition(Batch(prior.pixels, torch.zeros(4, dtype=torch.bool), prior.captions))
            said = model.forward(model.schedule.add_noise(prior.pixels, noise, t), t, cond)
        return float((said - model.schedule.target(prior.pixels, noise, t)).square().mean())

    assert loss_on_prior(4.0) < loss_on_prior(0.0)


def test_captions_name_the_word_and_its_noun():
    assert METHOD.said(small.TASKS[0]) == "<rex> dog" and METHOD.needs == {"prior_images"}


def test_without_pictures_of_the_noun_it_refuses_and_without_a_weight_it_wants_none(build):
    model = build(METHOD.parts, small.TASKS[:1])
    client = replace(small.client_for(METHOD, model, 1), given=Given())
    with pytest.raises(ConfigError, match="was given none"):
        METHOD.begin(client, State())
    assert replace(METHOD, prior_weight=0.0).begin(client, State()).loss is None


def test_pictures_are_encoded_in_float32_whatever_the_precision(build, monkeypatch):
    client = small.begun(METHOD, build, 1, State())
    model, seen = client.model, []
    pixels = torch.randint(0, 256, (4, *model.image_shape), generator=stream(0)).byte()
    pictures = Images(pixels, captions=("a dog",) * 4)
    client = replace(client, data=ClientData(pictures, pictures), given=Given(pictures))
    client = replace(client, plan=METHOD.begin(client, State()))
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda images: seen.append(encode(images)) or seen[-1])
    fit(client, everything, replace(small.TRAINING, steps=1, precision="bfloat16"))
    assert len(seen) == 2 and {latents.dtype for latents in seen} == {torch.float32}
