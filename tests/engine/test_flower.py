"""The distributed engine over a loopback grid: the bits of one process, and what it does when things go wrong."""

import gc
import json
import math
import random
import re
import time
import weakref
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from personae.artefact.save import load_state, state_bytes, state_from_bytes
from personae.core import State, Training
from personae.engine import InProcess
from personae.engine.flower import FORMAT, pack, unpack
from personae.engine.patience import Patience
from personae.errors import (
    ArtefactError,
    ClientFailed,
    ClientSilent,
    ConfigError,
    FederationError,
    PersonaeError,
    TooFewClients,
)
from personae.methods import FedAvgFT, LocalOnly, Proximal, ServerAdam, ServerEma, SharedRep, Spire
from personae.personal.embedding import EMBEDDING
from personae.testing import tiny_job, tiny_population
from personae.testing.contract import differing_states
from personae.testing.faulty import UploadsItsEmbedding
from personae.testing.loopback import Loopback

TRAINING, ADAPT = Training(2, 1e-2, 4, condition_dropout=0.2), Training(1, 1e-2, 4)
SPIRE = Spire(TRAINING, ADAPT)
METHODS = {
    "spire": SPIRE,
    "fedavg_ft": FedAvgFT(TRAINING, ADAPT),
    "shared_rep": SharedRep(TRAINING, ADAPT, ADAPT, ("output.",)),
    "local_only": LocalOnly(TRAINING, ADAPT),
    "wrapped": ServerEma(ServerAdam(Proximal(SPIRE, 0.1), 1e-2), 0.9),
}


def job(folder, method=SPIRE, **options):
    population = options.pop("population", None)
    changed = {key: options.pop(key) for key in ("minimum", "clip_norm") if key in options}
    return replace(tiny_job(method, population, folder=folder, **options), **changed)


def records(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Troubled:
    """SPIRE, but the named clients do something else first."""

    trouble: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name):
        return getattr(SPIRE, name)

    def __repr__(self):
        return "Troubled()"

    def local(self, client, got, kept):
        if client.name in self.trouble:
            self.trouble[client.name]()
        return SPIRE.local(client, got, kept)


def fails():
    raise ValueError("photos/anna/secret.png is damaged")


