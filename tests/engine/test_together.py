"""New clients in one batch: each as if it had come alone."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from personae.attack import Poisoned
from personae.core import ClientData, Images, State, Training
from personae.engine.in_process import personalize_one
from personae.engine.together import personalize_many
from personae.errors import ClientFailed, ConfigError, Diverged, ShapeError
from personae.methods import FedAvgFT, LocalOnly, Proximal, ServerAdam, ServerEma, SharedRep, Spire
from personae.personal.embedding import EMBEDDING
from personae.testing import tiny_job, tiny_population

TRAINING, ADAPT = Training(2, 1e-2, 4), Training(20, 1e-2, 4, condition_dropout=0.2)
SPIRE = Spire(TRAINING, ADAPT)
NAMES = ["n0", "n1", "n2", "n3"]


def met(method=SPIRE, **changes):
    """A job with four new clients of different numbers of images, and a released model that none of them knows."""
    job = tiny_job(method, tiny_population(2, num_new=4, num_examples=1), **changes)
    initial = job.members.initial(0)
    return job, method.release(method.init({**initial, "null_embedding.weight": torch.full((1, 4), 0.3)}))


@pytest.mark.parametrize(
    "method",
    [
        SPIRE,
        ServerEma(ServerAdam(Proximal(SPIRE, 0.1), 0.01), 0.9),
        Poisoned(SPIRE, "nan", ("c0",)),
        Spire(TRAINING, replace(ADAPT, max_grad_norm=0.05, accumulate=2, optimizer="adamw", weight_decay=0.1)),
    ],
    ids=["spire", "wrapped", "poisoned", "clipped"],
)
def test_each_gets_what_it_would_get_alone(method):
    job, released = met(method)
    together = personalize_many(job, released, NAMES)
    assert list(together) == NAMES
    for name in NAMES:
        alone = personalize_one(job, released, State(), name)
        assert together[name].params.keys() == {EMBEDDING} and together[name].params[EMBEDDING].shape == (1, 4)
        torch.testing.assert_close(together[name].params[EMBEDDING], alone.params[EMBEDDING], atol=1e-4, rtol=1e-4)
        assert together[name].facts == alone.facts
        assert not torch.allclose(alone.params[EMBEDDING], torch.full((1, 4), 0.3), atol=0.05)


def test_it_does_not_matter_who_else_comes_nor_in_which_order():
    job, released = met()
    whole = personalize_many(job, released, NAMES)
    for some in (NAMES[::-1], ["n2", "n0"], ["n3"]):
        for name, state in personalize_many(job, released, some).items():
            torch.testing.assert_close(state.params, whole[name].params, atol=1e-4, rtol=1e-4)


def test_nobody_comes():
    assert personalize_many(*met(), []) == {}


@pytest.mark.parametrize(
    ("method", "part"),
    [
        (FedAvgFT(TRAINING, ADAPT), "FedAvgFT gives every client a part of its own that .*: the whole model"),
        (LocalOnly(TRAINING, ADAPT), "LocalOnly .*: the whole model"),
        (SharedRep(TRAINING, ADAPT, ADAPT, ("output.",)), r"SharedRep .*: output\.bias, output\.weight\."),
        (ServerEma(FedAvgFT(TRAINING, ADAPT), 0.9), "FedAvgFT .*: the whole model"),
    ],
)
def test_a_method_whose_part_is_no_embedding_is_refused(method, part):
    with pytest.raises(ConfigError, match=rf"^{part}.*Only a client embedding can; take these clients one after"):
        personalize_many(*met(method), NAMES)


def test_who_diverged_is_named():
    job, released = met()
    broken = Images(torch.full((3, 2), torch.inf))
    job = replace(job, site=replace(job.site, data={**job.site.data, "n2": ClientData(broken, broken)}))
    with pytest.raises(ClientFailed, match=r"'n2' failed .* during personalize: Diverged: client 'n2'") as caught:
        personalize_many(job, released, NAMES)
    assert (caught.value.client, caught.value.stage) == ("n2", "personalize")
    assert isinstance(caught.value.__cause__, Diverged)


def test_who_cannot_be_reached_is_named():
    job, released = met()
    with pytest.raises(ClientFailed, match="client 'stranger' failed") as caught:
        personalize_many(job, released, ["n0", "stranger"])
    assert caught.value.client == "stranger"


@dataclass(frozen=True)
class Returns:
    """SPIRE, but `personalize` returns something else."""

    state: Any

    def __getattr__(self, name):
        return getattr(SPIRE, name)

    def personalize(self, client, got, kept):
        return self.state


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (State(), "nothing"),
        (State({EMBEDDING: torch.zeros(1, 4)}), r"embedding\.weight \[1, 4\]"),
        (State({EMBEDDING: torch.zeros(4, 4), "output.bias": torch.zeros(2)}), r"output\.bias \[2\]"),
        (State({EMBEDDING: torch.zeros(4, 4)}, {"seen": torch.zeros(4)}), "and extras"),
    ],
)
def test_what_is_not_a_row_for_each_is_given_to_nobody(state, found):
    job, released = met()
    with pytest.raises(ShapeError, match=rf"{found}.* for several clients, expected embedding\.weight \[4, 4\] alone"):
        personalize_many(replace(job, method=Returns(state)), released, NAMES)
