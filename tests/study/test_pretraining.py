"""Pre-training in stretches: none that is held out, the same in one go or stopped, a pipeline that diffusers loads."""

import dataclasses
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from personae.artefact.save import load_state
from personae.backbone.pipeline import open_pipeline
from personae.core import Client, ClientData, Images, Training, everything, stream
from personae.data.emoji import HELD_OUT_STYLES, emoji
from personae.errors import ConfigError
from personae.local.fit import fit
from personae.study import pretraining
from personae.study.pretraining import Pretraining

STUDY = Pretraining(
    "tiny",
    Training(2, 1e-3, 4, optimizer="adamw"),
    2,
    Training(2, 1e-3, 4, optimizer="adamw"),
    2,
    Training(2, 1e-3, 4, optimizer="adamw", condition_dropout=0.1),
    2,
    Training(2, 5e-4, 4, optimizer="adamw", condition_dropout=0.1),
    2,
    num_scenes=4,
    copies=1,
)


CELLS = [
    {"stage": "autoencoder", "stretch": 0},
    {"stage": "autoencoder", "stretch": 1},
    {"stage": "latents"},
    {"stage": "denoiser", "stretch": 0},
    {"stage": "denoiser", "stretch": 1},
]


@pytest.fixture
def few(monkeypatch):
    """So few pictures that a test can afford them."""
    whole = STUDY.pictures(0)
    some = Images(whole.pixels[-12:], captions=whole.captions[-12:])
    monkeypatch.setattr(pretraining, "_pictures", lambda *_: some)


def measured(folder, study=STUDY):
    rows = []
    while len(cells := study.cells(rows)) > len(rows):
        rows.append({**cells[-1], **study.measure(cells[-1], 0, folder)})
    return rows


def test_nothing_that_is_held_out_is_learned_from():
    images = STUDY.pictures(0)
    assert len(images) == len(images.captions)
    seen = {pixels.numpy().tobytes() for pixels in images.pixels}
    for held in (emoji(HELD_OUT_STYLES, "all"), emoji(names="held_out")):
        assert not seen & {pixels.numpy().tobytes() for pixels in held.images.pixels}


def test_from_nothing_to_a_pipeline(few, tmp_path):
    rows = measured(tmp_path)
    assert [row["stage"] for row in rows] == [
        *(
            "autoencoder",
            "autoencoder",
            "latents",
            "decoder",
            "decoder",
            "denoiser",
            "denoiser",
            "refining",
            "refining",
            "model",
        )
    ]
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a noto drawing of a dog", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    assert rows[-1]["bytes"] < 20e6
    captions = json.loads((tmp_path / "pictures" / "grid.json").read_text("utf-8"))["captions"]
    assert len(captions) == 4 * pretraining.SHOWN
    average = pretraining._split(load_state(tmp_path / "parts" / "refining-001.safetensors").extras)[1]
    saved = open_pipeline(tmp_path / "model", everything).params()
    assert all(torch.equal(saved[name], value) for name, value in average.items() if name.startswith("text_encoder."))
    assert all(torch.equal(saved[name], value.half().float()) for name, value in average.items() if name[:5] == "unet.")
    latents = load_state(tmp_path / "parts" / "latents-000.safetensors").extras["latents"]
    assert latents.shape == (12, 8, 8, 8) and latents.std() == pytest.approx(1, rel=0.05)

    trained = load_state(tmp_path / "parts" / "decoder-001.safetensors").params
    vae = open_pipeline(tmp_path / "model").vae.state_dict()
    assert all(torch.equal(vae[name], value.half().float()) for name, value in trained.items())
    before = load_state(tmp_path / "parts" / "latents-000.safetensors").params
    moved = {name for name, value in trained.items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)

    answer = STUDY.answer(rows)
    assert {chart.name for chart in answer.charts} == {"autoencoder", "decoder", "denoiser", "refining"}
    assert len(answer.pictures) == 2
    assert answer.numbers["denoiser_loss"] == rows[6]["loss"]
    assert STUDY.answer(rows[:1]).numbers == {
        "autoencoder_loss": rows[0]["loss"],
        "autoencoder_error": rows[0]["error"],
    }


def test_a_stretch_measured_again_gives_the_same(few, tmp_path):
    rows = measured(tmp_path)
    last = tmp_path / "parts" / "denoiser-001.safetensors"
    before = load_state(last)
    last.unlink()
    assert STUDY.measure({"stage": "denoiser", "stretch": 1}, 0, tmp_path)["loss"] == rows[6]["loss"]
    after = load_state(last)
    assert all(torch.equal(value, after.params[name]) for name, value in before.params.items())
    assert all(torch.equal(value, after.extras[name]) for name, value in before.extras.items())


def test_common_things_and_scenes_are_refined_from_where_the_denoiser_ended(monkeypatch, tmp_path):
    """Of twelve pictures eight are of the last kinds."""
    whole = STUDY.pictures(0)
    some = Images(whole.pixels[-12:], captions=tuple(f"a {number}" for number in range(12)))
    monkeypatch.setattr(pretraining, "_pictures", lambda *_: some)
    monkeypatch.setattr(pretraining, "scene_names", lambda: ("one thing",))
    study = dataclasses.replace(STUDY, num_scenes=2, common_copies=2)
    for cell in (row for stage in ("autoencoder", "latents", "denoiser") for row in CELLS if row["stage"] == stage):
        study.measure(cell, 0, tmp_path)
    seen, ended = [], load_state(tmp_path / "parts" / "denoiser-001.safetensors")

    def noticed(client, *arguments):
        seen.append((client.data.train.captions, client.model.params()))
        return fit(client, *arguments)

    monkeypatch.setattr(pretraining, "fit", noticed)
    study.measure({"stage": "refining", "stretch": 0}, 0, tmp_path)
    ((captions, params),) = seen
    assert captions == tuple(f"a {number}" for number in range(4, 12))
    assert all(torch.equal(value, params[name]) for name, value in ended.params.items())


def test_the_rate_falls_and_old_stretches_go(few, tmp_path):
    long = dataclasses.replace(STUDY, autoencoder_stretches=4)
    rates = [pretraining._slower(long.autoencoder, number, 4).lr for number in range(4)]
    assert rates[0] == 1e-3 and rates == sorted(rates, reverse=True) and rates[-1] < 0.2e-3
    for number in range(4):
        long.measure({"stage": "autoencoder", "stretch": number}, 0, tmp_path)
    assert sorted(path.name for path in (tmp_path / "parts").glob("auto*")) == [
        "autoencoder-002.safetensors",
        "autoencoder-003.safetensors",
    ]


def test_stretches_carry_the_optimizer_on(few, tmp_path):
    measured(tmp_path)
    parts = [load_state(tmp_path / "parts" / f"denoiser-00{number}.safetensors") for number in (0, 1)]
    model, latents = STUDY._encoded(0, tmp_path)
    data = Images(latents, captions=STUDY.pictures(0).captions)
    model.load(parts[0].params)
    client = Client("pretraining", ClientData(data, data), model, stream(0, "denoiser", 1))
    how = pretraining._slower(STUDY.denoiser, 1, 2)
    fit(client, everything, how, pretraining._split(parts[0].extras)[0])
    assert all(torch.equal(value, parts[1].params[name]) for name, value in model.params().items())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"size": "huge"}, "expected one of smallest.*tiny"),
        ({"copies": 0}, "at least 1"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"denoiser": Training(2, 0.1, 1, warmup_steps=1)}, "left out here"),
    ],
)
def test_problems_are_named(changes, told):
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(STUDY, **changes)
