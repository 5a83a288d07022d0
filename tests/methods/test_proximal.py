import torch

from personae.core import Training
from personae.engine import InProcess
from personae.methods import FedAvgFT, Proximal, Spire
from personae.testing import tiny_job, tiny_population
from personae.testing.contract import differing, differing_states

TRAINING = Training(6, 1e-2, 4)
SPIRE = Spire(TRAINING, Training(2, 1e-2, 4))


def test_without_weight_it_is_the_plain_method():
    plain, pulled = (InProcess().run(tiny_job(method)) for method in (SPIRE, Proximal(SPIRE, 0.0)))
    assert differing_states(plain.server, pulled.server) == []
    assert all(differing(plain.personal[name].params, pulled.personal[name].params) == [] for name in plain.personal)


def test_the_heavier_it_weighs_the_less_a_round_moves():
    population = tiny_population()
    start = population.initial(0)
    ways = [
        sum(
            float((value - start[name]).square().sum())
            for name, value in InProcess()
            .run(tiny_job(Proximal(SPIRE, mu), population, rounds=1))
            .server.params.items()
        )
        for mu in (0.0, 10.0, 1000.0)
    ]
    assert ways[0] > ways[1] > ways[2]


def test_one_step_by_hand():
    """The first step starts at the anchor and is not pulled; the second is, by lr * mu * (what the first one did)."""
    after = {}
    for mu in (0.0, 0.5):
        for steps in (1, 2):
            sgd = Training(steps, 0.1, 4, optimizer="sgd", max_grad_norm=None)
            method = Proximal(FedAvgFT(sgd, Training(0, 0.1, 4)), mu)
            run = InProcess().run(tiny_job(method, tiny_population(1), rounds=1))
            after[mu, steps] = run.server.params["input.weight"]
    start = tiny_population(1).initial(0)["input.weight"]
    assert torch.equal(after[0.0, 1], after[0.5, 1])
    pulled = after[0.0, 2] - 0.1 * 0.5 * (after[0.0, 1] - start)
    torch.testing.assert_close(after[0.5, 2], pulled, rtol=1e-5, atol=1e-6)
