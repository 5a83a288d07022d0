"""The comparison of adapting clients: which cells, whose held-out images choose, and what a finished one says."""

import copy
import dataclasses
import itertools

import pytest
import torch

from personae.core import Training
from personae.errors import ConfigError, DataError
from personae.recipe.build import build_clients
from personae.recipe.config import load_recipe, read_table
from personae.study.adaptation import Adaptation, Redrawn, Rival
from personae.study.adaptation_report import adaptation_answer
from personae.study.bench import adapting, kinds_of, open_bench
from personae.study.study import where

STUDY = Adaptation(
    (Rival("spire", "digits/spire", (0.1, 0.01)), Rival("fedavg_ft", "digits/fedavg_ft", (0.001,))),
    tuned_on=(0,),
    seeds=(1, 2),
    images=(8,),
    steps=(5, 50),
)


def people(loss, kind="seen", **more):
    own = {
        "distance": 0.2,
        "copy": 1.0,
        "population": 0.5,
        "numbers": 128,
        "kind": kind,
        "num_images": 8,
        "bytes_received": 4,
    }
    return {name: {**own, "loss": loss + step / 1000, **more} for step, name in enumerate(("c1", "c2"))}


def found(study=STUDY, losses=None):
    """Rows of all stages: the loss of a setting is `losses[rival, seed, rate, steps]`, 0.3 where nothing is said."""
    rows = []
    while len(cells := study.cells(rows)) > len(rows):
        for cell in cells[len(rows) :]:
            if cell["stage"] == "train":
                own = {"loss": 0.25, "distance": 0.1, "kid": 0.0, "copy": 1.0, "before": 0.6, "distance_before": 0.5}
                clients = {"c0": {"role": "train", **own}, "c1": {"role": "new", **own}}
                rows.append({**cell, "clients": clients, "numbers": 128})
            else:
                at = (cell["rival"], cell["seed"], cell["rate"], cell["steps"])
                base = 0.3 if cell["rival"] == "spire" else 0.4
                kid = {"kid": base, "kid_floor": 0.0} if cell["stage"] == "final" else {}
                clients = people((losses or {}).get(at, base), **kid)
                rows.append({**cell, "clients": clients, "population_before": 0.5})
    return rows


def test_settings_are_chosen_on_the_first_seeds_and_used_on_the_others():
    rows = found()
    stages = [(stage, seed) for (stage, seed), _ in itertools.groupby(rows, key=lambda r: (r["stage"], r["seed"]))]
    assert stages == [("train", 0), ("adapt", 0), ("train", 1), ("final", 1), ("train", 2), ("final", 2)]
    assert [sum(row["stage"] == stage for row in rows) for stage in ("train", "adapt", "final")] == [6, 6, 4]


def test_the_first_is_drawn_otherwise_at_its_chosen_settings_and_trains_and_tunes_no_more():
    study = dataclasses.replace(STUDY, redrawn=(Redrawn("guided", ("sampling.guidance=2",)),))
    rows = found(study, {("spire", 0, 0.01, 50): 0.1})
    own = [(row["stage"], row["seed"], row["rate"], row["steps"]) for row in where(rows, rival="guided")]
    assert own == [("final", 1, 0.01, 50), ("final", 2, 0.01, 50)]
    assert [row for row in rows if row["rival"] != "guided"] == found(losses={("spire", 0, 0.01, 50): 0.1})
    assert {paired["ours"] for paired in study.answer(rows).numbers["paired"]} == {"spire", "guided"}


def test_the_setting_with_the_least_loss_is_chosen_for_each_method():
    rows = found(losses={("spire", 0, 0.01, 50): 0.1, ("spire", 1, 0.1, 5): 0.05})
    assert STUDY.chosen(rows, "spire", 8) == (0.01, 50)
    final = {(row["rate"], row["steps"]) for row in rows if row["stage"] == "final" and row["rival"] == "spire"}
    assert final == {(0.01, 50)}