# --- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("cohort", [None, 2])
def test_the_same_bits_as_in_one_process(method, cohort, tmp_path):
    here = InProcess().run(job(tmp_path / "here", method, population=tiny_population(3, cohort_size=cohort), rounds=4))
    there = Loopback().run(job(tmp_path / "there", method, population=tiny_population(3, cohort_size=cohort), rounds=4))
    assert differing_states(here.server, there.server) == []
    assert list(here.personal) == list(there.personal) == ["c0", "c1", "c2", "n0"]
    for name in here.personal:
        assert differing_states(here.personal[name], there.personal[name]) == [], name
        files = [tmp_path / where / "clients" / f"{name}.safetensors" for where in ("here", "there")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert here.traffic == there.traffic
    without_seconds = [[{**r, "seconds": 0} for r in run.rounds] for run in (here, there)]
    assert without_seconds[0] == without_seconds[1]


@pytest.mark.parametrize("late", [{1: 3}, {1: 5, 2: 1}, {3: 2, 2: 4}])
def test_the_order_of_arrival_changes_nothing(late, tmp_path):
    soon = Loopback().run(job(tmp_path / "soon"))
    later = Loopback(late=late).run(job(tmp_path / "later"))
    assert differing_states(soon.server, later.server) == []


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("stopped_at", [("train", 1, 2), ("train", 2, 1), ("train", 3, 2), ("personalize", 4, 2)])
def test_a_server_that_is_stopped_anywhere_goes_on_to_the_same_bits(stopped_at, every, tmp_path):
    class Stop(Exception): ...

    def stop(now):
        if (now.stage, now.round, now.clients_done) == stopped_at:
            raise Stop

    options = {"rounds": 4, "checkpoint_every": every}
    whole = Loopback().run(job(tmp_path / "whole", population=tiny_population(3, cohort_size=2), **options))
    part = job(tmp_path / "part", population=tiny_population(3, cohort_size=2), **options)
    with pytest.raises(Stop):
        Loopback().run(part, watch=stop)
    resumed = Loopback().run(part, resume=True)
    assert differing_states(whole.server, resumed.server) == []
    for name in whole.personal:
        assert differing_states(whole.personal[name], resumed.personal[name]) == [], name


# --- nothing personal on the wire ------------------------------------------------------------------------------------


def test_no_message_holds_a_personal_tensor_or_name(tmp_path):
    engine = Loopback()
    run = engine.run(job(tmp_path / "run", rounds=3))
    (grid,) = engine.grids
    arrays = [m.content.array_records["state"]["state"].data for m in (*grid.pushed, *grid.replied) if has_state(m)]
    assert len(arrays) == 3 * 3 * 2 + 4
    personal = [state.params[EMBEDDING].numpy().tobytes() for state in run.personal.values()]
    kept = [load_state(path) for path in (tmp_path / "run/checkpoint/nodes").rglob("kept/*.safetensors")]
    personal += [
        value.numpy().tobytes() for state in kept for value in (*state.params.values(), *state.extras.values())
    ]
    assert len(personal) > 10
    for data in arrays:
        names = state_from_bytes(data, "a message").params
        assert names and not any(SPIRE.personal(name) for name in names)
        assert not any(value in data for value in personal if len(value) > 8)


def has_state(message):
    return message.has_content() and "state" in message.content.array_records


@pytest.mark.parametrize("disguise", [None, "moments."])
def test_a_client_does_not_send_what_is_personal(disguise, tmp_path):
    engine = Loopback()
    method = UploadsItsEmbedding(SPIRE, None if disguise is None else f"{disguise}{EMBEDDING}")
    with pytest.raises(ClientFailed, match=r"client 'c.' failed in round 1 during local: .*PrivacyError"):
        engine.run(job(tmp_path / "run", method, minimum=1))
    (grid,) = engine.grids
    assert not any(has_state(reply) for reply in grid.replied)


# --- clients in trouble ----------------------------------------------------------------------------------------------


def test_a_client_that_fails_is_left_out_and_named(tmp_path, capsys):
    engine = Loopback()
    engine.run(job(tmp_path / "run", Troubled({"c1": fails}), minimum=2))
    for record in records(tmp_path / "run"):
        assert list(record["clients"]) == ["c0", "c2"]
        assert re.match(
            "ClientFailed: client 'c1' failed in round . during local: .*ValueError", record["refused"]["c1"]
        )
    assert "secret.png" in capsys.readouterr().err  # at the client
    for reply in engine.grids[0].replied:
        assert "secret" not in repr(reply.content)


def test_a_client_that_failed_goes_on_from_where_it_was(tmp_path):
    """As if it had not been in the cohort: what it kept in a round that did not count is not used."""
    times = {"c1": iter([None, fails, None])}

    def sometimes():
        if (act := next(times["c1"])) is not None:
            act()

    Loopback().run(job(tmp_path / "run", Troubled({"c1": sometimes}), rounds=3, minimum=2))
    assert [list(r["clients"]) for r in records(tmp_path / "run")] == [
        ["c0", "c1", "c2"],
        ["c0", "c2"],
        ["c0", "c1", "c2"],
    ]


def test_too_many_failures_stop_the_run_with_the_reason(tmp_path):
    with pytest.raises(PersonaeError, match="client 'c1' failed in round 1 during local: FederationError: ValueError"):
        Loopback().run(job(tmp_path / "run", Troubled({"c0": fails, "c1": fails}), minimum=2))


BAD = {
    "nan": lambda s: State({**s.params, "input.bias": torch.full((16,), math.nan)}),
    "shape": lambda s: State({**s.params, "input.bias": torch.zeros(1)}),
    "type": lambda s: State({**s.params, "input.bias": torch.zeros(16, dtype=torch.float16)}),
    "renamed": lambda s: State({("other" if n == "input.bias" else n): v for n, v in s.params.items()}),
    "fewer": lambda s: State({n: v for n, v in s.params.items() if n != "input.bias"}),
    "float8 in the extras": lambda s: State(s.params, {"m": torch.zeros(2, dtype=torch.float8_e4m3fn)}),
    "complex in the extras": lambda s: State(s.params, {"m": torch.zeros(2, dtype=torch.complex64)}),
    "what is personal": lambda s: State({**s.params, EMBEDDING: torch.zeros(1, 4)}),
    "inf in the extras": lambda s: State(s.params, {"m": torch.tensor(math.inf)}),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_update_is_refused_and_the_round_goes_on(bad, tmp_path):
    def bend(node, reply):
        if node == 2 and has_state(reply):
            about, sent = unpack(reply.content)
            about.pop("protocol")
            return Message(pack(about, bad(sent)), reply_to=reply)
        return reply

    run = Loopback(bend=lambda node, reply: same_id(bend(node, reply), reply)).run(job(tmp_path / "run", minimum=2))
    without = Loopback().run(job(tmp_path / "without", Troubled({"c1": fails}), minimum=2))
    assert differing_states(run.server, without.server) == []
    assert all(list(r["refused"]) == ["c1"] for r in records(tmp_path / "run"))


def same_id(bent, reply):
    """The bent message answers what the reply did."""
    if bent is not reply:
        bent.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
    return bent


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_examples", 0),
        ("num_examples", -5),
        ("num_examples", 10**12),
        ("num_examples", math.nan),
        ("num_examples", 1.5),
        ("num_examples", True),
        ("num_examples", "many"),
        ("run", "another"),
        ("round", 7),
        ("round", True),
        ("client", "c0"),
        ("protocol", 99),
    ],
)
def test_a_lie_beside_the_tensors_is_refused(key, value, tmp_path):
    def bend(node, reply):
        if node == 2 and has_state(reply):
            reply.content.config_records["about"][key] = value
        return reply

    Loopback(bend=bend).run(job(tmp_path / "run", minimum=2))
    assert all(list(r["refused"]) == ["c1"] for r in records(tmp_path / "run"))


