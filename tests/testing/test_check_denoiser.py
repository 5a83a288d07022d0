"""Sound denoisers pass; every planted fault is caught, and named for what it is."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from personae.backbone.mixture import MixtureDenoiser
from personae.backbone.mlp import MLPDenoiser
from personae.backbone.schedule import schedule
from personae.backbone.unet import preset
from personae.core import Batch, everything, stream
from personae.personal.embedding import EMBEDDING
from personae.testing import ContractBroken, check_denoiser
from personae.testing.faulty import LoadsOnTop, SharesItsTensors

SCHEDULE = schedule(20, clip_sample=False)
VECTORS = Batch(torch.randn(4, 2, generator=stream(0, "vectors")), torch.tensor([False, True, False, False]))
IMAGES = Batch(torch.randn(4, 1, 8, 8, generator=stream(0, "images")), torch.tensor([False, True, False, False]))
MEANS = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])


def mlp(embedding_width=4):
    return MLPDenoiser((2,), SCHEDULE, width=16, num_blocks=1, embedding_width=embedding_width)


SOUND = {
    "mlp": (mlp, VECTORS),
    "mlp without embedding": (lambda: mlp(None), VECTORS),
    "mixture": (lambda: MixtureDenoiser(MEANS, SCHEDULE), VECTORS),
    "unet": (lambda: preset("tiny", SCHEDULE, size=8, channels=1, embedding_width=4, place="blocks"), IMAGES),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_denoiser_passes(name):
    check_denoiser(*SOUND[name])


class Spoiled:
    """A sound denoiser with some of its functions replaced."""

    def __init__(self, **spoiled: Any) -> None:
        self.model, self.spoiled = mlp(), spoiled

    def __getattr__(self, name: str) -> Any:
        spoiled = self.__dict__["spoiled"]
        return (lambda *given: spoiled[name](self.model, *given)) if name in spoiled else getattr(self.model, name)


def deaf(model, batch):
    return model.condition(Batch(batch.images, torch.ones_like(batch.unconditional)))


def deaf_to_the_null_vector(model, batch):
    return model.condition(Batch(batch.images, torch.zeros_like(batch.unconditional)))


def deaf_to_whose(model, batch):
    return model.condition(replace(batch, clients=torch.zeros(len(batch), dtype=torch.long)))


def counting_for_itself(model, params, num_clients=1):
    model.load(params, len(params.get(EMBEDDING, "1")))


def with_global_noise(model, rng, only=everything):
    return {name: value + torch.rand(1) for name, value in model.initial(rng, only).items()}


def half_loaded(model, params):
    """Copies what it can before it looks at the rest."""
    with torch.no_grad():
        for name, value in params.items():
            if name in model.live() and value.shape == model.live()[name].shape:
                model.live()[name].copy_(value)
    model.load(params)


FAULTS = {
    "loads on top": (lambda: LoadsOnTop(mlp()), "load() is absolute: X, then Y, equals Y on a fresh model"),
    "shares its tensors": (lambda: SharesItsTensors(mlp()), "params() are copies"),
    "half loaded": (lambda: Spoiled(load=half_loaded), "load() refuses before anything has changed"),
    "takes anything": (
        lambda: Spoiled(load=lambda model, params: None),
        "load() copies|it was accepted|load() without",
    ),
    "hides a name": (
        lambda: Spoiled(params=lambda model: {n: v for n, v in model.params().items() if n != EMBEDDING}),
        "speak of the same names; live() differs in embedding.weight",
    ),
    "copies for live": (
        lambda: Spoiled(live=lambda model: {n: torch.nn.Parameter(v) for n, v in model.params().items()}),
        "live() are the parameters themselves",
    ),
    "global generator": (lambda: Spoiled(initial=with_global_noise), "initial() depends on its generator alone"),
    "ignores only": (
        lambda: Spoiled(initial=lambda model, rng, only=everything: model.initial(rng)),
        "initial() honours `only`",
    ),
    "flattens": (
        lambda: Spoiled(forward=lambda model, *given: model.forward(*given).flatten()),
        "forward() keeps the shape of x_t",
    ),
    "noisy": (
        lambda: Spoiled(forward=lambda model, *given: model.forward(*given) + torch.rand(1)),
        "load() is absolute|twice",
    ),
    "deaf": (lambda: Spoiled(condition=deaf), "with condition, the client's vector matters"),
    "never null": (
        lambda: Spoiled(condition=deaf_to_the_null_vector),
        "without condition, the client's vector does not matter",
    ),
    "everybody is the first": (
        lambda: Spoiled(condition=deaf_to_whose),
        "every example gets what its own client's would get alone; those of client 2 of 3 differ by",
    ),
    "counts the rows": (
        lambda: Spoiled(load=counting_for_itself),
        "load() takes several rows of embedding.weight only when it is told their number; it was accepted",
    ),
    "detached": (
        lambda: Spoiled(condition=lambda model, batch: model.condition(batch).detach()),
        "none reached embedding.weight, embedding_projection.weight, null_embedding.weight",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_and_named(fault):
    make, sentence = FAULTS[fault]
    with pytest.raises(ContractBroken) as caught:
        check_denoiser(make, VECTORS)
    assert any(part in str(caught.value) for part in sentence.split("|")), caught.value


def test_idle_parameters_may_lack_a_gradient():
    make = FAULTS["detached"][0]
    check_denoiser(make, VECTORS, idle=lambda name: "embedding" in name)
