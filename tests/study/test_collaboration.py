"""Adapters by style against one for all: rates are chosen, groups told, pictures judged, weights compared."""

import math
from statistics import fmean

import pytest
import torch
from PIL import Image

from personae.data.emoji import scene_names
from personae.errors import ConfigError, DataError
from personae.evaluate.grouping import adjusted_rand
from personae.evaluate.text2image_features import renderings
from personae.recipe.build import build_clients
from personae.recipe.config import load_recipe
from personae.recipe.workflow import open_run
from personae.study.by_style import kept_in, real_pictures, styles_of
from personae.study.collaboration import WORDS, Collaboration, _entropies, best_rate, strangers
from personae.study.collaboration_report import FIGURES, answer
from personae.study.study import where
from personae.study.variants import Variant
from personae.study.workflow import run_study
from personae.testing.contract import differing_states

LITTLE = (
    "rounds=2",
    'data.styles=["noto","twemoji","70 noto + 30 twemoji"]',
    "data.partition.num_clients=3",
    "data.heldout=0.05",
    "method.smallest_cluster=1",
    "method.words.steps=2",
    "method.describing=1",
    "method.training.steps=1",
    "method.adapt.steps=1",
    "evaluation.num_images=2",
    "evaluation.loss_grid=1",
    "evaluation.loss_draws=1",
    "sampling.steps=1",
)

MIXED = "70 noto + 30 twemoji"
STYLES = ("noto", "twemoji", MIXED)

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
def done(tmp_path_factory, untrained):
    folder = tmp_path_factory.mktemp("collaboration")
    changes = str([*LITTLE, f"backbone.folder={untrained}"])
    (folder / "study.toml").write_text(STUDY.format(changes=changes), "utf-8")
    return run_study(folder / "study.toml", folder / "out")


def test_every_variant_runs_at_every_rate_and_is_drawn_at_its_best(done):
    assert len(where(done.rows, stage="run")) == 1 + 2 * 2
    for name in ("by style", "one for all"):
        losses = {r["rate"]: fmean(r["losses"].values()) for r in where(done.rows, stage="run", variant=name)}
        assert best_rate(done.rows, name) == min(losses, key=losses.get)
        (drawn,) = where(done.rows, stage="drawn", variant=name)
        assert drawn["rate"] == best_rate(done.rows, name) and drawn["by_style"].keys() == set(STYLES)
        assert all(math.isfinite(of[key]) for of in drawn["by_style"].values() for key in FIGURES)


def test_all_runs_begin_with_the_words_and_descriptions_of_the_first(done):
    def kept(variant, rate):
        return kept_in(done.folder / "runs" / f"{variant}-{rate}-0")

    words = kept(WORDS, 0)
    assert words.keys() == where(done.rows, stage="run")[0]["styles"].keys()
    for variant in ("by style", "one for all"):
        for rate in (0.001, 0.01):
            ours = kept(variant, rate)
            assert all(differing_states(ours[name], words[name]) == [] for name in words)
    alone = open_run(done.folder / "runs" / f"{WORDS}-0-0")
    assert not any(value.any() for name, value in alone.personal("c0").items() if name.endswith("lora_B"))


def test_every_client_has_a_sheet_with_all_variants(done):
    (row,) = where(done.rows, stage="sheets")
    assert {name: sheet["style"] for name, sheet in row["sheets"].items()} == where(done.rows, stage="run")[0]["styles"]
    assert [picture.path for picture in done.answer.pictures] == [sheet["picture"] for sheet in row["sheets"].values()]
    with Image.open(done.folder / row["sheets"]["c0"]["picture"]) as sheet:
        wide, high = sheet.size
    assert wide / high == pytest.approx(4 / 6, rel=0.05), "real, ours thrice, one for all, words only; four things"


def test_groups_are_told_beside_styles(done):
    by_style, whole = (where(done.rows, stage="run", variant=variant)[0] for variant in ("by style", "one for all"))
    assert set(whole["groups"].values()) == {0} and whole["agreement"] == 0
    assert sum(by_style["shares"]) == pytest.approx(1)
    assert whole["bytes_up"] == pytest.approx(by_style["bytes_up"], rel=1e-3) and whole["bytes_up"] > 0