def test_a_method_that_always_diverges_is_named():
    rows = [{**row, "diverged": ["c1"]} if row["rival"] == "spire" else row for row in found()]
    with pytest.raises(DataError, match="'spire' with 8 images diverged at every learning rate"):
        STUDY.chosen(rows, "spire", 8)


def test_a_setting_that_diverged_for_anybody_is_not_chosen():
    rows = found(losses={("spire", 0, 0.01, 50): 0.1, ("spire", 0, 0.1, 5): 0.2})
    rows = [{**row, "diverged": ["c1"]} if (row.get("rate"), row.get("steps")) == (0.01, 50) else row for row in rows]
    assert STUDY.chosen(rows, "spire", 8) == (0.1, 5)


def test_whom_the_comparison_lacks_is_said():
    rows = found()
    for row in rows:
        if row["stage"] == "final" and row["rival"] == "fedavg_ft" and row["seed"] == 2:
            row["clients"], row["diverged"] = {"c1": row["clients"]["c1"]}, ["c2"]
    answer = adaptation_answer(rows, ["spire", "fedavg_ft"])
    assert any("fedavg_ft diverged for c2 of seed 2" in finding for finding in answer.findings)
    assert answer.numbers["diverged"] == 1 and answer.numbers["paired"][0]["num"] == 3


def test_the_answer_pairs_clients_and_counts_them():
    answer = adaptation_answer(found(), ["spire", "fedavg_ft"])
    paired = {(p["figure"], p["kind"]): p for p in answer.numbers["paired"]}
    assert paired["loss", "all"]["mean"] == pytest.approx(-0.1)
    assert paired["loss", "all"]["num"] == 4 and paired["loss", "all"]["high"] < 0
    assert "spire against fedavg_ft: held-out loss lower" in answer.findings[0]
    told = (
        "With 8 images and classes as one training client has them, spire's held-out loss is below that of fedavg_ft."
    )
    assert told in answer.findings
    assert answer.numbers["largest_change_of_others"] == 0
    assert {chart.name for chart in answer.charts} == {"paired-spire-loss", "paired-spire-kid", "rates", "steps"}
    best = answer.tables[0].rows
    assert [row[:3] for row in best] == [["8", "spire", 4], ["8", "fedavg_ft", 4]]


def test_training_clients_are_compared_too_without_those_who_are_new():
    rows = found()
    for row in rows:
        if row["stage"] == "train" and row["rival"] == "spire":
            row["clients"]["c0"] |= {"loss": 0.25 - 0.1 * (1 + row["seed"]), "kid": 0.5, "distance": None}
            row["clients"]["c1"] |= {"loss": 9.0}
    answer = adaptation_answer(rows, ["spire", "fedavg_ft"])
    trained = {one["figure"]: one for one in answer.numbers["trained"]}
    assert trained.keys() == {"loss", "kid", "copy"} and trained["kid"]["mean"] == 0.5
    assert trained["loss"]["mean"] == pytest.approx(-0.2) and trained["loss"]["num"] == 3
    (table,) = [table for table in answer.tables if table.title == "Training clients, paired differences"]
    assert table.rows[0][:3] == ["spire", "fedavg_ft", 3] and len(table.rows[0]) == len(table.columns)
    assert any(told.startswith("Training clients: spire against fedavg_ft: held-out loss") for told in answer.findings)


def test_those_drawn_otherwise_are_compared_with_the_others_and_with_the_first():
    rows = found()
    rows += [
        {**row, "rival": "guided", "clients": {name: {**c, "kid": 0.25} for name, c in row["clients"].items()}}
        for row in where(rows, rival="spire", stage="final")
    ]
    answer = adaptation_answer(rows, ["spire", "fedavg_ft"], ["guided"])
    matches = [("spire", "fedavg_ft"), ("guided", "spire"), ("guided", "fedavg_ft")]
    assert list(dict.fromkeys((p["ours"], p["rival"]) for p in answer.numbers["paired"])) == matches
    mean = {(p["ours"], p["rival"]): p["mean"] for p in answer.numbers["paired"] if p["figure"] == "kid"}
    kid = where(rows, stage="final", rival="spire")[0]["clients"]["c1"]["kid"]
    assert mean["guided", "spire"] == pytest.approx(0.25 - kid)
    told = "With 8 images, guided against spire: histogram distance no difference that can be told"
    assert any(finding.startswith(told) for finding in answer.findings)
    names = ["paired-spire-loss", "paired-spire-kid", "paired-guided-kid", "rates", "steps"]
    assert [chart.name for chart in answer.charts] == names  # drawn otherwise, the loss is what it was
    (trained,) = [table for table in answer.tables if table.title.startswith("Training clients, and new")]
    assert [row[0] for row in trained.rows] == ["spire", "fedavg_ft"]


