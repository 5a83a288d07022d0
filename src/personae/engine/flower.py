"""The distributed engine: the same rounds over Flower's messages, simulated on one machine or deployed on many.

A message is one ConfigRecord of scalars ("about") and, where a State travels, one Array that holds it in the format of
our files: no pickle, any dtype, and one decoder for disk and wire.
"""

from __future__ import annotations

import math
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from personae.artefact.save import read_json, state_bytes, state_from_bytes, write_json
from personae.core import Facts, Job, Run, State, Update, ignore
from personae.engine.patience import Patience
from personae.engine.rounds import Answer, Since, Store, Watch, serve
from personae.engine.seat import Seat, disagreement, introduction
from personae.errors import (
    ArtefactError,
    ClientFailed,
    ClientSilent,
    ConfigError,
    FederationError,
    PersonaeError,
    PrivacyError,
    RefusedUpdate,
    TooFewClients,
)

PROTOCOL = 1
HELLO, LOCAL, PERSONALIZE = "query.hello", "train.local", "train.personalize"
FORMAT = "personae.state"

MakeMessage = Callable[[RecordDict, int, str], Message]
SeatOf = Callable[[Context], Seat]
About = Mapping[str, Any]


# --- what a message holds ----------------------------------------------------------------------------------------


def pack(about: Mapping[str, int | float | str | bool], state: State | None = None) -> RecordDict:
    records = RecordDict({"about": ConfigRecord({"protocol": PROTOCOL, **about})})
    if state is not None:
        data = state_bytes(state)
        records["state"] = ArrayRecord({"state": Array("uint8", (len(data),), FORMAT, data)})
    return records


def unpack(content: RecordDict, max_bytes: int | None = None) -> tuple[dict[str, Any], State]:
    """What `pack` made, from a peer that may lie.

    Raises: RefusedUpdate, for records that are not ours or longer than `max_bytes`; ArtefactError, for a damaged State.
    """
    # Not by content.config_records and the like: that makes a cycle, which holds the message until garbage is collected.
    about, arrays = content.get("about"), content.get("state")
    if not isinstance(about, ConfigRecord) or about.get("protocol") != PROTOCOL:
        found = about.get("protocol") if isinstance(about, ConfigRecord) else None
        raise RefusedUpdate(f"a message of protocol {found!r} came, expected {PROTOCOL}; install the same version")
    if not isinstance(arrays, ArrayRecord):
        return dict(about), State()
    array = arrays.get("state")
    if array is None or array.stype != FORMAT:
        raise RefusedUpdate("a message came without a State where one is expected")
    if max_bytes is not None and len(array.data) > max_bytes:
        raise RefusedUpdate(f"a message of {len(array.data)} bytes came, expected at most {max_bytes}")
    return dict(about), state_from_bytes(array.data, "a message")


# --- the client's half -------------------------------------------------------------------------------------------


def client_app(seat_of: SeatOf) -> ClientApp:
    """A Flower app for one client; `seat_of` says from the node's configuration who it is."""
    app = ClientApp()

    def answering(do: Callable[[Seat, About, State], RecordDict]) -> Callable[[Message, Context], Message]:
        def answer(message: Message, context: Context) -> Message:
            try:
                about, got = unpack(message.content)
                reply = do(seat_of(context), about, got)
            except Exception as error:
                # What went wrong may speak of this client's files, so only its kind leaves; the rest stays here.
                print(f"personae: {type(error).__name__}: {error}", file=sys.stderr)
                reply = pack({"problem": type(error).__name__})
            return Message(reply, reply_to=message)

        return answer

    app.query("hello")(answering(_hello))
    app.train("local")(answering(_local))
    app.train("personalize")(answering(_personalize))
    return app


def _hello(seat: Seat, about: About, got: State) -> RecordDict:
    live = seat.site.client(seat.name, "hello", seat.seed).model.live()
    return pack({"client": seat.name, **introduction(seat.method, live)})


def _local(seat: Seat, about: About, got: State) -> RecordDict:
    update = seat.local(str(about["run"]), int(about["round"]), int(about["since"]), int(about["committed"]), got)
    metrics = {f"metric.{name}": float(value) for name, value in update.metrics.items()}
    own = {"run": about["run"], "round": about["round"], "client": seat.name, "num_examples": update.num_examples}
    return pack({**own, **metrics}, update.sent)