def test_weights_are_measured_on_the_first_variants_groups(done):
    (alike,) = where(done.rows, stage="weights")
    assert len(set(alike["shares"].values())) == 1 and sum(alike["shares"].values()) == pytest.approx(1)
    assert alike["losses"].keys() == set(STYLES)


def test_the_answer_compares_with_the_best_rival(done):
    answer = done.answer
    ours, theirs = (answer.numbers["figures"][name] for name in ("by style", "one for all"))
    compared = answer.numbers["against"]["compared"]
    assert compared.keys() == {*STYLES, "mean"} and compared["mean"]["rival"] == "one for all"
    noto = compared["noto"]
    assert noto["difference"]["mean"] == pytest.approx(ours["noto"]["distance"] - theirs["noto"]["distance"])
    if theirs["noto"]["distance"] > 0:
        assert noto["ratio"] == pytest.approx(ours["noto"]["distance"] / theirs["noto"]["distance"])
    assert [chart.name for chart in answer.charts] == ["groups", "distances"]
    assert any("1 seeds." in finding for finding in answer.findings)
    assert any(finding.startswith("Hoped for: 0.8 times in one of") for finding in answer.findings)


def test_a_mixture_is_told_by_its_two_styles_and_shown_in_the_map(done):
    (mixed,) = (row["by_style"][MIXED] for row in where(done.rows, stage="drawn", variant="by style"))
    assert mixed["told"].keys() == {"noto", "twemoji"} and mixed["style"] == sum(mixed["told"].values()) <= 1
    row = where(done.rows, stage="run", variant="by style")[0]
    assert row["entropies"].keys() == row["styles"].keys() and min(row["entropies"].values()) >= 0
    assert done.answer.numbers["mixtures"][MIXED]["clients"] == 1
    assert any(f"with {MIXED} draw" in finding for finding in done.answer.findings)
    assert str(done.answer.charts[0].drawing).count("<svg") == 1


MIX = "70 noto + 30 emojione"


def drawn(variant, seed, distance):
    figures = dict.fromkeys(FIGURES, 0.5) | {"distance": distance, "alignment_real": 0.9}
    return {"stage": "drawn", "variant": variant, "seed": seed, "by_style": {"noto": figures}}


def ran(variant, seed, loss):
    return {"stage": "run", "variant": variant, "rate": 0.1, "seed": seed, "losses": {"a": loss}, **COST}


COST = {"bytes_up": 1, "bytes_down": 1, "seconds": 1.0}


def test_a_rival_that_is_not_above_the_floor_has_no_ratio_and_seeds_are_paired_by_name():
    """Seeds stand in other orders, and one is missing with the rival."""
    rows = [ran(v, s, 0.1 * s + (v == "r")) for v, s in (("o", 0), ("o", 1), ("o", 2), ("r", 1), ("r", 0))]
    near = [drawn("o", 0, 0.02), drawn("o", 1, 0.03), drawn("o", 2, 9.0), drawn("r", 1, -0.004), drawn("r", 0, 0.001)]
    against = answer([*rows, *near], ["o", "r"], ["r"], {"o": 0.1, "r": 0.1}).numbers["against"]
    assert against["compared"]["noto"]["ratio"] is None
    assert against["compared"]["noto"]["difference"]["mean"] == pytest.approx((0.019 + 0.034) / 2)
    assert against["loss"]["mean"] == pytest.approx(-1) and against["loss"]["num"] == 2
    far = [drawn("o", 0, 0.02), drawn("o", 1, 0.04), drawn("r", 1, 0.041), drawn("r", 0, 0.039)]
    whole = answer([*rows, *far], ["o", "r"], ["r"], {"o": 0.1, "r": 0.1})
    found = whole.numbers["against"]["compared"]["mean"]
    assert found["ratio"] == pytest.approx(0.03 / 0.04)
    assert math.exp(found["log_ratio"]["mean"]) == pytest.approx((0.02 / 0.039 * 0.04 / 0.041) ** 0.5)
    assert "in one of 1 styles, which are as many chances: reached in noto; 1.0 times on average: reached." in str(
        whole.findings
    )


