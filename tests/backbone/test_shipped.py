"""The model that comes with the library: other tools open it, a folder of the same name comes first, it is small."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from personae.backbone.pipeline import open_pipeline
from personae.backbone.shipped import WEIGHTS, is_shipped, model_folder, shipped
from personae.core import Batch, stream
from personae.data.emoji import planned_scenes
from personae.evaluate.text2image_scenes import score_scenes
from personae.infer.sample import draw
from personae.study.drawing import TWO

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


def test_it_draws_both_things_of_a_scene_where_they_should_be():
    """66 % of two hundred in docs/studies/text2image-drawing.md; by chance none."""
    plans = planned_scenes(24, 7, layouts=TWO)
    pictures = draw(open_pipeline(model_folder("tiny-t2i")), [plan.caption for plan in plans], stream(0), steps=12)
    found = score_scenes(pictures, plans)
    assert found.drawn.at_place.share >= 0.5 and found.shuffled.at_place.share <= 0.1


def test_a_name_means_the_same_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-t2i").mkdir()
    assert is_shipped("tiny-t2i") and model_folder("tiny-t2i") == WEIGHTS / "tiny-t2i"
    assert model_folder(tmp_path / "tiny-t2i") == tmp_path / "tiny-t2i"
    assert not is_shipped("tiny-t3i")
