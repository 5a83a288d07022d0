from dataclasses import replace

import pytest
import torch

from personae.artefact.run_folder import RunFolder
from personae.core import Training, stream
from personae.engine import InProcess
from personae.errors import ConfigError
from personae.methods import LocalOnly
from personae.testing import tiny_job, tiny_population
from personae.testing.contract import differing

METHOD = LocalOnly(Training(3, 1e-2, 4), Training(2, 1e-2, 4))


def test_no_tensor_travels():
    run = InProcess().run(tiny_job(METHOD, rounds=1))
    assert not run.server.params
    for client in run.rounds[0]["clients"].values():
        assert client["bytes_up"] == len(f"loss{client['loss']}") + 8  # and the number of images
    assert all(traffic.down == 0 for traffic in run.traffic.values())


def test_others_do_not_matter():
    together = InProcess().run(tiny_job(METHOD, tiny_population(3))).personal["c0"]
    alone = InProcess().run(tiny_job(METHOD, replace(tiny_population(3), train=["c0"]))).personal["c0"]
    assert differing(together.params, alone.params) == []


def test_moments_go_on_from_round_to_round(tmp_path):
    InProcess().run(tiny_job(METHOD, rounds=2, folder=tmp_path / "run"))
    folder = RunFolder(tmp_path / "run")
    folder.restore()
    assert folder.kept("c0").extras["moments.step.output.weight"] == 6


def test_a_new_client_trains_a_model_of_its_own():
    run = InProcess().run(tiny_job(METHOD))
    assert run.personal["n0"].params.keys() == run.personal["c0"].params.keys()
    assert not torch.equal(run.personal["n0"].params["input.weight"], run.personal["c0"].params["input.weight"])


def test_a_vector_may_take_larger_steps_than_weights():
    slow, fast = (InProcess().run(tiny_job(replace(METHOD, vector_rate=rate), rounds=1)) for rate in (1.0, 1e-6))
    name = "embedding.weight"
    start = tiny_population(3).model.initial(stream(0, "c0", "init"))[name]
    moved = [float((run.personal["c0"].params[name] - start).abs().max()) for run in (slow, fast)]
    assert moved[0] > 1e-3 and moved[1] < 1e-6
    with pytest.raises(ConfigError, match="vector_rate is 0"):
        LocalOnly(METHOD.training, METHOD.adapt, vector_rate=0)
