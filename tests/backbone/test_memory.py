"""What saves memory: a frozen base in half precision, and layers that run again instead of keeping what they saw."""

import pytest
import torch

from personae.backbone.pipeline import open_pipeline, save_pipeline
from personae.backbone.text2image import TextToImage, Vector
from personae.core import Batch, Client, ClientData, Images, Training, everything, nothing, stream, under
from personae.errors import ConfigError
from personae.infer.sample import sample
from personae.local.fit import fit
from personae.personal.lora import TEXT, TEXT_2, UNET, Lora
from personae.personal.tokens import Words
from personae.testing import check_denoiser
from personae.testing.tiny_pipeline import SCHEDULE, tiny_networks

SIZES = ("smallest", "smallest_xl")
PARTS = {"lora": Lora(2, "self+cross+text"), "words": Words(("<rex>",), "dog", 2), "vector": Vector(5)}
LATENTS, T = torch.randn(3, 4, 4, 4, generator=stream(0)), torch.tensor([1, 200, 900])
CAPTIONS = ("a <rex>", "a cat", "a dog")
BATCH = Batch(LATENTS, torch.tensor([False, False, True]), CAPTIONS)
DATA = Images(LATENTS, captions=("a <rex>", "a <rex> dog", "a dog <rex>"))


@pytest.fixture(params=SIZES)
def make(request, tmp_path):
    return lambda opened=nothing, **options: TextToImage(
        tiny_networks(tmp_path, request.param), SCHEDULE, opened, **options
    )


def trained(model, steps=3, **options):
    """(loss, parts) after some steps."""
    model.load({name: value + 0.1 for name, value in model.initial(stream(1)).items()})
    how = Training(steps, 0.01, 2, condition_dropout=0.3, **options)
    return fit(Client("a", ClientData(DATA, DATA), model, stream(1)), everything, how).loss, model.params()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_frozen_base_is_in_half_precision_and_what_trains_is_not(make, precision):
    model, whole = make(half=True, **PARTS), make(**PARTS)
    base = {name: value.clone() for name, value in model.base().items()}
    assert {value.dtype for value in base.values()} == {torch.bfloat16}
    assert (
        {value.dtype for value in model.live().values()} == {torch.float32} == {p.dtype for p in model.vae.parameters()}
    )
    start = {name: value + 0.1 for name, value in model.initial(stream(1)).items()}
    assert all(torch.equal(start[name], value + 0.1) for name, value in whole.initial(stream(1)).items())
    (loss, parts), (expected, others) = trained(model, precision=precision), trained(whole, precision=precision)
    assert loss == pytest.approx(expected, rel=0.02) and loss != expected
    assert {value.dtype for value in parts.values()} == {torch.float32}
    moved, expected = ({n for n in found if not torch.equal(found[n], start[n])} for found in (parts, others))
    assert moved == expected >= {"tokens.<rex>", "embedding.weight", "null_embedding.weight"}
    assert {TEXT, UNET} <= {name.split(".")[0] + "." for name in moved}
    assert all(torch.equal(base[name], value) and value.dtype == torch.bfloat16 for name, value in model.base().items())


def test_the_contract_in_half_precision(make):
    idle = lambda name: "text_model.encoder.layers.1" in name and name.startswith(TEXT)  # noqa: E731
    check_denoiser(lambda: make(half=True, lora=PARTS["lora"], words=PARTS["words"]), BATCH, idle=idle)


@torch.no_grad()
def test_predictions_in_half_precision_are_near_and_in_float32(make):
    half, whole = make(half=True, **PARTS), make(**PARTS)
    for model in (half, whole):
        model.load({name: value + 0.1 for name, value in whole.initial(stream(1)).items()})
    ours, expected = (model.forward(LATENTS, T, model.condition(BATCH)) for model in (half, whole))
    assert ours.dtype == torch.float32 and torch.allclose(ours, expected, atol=0.05) and not torch.equal(ours, expected)
    drawn = sample(half, 2, stream(0), steps=2, guidance=2.0, captions=["a <rex>", "a cat"])
    assert drawn.dtype == torch.float32 and drawn.isfinite().all()


def test_a_network_that_trains_stays_whole_and_the_others_are_halved(make):
    model = make(under(UNET), half=True)
    assert {value.dtype for value in model.base().values()} == {torch.bfloat16}
    assert all(name.startswith((TEXT, TEXT_2)) for name in model.base())
    loss, _ = trained(model)
    assert loss == pytest.approx(trained(make(under(UNET)))[0], rel=0.02)
    with pytest.raises(ConfigError, match="half is for weights that do not train"):
        make(everything, half=True)


def test_what_is_saved_is_in_float32(make, tmp_path):
    model = make(half=True, lora=PARTS["lora"])
    model.load({name: 0.2 * torch.randn(v.shape, generator=stream(3, name)) for name, v in model.params().items()})
    save_pipeline(model, tmp_path / "pipeline")
    opened, own = (
        open_pipeline(tmp_path / "pipeline"),
        Batch(LATENTS, BATCH.unconditional, ("a dog", "a cat", "a tree")),
    )
    with torch.no_grad():
        ours, theirs = (each.forward(LATENTS, T, each.condition(own)) for each in (model, opened))
    assert {value.dtype for value in opened.base().values()} == {torch.float32}
    assert torch.allclose(ours, theirs, atol=0.05 * float(theirs.abs().max()))


def gradients(model):
    model.load({name: value + 0.1 for name, value in model.initial(stream(1)).items()})
    for parameter in model.live().values():
        parameter.requires_grad_(True)
    model.train(True)
    model.forward(LATENTS, T, model.condition(BATCH)).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.live().items()}


@pytest.mark.parametrize("options", [PARTS, {"opened": everything}])
def test_layers_that_run_again_give_the_same_gradients(make, options):
    again = make(recompute=True, **options)
    runs = {"unet": 0, "text": 0}

    def counted(name):
        return lambda *_: runs.update({name: runs[name] + 1})

    again.unet.down_blocks[0].resnets[0].conv1.register_forward_hook(counted("unet"))
    encoders = list(again.captions.encoders().values())
    next(m for n, m in encoders[0].named_modules() if n.endswith("layers.0.mlp.fc1")).register_forward_hook(
        counted("text")
    )
    found, expected = gradients(again), gradients(make(**options))
    assert runs == {"unet": 2, "text": 2}
    assert [n for n, g in expected.items() if (g is None) != (found[n] is None)] == []
    apart = {n: float((found[n] - g).abs().max()) for n, g in expected.items() if g is not None}
    assert max(apart.values()) <= 1e-6


def test_both_savings_together_end_in_the_same_bits_every_time(make):
    once, twice = (trained(make(half=True, recompute=True, **PARTS)) for _ in range(2))
    assert once[0] == twice[0] and all(torch.equal(twice[1][name], value) for name, value in once[1].items())
