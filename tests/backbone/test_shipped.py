"""The model that comes with the library: other tools open it, a folder of the same name comes first, it is small."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from personae.backbone.pipeline import open_pipeline
from personae.backbone.shipped import WEIGHTS, is_shipped, model_folder, shipped
from personae.core import Batch, stream
from personae.data.emoji import SEEN_STYLES, caption, named
from personae.evaluate.text2image import fit_style_probe
from personae.infer.sample import draw

MODELS = shipped()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_small_and_says_what_it_is(name):
    files = [path for path in (WEIGHTS / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert (WEIGHTS / name / "README.md").is_file() and (WEIGHTS / name / "NOTICE").is_file()
    assert json.loads((WEIGHTS / name / "text_encoder" / "config.json").read_text("utf-8"))["vocab_size"] <= 4000


@pytest.mark.parametrize("name", MODELS)
def test_stock_diffusers_opens_it_and_says_the_same(name):
    model = open_pipeline(model_folder(name))
    theirs = StableDiffusionPipeline.from_pretrained(model_folder(name), safety_checker=None)
    latents, t = torch.randn(2, *model.sample_shape, generator=stream(0)), torch.tensor([10, 700])
    batch = Batch(latents, torch.tensor([False, True]), ("a cat left of a tree",) * 2)
    ids = theirs.tokenizer(["a cat left of a tree", ""], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        ours = model.forward(latents, t, model.condition(batch))
        expected = theirs.unet(latents, t, encoder_hidden_states=theirs.text_encoder(ids)[0]).sample
    assert torch.allclose(ours, expected, atol=1e-5)


def test_the_styles_that_it_knows_are_those_that_it_draws():
    told = [(style, name) for style in SEEN_STYLES for name in named("seen")[:8]]
    pictures = draw(
        open_pipeline(model_folder("tiny-t2i")), [caption(*pair) for pair in told], stream(0), steps=10, guidance=3.0
    )
    found = fit_style_probe().score(pictures, [style for style, _ in told]).drawn.overall
    assert found.share >= 0.75, found


def test_a_folder_of_the_same_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_shipped("tiny-t2i") and model_folder("tiny-t2i") == WEIGHTS / "tiny-t2i"
    (tmp_path / "tiny-t2i").mkdir()
    assert not is_shipped("tiny-t2i") and model_folder("tiny-t2i").resolve() == tmp_path / "tiny-t2i"
    assert not is_shipped("tiny-t3i")
