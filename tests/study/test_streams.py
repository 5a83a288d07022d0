"""Pairs of a federated and a continual method: what is measured of each, on random weights, and what is said of it."""

import dataclasses

import pytest

from personae.aggregate.mean import mean
from personae.core import Job
from personae.engine import InProcess
from personae.errors import ConfigError
from personae.evaluate.loss import denoising_loss
from personae.personal.lora import is_lora
from personae.personal.tokens import is_word
from personae.recipe.schema import Data
from personae.sequence.config import Concept
from personae.study.streams import Pair, Participant, Streams, arriving, followed
from personae.testing.contract import differing, differing_states

LITTLE = (
    *("lesson.stretches=1", "lesson.training.steps=2", "lesson.training.batch_size=2", "lesson.training.lr=0.02"),
    *("scoring.loss_grid=2", "scoring.loss_draws=1", "num_prior=2", "num_prompts=2", "sampling.steps=2"),
)


def concept(name, noun, thing):
    return Concept(name, noun, Data("thing", thing=thing, num_images=5, heldout=0.4))


CLIENTS = (
    Participant("anna", (concept("moo", "goat", "cow"), concept("nip", "shrimp", "crab"))),
    Participant("ben", (concept("bot", "television", "robot"), concept("nana", "lemon", "banana"))),
)
SHARED, TOLD, ALONE = (
    Pair("fedavg_ft", "sequential_lora"),
    Pair("fedavg_ft", "textual_inversion"),
    Pair("local_only", "sequential_lora"),
)


def study(model="tiny-t2i", **options):
    given = {"clients": CLIENTS, "pairs": (SHARED, TOLD, ALONE), "num_seen": 2, "changes": (*LITTLE, f"model={model}")}
    return Streams("continual/sequential_lora", **{**given, **options})


@pytest.fixture(scope="module")
def rows(untrained, tmp_path_factory):
    """What is measured of every pair."""
    little = study(untrained)
    return [{**cell, **little.measure(cell, 3, tmp_path_factory.mktemp("study"))} for cell in little.cells([])]


@pytest.fixture(scope="module")
def federation(untrained, tmp_path_factory):
    """The recipe of the first pair, everybody in it, and what was there after each task."""
    recipe, method = study(untrained).read(SHARED, 3)
    people = arriving(CLIENTS, recipe, method.continual)
    moments, cost = followed(people, method, recipe.seed, tmp_path_factory.mktemp("federation") / "run")
    return recipe, method, people, moments, cost


# --- what is measured -------------------------------------------------------------------------------------------------


def loss(people, params, images, recipe):
    people.model.load(params)
    return denoising_loss(people.model, images, grid=2, draws=1, seed=recipe.seed)


def test_gains_are_those_of_each_client_s_own_model_and_of_what_was_released(rows, federation):
    recipe, _, people, moments, _ = federation
    own = people.streams["ben"]
    told = [period.data.heldout for period in own.periods]
    assert all("<concept-1>" in caption for caption in told[0].captions) and own.tasks[0].noun == "television"
    by_noun = [
        dataclasses.replace(held, captions=tuple(text.replace(f"<concept-{at}>", noun) for text in held.captions))
        for at, (held, noun) in enumerate(zip(told, ("television", "lemon"), strict=True), 1)
    ]
    start = people.initial(0)
    before = [loss(people, start, images, recipe) for images in by_noun]
    assert rows[0]["untaught"]["ben"] == pytest.approx(before)
    gains, shared = rows[0]["gains"]["ben"], rows[0]["shared"]["ben"]
    assert gains[0][1] is None and shared[0][1] is None
    for after, at in ((0, 0), (1, 0), (1, 1)):
        params = {**moments[after].released, **moments[after].kept["ben"].params}
        assert gains[after][at] == pytest.approx(before[at] - loss(people, params, told[at], recipe))
        released = {**start, **moments[after].released}
        assert shared[after][at] == pytest.approx(before[at] - loss(people, released, by_noun[at], recipe))
    flat = [value for matrix in (gains, shared) for line in matrix for value in line if value is not None]
    assert len(set(flat)) == 6 and all(flat), "each is of another model, concept or caption"


def test_a_model_that_learned_nothing_gains_nothing(untrained, tmp_path):
    idle = study(untrained, pairs=(SHARED, ALONE), changes=(*LITTLE, f"model={untrained}", "lesson.training.lr=1e-20"))
    for cell in idle.cells([]):
        found = idle.measure(cell, 3, tmp_path)
        gains = [value for own in found["gains"].values() for line in own for value in line if value is not None]
        assert gains == pytest.approx([0.0] * 6, abs=1e-6), "a word that is its noun is told as the noun"
        assert [*found["seen"]["things"]["own"].values(), *found["seen"]["scenes"]["own"].values()] == [0.0] * 4


