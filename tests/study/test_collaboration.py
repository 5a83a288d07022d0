"""Adapters by style against one for all: rates are chosen, groups told, pictures judged, weights compared."""

import math
from statistics import fmean

import pytest

from personae.backbone.pipeline import fresh, save_pipeline
from personae.backbone.schedule import schedule
from personae.backbone.text2image import TextToImage
from personae.backbone.vocabulary import write_tokenizer
from personae.core import stream
from personae.data.emoji import vocabulary
from personae.errors import ConfigError, DataError
from personae.evaluate.grouping import adjusted_rand
from personae.recipe.build import build_clients
from personae.recipe.config import load_recipe
from personae.study.by_style import styles_of
from personae.study.collaboration import Collaboration, best_rate
from personae.study.study import where
from personae.study.variants import Variant
from personae.study.workflow import run_study

LITTLE = (
    "rounds=2",
    'data.styles=["noto","twemoji"]',
    "data.partition.num_clients=3",
    "method.smallest_cluster=1",
    "method.words.steps=2",
    "method.training.steps=1",
    "method.adapt.steps=1",
    "evaluation.num_images=2",
    "evaluation.loss_grid=1",
    "evaluation.loss_draws=1",
    "sampling.steps=1",
)

STUDY = """
name = "collaborative"
study = "collaboration"

[settings]
recipe = "collaborative/styles"
changes = {changes}
rates = [0.001, 0.01]
rivals = ["one for all"]
num_names = 4
sampler_steps = 1

[[settings.variants]]
name = "by style"

[[settings.variants]]
name = "one for all"
changes = ["method.inside=factor_mean", "method.most_clusters=1"]

[[settings.weights]]
name = "alike"
changes = ["method.size_power=0", "method.distance_power=0", "method.trace_power=0"]

[machine]
threads = 1
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collaboration")
    tokenizer = write_tokenizer(folder / "tokenizer", vocabulary(), max_tokens=4000, length=24)
    networks = fresh("tiny", tokenizer, stream(0))
    save_pipeline(TextToImage(networks, schedule(prediction_type="v_prediction", clip_sample=False)), folder / "model")
    changes = str([*LITTLE, f"backbone.folder={folder / 'model'}"])
    (folder / "study.toml").write_text(STUDY.format(changes=changes), "utf-8")
    return run_study(folder / "study.toml", folder / "out")


def test_every_variant_runs_at_every_rate_and_is_drawn_at_its_best(done):
    assert len(where(done.rows, stage="run")) == 2 * 2
    for name in ("by style", "one for all"):
        losses = {r["rate"]: fmean(r["losses"].values()) for r in where(done.rows, stage="run", variant=name)}
        assert best_rate(done.rows, name) == min(losses, key=losses.get)
        (drawn,) = where(done.rows, stage="drawn", variant=name)
        assert drawn["rate"] == best_rate(done.rows, name) and drawn["by_style"].keys() == {"noto", "twemoji"}
        assert all(math.isfinite(figure) for of in drawn["by_style"].values() for figure in of.values())
        assert (done.folder / drawn["picture"]).is_file()


def test_groups_are_told_beside_styles(done):
    by_style, whole = (where(done.rows, stage="run", variant=variant)[0] for variant in ("by style", "one for all"))
    assert set(whole["groups"].values()) == {0} and whole["agreement"] == 0
    assert sum(by_style["shares"]) == pytest.approx(1)
    assert whole["bytes_up"] == pytest.approx(by_style["bytes_up"], rel=1e-3) and whole["bytes_up"] > 0


def test_weights_are_measured_on_the_first_variants_groups(done):
    (alike,) = where(done.rows, stage="weights")
    assert len(set(alike["shares"].values())) == 1 and sum(alike["shares"].values()) == pytest.approx(1)
    assert alike["losses"].keys() == {"noto", "twemoji"}


def test_the_answer_compares_with_the_best_rival(done):
    answer = done.answer
    assert answer.numbers["ratios"]["rival"] == "one for all"
    ours, theirs = (answer.numbers["figures"][name] for name in ("by style", "one for all"))
    ratios = answer.numbers["ratios"]["by_style"]
    assert ratios["noto"] == pytest.approx(ours["noto"]["distance"] / theirs["noto"]["distance"])
    assert [chart.name for chart in answer.charts] == ["groups", "distances"]
    assert any("The best rival is one for all" in finding for finding in answer.findings)


def test_styles_are_told_by_pictures():
    clients = build_clients(load_recipe("collaborative/styles"))
    styles = styles_of(clients)
    assert sorted(styles.values()) == sorted(
        ["noto", "fluent-emoji-flat", "emojione", "twemoji", "fluent-emoji-high-contrast"] * 3
    )
    with pytest.raises(DataError, match="not of one style"):
        styles_of(build_clients(load_recipe("digits/spire")))


def test_the_adjusted_rand_index_of_a_published_table():
    """Hubert and Arabie's example: 10 objects, of which the contingency table is ((1, 1, 0), (1, 2, 1), (0, 0, 4))."""
    rows = [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    columns = ["a", "b", "a", "b", "b", "c", "c", "c", "c", "c"]
    assert adjusted_rand(columns, rows) == pytest.approx(0.313, abs=5e-4)
    assert adjusted_rand(["x", "y"], [1, 0]) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rivals": ("nobody",)}, "rivals"),
        ({"rates": ()}, "rates are"),
        ({"num_names": 1}, "num_names is 1"),
        ({"recipe": "digits/spire"}, "another method"),
    ],
)
def test_problems_are_named(changes, message):
    fine = {
        "recipe": "collaborative/styles",
        "variants": (Variant("a"), Variant("b")),
        "rivals": ("b",),
        "rates": (0.1,),
    }
    with pytest.raises(ConfigError, match=message):
        Collaboration(**{**fine, **changes})
