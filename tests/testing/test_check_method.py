"""Every planted fault is caught, and named for what it is."""

import pytest

from personae.core import Training
from personae.methods import ServerAdam, ServerEma, Spire
from personae.testing import ContractBroken, check_method, tiny_population
from personae.testing.faulty import (
    DependsOnArrivalOrder,
    LeaksBetweenClients,
    MixesUpNewcomers,
    MutatesServerState,
    RemembersInAggregate,
    UploadsAPicture,
    UploadsItsEmbedding,
)

SPIRE = Spire(Training(3, 1e-2, 4, condition_dropout=0.2), Training(2, 1e-2, 4))

FAULTS = {
    "in the open": (UploadsItsEmbedding(SPIRE), "client 'c0' sent extras/embedding.weight, which `personal` claims"),
    "disguised": (
        UploadsItsEmbedding(SPIRE, "signature"),
        "the values of embedding.weight under the name extras/signature0",
    ),
    "a picture": (UploadsAPicture(SPIRE), "no tensor of what 'c0' sends holds a picture"),
    "remembers": (RemembersInAggregate(SPIRE), "`aggregate` remembers nothing"),
    "order": (DependsOnArrivalOrder(SPIRE), "`aggregate` ignores the order in which updates arrive"),
    "mutates": (MutatesServerState(SPIRE), "`aggregate` leaves its arguments alone; the server's state changed in"),
    "leaks": (LeaksBetweenClients(SPIRE), "something of 'c0' was left over"),
    "mixes up": (MixesUpNewcomers(SPIRE), "get what each would get alone; 'c0' differs in embedding.weight"),
    "around a wrapper": (RemembersInAggregate(ServerEma(SPIRE, 0.9)), "`aggregate` remembers nothing"),
    "inside a wrapper": (ServerAdam(MutatesServerState(SPIRE), 0.01), "`aggregate` leaves its arguments alone"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_and_named(fault):
    method, sentence = FAULTS[fault]
    with pytest.raises(ContractBroken, match=".*" + sentence.replace("(", r"\(")):
        check_method(method)


def test_a_broken_contract_is_an_assertion_error():
    assert issubclass(ContractBroken, AssertionError)


def test_checking_changes_neither_the_method_nor_a_second_check():
    faulty = LeaksBetweenClients(SPIRE)
    for _ in range(2):
        with pytest.raises(ContractBroken, match="left over"):
            check_method(faulty)
    assert faulty.left == {}


def test_alone_refuses_a_server_that_takes_steps_of_its_own():
    check_method(ServerAdam(SPIRE, 0.01))
    with pytest.raises(ContractBroken, match="round 2 would not start where round 1 ended"):
        check_method(ServerAdam(SPIRE, 0.01), alone=True)


def test_a_population_can_be_given():
    check_method(SPIRE, tiny_population(2))


def test_the_tiny_population_is_what_it_says():
    population = tiny_population(2, num_new=2)
    assert (population.train, population.new) == (["c0", "c1"], ["n0", "n1"])
    assert [len(population.data[name].train) for name in ("c0", "c1", "n0", "n1")] == [8, 12, 16, 20]
    assert population.data["c0"].train.pixels.shape == (8, 2)
