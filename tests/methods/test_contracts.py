"""Every method and every wrapper keeps the contracts; a new entry without a line here fails."""

import pytest

from personae.core import Training
from personae.methods import METHODS, WRAPPERS, FedAvgFT, LocalOnly, Proximal, ServerAdam, ServerEma, SharedRep, Spire
from personae.testing import check_method

TRAINING = Training(3, 1e-2, 4, condition_dropout=0.2)
ADAPT = Training(2, 1e-2, 4)
SPIRE = Spire(TRAINING, ADAPT)

PLAIN = {
    "spire": SPIRE,
    "fedavg_ft": FedAvgFT(TRAINING, ADAPT),
    "shared_rep": SharedRep(TRAINING, ADAPT, ADAPT, ("output.",)),
    "local_only": LocalOnly(TRAINING, ADAPT),
}
WRAPPED = {
    "proximal": Proximal(SPIRE, 0.1),
    "server_adam": ServerAdam(SPIRE, 0.01),
    "server_ema": ServerEma(SPIRE, 0.9),
}
STACKED = {
    "ema of adam": ServerEma(ServerAdam(SPIRE, 0.01), 0.9),
    "all three": ServerEma(ServerAdam(Proximal(SPIRE, 0.1), 0.01), 0.9),
    "around nothing sent": ServerEma(ServerAdam(Proximal(LocalOnly(TRAINING, ADAPT), 0.1), 0.01), 0.9),
    "warm-up": Spire(TRAINING, ADAPT, embedding_warmup_rounds=1),
    "plain averaging": FedAvgFT(TRAINING, Training(0, 1e-2, 4)),
}


def test_nothing_is_left_out():
    elsewhere = {"cluster_lora"}  # it needs a text-to-image model: test_cluster_lora.py asks the same of it
    assert PLAIN.keys() == METHODS.keys() - elsewhere and all(type(PLAIN[name]) is METHODS[name] for name in PLAIN)
    assert WRAPPED.keys() == WRAPPERS.keys() and all(type(WRAPPED[name]) is WRAPPERS[name] for name in WRAPPERS)


@pytest.mark.parametrize("name", PLAIN)
def test_method(name):
    check_method(PLAIN[name], alone=True)


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapper(name):
    # Adam on the server takes steps of its own, also for one client.
    check_method(WRAPPED[name], alone=name != "server_adam")


@pytest.mark.parametrize("name", STACKED)
def test_variant(name):
    check_method(STACKED[name])
