"""Newcomers: who is late, what the server says of them, from where they train fastest, what becomes of the others."""

import math

import pytest

from personae.backbone.pipeline import fresh, save_pipeline
from personae.backbone.schedule import schedule
from personae.backbone.text2image import TextToImage
from personae.backbone.vocabulary import write_tokenizer
from personae.core import stream
from personae.data.emoji import vocabulary
from personae.errors import ConfigError, DataError
from personae.evaluate.grouping import auroc
from personae.study.newcomers import Newcomers
from personae.study.study import where
from personae.study.workflow import run_study

LITTLE = (
    "rounds=3",
    'data.styles=["noto","twemoji"]',
    "data.partition.num_clients=4",
    "data.heldout=0.05",
    "method.smallest_cluster=1",
    "method.grouping_rounds=1",
    "method.words.steps=1",
    "method.training.steps=1",
    "method.adapt.steps=1",
    "evaluation.num_images=2",
    "evaluation.loss_grid=1",
    "evaluation.loss_draws=1",
    "sampling.steps=1",
)

STUDY = """
name = "newcomers"
study = "newcomers"

[settings]
recipe = "collaborative/styles"
changes = {changes}
withheld = ["twemoji"]
late_from = 2
adapt_rounds = [0, 1]

[machine]
threads = 1
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("newcomers")
    tokenizer = write_tokenizer(folder / "tokenizer", vocabulary(), max_tokens=4000, length=24)
    networks = fresh("tiny", tokenizer, stream(0))
    save_pipeline(TextToImage(networks, schedule(prediction_type="v_prediction", clip_sample=False)), folder / "model")
    changes = str([*LITTLE, f"backbone.folder={folder / 'model'}"])
    (folder / "study.toml").write_text(STUDY.format(changes=changes), "utf-8")
    return run_study(folder / "study.toml", folder / "out")


def test_the_withheld_style_comes_late_with_one_of_every_other(done):
    (late,) = where(done.rows, stage="late")
    styles = late["styles"]
    assert sorted(styles[name] for name in late["newcomers"]) == ["noto", "twemoji", "twemoji"]
    (without,) = where(done.rows, stage="without")
    stayed = next(name for name in styles if name not in late["newcomers"])
    assert without["losses"].keys() == late["losses"].keys() == styles.keys()
    assert without["losses"][stayed] > 0


def test_the_server_says_how_like_its_groups_each_newcomer_is(done):
    (late,) = where(done.rows, stage="late")
    assert all(-1 <= each["likeness"] <= 1 and 0 <= each["redundancy"] <= 1 for each in late["newcomers"].values())
    assert done.answer.numbers["auroc"].keys() == {"likeness", "redundancy"}


def test_a_newcomer_trains_from_its_group_and_from_nothing(done):
    (row,) = where(done.rows, stage="adapt")
    assert row["style"] == "noto"
    group, nothing = row["losses"]["group"], row["losses"]["nothing"]
    assert len(group) == len(nothing) == 2 and all(map(math.isfinite, [*group, *nothing]))
    assert group[0] != nothing[0] and group[0] != group[1]
    assert done.answer.tables[0].rows[0][4] == where(done.rows, stage="together")[0]["losses"][row["client"]]


def test_the_area_under_the_curve():
    assert auroc([1, 2, 3, 4], [False, False, True, True]) == 1
    assert auroc([1, 1], [True, False]) == 0.5
    assert auroc([3, 1, 2], [True, True, False]) == 0.5
    with pytest.raises(DataError, match="some of each"):
        auroc([1, 2], [True, True])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"withheld": ("cubism",)}, "withheld styles are cubism"),
        ({"adapt_rounds": ()}, "adapt_rounds of 0 or more"),
        ({"late_from": 3}, "late_from is 3, expected more than the method's grouping_rounds 3"),
        ({"recipe": "digits/spire"}, "another method"),
    ],
)
def test_problems_are_named(changes, message):
    fine = {"recipe": "collaborative/styles", "withheld": ("noto",)}
    with pytest.raises(ConfigError, match=message):
        Newcomers(**{**fine, **changes})
