from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from personae.core import Images, Training, stream
from personae.engine import InProcess
from personae.engine.population import POOLED, Pooled, Population, Roster
from personae.errors import ConfigError
from personae.local.fit import fit
from personae.methods import FedAvgFT
from personae.testing import tiny_job, tiny_population
from personae.testing.contract import differing

ALL = ["c0", "c1", "c2"]


def test_everyone_takes_part_unless_a_cohort_is_given():
    assert tiny_population(3).cohort(1, 0, ALL) == ["c0", "c1", "c2"]
    assert tiny_population(3, cohort_size=3).cohort(1, 0, ALL) == ["c0", "c1", "c2"]


def test_a_cohort_depends_on_round_and_seed_alone():
    population = tiny_population(5, cohort_size=2)
    first = [population.cohort(number, 0, population.train) for number in range(20)]
    torch.rand(3)  # the global generator takes no part
    assert first == [tiny_population(5, cohort_size=2).cohort(number, 0, population.train) for number in range(20)]
    assert first != [population.cohort(number, 1, population.train) for number in range(20)]
    assert population.cohort(7, 0, population.train) == first[7]


def test_those_who_cannot_be_reached_are_not_asked():
    population = tiny_population(5, cohort_size=2)
    assert population.cohort(1, 0, ["c4", "c1", "stranger"]) == ["c1", "c4"]
    assert population.cohort(1, 0, ["c3"]) == ["c3"]
    assert population.cohort(1, 0, []) == []


def test_late_clients_are_asked_from_their_round_on():
    population = replace(tiny_population(4), late=("c1", "c3"), late_from=3)
    names = ["c0", "c1", "c2", "c3"]
    assert [population.cohort(number, 0, names) for number in (1, 2)] == [["c0", "c2"]] * 2
    assert population.cohort(3, 0, names) == names
    roster = Roster(population.model, None, (), ("c1", "c3"), 3)
    assert roster.cohort(2, 0, names) == ["c0", "c2"] and roster.cohort(3, 0, names) == names
    with pytest.raises(ConfigError, match="nobody can be late where all data are pooled"):
        Pooled(population)


def test_a_cohort_is_a_uniform_sample_without_replacement_in_name_order():
    population = tiny_population(5, cohort_size=2)
    counts = Counter(tuple(population.cohort(number, 0, population.train)) for number in range(2000))
    assert counts.keys() == set(combinations(["c0", "c1", "c2", "c3", "c4"], 2))
    # 200 expected per pair, standard deviation 13.
    assert all(135 < count < 265 for count in counts.values()), counts


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"cohort_size": 0}, "cohort is 0, expected 1 to 3"),
        ({"cohort_size": 4}, "cohort is 4, expected 1 to 3"),
        ({"train": []}, "no client takes part in training"),
        ({"train": ["c0", "c1", "c0"]}, "names are used twice: c0"),
        ({"new": ["c0"]}, "names are used twice: c0"),
        ({"train": ["c0", "c9"]}, "no data for c9"),
        ({"late": ["c9"], "late_from": 2}, "late clients c9 do not train"),
        ({"late": ["c1"]}, "late_from is 1; say from which round"),
        ({"late": ["c0", "c1", "c2"], "late_from": 2}, "nobody is there before round 2"),
    ],
)
def test_what_cannot_be_is_refused(change, found):
    with pytest.raises(ConfigError, match=found):
        replace(tiny_population(3), **change)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError, match="used twice: c0; no data for c9; cohort is 7"):
        replace(tiny_population(3), train=["c0", "c0", "c9"], cohort_size=7)


def test_a_client_has_a_generator_of_its_own_in_every_round():
    population = tiny_population(2)
    draws = [
        torch.rand(1, generator=population.client(name, when, seed).rng).item()
        for name, when, seed in (("c0", 1, 0), ("c1", 1, 0), ("c0", 2, 0), ("c0", 1, 1), ("c0", "personalize", 0))
    ]
    assert len(set(draws)) == 5
    assert torch.rand(1, generator=population.client("c0", 1, 0).rng).item() == draws[0]


def test_pooled_trains_on_the_concatenation():
    population, training = tiny_population(3), Training(4, 1e-2, 8)
    method = FedAvgFT(training, Training(0, 1e-2, 8))
    job = tiny_job(method, population, rounds=1, seed=2)
    server = InProcess().run(replace(job, members=Pooled(population), site=Pooled(population))).server

    parts = [population.data[name].train for name in ("c0", "c1", "c2")]
    client = population.client("c0", 1, 2)
    together = Images(torch.cat([part.pixels for part in parts]))
    client = replace(client, data=replace(client.data, train=together), rng=stream(2, POOLED, 1))
    client.model.load(population.initial(2))
    fit(client, lambda name: True, training)
    assert len(together) == 8 + 12 + 16
    assert differing(server.params, client.model.params()) == []


def test_pooled_personalizes_every_client_with_its_own_images():
    population = tiny_population(2)
    job = tiny_job(FedAvgFT(Training(2, 1e-2, 4), Training(2, 1e-2, 4)), population)
    run = InProcess().run(replace(job, members=Pooled(population), site=Pooled(population)))
    assert list(run.personal) == ["c0", "c1", "n0"]
    assert [list(record["clients"]) for record in run.rounds] == [[POOLED], [POOLED]]
    assert Pooled(population).client("c1", "personalize", 0).data is population.data["c1"]


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "a b", "anna-real"])
def test_a_name_that_cannot_be_a_file_is_refused(name):
    with pytest.raises(ConfigError, match="names that cannot be files"):
        Population(model=None, data={name: None}, train=[name])


def test_nobody_may_be_called_as_the_pooled_data_are():
    population = tiny_population()
    named = replace(population, train=[POOLED], new=(), data={POOLED: population.data["c0"]})
    with pytest.raises(ConfigError, match="rename it"):
        Pooled(named)
