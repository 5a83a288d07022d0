"""The study of the mixing weight at a small size: its figures against the formulas, and what its answer says."""

import dataclasses
import math

import pytest

from personae.errors import ConfigError
from personae.recipe.config import read_table
from personae.study.config import parse_study
from personae.study.mixing_weight import ALL, MixingWeight, _one, _slope
from personae.theory import two_components as theory

SMALL = MixingWeight(0.3, norms=(1.0,), dims=(1, 6), images=(60, 240), times=(0.3,), repeats=120, every=200)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return [{**cell, **SMALL.measure(cell, 0, folder)} for cell in SMALL.cells([])]


def test_every_combination_is_a_cell_and_none_depends_on_what_was_found(found):
    cells = SMALL.cells([])
    assert cells == SMALL.cells(found)
    assert len(cells) == 2 * 2 * 2 == len({tuple(cell.items()) for cell in cells})


def test_a_cell_measured_again_gives_the_same_and_another_seed_does_not(found, tmp_path):
    for row in (found[-1], found[0]):
        cell = {key: row[key] for key in ("norm", "dim", "images", "level")}
        assert {**cell, **SMALL.measure(cell, 0, tmp_path)} == row
        assert {**cell, **SMALL.measure(cell, 1, tmp_path)} != row


def test_the_errors_are_those_of_the_formulas(found):
    """120 clients: the standard error of a mean square is 13 %, accepted are 4 of them; the cells' mean is nearer."""
    ratios = {}
    for row in found:
        if row["level"] == ALL:
            limits = {"projection": theory.projection_variance(0.3, 1.0), "likeliest": theory.cramer_rao(0.3, 1.0),
                      "trained": SMALL._expected(1.0)}  # fmt: skip
        else:
            signal, sigma = theory.signal_and_sigma(0.3)
            averaged, one_draw = theory.sandwich(0.3, 1.0, *_one(0.3))
            limits = {"averaged": averaged, "one_draw": one_draw,
                      "noised_projection": theory.projection_variance(0.3, signal),
                      "target_projection": theory.projection_variance(0.3, sigma)}  # fmt: skip
        for name, limit in limits.items():
            assert row["images"] * row[name]["mse"] == pytest.approx(limit, rel=0.55), name
            ratios.setdefault(name, []).append(row["images"] * row[name]["mse"] / limit)
            assert abs(row[name]["mean"] - 0.3) < 5 * math.sqrt(row[name]["mse"] / SMALL.repeats)
    assert all(sum(values) / len(values) == pytest.approx(1, abs=0.3) for values in ratios.values())


def test_training_agrees_with_maximum_likelihood(found):
    assert all(row["apart"] < 0.15 for row in found if row["level"] == ALL)


def test_the_answer_says_what_was_measured(found):
    answer = SMALL.answer(found)
    numbers = answer.numbers
    assert numbers["over_cramer_rao"]["mean"] == pytest.approx(1, abs=0.3)
    assert set(numbers["slope_of_images"]) == {"|mu| = 1, d = 1", "|mu| = 1, d = 6"}
    assert all(found["slope"] == pytest.approx(-1, abs=0.45) for found in numbers["slope_of_images"].values())
    assert abs(numbers["slope_of_dims"]["1"]["slope"]) < 0.25
    assert [row["dim"] for row in numbers["over_limit"]] == [1, 1, 6, 6]
    assert all(row["one_draw"] == pytest.approx(1, abs=0.55) for row in numbers["over_limit"])
    assert f"{numbers['over_cramer_rao']['mean']:.3f}" in answer.findings[0]
    assert [len(table.rows) for table in answer.tables] == [4, 4]
    assert all(len(row) == len(table.columns) for table in answer.tables for row in table.rows)
    assert [chart.name for chart in answer.charts] == ["images", "dims", "levels-1"]


def test_separations_have_their_chart():
    study = dataclasses.replace(SMALL, norms=(0.5, 1.0, 2.0), dims=(2,), images=(50,), times=(), repeats=20)
    rows = [{**cell, **study.measure(cell, 0, None)} for cell in study.cells([])]
    answer = study.answer(rows)
    assert [chart.name for chart in answer.charts] == ["norms"]
    by_norm = answer.numbers["by_norm"]
    assert by_norm["0.5"] > by_norm["2"]


@pytest.mark.parametrize("num", range(9))
def test_an_unfinished_study_has_an_answer_too(found, num):
    SMALL.answer(found[:num])


def test_a_slope_and_its_error():
    """Through (1, 1), (10, 0.1), (100, 0.01): -1. Errors of 10 % at the ends, ln 10 from the middle."""
    slope, error = _slope([(1, 1.0, 0.1), (10, 0.1, 0.01), (100, 0.01, 0.001)])
    assert slope == pytest.approx(-1)
    assert error == pytest.approx(0.1 * math.sqrt(2) / (2 * math.log(10)))


def test_settings_that_cannot_be_are_all_named():
    with pytest.raises(ConfigError, match=r"weight is 1\.0.*dims is \[\].*times is \[0\.0\].*repeats is 1"):
        MixingWeight(1.0, norms=(1.0,), dims=(), images=(10,), times=(0.0,), repeats=1)
    with pytest.raises(ConfigError, match="every is 2000"):
        dataclasses.replace(SMALL, every=2000)


@pytest.mark.parametrize("name", ["two_components", "separation", "noise_level"])
def test_the_recipes_are_read(name):
    recipe, study = parse_study(*read_table(f"theory/{name}"))
    assert recipe.study == "mixing_weight" and isinstance(study, MixingWeight)
    assert study.repeats >= 400
