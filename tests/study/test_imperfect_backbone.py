"""New clients on means that are wrong, at a size of seconds, and what the study says of planted figures."""

from dataclasses import replace

import pytest

from personae.core import Training
from personae.errors import ConfigError
from personae.recipe.config import read_table
from personae.study.config import parse_study
from personae.study.imperfect_backbone import Federation, ImperfectBackbone

STUDY = ImperfectBackbone(
    seeds=(0,),
    federations=(Federation(3, 60),),
    rounds=(2, 20),
    images=(20, 500),
    training=Training(5, 0.05, 32, condition_dropout=0.1),
    scales=(0.6,),
    degrees=(20.0,),
    num_components=3,
    width=4,
    num_new=6,
    learning_steps=100,
    learning_rate=0.1,
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    return [{**cell, **STUDY.measure(cell, 0, folder)} for cell in STUDY.cells([])]


def test_a_wrong_mean_moves_the_weight_little_over_all_levels_and_much_at_high_noise(rows):
    scaled, turned = rows[:2]
    assert scaled["all_levels"] == pytest.approx(0.0855, abs=0.003)
    assert scaled["high_noise"] == pytest.approx(-1 / 6)
    assert turned["all_levels"] == pytest.approx(0.1016, abs=0.003)
    assert turned["high_noise"] == pytest.approx(0.124, abs=1e-3)


def test_weights_get_worse_with_the_backbone_and_better_with_images(rows):
    true, young, trained = rows[2:]
    assert true["backbone_error"] == 0 < trained["backbone_error"] < young["backbone_error"]
    errors = [[entry["weight_error"] for entry in row["learned"]] for row in (true, trained, young)]
    assert errors[0][1] < errors[0][0] / 2, "with the true means, more images help"
    assert errors[0][1] < errors[1][1] < errors[2][1], "with many images, the backbone decides"
    assert true["limit"] == pytest.approx(0, abs=1e-9) and true["kl_given"] == pytest.approx(0, abs=1e-9)
    assert 0 < trained["kl_given"] < young["kl_given"]


def test_a_cell_measured_again_gives_the_same(rows, tmp_path):
    cell = STUDY.cells([])[-1]
    again = STUDY.measure(cell, 0, tmp_path)
    assert {key: rows[-1][key] for key in again} == again


def planted():
    """With 20 images every backbone will do; with 500 only those below an error of 0.5."""

    def row(error, few, many):
        learned = [{"images": 20, "weight_error": few, "kl": error**2}]
        learned.append({"images": 500, "weight_error": many, "kl": error**2})
        cell = {"stage": "learned", "number": 0, "clients": 3, "client_images": 60, "rounds": round(100 * error)}
        return {**cell, "backbone_error": error, "limit": 0.3, "kl_given": error**2 - 0.01, "learned": learned}

    true = {**row(0.0, 0.1, 0.02), "stage": "true"}
    return [true, row(0.2, 0.1, 0.021), row(0.4, 0.1, 0.024), row(0.8, 0.11, 0.04), row(1.6, 0.12, 0.1)]


def test_how_wrong_a_backbone_may_be_is_read_off():
    numbers = STUDY.answer(planted()).numbers
    assert numbers["tolerated_backbone_error"] == {"20": 1.6, "500": 0.4}
    assert numbers["weight_error_on_true_means"] == {"20": 0.1, "500": 0.02}
    assert numbers["kl_slope"] == pytest.approx(2)
    assert numbers["kl_added_by_learning"] == pytest.approx(0.01)


def test_an_unfinished_study_says_what_it_has(rows):
    assert STUDY.answer([]).findings == []
    assert len(STUDY.answer(rows[:2]).findings) == 1
    full = STUDY.answer(rows)
    assert len(full.charts) == 2 and len(full.tables) == 2 and len(full.findings) == 5


def test_a_study_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="there must be seeds"):
        replace(STUDY, federations=())


def test_the_recipe_is_one():
    _, study = parse_study(*read_table("theory/imperfect_backbone", []))
    assert isinstance(study, ImperfectBackbone) and len(study.cells([])) == 8 + 3 * (1 + 9)