def test_a_replay_of_an_earlier_round_is_refused(tmp_path):
    first = {}

    def bend(node, reply):
        if node == 2 and has_state(reply):
            return same_id(Message(first.setdefault(node, reply.content), reply_to=reply), reply)
        return reply

    Loopback(bend=bend).run(job(tmp_path / "run", minimum=2, rounds=3))
    refused = [r.get("refused", {}) for r in records(tmp_path / "run")]
    assert refused[0] == {} and all("answered round 1, expected" in r["c1"] for r in refused[1:])


def test_a_client_that_is_silent_is_waited_for_as_long_as_the_others_took(tmp_path):
    patience = Patience(deadline_seconds=30.0, times_median=2.0, least_seconds=0.2, wait_seconds=1.0)
    started = time.monotonic()
    lost = Loopback(patience, bend=lambda node, reply: None if node == 2 and has_state(reply) else reply)
    lost.run(job(tmp_path / "run", minimum=2, rounds=2))
    assert time.monotonic() - started < 10
    first, second = records(tmp_path / "run")
    assert "did not answer round 1" in first["refused"]["c1"]
    # It still owes that answer, so it was not asked again.
    assert list(second["clients"]) == ["c0", "c2"] and "refused" not in second
    asked = [m for m in lost.grids[0].pushed if m.metadata.dst_node_id == 2]
    assert [m.metadata.message_type for m in asked] == ["query.hello", "train.local", "train.personalize"]


