"""The distributed engine: the same rounds over Flower's messages, simulated on one machine or deployed on many.

A message is one ConfigRecord of scalars ("about") and, where a State travels, one Array that holds it in the format of
our files: no pickle, any dtype, and one decoder for disk and wire.
"""

from __future__ import annotations

import math
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from personae.artefact.save import (
    explained,
    load_state,
    read_json,
    save_state,
    state_bytes,
    state_from_bytes,
    write_json,
)
from personae.core import Facts, Job, Run, State, Update, ignore
from personae.engine.patience import Patience
from personae.engine.population import SAFE_NAME
from personae.engine.rounds import Answer, Since, Store, Watch, serve
from personae.engine.seat import Seat, disagreement, introduction
from personae.engine.validate import check_privacy
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

MakeMessage = Callable[[RecordDict, int, str, float], Message]
"""From content, node, kind and seconds to live."""
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
    # Not by content.config_records and the like: each makes a cycle that holds the message until garbage is collected.
    about, arrays = content.get("about"), content.get("state")
    if not isinstance(about, ConfigRecord) or about.get("protocol") != PROTOCOL:
        found = about.get("protocol") if isinstance(about, ConfigRecord) else None
        raise RefusedUpdate(f"a message of protocol {found!r} came, expected {PROTOCOL}; install the same version")
    for key, value in about.items():
        if not isinstance(value, int | float | str) or len(key) > MAX_NAME:
            raise RefusedUpdate(f"a message came with {key[:MAX_NAME]!r} that is no single number or text")
        if isinstance(value, str) and len(value) > (2**20 if key in ("method", "shapes") else 200):
            raise RefusedUpdate(f"a message came with {len(value)} characters of {key!r}")
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
    run, since = str(about["run"]), int(about["since"])
    seat.personalize(run, since, got)
    try:
        told = seat.figures(run, since)
    except Exception as error:  # the personal model is there all the same
        print(f"personae: measuring failed: {type(error).__name__}: {error}", file=sys.stderr)
        told = {}
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
        return _OverGrid(job, grid, _run_name(job), ours, patience or Patience(), make or _message, told)

    return serve(job, carrier, resume=resume, watch=watch)


def _message(content: RecordDict, node: int, kind: str, seconds: float) -> Message:
    return Message(content, node, kind, ttl=seconds)


def _run_name(job: Job) -> str:
    """Tells this run's messages and its clients' folders from those of another; the same after a resume."""
    if job.folder is None:
        return uuid.uuid4().hex
    path = job.folder / "federation.json"
    if not path.is_file():
        write_json(path, {"run": uuid.uuid4().hex})
    return str(read_json(path)["run"])


ASK_AGAIN_SECONDS = 30.0
"""After which a node that did not say who it is, or was turned away, is asked again."""

MAX_NAME = 64


@dataclass(frozen=True)
class _Owed:
    """A message that a client has not answered."""

    message: str
    node: int