def test_stops_between_tasks_change_no_bit(federation):
    recipe, method, people, moments, cost = federation
    run = InProcess().run(Job(method, people, people, 2, recipe.seed, mean))
    assert differing(run.server.params, moments[-1].released) == [] and all(map(is_lora, run.server.params))
    for name, kept in moments[-1].kept.items():
        words = {key: value for key, value in kept.params.items() if is_word(key)}
        assert differing(words, run.personal[name].params) == [], name
        assert sum(cost["bytes_up"][name]) == run.traffic[name].up and cost["bytes_kept"][name] == kept.num_bytes()
    assert differing_states(moments[0].kept["anna"], moments[1].kept["anna"]) != []


def test_what_is_not_sent_is_not_measured_on_the_server(rows):
    shared, told, alone = rows
    assert told["shared"] is None and alone["shared"] is None and alone["seen"]["things"]["released"] is None
    assert max(told["bytes_up"]["anna"]) < 100 < min(shared["bytes_up"]["anna"])
    for kind in ("things", "scenes"):
        assert not any(told["seen"][kind]["own"].values()), "a word is not in these captions"
        first, last = shared["seen"][kind]["released"]
        assert first != 0 and last != first
        assert list(shared["seen"][kind]["own"].values()) == [last] * 2, "all that is a client's own are words"
        assert len(set(alone["seen"][kind]["own"].values())) == 2
    assert shared["seen"]["things"]["untaught"] != shared["seen"]["scenes"]["untaught"]
    assert told["gains"]["anna"][0][0] == told["gains"]["anna"][1][0], "a word rests when its concept is over"
    assert alone["gains"]["anna"][0][0] != alone["gains"]["anna"][1][0]


def test_equal_seeds_give_equal_numbers(rows, untrained, tmp_path):
    little = study(untrained)
    again = {**little.measure(little.cells([])[0], 3, tmp_path)}
    timed = {"learning_seconds", "method", "continual", "seed"}
    assert {key: again[key] for key in again.keys() - timed} == {key: rows[0][key] for key in rows[0].keys() - timed}
    other = study(untrained, seeds=(1,))
    assert other.measure(other.cells([])[0], 3, tmp_path)["gains"] != rows[0]["gains"]


# --- what is said -----------------------------------------------------------------------------------------------------


def row(method, continual, first, second, shared=None, fell=0.0):
    """Gains of two clients, of two concepts each."""
    gains = {"anna": first, "ben": second}
    return {
        "method": method,
        "continual": continual,
        "seed": 0,
        "concepts": {"anna": ["moo", "nip"], "ben": ["bot", "nana"]},
        "untaught": {"anna": [1.0, 1.0], "ben": [1.0, 1.0]},
        "gains": gains,
        "shared": shared and dict.fromkeys(gains, shared),
        "seen": {
            "things": {"untaught": 0.5, "released": [0.1, 0.2] if shared else None, "own": {"anna": 0.1, "ben": 0.3}},
            "scenes": {"untaught": 0.4, "released": [0.1, -0.1] if shared else None, "own": {"anna": fell, "ben": 0.0}},
        },
        "bytes_up": {"anna": [10, 20], "ben": [30, 40]},
        "bytes_kept": {"anna": 100, "ben": 300},
        "learning_seconds": 120.0,
    }


def matrix(first, later, second):
    return [[first, None], [later, second]]


FOUND = [
    row("fedavg_ft", "sequential_lora", matrix(0.4, 0.1, 0.5), matrix(0.2, 0.1, 0.3), matrix(0.2, 0.1, 0.1)),
    row("fedavg_ft", "ewc", matrix(0.3, 0.3, 0.3), matrix(0.2, 0.2, 0.2), matrix(0.2, 0.0, 0.2)),
    row("local_only", "sequential_lora", matrix(0.6, 0.2, 0.8), matrix(0.2, 0.2, 0.2)),
]