def test_when_everyone_is_needed_the_deadline_ends_the_run(tmp_path):
    patience = Patience(deadline_seconds=0.3, least_seconds=0.1, wait_seconds=1.0)
    lost = Loopback(patience, bend=lambda node, reply: None if node == 2 and has_state(reply) else reply)
    with pytest.raises(ClientSilent, match="client 'c1' did not answer round 1"):
        lost.run(job(tmp_path / "run"))


def test_too_few_clients_are_waited_for_and_then_said(tmp_path, capsys):
    patience = Patience(wait_seconds=0.5)
    with pytest.raises(
        TooFewClients, match=r"round 1: 1 clients can be reached after 0\.5 s, expected at least 2"
    ) as ended:
        Loopback(patience, offline={2, 3}).run(job(tmp_path / "run", minimum=2))
    assert ended.value.exit_code == 7
    assert "round 1 waits for 2 clients; c0 can be reached" in capsys.readouterr().err


def test_a_client_that_comes_later_takes_part_from_then_on(tmp_path):
    offline = {3}

    def arrive(now):
        if now.done and now.round == 1:
            offline.clear()

    Loopback(offline=offline).run(job(tmp_path / "run", minimum=2, rounds=3), watch=arrive)
    assert [list(r["clients"]) for r in records(tmp_path / "run")] == [
        ["c0", "c1"],
        ["c0", "c1", "c2"],
        ["c0", "c1", "c2"],
    ]


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("version", "0.0.0", "client 'c1': version is '0.0.0', the server's is"),
        ("method", "FedAvgFT()", r"client 'c1': method is 'FedAvgFT\(\)', the server's is .Spire"),
        ("shapes", "w [1]", "client 'c1': the models differ in names or shapes"),
        ("client", "c0", "client 'c0' sits at two nodes"),
        ("client", "", "a node failed to introduce itself"),
        ("client", "../../etc", "a node failed to introduce itself"),
        ("client", "y" * 65, "a node failed to introduce itself"),
        ("problem", "x" * 10**6, "a node was turned away: a message came with 1000000 characters of 'problem'"),
    ],
)
def test_a_node_that_does_not_fit_is_turned_away(key, value, sentence, tmp_path, capsys):
    def bend(node, reply):
        if node == 2 and "method" in reply.content.config_records["about"]:
            reply.content.config_records["about"][key] = value
        return reply

    Loopback(bend=bend).run(job(tmp_path / "run", minimum=2))
    assert re.search(sentence, capsys.readouterr().err)
    assert all(list(r["clients"]) == ["c0", "c2"] for r in records(tmp_path / "run"))


def test_a_node_that_was_turned_away_may_come_back(tmp_path):
    """With the right version: a SuperNode keeps its number when it is started again."""
    offline, wrong = set(), {2}

    def bend(node, reply):
        if node in wrong and "method" in reply.content.config_records["about"]:
            reply.content.config_records["about"]["version"] = "0.0.0"
        return reply

    def restart(now):
        if now.done and now.round == 1:
            wrong.clear()
            offline.add(2)
        elif now.done:
            offline.clear()

    engine = Loopback(bend=bend, offline=offline)
    engine.run(job(tmp_path / "run", minimum=2, rounds=3), watch=restart)
    two, three = ["c0", "c2"], ["c0", "c1", "c2"]
    assert [list(r["clients"]) for r in records(tmp_path / "run")] == [two, two, three]


def test_a_client_whose_state_is_gone_is_refused_and_not_reset(tmp_path, capsys):
    part = job(tmp_path / "run", minimum=2, rounds=2)
    Loopback().run(replace(part, rounds=1))
    for path in (tmp_path / "run/checkpoint/nodes/c1").rglob("kept/*"):
        path.unlink()
    Loopback().run(part, resume=True)
    assert "c1" in records(tmp_path / "run")[1]["refused"]
    assert "Restore the folder from a copy, or join again under another name" in capsys.readouterr().err