def test_a_style_is_unknown_in_its_turn():
    axes = torch.eye(16)
    seen = torch.stack([axes[k] + 0.1 * axes[9 + j] for k in range(3) for j in range(2)] + [axes[0] + axes[1]])
    styles = ["noto", "noto", "emojione", "emojione", "twemoji", "twemoji", MIX]
    assert strangers(seen, styles) == {"noto": 1, "emojione": 1, "twemoji": 1}
    seen[4:6] = axes[0]  # in no way like each other's style alone
    assert strangers(seen, styles)["twemoji"] < 0.5


def test_of_a_mixture_it_is_told_with_whom_its_clients_are():
    """Two clients of a mixture, one among those of "a", one in a group of its own; b0 is alone."""
    styles = {"a0": "noto", "a1": "noto", "b0": "emojione", "m0": MIX, "m1": MIX}
    groups = {"a0": 0, "a1": 0, "b0": 1, "m0": 0, "m1": 2}
    entropies = {"a0": 0.0, "a1": 0.0, "b0": 0.3, "m0": 1.0, "m1": 0.5}
    extra = {"styles": styles, "groups": groups, "entropies": entropies, "agreement": 1.0, "cosines": [[1.0] * 5] * 5}
    extra["strangers"] = {"noto": 1.0}
    rows = [{**ran("o", 0, 0.1), **extra}]
    found = answer(rows, ["o", "r"], ["r"], {"o": 0.1, "r": 0.1})
    told = {"clients": 2, "with": {"noto": 1, "emojione": 0}, "entropy": 0.75, "entropy_of_others": pytest.approx(0.1)}
    assert found.numbers["mixtures"] == {MIX: told}
    assert "1 are in a group mostly of noto, 0 are in a group mostly of emojione" in found.findings[2]
    assert "leave 0.75 bits open about the group, clients of one style 0.10" in found.findings[2]


def test_who_has_one_style_leaves_nothing_open_and_who_is_between_leaves_one_bit():
    axes = torch.eye(16)
    seen = torch.stack([axes[0], axes[0] + 0.1 * axes[2], axes[1], axes[1] + 0.1 * axes[3], axes[0] + axes[1]])
    found = _entropies({"a0": 3, "a1": 3, "b0": 5, "b1": 5, "m": 3}, seen)
    assert found["m"] == pytest.approx(1) and found["b0"] < 0.05
    assert _entropies({"a0": 3, "a1": 3, "b0": 5, "b1": 5, "m": 7}, seen)["m"] == 0, "alone in its group"


def test_the_mixture_with_the_nearest_shares_is_a_clients_style():
    others = "30 noto + 70 emojione"
    named = ["noto", "emojione", "twemoji", MIX, others]
    change = "data.styles=" + str(named).replace("'", '"')
    clients = build_clients(load_recipe("collaborative/styles", [change, "data.partition.num_clients=10"]))
    assert sorted(styles_of(clients, named).values()) == sorted([*named, *named])
    with pytest.raises(DataError, match="not of one style, or not of a mixture"):
        styles_of(clients)
    assert styles_of(clients, [*named[:4]])
    pixels = [data.train.pixels for data in clients.data.values()]
    every = torch.cat([*pixels, *(data.heldout.pixels for data in clients.data.values())]).flatten(1)
    assert len(every.unique(dim=0)) == len(every), "nobody trains on what another is measured on"


def test_real_pictures_of_a_mixture_are_in_both_styles_in_its_shares():
    names = list(scene_names())[:20]
    both = real_pictures(MIX, names)
    in_noto = (both == renderings("noto", names)).flatten(1).all(1)
    in_other = (both == renderings("emojione", names)).flatten(1).all(1)
    assert int(in_noto.sum()) == 14 and torch.equal(in_other, ~in_noto)
    assert torch.equal(real_pictures("noto", names), renderings("noto", names))


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
        ({"variants": (Variant("a"), Variant("b"), Variant("words only"))}, "as the run is that all others begin with"),
        ({"rates": ()}, "rates are"),
        ({"num_names": 1}, "num_names is 1"),
        ({"recipe": "digits/spire"}, "another method"),
        ({"changes": ("cohort=3",)}, "takes 3 of its clients in a round"),
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
