"""What parts of a text-to-image model give and cost: every kind is trained, chosen by its rate, and compared."""

import math

import pytest
import torch

from personae.errors import ConfigError
from personae.study.parts import HELD_OUT, WORD, Part, Parts, Subject, pictures_of
from personae.study.workflow import run_study

PROJECTION = """
name = "projection"
rounds = 1
cohort = 2

[data]
source = "emoji"
told = false

[data.partition]
kind = "by_attribute"
num_clients = 3

[backbone]
folder = "{model}"
frozen = true

[backbone.embedding]
width = 5

[method]
name = "spire"

[method.training]
steps = 1
lr = 0.01
batch_size = 2

[method.adapt]
steps = 1
lr = 0.01
batch_size = 2

[sampling]
sampler = "dpmsolver++"
steps = 1

[evaluation]
num_images = 2
features = "none"
loss_grid = 1
loss_draws = 1

[machine]
threads = 1
"""

STUDY_OF_PARTS = """
name = "parts"
study = "parts"

[settings]
model = "{model}"
steps = 2
num_drawn = 3
num_unrelated = 3
sampler_steps = 2

[[settings.subjects]]
name = "a style"
kind = "style"
style = "twemoji"

[[settings.subjects]]
name = "a person"
kind = "identity"
style = "lorelei"
person = 3
images = 6

[[settings.parts]]
name = "adapters"
rates = [0.001, 0.01]

[[settings.parts]]
name = "a word"
method = "tokens"
rates = [0.01]

[[settings.parts]]
name = "a token"
method = "embedding"
rates = [0.01]
changes = ["backbone.embedding.place=token", "backbone.embedding.width=128"]

[[settings.parts]]
name = "a projected vector"
rates = [0.01]
shared = "{projection}"
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory, untrained):
    folder = tmp_path_factory.mktemp("parts")
    (folder / "projection.toml").write_text(PROJECTION.format(model=untrained), "utf-8")
    text = STUDY_OF_PARTS.format(model=untrained, projection=folder / "projection.toml")
    (folder / "parts.toml").write_text(text, "utf-8")
    return run_study(folder / "parts.toml", folder / "out")


def rows(done, **settings):
    return [row for row in done.rows if all(row.get(key) == value for key, value in settings.items())]


def test_every_part_is_measured_at_every_rate_for_every_subject(done):
    assert len(rows(done, stage="shared")) == 1 and len(rows(done, stage="base")) == 2
    assert len(rows(done, stage="part")) == 2 * 5
    for row in rows(done, stage="part"):
        assert 0 <= row["found"] <= 1 and math.isfinite(row["loss"])
        assert (row["drift"] == 0) == (row["part"] == "a word"), "a word changes nothing where it does not stand"
        assert (done.folder / row["picture"]).is_file()


def test_bytes_are_those_of_what_a_client_keeps(done):
    numbers = {row["part"]: row["numbers"] for row in rows(done, stage="part", subject="a style")}
    assert numbers["a word"] == numbers["a token"] == 128 and numbers["a projected vector"] == 5
    assert numbers["adapters"] > 10_000
    assert all(row["bytes"] == 4 * row["numbers"] for row in rows(done, stage="part"))


def test_the_model_alone_does_not_drift(done):
    assert all(row["drift"] == pytest.approx(0, abs=1e-6) for row in rows(done, stage="base"))


def test_the_rate_is_chosen_by_held_out_loss(done):
    study = done.study
    best = study._best(done.rows, study.parts[0], study.subjects[0])
    losses = {row["rate"]: row["loss"] for row in rows(done, part="adapters", subject="a style")}
    assert best[0]["rate"] == min(losses, key=losses.get)


def test_the_answer_names_every_part_beside_the_model_alone(done):
    (style, person) = done.answer.tables
    assert [row[0] for row in style.rows] == ["the model alone", "adapters", "a word", "a token", "a projected vector"]
    assert "likeness, less others'" in person.columns and "named" in style.columns
    report = (done.folder / "report.html").read_text("utf-8")
    assert "recognised in" in report and report.count("<svg") >= 2


def test_pictures_to_judge_by_are_others_than_those_to_train_on():
    style = Subject("s", "style", "twemoji", images=8)
    own = pictures_of(style, 0, True)
    assert len(own.data.train) == 8 - HELD_OUT and len(own.data.heldout) == HELD_OUT
    assert all(f"a {WORD} drawing of" in text for text in (*own.captions, *own.data.train.captions))
    assert not set(own.captions) & set(own.data.train.captions)
    plain = pictures_of(style, 0, False)
    assert torch.equal(plain.data.train.pixels, own.data.train.pixels) and WORD not in plain.captions[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ()}, "parts are"),
        ({"subjects": (Subject("s", "style", "cubism"),)}, "style 'cubism' is none of"),
        ({"subjects": (Subject("s", "style", "twemoji", images=3),)}, "3 images, expected more than 4"),
        ({"steps": 0}, "at least 1 step"),
    ],
)
def test_problems_are_named(changes, message):
    fine = {
        "model": "m",
        "subjects": (Subject("s", "style", "twemoji"),),
        "parts": (Part("p", (0.1,)),),
    }
    with pytest.raises(ConfigError, match=message):
        Parts(**{**fine, **changes})
    with pytest.raises(ConfigError, match="rates are"):
        Part("p", ())