def test_two_processes_for_one_client_are_refused(tmp_path, capsys):
    from personae.artefact.client_folder import ClientFolder

    with ClientFolder(tmp_path, "anna").held(), pytest.raises(ArtefactError, match="in use by another process"):
        ClientFolder(tmp_path, "anna").held().__enter__()


def test_failures_do_not_shorten_the_time_that_others_get(tmp_path):
    """Two fail at once; the two who work honestly are slower than `least_seconds`, and are waited for."""
    patience = Patience(deadline_seconds=30.0, least_seconds=0.05, wait_seconds=1.0)
    slow = partial(time.sleep, 0.2)
    troubled = Troubled({"c0": fails, "c1": fails, "c2": slow, "c3": slow})
    Loopback(patience).run(job(tmp_path / "run", troubled, population=tiny_population(4), minimum=2))
    assert [list(r["clients"]) for r in records(tmp_path / "run")] == [["c2", "c3"]] * 2


def test_a_reply_that_is_lost_after_the_client_kept_its_state_counts_on_neither_side(tmp_path):
    def lose(node, reply):
        about = reply.content.config_records["about"]
        return None if node == 2 and about.get("round") == 2 and has_state(reply) else reply

    def fail():
        if next(turns) == 2:
            fails()

    turns = iter(range(1, 10))
    patience = Patience(deadline_seconds=30.0, times_median=3.0, least_seconds=0.3, wait_seconds=0.5)
    offline = set()

    def reappear(now):
        """Its node is started anew, so that it no longer owes an answer."""
        if now.done and now.stage == "train":
            offline.symmetric_difference_update({2} if now.round in (2, 3) else ())

    for every in (1, 3):
        turns = iter(range(1, 10))
        lost = Loopback(patience, bend=lose, offline=offline)
        options = {"minimum": 2, "rounds": 5, "checkpoint_every": every}
        left = lost.run(job(tmp_path / f"lost{every}", **options), watch=reappear)
        counted = [list(r["clients"]) for r in records(tmp_path / f"lost{every}")]
        assert counted[1] == counted[2] == ["c0", "c2"] and counted[3] == ["c0", "c1", "c2"]

        failed = Loopback(patience, offline=offline)
        right = failed.run(job(tmp_path / f"failed{every}", Troubled({"c1": fail}), **options), watch=reappear)
        assert differing_states(left.server, right.server) == []
        assert differing_states(left.personal["c1"], right.personal["c1"]) == []


def test_a_node_whose_answer_was_lost_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("personae.engine.flower.nodes.ASK_AGAIN_SECONDS", 0.2)
    first = {2}

    def lose(node, reply):
        if node in first and "method" in reply.content.config_records["about"]:
            first.discard(node)
            return None
        return reply

    Loopback(Patience(wait_seconds=3.0), bend=lose).run(job(tmp_path / "run"))
    assert all(len(r["clients"]) == 3 for r in records(tmp_path / "run"))


def test_a_node_that_was_started_anew_is_asked_again(tmp_path):
    """Killed after it had fetched a message, and back before the server looked: nobody will ever answer that one."""
    started = {}

    def lose(node, reply):
        about = reply.content.config_records["about"]
        return None if node == 2 and about.get("round") == 1 and has_state(reply) else reply

    def restart(now):
        if now.done and now.round == 1:
            started[2] = "2026-01-01T12:00:00"

    patience = Patience(deadline_seconds=30.0, times_median=2.0, least_seconds=0.2, wait_seconds=1.0)
    Loopback(patience, bend=lose, started=started).run(job(tmp_path / "run", minimum=2, rounds=3), watch=restart)
    two, three = ["c0", "c2"], ["c0", "c1", "c2"]
    assert [list(r["clients"]) for r in records(tmp_path / "run")] == [two, three, three]


