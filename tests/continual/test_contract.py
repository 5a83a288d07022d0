"""Every method, and some that break a rule each."""

from dataclasses import dataclass, replace

import pytest

from personae.continual import CONTINUAL, Dsc, Ewc, SequentialLora, learn
from personae.core import State, Training
from personae.testing import ContractBroken, check_continual
from personae.testing.check_continual import SEED, TASKS, TRAINING, client_for
from personae.testing.contract import differing_states

SMALL = (2, "cross_kv")
OPTIONS = {
    "textual_inversion": {},
    "cns": {"budget": 0.01, "draws": 4, "general_draws": 1, "drawing_steps": 2},
    "custom_diffusion": {},
    "mix_of_show": {"rank": 2, "sampling_steps": 2},
    "ewc": {"rank": 2, "draws": 2},
    "dsc": {"rank": 2, "consolidation": Training(2, 0.01, 2)},
}
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
