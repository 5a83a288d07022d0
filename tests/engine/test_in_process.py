import json
import math
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from personae.aggregate.mean import mean
from personae.core import State, Training, stream
from personae.engine import InProcess
from personae.engine.rounds import load_parts
from personae.errors import ClientFailed, ConfigError, EmptyRound, MismatchedNames, PrivacyError, RefusedUpdate
from personae.methods import LocalOnly, SharedRep, Spire
from personae.personal.embedding import EMBEDDING
from personae.testing import tiny_job, tiny_population
from personae.testing.contract import differing_states
from personae.testing.faulty import UploadsItsEmbedding

TRAINING, ADAPT = Training(2, 1e-2, 4, condition_dropout=0.2), Training(1, 1e-2, 4)
SPIRE = Spire(TRAINING, ADAPT)
LOCAL_ONLY = LocalOnly(TRAINING, ADAPT)


@dataclass(frozen=True)
class Spoiled:
    """SPIRE, but one client's update, or one verb, is replaced by what a test wants."""

    update: Any = None
    verbs: dict[str, Any] = field(default_factory=dict)
    client: str = "c1"

    def __getattr__(self, name):
        return self.verbs.get(name) or getattr(SPIRE, name)

    def local(self, client, got, kept):
        if "local" in self.verbs:
            self.verbs["local"](client, got, kept)
        update, kept = SPIRE.local(client, got, kept)
        return (self.update(update) if self.update and client.name == self.client else update), kept


def fails(*given):
    raise ValueError("no more battery")


def with_params(**params):
    return lambda update: replace(update, sent=replace(update.sent, params={**update.sent.params, **params}))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update", "error"),
    [
        (with_params(**{"input.bias": torch.full((16,), math.nan)}), RefusedUpdate),
        (with_params(**{"input.bias": torch.zeros(15)}), RefusedUpdate),
        (with_params(**{"input.bias": torch.zeros(16, dtype=torch.float64)}), RefusedUpdate),
        (with_params(other=torch.zeros(1)), MismatchedNames),
        (with_params(**{EMBEDDING: torch.zeros(1, 4)}), PrivacyError),
        (lambda update: replace(update, num_examples=1001), RefusedUpdate),
        (lambda update: replace(update, num_examples=0), RefusedUpdate),
    ],
)
def test_a_bad_update_ends_the_round_before_anything_is_added_up(update, error, tmp_path):
    job = replace(tiny_job(Spoiled(update), folder=tmp_path / "run"), max_examples=1000)
    with pytest.raises(error, match=r"client 'c1' .*\(round 1\)"):
        InProcess().run(job)
    assert json.loads((tmp_path / "run/checkpoint/checkpoint.json").read_text())["round"] == 0


def test_a_round_without_clients_is_refused():
    class Nobody:
        train, new = (), ()

        def initial(self, seed):
            return tiny_population().initial(seed)

        def cohort(self, round, seed, known):
            return []

    with pytest.raises(EmptyRound, match="round 1 has no clients"):
        InProcess().run(replace(tiny_job(SPIRE), members=Nobody()))


@pytest.mark.parametrize(
    ("verb", "change", "stage", "round"),
    [
        ("local", fails, "local", 1),
        ("personalize", fails, "personalize", 2),
        (
            "broadcast",
            lambda server, client: State({**server.params, "unknown": torch.zeros(1)}, facts=server.facts),
            "load",
            1,
        ),
    ],
)
def test_a_failing_client_is_named_with_its_stage_and_cause(verb, change, stage, round):
    with pytest.raises(ClientFailed) as caught:
        InProcess().run(tiny_job(Spoiled(verbs={verb: change})))
    error = caught.value
    assert (error.client, error.round, error.stage) == ("c0", round, stage)
    assert f"client 'c0' failed in round {round} during {stage}: {type(error.__cause__).__name__}" in str(error)
    assert isinstance(error.__cause__, MismatchedNames if stage == "load" else ValueError)


def test_the_data_of_a_client_may_fail_while_it_is_loaded():
    population = tiny_population()
    del population.data["c1"]
    with pytest.raises(ClientFailed, match="client 'c1' failed in round 1 during load: KeyError"):
        InProcess().run(tiny_job(SPIRE, population))