def _personalize(seat: Seat, about: About, got: State) -> RecordDict:
    told = seat.personalize(str(about["run"]), int(about["since"]), got)
    own = {"run": about["run"], "round": about["round"], "client": seat.name}
    return pack({**own, **{f"figure.{key}": value for key, value in told.items()}})


# --- the server's half -------------------------------------------------------------------------------------------


def serve_grid(
    job: Job,
    grid: Grid,
    *,
    resume: bool = False,
    watch: Watch = ignore,
    patience: Patience | None = None,
    make: MakeMessage | None = None,
    told: Callable[[str, Facts], None] = lambda client, figures: None,
) -> Run:
    """A whole run over a Grid; `told` hears what each client says of its personal model, `make` makes messages.

    Raises: what `engine.rounds.serve` does, and TooFewClients after waiting in vain.
    """

    def carrier(store: Store) -> _OverGrid:
        ours = introduction(job.method, job.members.initial(job.seed))
        return _OverGrid(job, grid, _run_name(job), ours, patience or Patience(), make or Message, told)

    return serve(job, carrier, resume=resume, watch=watch)


def _run_name(job: Job) -> str:
    """Tells this run's messages and its clients' folders from those of another; the same after a resume."""
    if job.folder is None:
        return uuid.uuid4().hex
    path = job.folder / "federation.json"
    if not path.is_file():
        write_json(path, {"run": uuid.uuid4().hex})
    return str(read_json(path)["run"])