def test_the_answer_in_numbers():
    told = study().answer(FOUND)
    figures = told.numbers["figures"]
    sequential = figures["fedavg_ft, sequential_lora"]
    # anna: 0.3 in the end, 0.45 when new, loses 0.3; ben: 0.2, 0.25, 0.1
    assert sequential["average"] == pytest.approx(0.25) and sequential["learning"] == pytest.approx(0.35)
    assert sequential["forgetting"] == pytest.approx(0.2) and sequential["backward"] == pytest.approx(-0.2)
    assert sequential["shared"] == pytest.approx(0.1) and sequential["shared_forgetting"] == pytest.approx(0.1)
    assert sequential["things_own"] == pytest.approx(0.2) and sequential["scenes_own"] == 0
    assert sequential["things_released"] == pytest.approx(0.2) and sequential["scenes_released"] == pytest.approx(-0.1)
    assert (sequential["bytes_up"], sequential["bytes_kept"], sequential["minutes"]) == (25, 200, 2)
    assert figures["local_only, sequential_lora"]["shared"] is None
    federation, protection = told.numbers["federation"], told.numbers["protection"]
    assert list(federation) == ["fedavg_ft, sequential_lora"] and list(protection) == ["fedavg_ft, ewc"]
    assert federation["fedavg_ft, sequential_lora"]["average"]["mean"] == pytest.approx(0.25 - 0.35)
    assert protection["fedavg_ft, ewc"]["forgetting"]["mean"] == pytest.approx(-0.2)
    assert [line[:3] for line in told.tables[0].rows] == [[r["method"], r["continual"], 1] for r in FOUND]
    names = [each.name for each in told.charts]
    assert names[:3] == ["averages", "seen-things", "seen-scenes"] and len(names) == 3 + 3
    assert len(study().answer(FOUND[2:]).charts) == 1 + 1, "nobody sent anything"


def test_findings_say_what_the_clients_tell_and_what_they_do_not():
    first, *others = study().answer(FOUND).findings
    assert "Of 3 pairs, local_only, sequential_lora ends with the highest average gain, 0.3500" in first
    unsure = "fedavg_ft, sequential_lora: not to be told from clients alone in average gain, -0.1000"
    assert any(unsure in each for each in others)
    assert any("gains +0.1000 on the clients' concepts" in each for each in others)
    assert any("by +40.0% on seen things alone and by -25.0% on seen scenes" in each for each in others)
    assert not any("not the concepts'" in each for each in others)
    sure = [row("fedavg_ft", "ewc", matrix(0.3, 0.3, 0.3), matrix(0.21, 0.2, 0.2), matrix(0.2, 0.0, 0.2)),
            row("local_only", "ewc", matrix(0.4, 0.4, 0.4), matrix(0.31, 0.3, 0.3))]  # fmt: skip
    assert any("fedavg_ft, ewc: worse than clients alone" in each for each in study().answer(sure).findings)
    idle = [row("fedavg_ft", "ewc", matrix(-0.1, 0.0, 0.0), matrix(0.0, 0.0, 0.0), matrix(0.0, 0.0, 0.0))]
    assert any("nothing to forget: fedavg_ft, ewc." in each for each in study().answer(idle).findings)
    fell = [row("local_only", "ewc", matrix(0.3, 0.3, 0.3), matrix(0.2, 0.2, 0.2), fell=-0.1)]
    assert any("local_only, ewc (+0.2000 and -0.0500)" in each for each in study().answer(fell).findings)


def test_every_pair_stands_in_the_table_with_its_reason():
    told = study().answer([])
    (table,) = told.tables
    lines = {(line[0], line[1]): line[2:] for line in table.rows}
    assert len(lines) == len(table.rows) == 5 * 11 and told.findings[0] == "No pair is measured yet."
    # five that average an adapter or nothing, with two methods that average; all eleven with the one that does not
    assert told.numbers["allowed"] == 5 * 2 + 11 == sum(verdict == "allowed" for verdict, _ in lines.values())
    assert lines["fedavg_ft", "ewc"][1].startswith("the adapter, by name") and all(why for _, why in lines.values())
    assert lines["local_only", "cns"] == ["allowed", "nothing is sent"]
    assert lines["fedavg_ft", "cns"][0] == "refused" and "nothing to average one by one" in lines["fedavg_ft", "cns"][1]
    assert "Spire is not for concepts that arrive" in lines["spire", "ewc"][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clients": ()}, "clients are"),
        ({"clients": CLIENTS[:1] * 2}, "a name of its own"),
        ({"clients": (Participant("anna", CLIENTS[0].concepts[:1]),)}, "anna have fewer than two concepts"),
        ({"pairs": ()}, "pairs are"),
        ({"pairs": (SHARED, SHARED)}, "each once"),
        ({"pairs": (Pair("fedavg", "ewc"),)}, "did you mean 'fedavg_ft'"),
        ({"pairs": (Pair("fedavg_ft", "ewcc"),)}, "did you mean 'ewc'"),
        ({"pairs": (Pair("fedavg_ft", "ewc", ("continual.wait=1",)),)}, "did you mean 'weight'"),
        ({"pairs": (Pair("fedavg_ft", "ewc", ("method.adapt=1",)),)}, "method.adapt"),
        ({"pairs": (Pair("fedavg_ft", "c_lora"),)}, "CLora is not for a method that averages its parts"),
        ({"seeds": ()}, "seeds are"),
        ({"num_seen": 0}, "num_seen 0"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        study(**change)
