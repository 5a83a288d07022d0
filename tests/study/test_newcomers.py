"""Newcomers: who is late, what the server says of them, from where they train fastest, what becomes of the others."""

import math

import pytest

from personae.artefact.run_folder import RunFolder
from personae.errors import ConfigError, DataError
from personae.evaluate.grouping import auroc
from personae.evaluate.loss import denoising_loss
from personae.recipe.build import build_clients
from personae.recipe.config import load_recipe, read_table
from personae.recipe.workflow import open_run
from personae.study.by_style import kept_in, server_of, styles_of
from personae.study.config import parse_study
from personae.study.newcomers import Newcomers
from personae.study.newcomers_report import a_quarter, first_near
from personae.study.study import where
from personae.study.workflow import run_study
from personae.testing.contract import differing_states

LITTLE = (
    "rounds=3",
    'data.styles=["noto","twemoji"]',
    "data.partition.num_clients=4",
    "data.heldout=0.05",
    "method.smallest_cluster=1",
    "method.grouping_rounds=1",
    "method.words.steps=1",
    "method.describing=1",
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
adapt_rounds = 2

[machine]
threads = 1
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory, untrained):
    folder = tmp_path_factory.mktemp("newcomers")
    changes = str([*LITTLE, f"backbone.folder={untrained}"])
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


def test_nobody_but_the_withheld_style_is_late_twice_in_the_shipped_recipe():
    table, _ = read_table("collaborative/newcomers")
    _, study = parse_study(table, "newcomers")
    recipe = load_recipe(study.recipe, study.changes)
    styles = styles_of(build_clients(recipe), recipe.data.styles)
    late = {withheld: study._late(withheld, recipe.seed) for withheld in study.withheld}
    others = [name for withheld, names in late.items() for name in names if styles[name] != withheld]
    assert len(set(others)) == len(others) == len(late) * (len(set(styles.values())) - 1)
    for withheld, names in late.items():
        assert {name for name in styles if styles[name] == withheld} <= set(names)


def test_the_server_says_how_like_its_groups_each_newcomer_is(done):
    (late,) = where(done.rows, stage="late")
    facts = server_of(done.folder / "runs" / "late-twemoji-0").facts
    for name, figures in late["newcomers"].items():
        assert figures["likeness"] == facts[f"newcomer: likeness of {name}"]
        assert facts[f"newcomer: round of {name}"] == 2


def test_a_newcomer_trains_from_its_group_and_from_nothing(done):
    (row,) = where(done.rows, stage="adapt")
    assert row["style"] == "noto"
    group, nothing = row["losses"]["group"], row["losses"]["nothing"]
    assert len(group) == len(nothing) == 3 and all(map(math.isfinite, [*group, *nothing]))
    assert len({*group, *nothing}) == 6
    (table,) = [table for table in done.answer.tables if table.title == "Newcomers of known styles"]
    assert table.rows[0][4] == where(done.rows, stage="together")[0]["losses"][row["client"]]


def test_a_newcomers_first_losses_are_those_of_what_the_federation_gives_it(done):
    """Measured as the oracle's loss is: the same draws, with the words that it learned when it came."""
    (row,) = where(done.rows, stage="adapt")
    run = open_run(done.folder / "runs" / "without-twemoji-0")
    name, how = row["client"], run.recipe.evaluation
    words = kept_in(done.folder / "runs" / "words-0")[name].params
    groups = [v for k, v in run.released.extras.items() if k.startswith("centre.")]
    assert len(groups) == 1, "one style was there"
    adapter = {n.removeprefix("cluster.0."): v for n, v in run.released.extras.items() if n.startswith("cluster.0.")}
    run.denoiser.load({**adapter, **words})
    heldout = build_clients(run.recipe).data[name].heldout
    loss = denoising_loss(run.denoiser, heldout, grid=how.loss_grid, draws=how.loss_draws, seed=run.recipe.seed)
    assert row["losses"]["group"][0] == pytest.approx(loss, rel=1e-6)


def test_everybody_begins_with_the_same_words(done):
    words, late = kept_in(done.folder / "runs" / "words-0"), where(done.rows, stage="late")[0]["newcomers"]
    for stage in ("late", "without"):
        folder = RunFolder(done.folder / "runs" / f"{stage}-twemoji-0")
        there = [name for name in words if stage == "late" or name not in late]
        assert all(differing_states(folder.last_kept(name), words[name]) == [] for name in there) and there


def test_another_client_of_a_known_style_is_late_for_each_withheld_one():
    study = Newcomers("collaborative/styles", ("twemoji", "noto"), changes=("data.partition.num_clients=20",))
    styles = styles_of(build_clients(load_recipe(study.recipe, study.changes)))
    late = [[n for n in study._late(style, 0) if styles[n] == "emojione"] for style in study.withheld]
    assert len(late[0]) == len(late[1]) == 1 and late[0] != late[1]


def told(groups, likeness, losses=(1.0, 1.0)):
    """Two known styles, of which "b" is withheld; a0 and a1 were there, the others came late."""
    styles = {"a0": "a", "a1": "a", "late": "a", "b0": "b", "b1": "b"}
    newcomers = {name: {"likeness": likeness[name], "redundancy": 1 - likeness[name]} for name in ("late", "b0", "b1")}
    both = {"withheld": "b", "seed": 0, "styles": styles}
    return [
        {"stage": "late", **both, "groups": groups, "newcomers": newcomers, "losses": dict.fromkeys(styles, losses[1])},
        {"stage": "without", **both, "losses": dict.fromkeys(styles, losses[0])},
    ]


STUDY_OF_TWO = Newcomers("collaborative/styles", ("twemoji",), adapt_rounds=4)