@pytest.mark.parametrize("change", [{"rounds": -1}, {"checkpoint_every": 0}])
def test_an_impossible_job_is_refused(change):
    with pytest.raises(ConfigError, match="expected at least"):
        InProcess().run(replace(tiny_job(SPIRE), **change))


# --- what travels ----------------------------------------------------------------------------------------------------


def test_traffic_is_what_a_hand_would_count():
    """input 48, time 272, norm 32, modulate 544, widen 544, narrow 528, output 34, null 4, projection 64: 2070."""
    run = InProcess().run(tiny_job(SPIRE, rounds=2))
    backbone, fact, num_examples = 2070 * 4, len("round0"), 8
    down, released = 2 * (backbone + fact), backbone + fact
    up = {
        name: sum(backbone + num_examples + len(f"loss{record['clients'][name]['loss']}") for record in run.rounds)
        for name in ("c0", "c1", "c2")
    }
    assert {name: (t.up, t.down) for name, t in run.traffic.items()} == {
        "c0": (up["c0"], down + released),
        "c1": (up["c1"], down + released),
        "c2": (up["c2"], down + released),
        "n0": (0, released),
    }


def test_only_those_of_the_cohort_pay_for_a_round():
    population = tiny_population(3, cohort_size=1)
    run = InProcess().run(tiny_job(SPIRE, population, rounds=4))
    turns = [name for record in run.rounds for name in record["clients"]]
    assert turns == [population.cohort(number, 0, population.train)[0] for number in (1, 2, 3, 4)]
    assert all(run.traffic[name].up // (2070 * 4) == turns.count(name) for name in population.train)


@pytest.mark.parametrize("method", [SPIRE, LOCAL_ONLY, SharedRep(TRAINING, ADAPT, ADAPT, ("output.",))], ids=type)
def test_what_is_kept_is_never_in_an_update(method):
    sent = []

    @dataclass(frozen=True)
    class Watched:
        def __getattr__(self, verb):
            return getattr(method, verb)

        def local(self, client, got, kept):
            update, kept = method.local(client, got, kept)
            sent.append((update.sent, kept))
            return update, kept

    InProcess().run(tiny_job(Watched()))
    assert len(sent) == 6
    for update, kept in sent:
        assert kept.params and all(map(method.personal, kept.params))
        assert not {*kept.params, *kept.extras} & {*update.params, *update.extras}


def test_a_personal_tensor_in_the_extras_is_refused():
    with pytest.raises(PrivacyError, match=r"client 'c0' was about to send 1 personal tensors: embedding\.weight"):
        InProcess().run(tiny_job(UploadsItsEmbedding(SPIRE)))


def test_a_model_is_what_was_sent_then_what_was_kept_then_the_clients_own_start():
    population = tiny_population()
    client = population.client("c0", 1, 0)
    sent = {name: torch.zeros_like(value) for name, value in population.initial(0).items() if name != EMBEDDING}
    load_parts(client, sent, {"output.bias": torch.ones(2)}, seed=0)
    loaded = client.model.params()
    assert loaded["output.bias"].tolist() == [1, 1] and not loaded["output.weight"].any()
    own = client.model.initial(stream(0, "c0", "init"), lambda name: name == EMBEDDING)
    assert torch.equal(loaded[EMBEDDING], own[EMBEDDING]) and own[EMBEDDING].any()


# --- order, memory, progress -----------------------------------------------------------------------------------------


def test_one_update_is_in_memory_whatever_the_number_of_clients():
    alive, most = [], []

    @dataclass(frozen=True)
    class Counted:
        def __getattr__(self, verb):
            return getattr(SPIRE, verb)

        def local(self, client, got, kept):
            most.append(sum(reference() is not None for reference in alive))
            params = {name: value.clone() for name, value in got.params.items()}
            alive.extend(weakref.ref(value) for value in params.values())
            return client.update(State(params)), State()

        def personalize(self, client, got, kept):
            return State()

    InProcess().run(tiny_job(Counted(), tiny_population(200, num_new=0), rounds=1))
    assert len(most) == 200 and len(alive) == 200 * 16
    assert max(most) == 0, f"up to {max(most)} tensors of others were held while a client trained"


def test_updates_come_in_name_order_and_say_what_they_started_from():
    seen = []

    def rule(updates):
        return mean(seen.append((u.client, u.since)) or u for u in updates)

    population = tiny_population(3)
    InProcess().run(tiny_job(SPIRE, replace(population, train=["c2", "c0", "c1"]), rounds=2, rule=rule))
    assert seen == [("c0", 0), ("c1", 0), ("c2", 0), ("c0", 1), ("c1", 1), ("c2", 1)]


def test_clients_train_though_nobody_looks_at_what_they_send():
    run = InProcess().run(tiny_job(LOCAL_ONLY, rounds=2))
    assert [list(record["clients"]) for record in run.rounds] == [["c0", "c1", "c2"]] * 2


def test_a_watcher_sees_every_client_and_the_end_of_every_round():
    seen = []
    InProcess().run(tiny_job(SPIRE, tiny_population(2), rounds=2), watch=seen.append)
    assert [(r.stage, r.round, r.client, r.clients_done, r.done) for r in seen] == [
        ("train", 1, "c0", 1, False),
        ("train", 1, "c1", 2, False),
        ("train", 1, "c1", 2, True),
        ("train", 2, "c0", 1, False),
        ("train", 2, "c1", 2, False),
        ("train", 2, "c1", 2, True),
        ("personalize", 2, "c0", 1, False),
        ("personalize", 2, "c1", 2, False),
        ("personalize", 2, "n0", 3, True),
    ]


# --- folders ---------------------------------------------------------------------------------------------------------


def same(left, right):
    assert differing_states(left.server, right.server) == []
    assert list(left.personal) == list(right.personal)
    for name in left.personal:
        assert differing_states(left.personal[name], right.personal[name]) == [], name
    assert left.traffic == right.traffic


@pytest.mark.parametrize("every", [1, 2, 5])
def test_a_folder_changes_nothing(every, tmp_path):
    in_folder = InProcess().run(tiny_job(SPIRE, rounds=3, folder=tmp_path / "run", checkpoint_every=every))
    same(InProcess().run(tiny_job(SPIRE, rounds=3)), in_folder)


@pytest.mark.parametrize("method", [SPIRE, LOCAL_ONLY], ids=["spire", "local_only"])
def test_a_finished_run_can_be_given_more_rounds(method, tmp_path):
    whole = InProcess().run(tiny_job(method, rounds=3))
    job = tiny_job(method, rounds=1, folder=tmp_path / "run")
    InProcess().run(job)
    same(whole, InProcess().run(replace(job, rounds=3), resume=True))


def test_resuming_a_finished_run_repeats_nothing(tmp_path):
    job = tiny_job(SPIRE, rounds=2, folder=tmp_path / "run")
    first = InProcess().run(job)
    refuses = Spoiled(verbs={"personalize": fails, "local": fails})
    same(first, InProcess().run(replace(job, method=refuses), resume=True))


@pytest.mark.parametrize(
    "stopped_at", [("train", 1, 1), ("train", 2, 2), ("train", 3, 3), ("personalize", 3, 1), ("personalize", 3, 4)]
)
@pytest.mark.parametrize("every", [1, 2])
def test_stopping_anywhere_changes_nothing(stopped_at, every, tmp_path):
    class Stop(Exception): ...

    def stop(round):
        if (round.stage, round.round, round.clients_done) == stopped_at:
            raise Stop

    job = tiny_job(SPIRE, rounds=3, folder=tmp_path / "run", checkpoint_every=every)
    with pytest.raises(Stop):
        InProcess().run(job, watch=stop)
    same(InProcess().run(tiny_job(SPIRE, rounds=3)), InProcess().run(job, resume=True))


def test_the_folder_is_free_again_after_a_failure(tmp_path):
    job = tiny_job(Spoiled(verbs={"local": fails}), folder=tmp_path / "run")
    with pytest.raises(ClientFailed) as held:
        InProcess().run(job)
    assert held.value
    InProcess().run(replace(job, method=SPIRE), resume=True)
