"""Three estimators of K weights beside theory, at a size of seconds, and what the study says of planted figures."""

from dataclasses import replace

import pytest

from personae.errors import ConfigError
from personae.recipe.config import read_table
from personae.study.components import Case, Components
from personae.study.config import parse_study

CASE = Case(components=3, width=4, separation=1.5, equal=False, images=50)
STUDY = Components((CASE, replace(CASE, equal=True)), widths=(4, 9), images=(25, 50), repeats=60, trained=5, steps=150)


def planted(**changes):
    """Figures as theory would have them."""
    figures = {
        "projection": 2.0,
        "projection_theory": 2.0,
        "likelihood": 1.5,
        "bound": 1.5,
        "oracle": 0.6,
        "ddpm": 1.5,
        "likelihood_same_data": 1.5,
        "distance": 0.01,
        "likelihood_distance": 0.1,
    }
    return [{**cell, **figures, **changes} for cell in STUDY.cells([])]


def test_weights_sum_to_one_and_means_have_the_separation():
    assert CASE.weights.tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert replace(CASE, equal=True).weights.tolist() == pytest.approx([1 / 3] * 3)
    assert ((CASE.means[0] - CASE.means[1]).norm() / 2).item() == pytest.approx(1.5)


def test_no_cell_is_measured_twice():
    cells = STUDY.cells([])
    assert [(c["width"], c["equal"], c["images"]) for c in cells] == [
        (4, False, 50),
        (4, True, 50),
        (9, False, 50),
        (4, False, 25),
    ]


def test_a_cell_gives_the_same_again_and_near_theory(tmp_path):
    """60 repeats: one standard error of an error is some 13 %. Accepted: 50 %."""
    cell = STUDY.cells([])[0]
    figures = STUDY.measure(cell, 0, tmp_path)
    assert STUDY.measure(dict(cell), 0, tmp_path) == figures != STUDY.measure(cell, 1, tmp_path)
    assert figures["projection"] == pytest.approx(figures["projection_theory"], rel=0.5)
    assert figures["likelihood"] == pytest.approx(figures["bound"], rel=0.5)
    assert figures["oracle"] < figures["bound"] < figures["projection_theory"]
    assert figures["distance"] < 0.5 * figures["likelihood_distance"]


def test_agreement_and_slopes_are_counted():
    numbers = STUDY.answer(planted()).numbers
    assert numbers["agreement"] == {"worst": pytest.approx(0.1), "below": 4, "cases": 4}
    assert numbers["slope_against_images"]["ddpm"] == pytest.approx(-1)
    assert numbers["slope_against_width"]["ddpm"] == pytest.approx(0)
    assert STUDY.answer(planted(distance=0.03)).numbers["agreement"]["below"] == 0
    assert STUDY.answer(planted(projection=2.5)).numbers["projection_off_theory"] == pytest.approx(0.25)


def test_an_unfinished_study_says_what_it_has():
    assert STUDY.answer([]).findings == ()
    answer = STUDY.answer(planted()[:1])
    assert "slope_against_images" not in answer.numbers and len(answer.tables) == 1 and not answer.charts
    assert len(STUDY.answer(planted()).charts) == 2


def test_impossible_cases_are_refused():
    with pytest.raises(ConfigError, match="2 <= components <= width"):
        Case(components=5, width=4, separation=1.0, equal=True, images=10)
    with pytest.raises(ConfigError, match="20 trained of 10 repeats"):
        replace(STUDY, repeats=10, trained=20)


def test_the_recipe_is_one():
    _, study = parse_study(*read_table("theory/k_components", []))
    assert isinstance(study, Components) and len(study.cells([])) == 19
