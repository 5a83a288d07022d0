"""The map of where adapting an embedding wins: which cells, which differences, and what it says of them."""

import dataclasses

import pytest

from personae.errors import ConfigError
from personae.recipe.build import build_clients
from personae.recipe.config import load_recipe, read_table
from personae.study import advantage
from personae.study.adaptation import Rival
from personae.study.advantage import Advantage, World
from personae.study.config import parse_study

STUDY = Advantage(
    worlds=(World("few"), World("many", ("data.partition.num_clients=30",))),
    rivals=(Rival("spire", "digits/spire", (0.1, 0.3)), Rival("fedavg_ft", "digits/fedavg_ft", (1e-4, 3e-4))),
    images=(8, 32),
)


def found(study=STUDY, better=0.1):
    """Rows of everything: the first rival's loss is `better` below the other's with few clients, above it with many."""
    rows = []
    while len(cells := study.cells(rows)) > len(rows):
        for cell in cells[len(rows) :]:
            if cell["stage"] == "train":
                rows.append({**cell, "loss": 0.3})
                continue
            sign = (1 if cell["world"] == "few" else -1) * (cell["rival"] == "spire")
            people = {
                f"c{n}": {"kind": "seen", "loss": 0.5 - sign * (better + n / 1000) + n / 50, "distance": 0.2 + n / 50}
                for n in range(4)
            }
            rows.append({**cell, "clients": people})
    return rows


def test_a_world_is_trained_before_it_is_adapted_in_and_one_world_comes_after_the_other():
    rows = found()
    assert [(r["world"], r["stage"]) for r in rows] == [
        *[("few", "train")] * 2,
        *[("few", "adapt")] * 4,
        *[("many", "train")] * 2,
        *[("many", "adapt")] * 4,
    ]


def test_differences_are_paired_by_client_and_told_apart_by_world():
    answer = STUDY.answer(found())
    lines = answer.numbers["fedavg_ft-loss"]
    for world, sign in zip(lines, (-1, 1), strict=True):
        for cell in world:  # clients differ by 0.06, their differences by 0.003: without pairs the interval holds 0
            assert cell["mean"] == pytest.approx(sign * 0.1015)
            assert cell["num"] == 4 and cell["high"] - cell["low"] < 0.01
    assert answer.findings[0].startswith(
        "held-out loss: spire is better than fedavg_ft in 2 (0 over seeds alone) of 4 places of the map, worse in 2 (0"
    )
    assert "in 0 (0 over seeds alone) of 4 places of the map, worse in 0 (0" in answer.findings[1]  # equal distances


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_recipes_worlds_have_as_many_images_as_each_other(seed):
    study = parse_study(*read_table("unseen/map"))[1]
    for world in study.worlds:
        recipe = load_recipe("digits/spire", [*study.changes, *world.changes, f"seed={seed}"])
        clients = build_clients(recipe)
        assert (
            sum(len(clients.data[n].train) + len(clients.data[n].heldout) for n in clients.train) == 720
            and len(clients.new) == 8
        ), world.name


def test_an_unfinished_map_says_what_it_knows():
    rows = found()
    answer = STUDY.answer(rows[:6])
    assert ") of 2 places" in answer.findings[0] and answer.numbers["fedavg_ft-loss"][1] == [None, None]
    assert STUDY.answer(rows[:2]).charts == []


def test_each_number_of_images_has_its_rate(monkeypatch, tmp_path):
    class Bench:
        class clients:
            new = ("c0",)

        def adapted(self, name, how, images, drawn, references):
            return {"kind": "seen", "loss": how.lr, "distance": images, "copy": 1.0}

    opened = []
    monkeypatch.setattr(advantage, "open_bench", lambda folder: opened.append(folder) or Bench())
    cell = {"stage": "adapt", "world": "many", "rival": "fedavg_ft", "seed": 0, "images": 32}
    assert STUDY.measure(cell, 0, tmp_path)["clients"] == {"c0": {"kind": "seen", "loss": 3e-4, "distance": 32}}
    assert opened == [tmp_path / "runs" / "1-fedavg_ft-0"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"worlds": (World("few"), World("few"))}, "worlds are"),
        ({"rivals": STUDY.rivals[:1]}, "expected 2 or more"),
        ({"images": (8,)}, "one for each of images"),
        ({"images": (8, 0)}, "at least 1"),
        ({"worlds": (World("odd", ("data.partition.num_client=3",)),)}, "num_client"),
    ],
)
def test_bad_settings_are_refused(change, expected):
    with pytest.raises(ConfigError, match=expected):
        dataclasses.replace(STUDY, **change)