def test_a_node_that_was_started_anew_introduces_itself_anew(tmp_path, capsys):
    started = {}

    def bend(node, reply):
        if node in started and "method" in reply.content.config_records["about"]:
            reply.content.config_records["about"]["version"] = "0.0.0"
        return reply

    def restart(now):
        if now.done and now.round == 1:
            started[2] = "2026-01-01T12:00:00"

    Loopback(bend=bend, started=started).run(job(tmp_path / "run", minimum=2, rounds=2), watch=restart)
    assert [list(r["clients"]) for r in records(tmp_path / "run")] == [["c0", "c1", "c2"], ["c0", "c2"]]
    assert "client 'c1': version is '0.0.0', the server's is" in capsys.readouterr().err


def test_the_end_waits_for_those_who_took_part(tmp_path):
    class Stop(Exception): ...

    def stop(now):
        if now.stage == "personalize":
            raise Stop

    part = job(tmp_path / "run")
    with pytest.raises(Stop):
        Loopback().run(part, watch=stop)
    resumed = Loopback(Patience(wait_seconds=5.0), late=dict.fromkeys(range(1, 5), 12)).run(part, resume=True)
    assert list(resumed.personal) == ["c0", "c1", "c2", "n0"]


def test_nobody_at_the_end_is_no_end(tmp_path):
    offline = set()

    def leave(now):
        if now.done and now.round == 2:
            offline.update({1, 2, 3, 4})

    with pytest.raises(TooFewClients, match="no client could be reached to personalize"):
        Loopback(Patience(wait_seconds=0.2), offline=offline).run(job(tmp_path / "run"), watch=leave)
    assert not (tmp_path / "run" / "cost.json").exists()
    offline.clear()
    assert len(Loopback(offline=offline).run(job(tmp_path / "run"), resume=True).personal) == 4


@pytest.mark.parametrize("engine", [InProcess(), Loopback()], ids=["in_process", "loopback"])
def test_values_that_are_finite_and_huge_do_not_reach_the_checkpoint(engine, tmp_path):
    @dataclass(frozen=True)
    class Huge:
        def __getattr__(self, name):
            return getattr(SPIRE, name)

        def __repr__(self):
            return "Huge()"

        def local(self, client, got, kept):
            update, kept = SPIRE.local(client, got, kept)
            sign = -1 if client.name == "c0" else 1
            params = {n: torch.full_like(v, sign * 3.4e38) for n, v in update.sent.params.items()}
            return replace(update, sent=replace(update.sent, params=params)), kept

    with pytest.raises(FederationError, match=r"round 1 ended in values that are not finite.*clip_norm or a robust"):
        engine.run(job(tmp_path / "run", Huge()))
    assert json.loads((tmp_path / "run/checkpoint/checkpoint.json").read_text())["round"] == 0


def test_early_answers_wait_in_files_and_leave_none_behind(tmp_path):
    seen = set()

    def look(now):
        seen.update(path.name for path in (tmp_path / "run").rglob("early/*"))

    Loopback(late={1: 6}).run(job(tmp_path / "run"), watch=look)
    assert seen >= {"c1.safetensors", "c2.safetensors"}
    assert not list((tmp_path / "run").rglob("early/*"))


# --- the decoder -----------------------------------------------------------------------------------------------------


def message_bytes():
    arrays = {"a.weight": torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), "b": torch.arange(5)}
    return state_bytes(
        State(arrays, {"m": torch.zeros(0, 3, dtype=torch.bfloat16)}, {"round": 3, "x": 0.5, "ok": True})
    )


