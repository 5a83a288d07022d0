"""Every method, and some that break a rule each."""

import runpy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from personae.continual import CONTINUAL, Dsc, Ewc, SequentialLora, learn
from personae.continual.contract import words_of
from personae.core import State, Training
from personae.testing import ContractBroken, check_continual
from personae.testing.check_continual import SEED, TASKS, TRAINING, client_for
from personae.testing.contract import differing_states

SMALL = (2, "cross_kv")
OPTIONS = runpy.run_path(str(Path(__file__).with_name("small.py")))["OPTIONS"]
METHODS = {name: kind(**OPTIONS.get(name, {"rank": 2})) for name, kind in CONTINUAL.items()}
METHODS |= {
    "plain ewc": Ewc(*SMALL, dc_weight=0, draws=2),
    "dsc with ewc": Dsc(Training(2, 0.01, 2), *SMALL, ewc=Ewc(*SMALL, draws=2)),
    "larger": replace(METHODS["merged_lora"], merge="larger"),
}


@pytest.mark.parametrize("name", METHODS)
def test_contract(name, build):
    check_continual(METHODS[name], build)


@dataclass(frozen=True)
class Remembers(SequentialLora):
    """Keeps something in itself."""

    def end(self, client, kept):
        object.__setattr__(self, "calls", getattr(self, "calls", 0) + 1)
        params = client.model.params()
        return State({name: value * self.calls for name, value in params.items()})


@dataclass(frozen=True)
class MovesOldWords(SequentialLora):
    def begin(self, client, kept):
        return replace(super().begin(client, kept), may_move=lambda name: True)

    def end(self, client, kept):
        return State({name: value + 1 for name, value in client.model.params().items()})


@dataclass(frozen=True)
class BeginsOtherwise(SequentialLora):
    def begin(self, client, kept):
        client.model.load({name: value + 1 for name, value in client.model.params().items()})
        return super().begin(client, kept)


@dataclass(frozen=True)
class WritesIntoWhatWasKept(SequentialLora):
    def begin(self, client, kept):
        for value in kept.params.values():
            value.add_(1)
        return super().begin(client, kept)


@dataclass(frozen=True)
class DrawsWithWhatIsThere(SequentialLora):
    def compose(self, model, kept, concepts):
        return None


@pytest.mark.parametrize(
    ("method", "broken"),
    [
        (Remembers(*SMALL), "all that survives"),
        (MovesOldWords(*SMALL), "words keep their bits"),
        (BeginsOtherwise(*SMALL), "called again"),
        (WritesIntoWhatWasKept(*SMALL), "called again|leave what was kept alone|survives"),
        (DrawsWithWhatIsThere(*SMALL), "`compose`"),
    ],
)
def test_a_method_that_breaks_a_rule_is_caught(method, broken, build):
    with pytest.raises(ContractBroken, match=broken):
        check_continual(method, build)


@dataclass(frozen=True)
class KeepsItsPictures(SequentialLora):
    form: Literal["floats", "bytes", "latents", "half"] = "floats"

    def end(self, client, kept):
        images, model = client.data.train, client.model
        forms = {"floats": images.floats(), "bytes": images.pixels, "half": images.floats().half()}
        with torch.no_grad():
            forms["latents"] = model.encode(images.floats())
        return replace(super().end(client, kept), extras={"rehearsal": forms[self.form][1:3]})


SEEN = {}


@dataclass(frozen=True)
class KeepsItsPicturesOutside(SequentialLora):
    """The adapter is held back by as much as images of earlier concepts say, which no state shows."""

    def begin(self, client, kept):
        plan, weight = super().begin(client, kept), sum(float(SEEN[t.name].std()) for t in client.tasks[:-1])
        SEEN[client.task.name] = client.data.train.floats()

        def held_back(model, batch):
            return weight * sum(value.square().sum() for name, value in model.live().items() if plan.may_move(name))

        return replace(plan, penalties=(held_back,))


@pytest.mark.parametrize("form", ["floats", "bytes", "latents", "half"])
def test_a_picture_in_a_state_is_caught(form, build):
    with pytest.raises(ContractBroken, match="extras/rehearsal holds one's"):
        check_continual(KeepsItsPictures(*SMALL, form=form), build)


def test_a_picture_outside_of_every_state_is_caught(build):
    with pytest.raises(ContractBroken, match="thrown away"):
        check_continual(KeepsItsPicturesOutside(*SMALL), build)


@pytest.mark.parametrize("name", ["c_lora", "orthogonal", "merged_lora", "sequential_lora", "dreambooth"])
def test_state_grows_as_is_said(name, build):
    states = [State()]
    for count in (1, 2, 3):
        states.append(taught(METHODS[name], build, count, states[-1]))
    sizes = [replace(state, facts={}).num_bytes() for state in states[1:]]
    (word,) = words_of(TASKS[0]) & states[1].params.keys()
    vector = State({word: states[1].params[word]}).num_bytes()
    assert vector > 0 and [sizes[1] - sizes[0], sizes[2] - sizes[1]] == [vector, vector]


def test_every_method_says_where_it_comes_from():
    for kind in CONTINUAL.values():
        assert "Source:" in kind.__doc__ and "Departure" in kind.__doc__


@pytest.mark.parametrize("name", METHODS)
def test_a_concept_taken_up_in_the_middle_ends_in_the_same_bits(name, build):
    method, kept = METHODS[name], State()
    for number in (1, 2):
        seen = []
        whole = taught(method, build, number, kept, after=lambda *reached, seen=seen: seen.append(reached))
        assert [count for count, _ in seen] == [1, 2, 3]
        again = taught(method, build, number, kept, done=seen[1][0], reached=seen[1][1])
        assert differing_states(whole, again) == []
        kept = whole


def taught(method, build, count, kept, **how):
    client = client_for(method, build(method.parts, TASKS[:count]), count)
    return learn(method, replace(TRAINING, steps=1), client, kept, SEED, stretches=3, **how)
