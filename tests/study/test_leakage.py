"""A little run is attacked from the server's side; what attackers find is what clients sent, and no more."""

import dataclasses
import json

import pytest
import torch

from personae.artefact.run_folder import RunFolder
from personae.backbone import pipeline
from personae.backbone.pipeline import SIZES, fresh, save_pipeline
from personae.backbone.schedule import schedule
from personae.backbone.text2image import TextToImage
from personae.backbone.vocabulary import write_tokenizer
from personae.core import stream
from personae.data.emoji import pack, vocabulary
from personae.errors import ConfigError
from personae.study.leakage import Leakage, _public_pictures, _sides
from personae.study.workflow import run_study

CHANGES = (
    *(
        "rounds=1",
        "data.partition.num_clients=3",
        'data.styles=["noto", "emojione", "twemoji"]',
        "backbone.lora.rank=1",
    ),
    *(
        "method.describing=1",
        "method.words.steps=3",
        "method.words.batch_size=2",
        "method.training.steps=1",
        "method.training.batch_size=2",
    ),
    *("method.adapt.steps=0", "method.smallest_cluster=1", "sampling.steps=1", "evaluation.num_images=2"),
    *("evaluation.loss_grid=1", "evaluation.loss_draws=1", "backbone.lora.rank=1"),
)
STUDY_OF_LEAKS = """
name = "leaks"
study = "leakage"

[settings]
changes = {changes}
num_prompts = 2
state_noises = [0.0, 3.0]
num_shadows = 2
shadow_images = 4
noises = [0.0, 5.0]
num_draws = 4
"""
STYLES = ("noto", "emojione", "twemoji")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """On random networks whose text encoder is even smaller than that of "tiny"."""
    folder = tmp_path_factory.mktemp("leakage")
    little = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = write_tokenizer(folder / "tokenizer", vocabulary(), max_tokens=4000, length=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "little", {**SIZES["tiny"], "text": {**little, "max_position_embeddings": 24}})
        networks = fresh("little", tokenizer, stream(0))
    assert "little" not in pipeline.SIZES
    save_pipeline(TextToImage(networks, schedule(prediction_type="v_prediction", clip_sample=False)), folder / "model")
    changes = json.dumps([*CHANGES, f"backbone.folder={folder / 'model'}"])
    (folder / "leakage.toml").write_text(STUDY_OF_LEAKS.format(changes=changes), "utf-8")
    return run_study(folder / "leakage.toml", folder / "out")


def rows(done, **settings):
    return [row for row in done.rows if all(row.get(key) == value for key, value in settings.items())]


def test_the_server_holds_what_clients_sent(done):
    sides = _sides(done.folder / "runs" / "0")
    assert sides.names == ("c0", "c1", "c2") and sorted(sides.truth) == [0, 1, 2]
    for name, descriptor in zip(sides.names, sides.descriptors, strict=True):
        kept = RunFolder(sides.folder).last_kept(name)
        assert torch.allclose(kept.extras["descriptor"], descriptor, atol=1e-6)
        assert torch.equal(sides.vectors(name), kept.params["tokens.<own>"])
        labels = sides.data[name].train.labels
        style = sides.styles[sides.truth[sides.names.index(name)]]
        assert torch.equal(pack().pixels[style][labels], sides.data[name].train.pixels)
        assert sides.word(name) == pack().words[style]


def test_prompts_say_the_style_the_own_word_or_neither(done):
    sides = _sides(done.folder / "runs" / "0")
    word = sides.word("c0")
    said = [sides.worded("a <own> drawing of a dog", sent, "c0") for sent in ("told", "own", "neutral")]
    assert said == [f"a {word} drawing of a dog", "a <own> drawing of a dog", "a drawing of a dog"]
    prompts = sides.captions(6, 0)
    assert {client for client, _ in prompts} == set(sides.names)
    assert all(text in sides.data[client].train.captions for client, text in prompts)