def mutated(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        kind = rng.randrange(5)
        at = rng.randrange(len(data) or 1)
        if kind == 0 and data:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 3:
            data[:8] = rng.randrange(2**64).to_bytes(8, "little")
        else:
            at = rng.randrange(min(len(data), 600) or 1)
            data[at : at + 1] = rng.choice([b'"', b"{", b"[", b"]", b"9" * 30, b"\\u0000", b"-1", b"null"])
    return bytes(data)


def test_ten_thousand_mutated_messages_do_no_harm():
    rng, data = random.Random(0), message_bytes()
    taken, slowest = 0, 0.0
    for _ in range(10_000):
        bent = mutated(data, rng)
        started = time.perf_counter()
        try:
            state = state_from_bytes(bent, "a message")
            taken += 1
            held = sum(v.numel() * v.element_size() for v in (*state.params.values(), *state.extras.values()))
            assert held <= len(bent)
        except ArtefactError:
            pass
        slowest = max(slowest, time.perf_counter() - started)
    assert 100 < taken < 9_000 and slowest < 1.0


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00" * 8, b"\x80\x04K\x01.", (2**63).to_bytes(8, "little"), (10**6).to_bytes(8, "little") + b"[" * 10**6],
    ids=["nothing", "zeros", "a pickle", "a huge header", "deep nesting"],
)
def test_what_is_no_state_is_said_to_be_none(data):
    with pytest.raises(ArtefactError, match="a message is no State"):
        state_from_bytes(data, "a message")


@pytest.mark.parametrize("facts", ["[1]", '{"a": [1]}', '{"a": null}', "[" * 10_000, '{"a": ' + "9" * 10_000 + "}"])
def test_facts_are_flat(facts):
    from safetensors.torch import save

    data = save({}, {"format": "personae.state", "format_version": "1", "facts": facts})
    with pytest.raises(ArtefactError):
        state_from_bytes(data, "a message")


def test_a_message_is_let_go_as_soon_as_it_was_read():
    """A server of many clients holds one reply at a time, and not those since the last collection of garbage."""
    content = pack({"num_examples": 1}, State({"a": torch.zeros(3)}))
    held = weakref.ref(content["state"])
    gc.disable()
    try:
        unpack(content)
        del content
        assert held() is None
    finally:
        gc.enable()


def test_a_message_that_is_too_long_is_refused_before_it_is_read():
    data = message_bytes()
    content = RecordDict({"about": ConfigRecord({"protocol": 1})})
    content["state"] = ArrayRecord({"state": Array("uint8", (len(data),), FORMAT, data)})
    assert unpack(content, len(data))[1].facts["round"] == 3
    with pytest.raises(PersonaeError, match=f"a message of {len(data)} bytes came, expected at most {len(data) - 1}"):
        unpack(content, len(data) - 1)


def test_another_format_is_refused():
    content = RecordDict({"about": ConfigRecord({"protocol": 1})})
    content["state"] = ArrayRecord({"state": Array("float32", (1,), "numpy.ndarray", b"\x80\x04K\x01.")})
    with pytest.raises(PersonaeError, match="without a State"):
        unpack(content)


# --- patience --------------------------------------------------------------------------------------------------------


def test_the_deadline_follows_the_cohorts_own_times():
    patience = Patience(deadline_seconds=100.0, times_median=3.0, least_seconds=5.0)
    assert patience.deadline([], 1) == patience.deadline([1.0, 2.0], 3) == 100.0
    assert patience.deadline([1.0, 1.5, 2.0], 3) == 5.0
    assert patience.deadline([10.0, 11.0, 12.0], 3) == 33.0
    assert patience.deadline([60.0], 1) == 100.0


@pytest.mark.parametrize("wrong", [{"times_median": 0.5}, {"deadline_seconds": 0}, {"wait_seconds": -1}])
def test_patience_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"federation: {next(iter(wrong))} is"):
        Patience(**wrong)


def test_no_file_of_the_engine_reads_pickle():
    import personae

    for path in Path(personae.__file__).parent.rglob("*.py"):
        text = path.read_text("utf-8")
        assert not re.search(r"\bimport (pickle|dill|cloudpickle|joblib)\b|allow_pickle=True", text), path
        assert len(re.findall(r"torch\.load\(", text)) == len(re.findall(r"weights_only=True", text)), path