def test_no_ratio_where_the_rival_is_at_the_floor():
    rows = found()
    for row in rows:
        for step, client in enumerate(row["clients"].values()):
            if row["stage"] == "final" and row["rival"] == "fedavg_ft":
                client["kid"] = (-1) ** step * 0.4
    at = adaptation_answer(rows, ["spire", "fedavg_ft"]).tables[0].columns.index("above the floor / rival's")
    assert adaptation_answer(rows, ["spire", "fedavg_ft"]).tables[0].rows[1][at] == "rival at the floor"
    assert adaptation_answer(found(), ["spire", "fedavg_ft"]).tables[0].rows[1][at] == pytest.approx(0.75)


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_a_part_of_the_rows_is_answered_too(stages):
    kept = ["train", "adapt", "final"][:stages]
    answer = adaptation_answer([row for row in found() if row["stage"] in kept], ["spire", "fedavg_ft"])
    told = "With 8 images, least held-out loss over the grid: spire 0.300, fedavg_ft 0.401. 1 seed so far"
    assert [finding[: len(told)] for finding in answer.findings] == ([told] if stages == 2 else [])


def test_problems_are_named():
    with pytest.raises(ConfigError, match="expected at least one, all above 0"):
        Rival("spire", "digits/spire", ())
    with pytest.raises(ConfigError, match="names of their own"):
        Adaptation((STUDY.rivals[0], STUDY.rivals[0]), (0,), (1,), (8,), (5,))
    with pytest.raises(ConfigError, match="names of their own"):
        dataclasses.replace(STUDY, redrawn=(Redrawn("spire", ("sampling.guidance=2",)),))
    with pytest.raises(ConfigError, match="what trains otherwise is a rival of its own"):
        Redrawn("guided", ("sampling.guidance=2", "rounds=3"))
    with pytest.raises(ConfigError, match="guidance"):
        dataclasses.replace(STUDY, redrawn=(Redrawn("guided", ("sampling.guidance=much",)),))
    with pytest.raises(ConfigError, match=r"seeds \[0\] are also tuned on"):
        dataclasses.replace(STUDY, seeds=(0, 1))


# --- one trained model ------------------------------------------------------------------------------------------------


def test_kinds_are_those_that_the_partition_dealt(tiny_run):
    table, _ = read_table("unseen/one_class")
    recipe = load_recipe("digits/spire", table["settings"]["changes"])
    clients = build_clients(recipe)
    kinds = kinds_of(recipe, clients)
    assert list(kinds.values()) == ["seen", "mixed", "absent"] * 2 + ["seen", "mixed"]
    for name, kind in kinds.items():
        assert len(clients.data[name].train.labels.unique()) == (2 if kind == "mixed" else 1)
        assert (9 in clients.data[name].train.labels) == (kind == "absent")
    assert kinds_of(tiny_run.recipe, build_clients(tiny_run.recipe)) == {"c4": "new"}


def test_adapting_changes_the_method_inside_its_wrappers(tiny_run):
    how = Training(7, 0.5, 3)
    changed = adapting(tiny_run.recipe.method, how)
    assert type(changed) is type(tiny_run.recipe.method)
    assert (
        changed.method.method.adapt == how
        and changed.method.method.training == tiny_run.recipe.method.method.method.training
    )


