"""Who takes part in a round, and with which concept, where concepts arrive over rounds."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from personae.continual import SequentialLora
from personae.data.tasks import TaskStream
from personae.engine.task_population import TaskPopulation
from personae.errors import ConfigError, FederationError

fed = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "continual" / "federation.py")))

METHOD = SequentialLora(2)


@pytest.fixture
def people(tmp_path):
    return lambda **options: fed.population(METHOD, tmp_path / "tokenizer", **options)


def test_a_client_sees_its_present_task_and_the_names_of_earlier_ones(people):
    population = people()
    seen = [population.client("c0", number, 0) for number in (1, 2, 3)]
    assert [[task.name for task in client.tasks] for client in seen] == [["rex"], ["rex", "tom"], ["rex", "tom"]]
    assert [client.ends_task for client in seen] == [True, False, True]
    assert [client.data.train.captions[0] for client in seen] == ["a <concept-1>", "a <concept-2>", "a <concept-2>"]
    assert seen[1].data is population.streams["c0"].periods[1].data and seen[1].given.prior is not None
    after = population.client("c0", "personalize", 0)
    assert after.task.name == "tom" and not after.ends_task
    with pytest.raises(FederationError, match="'c0' has no task in round 4"):
        population.client("c0", 4, 0)


def test_draws_are_those_of_any_population(people):
    one, other = people().client("c0", 2, 5), people().client("c0", 2, 5)
    assert one.rng.initial_seed() == other.rng.initial_seed() != people().client("c0", 3, 5).rng.initial_seed()


def test_whose_task_ends_in_a_round_takes_part_in_it(people):
    population = people(cohort_size=1)
    for seed in range(10):
        assert {"c0", "c2"} <= set(population.cohort(1, seed, population.train)), "both end their first task"
        assert population.cohort(2, seed, population.train) == ["c1"], "and here it alone does"
        assert population.cohort(3, seed, population.train) == ["c0", "c1", "c2"]
    assert population.cohort(1, 0, ["c1", "c2"]) == ["c2"]
    assert people().cohort(2, 0, population.train) == ["c0", "c1", "c2"]
    assert population.rounds == 3


def test_only_who_has_a_task_takes_part(people):
    population = people()
    late = replace(population.streams["c1"], begins=3)
    population = replace(population, streams={**population.streams, "c1": late}, cohort_size=2)
    assert population.cohort(2, 0, population.train) == ["c0", "c2"] and population.rounds == 5
    assert population.cohort(4, 0, population.train) == ["c1"] and population.cohort(6, 0, population.train) == []
    drawn = {tuple(replace(population, cohort_size=1).cohort(2, seed, population.train)) for seed in range(20)}
    assert drawn == {("c0",), ("c2",)}


def test_what_cannot_be_is_refused(people):
    population = people()
    with pytest.raises(ConfigError, match="no data for c9"):
        TaskPopulation(population.model, population.streams, ("c0", "c9"))
    with pytest.raises(ConfigError, match="c1 are new and have several tasks"):
        TaskPopulation(population.model, population.streams, ("c0",), ("c1",))
    third = fed.period(METHOD, "pip", "dog", 3, 1)
    longer = TaskStream((*population.streams["c0"].periods, third))
    with pytest.raises(ConfigError, match="client 'c0' has tasks for which the model has no word: <concept-3>"):
        TaskPopulation(population.model, {"c0": longer}, ("c0",))