@dataclass
class _OverGrid:
    """Carries states as Flower messages. Remembers who sits at which node, and nothing of any round."""

    job: Job
    grid: Grid
    run: str
    ours: Facts
    patience: Patience
    make: MakeMessage
    told: Callable[[str, Facts], None]
    nodes: dict[str, int] = field(default_factory=dict)
    """Node of each client that said hello and whose node is there."""
    strangers: dict[int, str] = field(default_factory=dict)
    """Nodes that were turned away, and why."""
    _asked: dict[str, int] = field(default_factory=dict)
    """Nodes by the message that asked for their name."""
    _last: tuple[bytes, Array] | None = None
    """The Array of the last State: clients that are sent the same share it."""

    # --- who is there ---

    def known(self, number: int) -> Sequence[str]:
        """Waits, and says so, until as many clients as a round needs can be reached."""
        train = self.job.members.train
        needed = self.job.minimum or max(1, len(train))
        started, told = time.monotonic(), False
        while True:
            self._greet()
            names = sorted(name for name in self.nodes if name not in self.job.members.new)
            if len(names) >= needed:
                return names
            waited = time.monotonic() - started
            if waited > self.patience.wait_seconds:
                raise TooFewClients(
                    f"round {number}: {len(names)} clients can be reached after {waited:.0f} s, expected at least "
                    f"{needed}{self._turned_away()}. Start more nodes, or lower federation.minimum, and resume"
                )
            if not told:
                self._say(f"round {number} waits for {needed - len(names)} more clients{self._turned_away()}")
                told = True
            time.sleep(min(0.5, self.patience.wait_seconds / 10))

    def everyone(self) -> Sequence[str]:
        """Training clients first, then those who come afterwards."""
        self._greet()
        new = self.job.members.new
        known = {*self.nodes, *self.job.members.train, *new}
        return [*sorted(known - set(new)), *sorted(new)]

    def _greet(self) -> None:
        """Ask every node that is not known yet who it is, for at most a few seconds."""
        there = set(self.grid.get_node_ids())
        self.nodes = {name: node for name, node in self.nodes.items() if node in there}
        # Who was turned away and comes back, perhaps with another version, is asked again.
        self.strangers = {node: why for node, why in self.strangers.items() if node in there}
        fresh = there - {*self.nodes.values(), *self.strangers, *self._asked.values()}
        for node in sorted(fresh):
            self._asked[self._push(pack({"run": self.run}), node, HELLO)] = node
        # Whoever was slow once is not waited for again: its answer is looked for in passing.
        until = time.monotonic() + (min(30.0, self.patience.wait_seconds) if fresh else 0.0)
        came = {self._asked.pop(m.metadata.reply_to_message_id): m for m in self._pull(set(self._asked), until)}
        for node in sorted(came):
            self._meet(node, came[node])
        self._asked = {asked: node for asked, node in self._asked.items() if node in there}

    def _meet(self, node: int, message: Message) -> None:
        try:
            about, _ = self._open(message)
            name = about.get("client")
            if not isinstance(name, str) or not name:
                raise RefusedUpdate(f"a node failed to introduce itself ({about.get('problem', 'no name')})")
            if (differs := disagreement(self.ours, about)) is not None:
                raise RefusedUpdate(f"client {name!r}: {differs}")
            if name in self.nodes:
                raise RefusedUpdate(f"client {name!r} sits at two nodes; stop one of them")
        except PersonaeError as error:
            self.strangers[node] = str(error)
            self._say(f"a node was turned away: {error}")
            return
        self.nodes[name] = node

    def _turned_away(self) -> str:
        return f" (turned away: {'; '.join(sorted(set(self.strangers.values())))})" if self.strangers else ""

    # --- rounds ---

    def answers(self, server: State, number: int, cohort: Sequence[str], since: Since) -> Iterator[Answer]:
        """In the cohort's order; an answer that comes before its turn waits as bytes."""
        sent: dict[str, str] = {}
        down: dict[str, int] = {}
        for name in cohort:
            got = self.job.method.broadcast(server, name)
            about = {
                "run": self.run,
                "round": number,
                "since": since.now.get(name, 0),
                "committed": since.committed.get(name, 0),
            }
            down[name] = got.num_bytes()
            sent[self._push(self._with_state(about, got), self.nodes[name], LOCAL)] = name
        minimum = len(cohort) if self.job.minimum is None else self.job.minimum
        limit = 2 * server.num_bytes() + 2**20
        waiting, times, started = dict(sent), list[float](), time.monotonic()
        arrived: dict[str, Message] = {}
        for name in cohort:
            while name not in arrived and name in waiting.values():
                until = started + self.patience.deadline(times, minimum)
                for message in self._pull(set(waiting), until, enough=1):
                    arrived[waiting.pop(message.metadata.reply_to_message_id)] = message
                    times.append(time.monotonic() - started)
                if time.monotonic() >= started + self.patience.deadline(times, minimum):
                    break
            if name not in arrived:
                silent = ClientSilent(
                    f"client {name!r} did not answer round {number} within {time.monotonic() - started:.0f} s"
                )
                yield Answer(name, down[name], problem=silent)
            else:
                yield self._answer(arrived.pop(name), name, number, down[name], limit)

    def _answer(self, message: Message, name: str, number: int, bytes_down: int, limit: int) -> Answer:
        try:
            about, sent = self._open(message, limit)
            if (problem := about.get("problem")) is not None:
                kind = PrivacyError if problem == "PrivacyError" else None
                text = f"{problem}; that node's log says more"
                raise (
                    kind(f"client {name!r}: {text}")
                    if kind
                    else ClientFailed(name, number, "local", FederationError(text))
                )
            expected = {"run": self.run, "round": number, "client": name}
            for key, value in expected.items():
                if type(about.get(key)) is not type(value) or about[key] != value:
                    raise RefusedUpdate(f"client {name!r} answered {key} {about.get(key)!r}, expected {value!r}")
            metrics = {
                key.removeprefix("metric."): float(value)
                for key, value in about.items()
                if key.startswith("metric.") and isinstance(value, int | float)
            }
            return Answer(name, bytes_down, Update(name, about.get("num_examples", 0), sent, metrics))
        except PersonaeError as error:
            if isinstance(error, ArtefactError):
                error = RefusedUpdate(f"client {name!r} (round {number}): {error}")
            return Answer(name, bytes_down, problem=error)

    def personalize(self, released: State, backbone: str, names: Sequence[str], since: Since) -> Iterator[str]:
        """The names of those who have made their personal part; the others are said."""
        about = {"run": self.run, "round": self.job.rounds, "committed": 0}
        waiting = {}
        for name in names:
            if name in self.nodes:
                own = {**about, "since": since.now.get(name, 0)}
                waiting[self._push(self._with_state(own, released), self.nodes[name], PERSONALIZE)] = name
        until, done = time.monotonic() + self.patience.deadline_seconds, set[str]()
        failed = dict.fromkeys(set(names) - set(waiting.values()), "is not there")
        for name in names:
            while name in waiting.values() and time.monotonic() < until:
                for message in self._pull(set(waiting), until, enough=1):
                    who = waiting.pop(message.metadata.reply_to_message_id)
                    try:
                        reply, _ = self._open(message)
                        if reply.get("problem") is not None or reply.get("client") != who:
                            raise RefusedUpdate(f"failed with {reply.get('problem')}")
                        done.add(who)
                        told = {k.removeprefix("figure."): v for k, v in reply.items() if k.startswith("figure.")}
                        self.told(who, told)
                    except PersonaeError as error:
                        failed[who] = str(error)
            if name in done:
                yield name
            else:
                self._say(f"client {name!r} was not personalized: it {failed.get(name, 'did not answer')}")

    # --- messages ---

    def _with_state(self, about: Mapping[str, Any], state: State) -> RecordDict:
        data = state_bytes(state)
        if self._last is None or self._last[0] != data:
            self._last = (data, Array("uint8", (len(data),), FORMAT, data))
        records = pack(about)
        records["state"] = ArrayRecord({"state": self._last[1]})
        return records

    def _push(self, content: RecordDict, node: int, kind: str) -> str:
        (sent,) = self.grid.push_messages([self.make(content, node, kind)])
        return sent

    def _pull(self, waiting: set[str], until: float, enough: float = math.inf) -> Iterator[Message]:
        """Replies as they come, until all or `enough` are there or the time is over."""
        pause, seen = 0.01, 0
        while waiting:
            for message in self.grid.pull_messages(waiting):
                if message.metadata.reply_to_message_id in waiting:
                    waiting.discard(message.metadata.reply_to_message_id)
                    seen, pause = seen + 1, 0.01
                    yield message
            if not waiting or seen >= enough or time.monotonic() >= until:
                return
            time.sleep(min(pause, max(0.0, until - time.monotonic())))
            pause = min(0.5, pause * 1.5)

    def _open(self, message: Message, max_bytes: int | None = None) -> tuple[dict[str, Any], State]:
        if message.has_error():
            raise RefusedUpdate(f"Flower reports: {message.error.reason}")
        return unpack(message.content, max_bytes)

    def _say(self, text: str) -> None:
        print(f"personae: {text}", file=sys.stderr, flush=True)