def test_what_is_drawn_otherwise_learns_the_same(tiny_run, tmp_path):
    study = dataclasses.replace(
        STUDY,
        rivals=(Rival("spire", "quickstart", (0.1,)),),
        redrawn=(Redrawn("guided", ("sampling.guidance=9",)),),
        num_final=32,
        num_references=32,
    )
    folder = tmp_path / "runs" / "spire-1"
    folder.parent.mkdir()
    folder.symlink_to(tiny_run.folder.resolve())
    cell = {"stage": "final", "rival": "spire", "seed": 1, "images": 4, "rate": 0.1, "steps": 3}
    plain, guided = (
        study.measure({**cell, "rival": name}, 0, tmp_path)["clients"]["c4"] for name in ("spire", "guided")
    )
    assert plain["loss"] == guided["loss"] and plain["kid"] != guided["kid"]


@pytest.fixture(scope="module")
def bench(tiny_run):
    return open_bench(tiny_run.folder)


def test_an_embedding_leaves_everybody_else_alone(bench):
    before = bench.population_before
    figures = bench.adapted("c4", Training(3, 0.5, 4), images=5, drawn=8, references=0)
    assert figures["population"] == before
    assert (
        figures["num_images"] == 5
        and figures["numbers"] == 128
        and figures["bytes_received"] > 1e6
        and 0 <= figures["distance"] <= 1
    )


def test_the_same_cell_measured_again_gives_the_same(bench):
    how = Training(2, 0.1, 4)
    first = bench.adapted("c4", how, images=0, drawn=24, references=24)
    bench.adapted("c4", Training(3, 1.0, 4), images=3, drawn=8, references=0)
    assert bench.adapted("c4", how, images=0, drawn=24, references=24) == first
    assert first["kid_features"] == bench.features.name


def test_pictures_are_drawn_as_the_recipe_says(bench):
    guided = dataclasses.replace(bench.recipe, sampling=dataclasses.replace(bench.recipe.sampling, guidance=3.0))
    louder = copy.copy(bench)
    louder.recipe = guided
    bench.adapted("c4", Training(3, 0.5, 4), images=0, drawn=8, references=0)
    assert bench.drawn("c4", 4).shape == louder.drawn("c4", 4).shape
    assert not torch.equal(bench.drawn("c4", 4), louder.drawn("c4", 4))


def test_references_have_the_clients_mix_and_nobody_trained_on_them(bench):
    own = bench.clients.data["c4"]
    counts = bench.label_counts(own)
    references = bench._references("c4", own, 24)
    trained = [own.train, *(bench.clients.data[name].train for name in bench.clients.train)]
    seen = {row.numpy().tobytes() for images in trained for row in images.pixels}
    assert len(references) == 24 and counts.sum() > 24
    assert sum(row.numpy().tobytes() in seen for row in references) <= 1  # two of the digits are equal in all pixels
    with pytest.raises(DataError, match="nobody trained on"):
        bench._references("c4", own, 5000)


def test_a_setting_that_diverges_is_an_answer(bench, tiny_run, tmp_path):
    study = dataclasses.replace(STUDY, rivals=(Rival("spire", "quickstart", (1e30,)),))
    folder = tmp_path / "runs" / "spire-0"
    folder.parent.mkdir()
    folder.symlink_to(tiny_run.folder.resolve())
    cell = {"stage": "adapt", "rival": "spire", "seed": 0, "images": 4, "rate": 1e30, "steps": 3}
    figures = study.measure(cell, 0, tmp_path)
    assert (figures["diverged"], figures["clients"]) == (["c4"], {})
    rows = [*found(), {**cell, "images": 8, **figures}]
    assert STUDY.chosen(rows, "spire", 8) == STUDY.chosen(found(), "spire", 8)


def test_a_data_set_without_classes_is_refused(tiny_run, copy_of, monkeypatch):
    monkeypatch.setattr("personae.study.bench.features_by_name", lambda name: None)
    with pytest.raises(ConfigError, match="no classifier"):
        open_bench(copy_of(tiny_run))


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        STUDY.seeds = (3,)