def test_prompts_are_read_back_and_noise_hides_them(done):
    told, hidden = rows(done, stage="prompts", sent="told")
    assert (told["right"], told["whole"], told["style named"]) == (1, 1, 1)
    assert told["by chance"] < 0.9 and told["whole by chance"] == 0
    assert hidden["right"] < 0.5 and hidden["whole"] == 0
    (neutral,) = rows(done, stage="prompts", sent="neutral")
    assert (neutral["right"], neutral["style named"]) == (1, 0)
    own = rows(done, stage="prompts", sent="own")[0]
    assert own["right"] == 1 and own["noticed"] == 1 and own["style named"] == 0
    assert own["residual"] > 0.1 > 0.05 > own["residual elsewhere"] and own["vector"] > 0.9
    assert own["example"][0].replace("<own>", "?") == own["example"][1]


def test_every_client_is_named_by_every_attacker(done):
    (row,) = rows(done, stage="styles")
    assert [client["client"] for client in row["clients"]] == ["c0", "c1", "c2"]
    for client in row["clients"]:
        assert {client["style"], client["word"], client["other"], client["same"]} <= set(STYLES)
        assert 1 <= client["rank"] <= row["known tokens"] and 1 <= client["rank by chance"] <= row["known tokens"]
    for attacker in ("word", "other", "same"):
        right = [client[attacker] == client["style"] for client in row["clients"]]
        assert row[attacker]["top_1"] == pytest.approx(sum(right) / 3)
        assert row[attacker]["chance"]["top_1"] == pytest.approx(1 / 3, abs=0.05)


def test_noise_is_measured_on_names_and_groups_alike(done):
    without, noisy = rows(done, stage="noise")
    (row,) = rows(done, stage="styles")
    for attacker in ("word", "other", "same"):
        assert without[attacker] == row[attacker]["top_1"]
    assert without["agreement"] == row["agreement"] and without["length"] == 0
    assert noisy["length"] == pytest.approx(5 * 64**0.5) and 0 <= noisy["same"] <= 1


def test_the_answer_says_so(done):
    answer = done.answer
    assert any(
        "names the style is read back: 100.0% of tokens, 100% of prompts" in finding for finding in answer.findings
    )
    assert any("with styles shuffled" in finding and "held out" in finding for finding in answer.findings)
    assert [table.title for table in answer.tables] == [
        "Prompts read back",
        "Naming a client's style from its description",
        "Style by style",
        "Noise on descriptions",
    ]
    assert all(len(row) == len(table.columns) for table in answer.tables for row in table.rows)
    assert [chart.name for chart in answer.charts] == ["prompts", "noise"]
    assert "read back" in (done.folder / "report.html").read_text("utf-8")


def test_an_unfinished_study_has_an_answer_too(done):
    for count in range(len(done.rows)):
        done.study.answer(done.rows[:count])


def test_public_pictures_are_of_the_things_that_clients_have_or_of_none_of_them(done):
    sides = _sides(done.folder / "runs" / "0")
    had = {int(label) for data in sides.data.values() for label in data.train.labels}
    same, other = (_public_pictures(things, "noto", sides.recipe) for things in ("same", "other"))
    assert had <= set(same.labels.tolist()) and not had & set(other.labels.tolist())


def test_too_few_public_pictures_are_named(done):
    for things, told in (("same", r"names that clients of"), ("other", r"names of pre-training that no client")):
        with pytest.raises(ConfigError, match=told):
            dataclasses.replace(done.study, shadow_images=798).measure(
                {"stage": "shadow", "things": things, "style": "noto", "seed": 0}, 0, done.folder
            )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_prompts": 1}, "num_prompts is 1, expected at least 2"),
        ({"noises": ()}, "noises are"),
        ({"state_noises": (-1.0,)}, "state_noises are"),
        ({"seeds": ()}, "seeds are missing"),
        ({"shadow_images": 10_000}, "of 798 public names"),
    ],
)
def test_problems_are_named(changes, told):
    with pytest.raises(ConfigError, match=told):
        Leakage(**changes)


@pytest.mark.parametrize(
    ("recipe", "changes", "told"),
    [
        ("quickstart", (), "set as method.name"),
        ("collaborative/styles", ("engine=flower",), "both sides in one folder"),
        ("collaborative/styles", ("data.caption=a drawing",), "the clients' own word"),
    ],
)
def test_a_run_without_an_answer_is_refused_before_it_trains(tmp_path, recipe, changes, told):
    study = dataclasses.replace(Leakage(), recipe=recipe, changes=changes)
    with pytest.raises(ConfigError, match=told):
        study.measure({"stage": "run", "seed": 0}, 0, tmp_path)
    assert not list(tmp_path.iterdir())
