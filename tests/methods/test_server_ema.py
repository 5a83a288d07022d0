import numpy as np
import torch

from personae.aggregate.mean import mean
from personae.core import State, Training, Update
from personae.engine.rounds import Arriving
from personae.methods import FedAvgFT, ServerEma

PLAIN = FedAvgFT(Training(1, 1e-2, 4), Training(1, 1e-2, 4))
START = np.array([1.0, -2.0, 0.5])
SENT = np.random.default_rng(0).normal(size=(3, 2, 3))
"""Three rounds, two clients, three parameters."""


def rounds_of(method):
    """The server's state after each round."""
    server = method.init({"w": torch.tensor(START, dtype=torch.float32)})
    for both in torch.tensor(SENT, dtype=torch.float32):
        updates = [Update(f"c{k}", 1 + 2 * k, State({"w": w})) for k, w in enumerate(both)]
        server = method.aggregate(server, Arriving(iter(updates), mean))
        yield server


def test_against_a_literal_twin():
    average, method = START, ServerEma(PLAIN, 0.15)
    for number, server in enumerate(rounds_of(method)):
        model = (1 * SENT[number, 0] + 3 * SENT[number, 1]) / 4
        decay = min(0.15, (1 + number) / (10 + number))
        average = decay * average + (1 - decay) * model
        np.testing.assert_allclose(method.release(server).params["w"], average, rtol=1e-5)
        np.testing.assert_allclose(method.broadcast(server, "c0").params["w"], model, rtol=1e-5)


def test_the_ramp_and_the_decay_both_take_part():
    assert (1 + 0) / (10 + 0) < 0.15 < (1 + 1) / (10 + 1)


def test_the_average_stays_on_the_server():
    *_, server = rounds_of(ServerEma(PLAIN, 0.15))
    got = ServerEma(PLAIN, 0.15).broadcast(server, "c0")
    assert list(got.params) == ["w"] and not got.extras and not got.facts
