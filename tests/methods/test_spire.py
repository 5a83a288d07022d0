from dataclasses import replace

import pytest
import torch

from personae.artefact.run_folder import RunFolder
from personae.backbone.mlp import MLPDenoiser
from personae.core import Training, divide, stream
from personae.engine import InProcess
from personae.errors import ConfigError
from personae.methods import Spire
from personae.personal.embedding import EMBEDDING, NULL_EMBEDDING
from personae.testing import tiny_job, tiny_population
from personae.testing.contract import differing

TRAINING = Training(3, 1e-2, 4, condition_dropout=0.3)
METHOD = Spire(TRAINING, Training(2, 1e-2, 4))
SGD = Training(1, 0.1, 4, optimizer="sgd", max_grad_norm=None)


def kept_after(method, folder, rounds):
    InProcess().run(tiny_job(method, rounds=rounds, folder=folder))
    run = RunFolder(folder)
    run.restore()
    return run.kept("c0")


def code(population, client, seed=0):
    """The random vector that a client starts from."""
    return population.model.initial(stream(seed, client, "init"), lambda name: name == EMBEDDING)[EMBEDDING]


def test_the_moments_of_the_embedding_go_on_from_round_to_round(tmp_path):
    one, two = (kept_after(METHOD, tmp_path / str(rounds), rounds).extras for rounds in (1, 2))
    assert sorted(two) == [f"moments.{slot}.{EMBEDDING}" for slot in ("exp_avg", "exp_avg_sq", "step")]
    assert one[f"moments.step.{EMBEDDING}"] == 3 and two[f"moments.step.{EMBEDDING}"] == 6


def test_warm_up_leaves_the_random_codes_alone(tmp_path):
    for rounds, warm in ((2, True), (3, False)):
        kept = kept_after(replace(METHOD, embedding_warmup_rounds=2), tmp_path / str(rounds), rounds)
        assert torch.equal(kept.params[EMBEDDING], code(tiny_population(), "c0")) == warm
        assert kept.facts == {"trained": not warm}


def test_noise_is_there_while_a_vector_trains_and_gone_afterwards(tmp_path):
    still, noisy = replace(TRAINING, steps=0), replace(METHOD, embedding_noise=0.5)
    kept = kept_after(replace(noisy, training=still), tmp_path / "still", 1)
    assert torch.allclose(kept.params[EMBEDDING], code(tiny_population(), "c0"), atol=1e-6)
    plain, first, again = (InProcess().run(tiny_job(method, rounds=2)) for method in (METHOD, noisy, noisy))
    assert differing(first.server.params, again.server.params) == []
    assert differing(first.server.params, plain.server.params), "the backbone saw other vectors"
    moved = (first.personal["c0"].params[EMBEDDING] - plain.personal["c0"].params[EMBEDDING]).abs().max()
    assert 0 < moved < 0.1, "and no noise is left in the client's"
    late = replace(noisy, embedding_warmup_rounds=1)
    warmed = kept_after(late, tmp_path / "late", 1)
    assert torch.equal(warmed.params[EMBEDDING], code(tiny_population(), "c0")), "nor is there any before it trains"
    with pytest.raises(ConfigError, match="embedding_noise is -1"):
        replace(METHOD, embedding_noise=-1)


def test_a_client_whose_vector_never_moved_adapts_like_a_new_one():
    """Its random code says nothing about it."""
    never = replace(METHOD, embedding_warmup_rounds=2, adapt=Training(0, 1e-2, 4))
    run = InProcess().run(tiny_job(never, rounds=2))
    assert torch.equal(run.personal["c0"].params[EMBEDDING], run.server.params[NULL_EMBEDDING])


def test_a_new_client_starts_at_the_null_vector():
    run = InProcess().run(tiny_job(replace(METHOD, adapt=Training(0, 1e-2, 4))))
    null = run.server.params[NULL_EMBEDDING]
    assert null.any()
    assert torch.equal(run.personal["n0"].params[EMBEDDING], null)


def test_a_new_client_trains_its_vector_and_nothing_else():
    population = tiny_population()
    run = InProcess().run(tiny_job(METHOD, population))
    assert list(run.personal["n0"].params) == [EMBEDDING]
    assert not torch.equal(run.personal["n0"].params[EMBEDDING], run.server.params[NULL_EMBEDDING])
    backbone, _ = divide(population.model.params(), METHOD.personal)  # the new client was the last one in the model
    assert differing(backbone, run.server.params) == []


def test_the_embedding_has_a_learning_rate_of_its_own():
    population, moved = tiny_population(1), []
    for rate in (2.0, 6.0):
        run = InProcess().run(tiny_job(Spire(SGD, SGD, embedding_rate=rate), population, rounds=1))
        moved.append(run.personal["c0"].params[EMBEDDING] - code(population, "c0"))
    torch.testing.assert_close(3 * moved[0], moved[1], rtol=1e-4, atol=1e-6)


def test_a_backbone_without_embedding_is_refused():
    population = tiny_population()
    plain = MLPDenoiser((2,), population.model.schedule, width=16, num_blocks=1)
    with pytest.raises(ConfigError, match="spire needs a backbone with a client embedding"):
        InProcess().run(tiny_job(METHOD, replace(population, model=plain)))