@dataclass
class _OverGrid:
    """Carries states as Flower messages. Remembers who sits at which node and who owes an answer, nothing else."""

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
    _asked_at: dict[int, float] = field(default_factory=dict)
    """When each node was last asked."""
    _there: set[int] = field(default_factory=set)
    _owing: dict[str, _Owed] = field(default_factory=dict)
    """Clients that were too late: they get no other message before they have answered, or a queue would grow."""

    # --- who is there ---

    def known(self, number: int) -> Sequence[str]:
        """Waits, and says so, until as many clients as a round needs can be reached."""
        needed = self.job.minimum or max(1, len(self.job.members.train))
        names = self._wait_for(lambda names: len(names) >= needed, f"round {number}", f"{needed} clients")
        if len(names) < needed:
            raise TooFewClients(
                f"round {number}: {len(names)} clients can be reached after {self.patience.wait_seconds:g} s, expected "
                f"at least {needed}{self._turned_away()}. Start more nodes, or lower federation.minimum, and resume"
            )
        return names

    def everyone(self, since: Since) -> Sequence[str]:
        """Training clients first, then those who come afterwards. Waits for all who took part or are expected."""
        new = set(self.job.members.new)
        expected = {*since.now, *new}
        self._wait_for(lambda _: expected <= self.nodes.keys(), "the end", ", ".join(sorted(expected)))
        known = {*self.nodes, *self.job.members.train, *since.now} - new
        return [*sorted(known), *sorted(new)]

    def _wait_for(self, enough: Callable[[Sequence[str]], bool], what: str, whom: str) -> Sequence[str]:
        """The training clients that can be reached, once they are enough or the time is over."""
        until, said = time.monotonic() + self.patience.wait_seconds, False
        while True:
            self._greet()
            names = sorted(n for n in self.nodes if n not in self.job.members.new and n not in self._owing)
            if enough(names) or time.monotonic() >= until:
                return names
            if not said:
                here = ", ".join(names) or "nobody"
                self._say(f"{what} waits for {whom}; {here} can be reached{self._turned_away()}")
                said = True
            time.sleep(min(0.5, self.patience.wait_seconds / 10))

    def _greet(self) -> None:
        """Ask every node that is not known who it is; only those that are new are waited for, a few seconds."""
        there, now = set(self.grid.get_node_ids()), time.monotonic()
        self.nodes = {name: node for name, node in self.nodes.items() if node in there}
        self._asked_at = {node: at for node, at in self._asked_at.items() if node in there}
        # Whoever was turned away may have changed; and with every node that goes, a name may have become free.
        again = there >= self._there
        self.strangers = {
            node: why
            for node, why in self.strangers.items()
            if again and node in there and now < self._asked_at[node] + ASK_AGAIN_SECONDS
        }
        self._there = there
        self._settle(there)
        quiet = {n for n in self._asked.values() if n in there and now < self._asked_at[n] + ASK_AGAIN_SECONDS}
        unknown = there - {*self.nodes.values(), *self.strangers, *quiet}
        fresh = unknown - self._asked_at.keys()
        for node in sorted(unknown):
            self._asked_at[node] = now
            self._asked[self._push(pack({}), node, HELLO)] = node
        until = now + (min(30.0, self.patience.wait_seconds / 4) if fresh else 0.0)
        came = {}
        for asked, message in self._pull(self._asked, until):
            came[self._asked.pop(asked)] = message
        for node in sorted(came):
            if node in there and node not in self.nodes.values():
                self._meet(node, came[node])
        self._asked = {message: node for message, node in self._asked.items() if node in there}

    def _meet(self, node: int, message: Message) -> None:
        try:
            about, _ = self._open(message)
            name = about.get("client")
            if not isinstance(name, str) or len(name) > MAX_NAME or not SAFE_NAME.fullmatch(name):
                raise RefusedUpdate(f"a node failed to introduce itself ({_problem(about) or 'no usable name'})")
            if (differs := disagreement(self.ours, about)) is not None:
                raise RefusedUpdate(f"client {name!r}: {differs}")
            if name in self.nodes:
                raise RefusedUpdate(f"client {name!r} sits at two nodes; stop one of them")
        except PersonaeError as error:
            self.strangers[node] = str(error)
            self._say(f"a node was turned away: {error}")
            return
        self.nodes[name] = node

    def _settle(self, there: set[int]) -> None:
        """Forget what clients owed who have answered since, or whose node is gone."""
        answered = {asked for asked, _ in self._pull([owed.message for owed in self._owing.values()], 0.0)}
        self._owing = {
            name: owed for name, owed in self._owing.items() if owed.message not in answered and owed.node in there
        }

    def _turned_away(self) -> str:
        return f" (turned away: {'; '.join(sorted(set(self.strangers.values())))})" if self.strangers else ""

    # --- rounds ---

    def answers(self, server: State, number: int, cohort: Sequence[str], since: Since) -> Iterator[Answer]:
        """In the cohort's order. One reply is in memory at a time: one that comes before its turn waits in a file."""
        down: dict[str, int] = {}
        waiting: dict[str, str] = {}
        send = self._sender()
        for name in cohort:
            got = self.job.method.broadcast(server, name)
            about = {
                "run": self.run,
                "round": number,
                "since": since.now.get(name, 0),
                "committed": since.committed.get(name, 0),
            }
            down[name] = got.num_bytes()
            waiting[send(about, got, self.nodes[name], LOCAL)] = name
        minimum = len(cohort) if self.job.minimum is None else self.job.minimum
        limit = 2 * server.num_bytes() + 2**20
        times, started = list[float](), time.monotonic()
        early: dict[str, Callable[[], Answer]] = {}
        for name in cohort:
            answer: Answer | None = early.pop(name)() if name in early else None
            while answer is None and time.monotonic() < started + self.patience.deadline(times, minimum):
                until = started + self.patience.deadline(times, minimum)
                for asked, message in self._pull(waiting, until, enough=1):
                    who = waiting.pop(asked)
                    came = self._answer(message, who, number, down[who], limit)
                    if came.problem is None:  # a failure says nothing of how long honest work takes
                        times.append(time.monotonic() - started)
                    if who == name:
                        answer = came
                    else:
                        early[who] = self._put_aside(came)
                    del message, came
                if not waiting and answer is None:
                    break
            if answer is None:
                late = {who: message for message, who in waiting.items()}
                if name in late:
                    self._owing[name] = _Owed(late[name], self.nodes[name])
                seconds = time.monotonic() - started
                silent = ClientSilent(f"client {name!r} did not answer round {number} within {seconds:.0f} s")
                answer = Answer(name, down[name], problem=silent)
            yield answer
            del answer

    def _put_aside(self, answer: Answer) -> Callable[[], Answer]:
        """A function that gives the answer back, whose State has meanwhile been in a file."""
        update, folder = answer.update, self.job.folder
        if update is None or folder is None:
            return lambda: answer
        path = folder / "checkpoint" / "early" / f"{answer.client}.safetensors"
        with explained(path, "writing"):
            path.parent.mkdir(exist_ok=True)
        save_state(path, update.sent, sync=False)
        light = replace(answer, update=replace(update, sent=State()))  # all that `back` holds on to

        def back() -> Answer:
            assert light.update is not None, "only updates are put aside"
            sent = load_state(path)
            path.unlink()
            return replace(light, update=replace(light.update, sent=sent))

        return back

    def _answer(self, message: Message, name: str, number: int, bytes_down: int, limit: int) -> Answer:
        try:
            about, sent = self._open(message, limit)
            if (problem := _problem(about)) is not None:
                raise ClientFailed(name, number, "local", FederationError(f"{problem}; its own log says more"))
            for key, value in {"run": self.run, "round": number, "client": name}.items():
                if type(about.get(key)) is not type(value) or about[key] != value:
                    raise RefusedUpdate(f"client {name!r} answered {key} {about.get(key)!r}, expected {value!r}")
            metrics = {
                key.removeprefix("metric."): float(value)
                for key, value in about.items()
                if key.startswith("metric.") and isinstance(value, int | float)
            }
            update = Update(name, about.get("num_examples", 0), sent, metrics)
            try:
                check_privacy(update, round=number, personal=self.job.method.personal)
            except PrivacyError as error:
                raise RefusedUpdate(
                    f"client {name!r} sent what is personal; it was dropped (round {number})"
                ) from error
            return Answer(name, bytes_down, update)
        except PersonaeError as error:
            if isinstance(error, ArtefactError):
                error = RefusedUpdate(f"client {name!r} (round {number}): {error}")
            return Answer(name, bytes_down, problem=error)

    def personalize(self, released: State, backbone: str, names: Sequence[str], since: Since) -> Iterator[str]:
        """The names of those who have made their personal part; the others are said."""
        waiting: dict[str, str] = {}
        send = self._sender()
        for name in names:
            if name in self.nodes:
                own = {"run": self.run, "round": self.job.rounds, "since": since.now.get(name, 0)}
                waiting[send(own, released, self.nodes[name], PERSONALIZE)] = name
        until, done = time.monotonic() + self.patience.deadline_seconds, set[str]()
        failed = dict.fromkeys(set(names) - set(waiting.values()), "is not there")
        for name in names:
            while name in waiting.values() and time.monotonic() < until:
                for asked, message in self._pull(waiting, until, enough=1):
                    who = waiting.pop(asked)
                    try:
                        reply, _ = self._open(message)
                        if (problem := _problem(reply)) is not None or reply.get("client") != who:
                            raise RefusedUpdate(f"failed with {problem or 'an answer that is not its own'}")
                        done.add(who)
                        self.told(
                            who, {k.removeprefix("figure."): v for k, v in reply.items() if k.startswith("figure.")}
                        )
                    except PersonaeError as error:
                        failed[who] = str(error)
            if name in done:
                yield name
            else:
                self._say(f"client {name!r} was not personalized: it {failed.get(name, 'did not answer')}")

    # --- messages ---

    def _sender(self) -> Callable[[Mapping[str, Any], State, int, str], str]:
        """Sends States; clients that are sent the same one after the other share its bytes."""
        last: tuple[State, Array] | None = None

        def send(about: Mapping[str, Any], state: State, node: int, kind: str) -> str:
            nonlocal last
            if last is None or not _same(last[0], state):
                data = state_bytes(state)
                last = (state, Array("uint8", (len(data),), FORMAT, data))
            records = pack(about)
            records["state"] = ArrayRecord({"state": last[1]})
            return self._push(records, node, kind)

        return send

    def _push(self, content: RecordDict, node: int, kind: str) -> str:
        """Nobody works on what is older than the deadline; some slack for clocks."""
        (sent,) = self.grid.push_messages([self.make(content, node, kind, self.patience.deadline_seconds + 60.0)])
        return sent

    def _pull(self, waiting: Collection[str], until: float, enough: float = math.inf) -> Iterator[tuple[str, Message]]:
        """Messages with their replies, one at a time, until all or `enough` are answered or the time is over."""
        pause, seen, left = 0.01, 0, list(waiting)
        while left:
            for asked in list(left):
                for message in self.grid.pull_messages([asked]):
                    left.remove(asked)
                    seen, pause = seen + 1, 0.01
                    yield asked, message
                    del message
                if seen >= enough:
                    return
            if not left or time.monotonic() >= until:
                return
            time.sleep(min(pause, max(0.0, until - time.monotonic())))
            pause = min(0.5, pause * 1.5)

    def _open(self, message: Message, max_bytes: int = 2**16) -> tuple[dict[str, Any], State]:
        if message.has_error():
            raise RefusedUpdate(f"Flower reports: {str(message.error.reason)[:200]}")
        return unpack(message.content, max_bytes)

    def _say(self, text: str) -> None:
        print(f"personae: {text}", file=sys.stderr, flush=True)


def _problem(about: Mapping[str, Any]) -> str | None:
    """The kind of error that a client reports; its word for it, if it is one."""
    problem = about.get("problem")
    if problem is None:
        return None
    return (
        problem if isinstance(problem, str) and problem.isalnum() and len(problem) <= MAX_NAME else "an unnamed error"
    )


def _same(left: State, right: State) -> bool:
    """Whether two States hold the very same tensors and equal facts."""
    return all(
        a.keys() == b.keys() and all(a[name] is b[name] for name in a)
        for a, b in ((left.params, right.params), (left.extras, right.extras))
    ) and dict(left.facts) == dict(right.facts)


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
    gpus_per_client: float = 0.0

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
            backend_config={"client_resources": {"num_cpus": self.cpus_per_client, "num_gpus": self.gpus_per_client}},
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