def server_app(main: Callable[[Grid, Mapping[str, Any]], None]) -> ServerApp:
    """A Flower app that calls `main` with the grid and the run's configuration."""
    app = ServerApp()

    @app.main()
    def begin(grid: Grid, context: Context) -> None:
        main(grid, context.run_config)

    return app


# --- on one machine ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flower:
    """Runs a job on Flower's own simulation: clients in worker processes, one per `cpus_per_client` processors."""

    patience: Patience = Patience()
    cpus_per_client: float = 1.0

    def run(self, job: Job, *, resume: bool = False, watch: Watch = ignore) -> Run:
        """Raises: ConfigError, ArtefactError, or the FederationError that stopped a round."""
        from flwr.simulation import run_simulation

        names = [*sorted(job.members.train), *sorted(job.members.new)]
        done: list[Run] = []

        def main(grid: Grid, _: Mapping[str, Any]) -> None:
            done.append(serve_grid(job, grid, resume=resume, watch=watch, patience=self.patience))

        run_simulation(
            server_app=server_app(main),
            client_app=client_app(simulated(job, names)),
            num_supernodes=len(names),
            backend_config={"client_resources": {"num_cpus": self.cpus_per_client, "num_gpus": 0.0}},
        )
        return done[0]


def simulated(job: Job, names: Sequence[str]) -> SeatOf:
    """Seats by the number that Flower gives each simulated node; their personal files go to the run's own folder."""
    method, site, seed, folder = job.method, job.site, job.seed, job.folder
    if folder is None:
        raise ConfigError("simulated clients keep their states in the run's folder; give the job one")
    personal: Path = folder / "clients"
    nodes = folder / "checkpoint" / "nodes"

    def seat_of(context: Context) -> Seat:
        name = names[int(context.node_config["partition-id"])]
        return Seat(name, method, site, seed, nodes / name, personal)

    return seat_of