def test_a_newcomer_alone_in_a_group_of_its_own_is_not_at_its_place_unless_its_style_is_new():
    right = {"a0": 0, "a1": 0, "late": 0, "b0": 1, "b1": 1}
    likeness = {"late": 0.9, "b0": 0.2, "b1": 0.3}
    numbers = STUDY_OF_TWO.answer(told(right, likeness)).numbers
    assert numbers["placed"] == {"known": 1, "unknown": 1} and numbers["agreement"] == 1
    assert numbers["auroc"] == {"likeness": 1, "redundancy": 1}
    scattered = {"a0": 0, "a1": 0, "late": 1, "b0": 2, "b1": 3}
    numbers = STUDY_OF_TWO.answer(told(scattered, {"late": 0.25, "b0": 0.2, "b1": 0.3})).numbers
    assert numbers["placed"] == {"known": 0, "unknown": 1} and numbers["agreement"] < 0.5
    assert numbers["auroc"]["likeness"] == 0.5
    drowned = {"a0": 0, "a1": 0, "late": 0, "b0": 0, "b1": 1}
    assert STUDY_OF_TWO.answer(told(drowned, likeness)).numbers["placed"]["unknown"] == 0.5


def test_the_others_are_those_who_were_there():
    groups = {"a0": 0, "a1": 0, "late": 0, "b0": 1, "b1": 1}
    rows = told(groups, {"late": 0.9, "b0": 0.2, "b1": 0.3}, (2.0, 2.018))
    rows[0]["losses"] |= {"late": 99.0}
    found = STUDY_OF_TWO.answer(rows)
    others = {"mean": 0.009, "worst": 0.009, "harmed": 0.0, "federations": [pytest.approx(0.009)]}
    assert {**found.numbers["others"]} == {key: pytest.approx(value) for key, value in others.items()}
    assert (
        "2.0180 with newcomers, 2.0000 without any" in found.findings[1] and "as was hoped of all" in found.findings[1]
    )


@pytest.mark.parametrize(("change", "harmed"), [(0.03, 0.5), (-0.03, 0.0)])
def test_a_federation_whose_loss_moves_either_way_has_changed_and_harm_is_what_goes_up(change, harmed):
    groups = {"a0": 0, "a1": 0, "late": 0, "b0": 1, "b1": 1}
    rows = told(groups, {"late": 0.9, "b0": 0.2, "b1": 0.3}, (2.0, 2.0))
    rows[0]["losses"]["a1"] *= 1 + change
    found = STUDY_OF_TWO.answer(rows)
    assert found.numbers["others"]["harmed"] == harmed and "hoped for was that of all" in found.findings[1]
    assert found.numbers["others"]["federations"] == [pytest.approx(change / 2)]


def test_rounds_are_counted_to_the_oracle_and_who_never_comes_there_is_not_left_out():
    rows = [{"stage": "together", "seed": 0, "losses": {"late": 1.0, "slow": 1.0}}]
    for name, nothing in (("late", [2.0, 1.5, 1.2, 1.1, 1.04]), ("slow", [2.0, 1.9, 1.8, 1.7, 1.6])):
        losses = {"group": [1.06, 1.049, 1.0, 1.0, 1.0], "nothing": nothing}
        rows.append({"stage": "adapt", "withheld": "b", "seed": 0, "client": name, "style": "a", "losses": losses})
    answer = STUDY_OF_TWO.answer(rows)
    assert answer.numbers["rounds"] == {"group": [1, 1], "nothing": [4, None]}
    assert answer.numbers["rounds_of_the_way"] == {"group": [1, 1], "nothing": [4, None]}
    assert answer.numbers["a_quarter"] == [True, True]
    assert "after 1 rounds from its group's adapter, after 4 from nothing" in answer.findings[0]
    assert "for 2 of 2 newcomers; as was hoped of all" in answer.findings[0]
    assert [row[5:] for row in answer.tables[0].rows[:2]] == [[1, 1.06, 1.049, 1.0, 1.0], [4, 2.0, 1.5, 1.2, 1.04]]
    rows[1]["losses"]["nothing"] = rows[2]["losses"]["nothing"]
    assert "after more than 4 from nothing" in STUDY_OF_TWO.answer(rows).findings[0]
    for row in rows[1:]:
        row["losses"]["nothing"] = row["losses"]["group"]
    found = STUDY_OF_TWO.answer(rows)
    assert found.numbers["a_quarter"] == [False, False] and "for 0 of 2 newcomers; hoped for" in found.findings[0]


def test_the_first_round_that_is_near_counts_and_never_is_more_than_all():
    assert first_near([1.06, 1.05, 1.2], 1.0) == 1 and first_near([1.0], 1.0) == 0 and first_near([1.06], 1.0) is None
    assert [a_quarter(1, cold, 4) for cold in (3, 4, None)] == [False, True, True]
    assert a_quarter(2, None, 4) is False and a_quarter(2, None, 7) is True, "one more than was tried, at least"
    assert a_quarter(None, None, 4) is False and a_quarter(0, 1, 4) is True
    assert a_quarter(0, 0, 4) is None, "nothing could be saved"


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
        ({"adapt_rounds": 0}, "adapt_rounds of 1 or more"),
        ({"late_from": 3}, "late_from is 3, expected more than the method's grouping_rounds 3"),
        ({"recipe": "digits/spire"}, "another method"),
    ],
)
def test_problems_are_named(changes, message):
    fine = {"recipe": "collaborative/styles", "withheld": ("noto",)}
    with pytest.raises(ConfigError, match=message):
        Newcomers(**{**fine, **changes})
