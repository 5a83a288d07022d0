import numpy as np
import pytest
import torch

from personae.aggregate.mean import mean
from personae.core import State, Training, Update
from personae.engine.rounds import Arriving
from personae.errors import ConfigError
from personae.methods import FedAvgFT, Proximal, ServerAdam, ServerEma

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
    model, first, second = START, np.zeros(3), np.zeros(3)
    for number, server in enumerate(rounds_of(ServerAdam(PLAIN, 0.3, beta1=0.8, beta2=0.95, eps=1e-3)), start=1):
        gradient = model - (1 * SENT[number - 1, 0] + 3 * SENT[number - 1, 1]) / 4
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        model = model - 0.3 * (first / (1 - 0.8**number)) / (np.sqrt(second / (1 - 0.95**number)) + 1e-3)
        np.testing.assert_allclose(server.params["w"], model, rtol=1e-4)


def test_the_first_step_is_the_learning_rate_in_the_direction_of_the_clients():
    server = next(rounds_of(ServerAdam(PLAIN, 0.3)))
    towards = np.sign((1 * SENT[0, 0] + 3 * SENT[0, 1]) / 4 - START)
    np.testing.assert_allclose(server.params["w"], START + 0.3 * towards, rtol=1e-5)


def test_moments_stay_on_the_server():
    *_, server = rounds_of(ServerAdam(PLAIN, 0.3))
    assert len(server.extras) == 2
    for sent in (ServerAdam(PLAIN, 0.3).broadcast(server, "c0"), ServerAdam(PLAIN, 0.3).release(server)):
        assert list(sent.params) == ["w"] and not sent.extras and not sent.facts


def test_an_average_goes_outside():
    with pytest.raises(ConfigError, match="server_adam goes inside server_ema"):
        ServerAdam(Proximal(ServerEma(PLAIN, 0.9), 0.1), 1e-3)
