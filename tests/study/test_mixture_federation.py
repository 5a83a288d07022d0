"""The whole loop on mixtures, at a size of seconds, and what the study says of planted figures."""

from dataclasses import replace

import pytest

from personae.core import Training
from personae.errors import ConfigError
from personae.methods.fedavg_ft import FedAvgFT
from personae.recipe.config import read_table
from personae.study.config import parse_study
from personae.study.mixture_federation import BIAS, FEDAVG, FINE_TUNED, RIVALS, SPIRE, MixtureFederation, Variant
from personae.study.study import where

STUDY = MixtureFederation(
    seeds=(0, 1),
    images=(10, 100, 300),
    rates=(0.03,),
    steps=(10, 100),
    training=Training(5, 0.1, 32, condition_dropout=0.1),
    fine_tuning=Training(20, 0.01, 32),
    variants=(Variant("SPIRE, slow", 0.5, 0),),
    num_components=3,
    width=4,
    num_train=4,
    num_new=3,
    num_images=60,
    rounds=20,
    embedding_warmup_rounds=3,
    least_travel=1.0,
)


def measured(study, folder, numbers=(0,)):
    """The rows of some seeds, in the order in which a study measures them."""
    study, rows = replace(study, seeds=numbers), []
    while missing := study.cells(rows)[len(rows) :]:
        rows += [{**cell, **study.measure(cell, 0, folder)} for cell in missing]
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return measured(STUDY, tmp_path_factory.mktemp("federation"))


def of(rows, **settings):
    (row,) = where(rows, **settings)
    return row


def test_the_loop_learns_the_means_and_everybodys_weights(rows):
    trained = of(rows, stage="train", method=SPIRE)
    assert max(trained["mean_errors"]) < 0.7
    plain = of(rows, stage="train", method=FEDAVG)
    assert sum(trained["clients"]) < sum(plain["clients"]) / 2
    assert len(plain["clients"]) == len(plain["fine_tuned"]) == 4 and plain["clients"] != plain["fine_tuned"]


def test_spire_forgets_nothing_and_fine_tuning_does(rows):
    before = of(rows, stage="train", method=SPIRE)["population"]
    assert {point["population"] for point in of(rows, stage="adapt", method=SPIRE)["grid"]} == {before}
    tuned = of(rows, stage="adapt", method=FINE_TUNED)["grid"]
    last = [point["population"] for point in tuned if point["steps"] == 100]
    assert min(last) > of(rows, stage="train", method=FEDAVG)["population"]


def test_every_point_of_the_grid_is_measured_for_every_new_client(rows):
    for rival in RIVALS:
        grid = of(rows, stage="adapt", method=rival)["grid"]
        assert len(grid) == 6 and all(len(point["clients"]) == 3 for point in grid)


def test_a_cell_measured_again_gives_the_same(rows, tmp_path):
    cell = {"stage": "train", "method": SPIRE, "number": 0}
    assert STUDY.measure(cell, 0, tmp_path)["clients"] == of(rows, **cell)["clients"]
    adapted = {"stage": "adapt", "method": SPIRE, "number": 0}
    assert STUDY.measure(adapted, 0, tmp_path)["grid"] == of(rows, **adapted)["grid"]


def test_new_clients_wait_for_what_they_adapt(rows):
    assert {cell["stage"] for cell in STUDY.cells([])} == {"train"} and len(STUDY.cells([])) == 4
    assert len(replace(STUDY, seeds=(0,)).cells(rows)) == len(rows) == 2 + 3 + 1


def test_plain_fedavg_has_no_null_vector_and_tunes_once_at_the_end():
    early, late = STUDY.method(FEDAVG, late=False), STUDY.method(FEDAVG, late=True)
    assert isinstance(early, FedAvgFT) and early.training.condition_dropout == 0
    assert early.adapt.steps == 0 and late.adapt.steps == 20 and late.training.lr == pytest.approx(0.02)
    assert STUDY.method("SPIRE, slow", late=False).embedding_rate == 0.5
    assert STUDY.method(SPIRE, late=False).embedding_warmup_rounds == 3


def planted(tuned):
    """SPIRE at 0.02, FedAvg+FT at `tuned`, the bias at 0.03, but at 1.03 with seed 1, where FedAvg lost a mean."""

    def grid(rival, number):
        level = {SPIRE: 0.02, BIAS: 0.03 + number, FINE_TUNED: tuned}[rival]
        return [
            {"images": num, "rate": 0.03, "steps": steps, "clients": [level] * 3, "population": 10 * level}
            for num in STUDY.images
            for steps in STUDY.steps
        ]

    rows = []
    for number in STUDY.seeds:
        for name in (SPIRE, FEDAVG):
            errors = 1.5 if (number, name) == (1, FEDAVG) else 0.1
            figures = {"clients": [0.04, 0.02 + 0.08 * number], "mean_errors": [0.1, 0.1, errors], "population": 0.1}
            rows.append({"stage": "train", "method": name, "number": number, **figures, "fine_tuned": [0.3, 0.3]})
        rows += [{"stage": "adapt", "method": rival, "number": number, "grid": grid(rival, number)} for rival in RIVALS]
    return rows


def test_what_is_accepted_is_counted():
    numbers = STUDY.answer(planted(tuned=0.05)).numbers
    assert (numbers["spire_seeds_below_0.05"], numbers["seeds"]) == (1, 2)  # means of 0.03 and 0.07
    assert (numbers["new_clients_half_of_fine_tuning"], numbers["new_clients_points"]) == (2, 2)
    assert numbers["lost_means"] == {SPIRE: 0, FEDAVG: 1} and numbers["seeds_where_no_mean_was_lost"] == 1
    assert numbers["largest_gap_of_bias_where_no_mean_was_lost"] == pytest.approx(0.01)
    assert numbers["population_after_fine_tuning"] == pytest.approx([0.5, 0.5])
    assert STUDY.answer(planted(tuned=0.03)).numbers["new_clients_half_of_fine_tuning"] == 0


def test_an_unfinished_study_says_what_it_has(rows):
    assert STUDY.answer([]).findings == ()
    answer = STUDY.answer(rows[:2])
    assert len(answer.findings) == 2 and not answer.charts
    full = STUDY.answer(rows)
    assert len(full.charts) == 2 and len(full.tables) == 2 and "SPIRE, slow" in full.numbers["training"]


def test_too_many_means_are_refused():
    with pytest.raises(ConfigError, match="5 orthogonal means need as many dimensions, width is 4"):
        replace(STUDY, num_components=5)


def test_the_recipe_is_one():
    _, study = parse_study(*read_table("theory/mixture_federation", []))
    assert isinstance(study, MixtureFederation) and len(study.cells([])) == 10
