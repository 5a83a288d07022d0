import pytest
import torch

from personae.core import Training, stream
from personae.engine import InProcess
from personae.errors import ConfigError
from personae.methods import SharedRep
from personae.testing import tiny_job, tiny_population

TRAINING, TAIL = Training(3, 1e-2, 4), Training(2, 1e-2, 4)
TAIL_NAMES = {"output.weight", "output.bias"}


def method(*layers):
    return SharedRep(TRAINING, TAIL, TAIL, layers)


def test_a_wrong_prefix_says_which_layers_there_are(tmp_path):
    with pytest.raises(ConfigError, match=r"no parameter starts with outptu\..* the model has .*output\."):
        InProcess().run(tiny_job(method("output.", "outptu."), folder=tmp_path / "run"))
    assert not (tmp_path / "run").exists()  # so that the corrected recipe can be run


def test_no_prefix_at_all_is_refused():
    with pytest.raises(ConfigError, match="nothing given"):
        InProcess().run(tiny_job(method()))


def test_the_tail_stays_and_the_body_is_shared():
    run = InProcess().run(tiny_job(method("output.")))
    assert not TAIL_NAMES & run.server.params.keys()
    assert all(set(state.params) == TAIL_NAMES for state in run.personal.values())
    assert not torch.equal(run.personal["c0"].params["output.weight"], run.personal["c1"].params["output.weight"])


def test_a_new_client_trains_a_tail_from_fresh_values():
    untrained = SharedRep(TRAINING, TAIL, Training(0, 1e-2, 4), ("output.",))
    population = tiny_population()
    tail = InProcess().run(tiny_job(untrained, population, seed=3)).personal["n0"].params
    fresh = population.model.initial(stream(3, "n0", "init"), TAIL_NAMES.__contains__)
    assert torch.equal(tail["output.weight"], fresh["output.weight"])


def test_a_training_client_samples_with_the_tail_it_kept():
    methods = [SharedRep(TRAINING, TAIL, Training(steps, 1e-2, 4), ("output.",)) for steps in (1, 9)]
    short, long = (InProcess().run(tiny_job(method)).personal for method in methods)
    assert torch.equal(short["c0"].params["output.weight"], long["c0"].params["output.weight"])
    assert not torch.equal(short["n0"].params["output.weight"], long["n0"].params["output.weight"])
