"""What a server does, whoever carries the messages: rounds, validation, checkpoints, and the release at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from personae.aggregate.clip import clipped
from personae.artefact.run_folder import RunFolder
from personae.artefact.save import digest
from personae.core import Arrays, Job, Round, Rule, Run, State, Traffic, Update, Updates, Watch, stream
from personae.core import Client as ClientRecord
from personae.engine.validate import check_update, is_finite
from personae.errors import ConfigError, EmptyRound, FederationError, PersonaeError, PrivacyError, TooFewClients


@dataclass(frozen=True)
class Answer:
    """What became of one client in one round: an update, or the problem that prevented it.

    `settle` makes permanent what the client keeps, once its update has been taken.
    """

    client: str
    bytes_down: int
    update: Update | None = None
    problem: PersonaeError | None = None
    settle: Callable[[], None] | None = None


class Carrier(Protocol):
    """Brings a State to clients and their answers back."""

    def everyone(self, since: Since) -> Sequence[str]:
        """Whoever gets a personal model at the end: training clients first."""
        ...

    def known(self, number: int) -> Sequence[str]:
        """Training clients that can be reached for a round. Raises: TooFewClients, when none more came in time."""
        ...

    def answers(self, server: State, number: int, cohort: Sequence[str], since: Since) -> Iterator[Answer]:
        """One per client of the cohort, in its order."""
        ...

    def personalize(self, released: State, backbone: str, names: Sequence[str], since: Since) -> Iterator[str]:
        """Every client's name, once its personal state is where it belongs."""
        ...


@dataclass(frozen=True)
class Since:
    """What the server knows of its clients' pasts: the round of each one's last update that counted.

    `now` is at this moment, `committed` at the last checkpoint, to which a stopped run goes back. 0: none yet.
    """

    now: Mapping[str, int]
    committed: Mapping[str, int]


def serve(job: Job, carrier: Callable[[Store], Carrier], *, resume: bool, watch: Watch) -> Run:
    """A whole run, from the first round or the last checkpoint to everybody's personal model.

    Raises: ConfigError, ArtefactError, or the FederationError that stopped a round.
    """
    if job.rounds < 0 or job.checkpoint_every < 1:
        raise ConfigError(
            f"rounds is {job.rounds}, expected at least 0; checkpoint_every is {job.checkpoint_every}, "
            "expected at least 1"
        )
    store: Store = _InMemory() if job.folder is None else RunFolder(job.folder)
    # Before there is a folder, so that a refused configuration leaves none behind.
    server = job.method.init(job.members.initial(job.seed))
    with store.held() if resume else store.begun():
        begun = store.restore() if resume else None
        done, server, records = begun or (0, server, [])
        if begun is None:
            store.commit(0, server)
        carried, past = carrier(store), _past(records)
        committed = dict(past)
        for number in range(done + 1, job.rounds + 1):
            server, record = play(job, carried, server, number, Since(past, committed), watch)
            store.append_round(record)
            records.append(record)
            past.update(dict.fromkeys(record["clients"], number))
            if number % job.checkpoint_every == 0 or number == job.rounds:
                store.commit(number, server)
                committed = dict(past)
        released = job.method.release(server)
        started = time.perf_counter()
        names = carried.everyone(Since(past, committed))
        backbone = digest(released.params)
        store.save_released(released, backbone)
        reached = []
        for name in carried.personalize(released, backbone, names, Since(past, committed)):
            reached.append(name)
            done_all = len(reached) == len(names)
            watch(
                _progress(job, "personalize", job.rounds, name, {n: {} for n in reached}, len(names), started, done_all)
            )
        if not reached:
            raise TooFewClients(
                "no client could be reached to personalize; the rounds are saved: start them, and resume"
            )
        traffic = _traffic(records, reached, released.num_bytes())
        seconds = {
            "train_seconds": sum(record["seconds"] for record in records),
            "personalize_seconds": time.perf_counter() - started,
        }
        store.complete({"stages": seconds, "traffic": {n: {"up": t.up, "down": t.down} for n, t in traffic.items()}})
        return Run(released, _Personal(store, reached), traffic, records)


def play(
    job: Job, carrier: Carrier, server: State, number: int, since: Since, watch: Watch
) -> tuple[State, dict[str, Any]]:
    """One round: every client of the cohort in name order, then the server. Returns its state and the round's record.

    Raises: PrivacyError, always; for any other problem of a client, the problem itself, as soon as the round can no
    longer have `job.minimum` updates.
    """
    started = time.perf_counter()
    cohort = sorted(job.members.cohort(number, job.seed, carrier.known(number)))
    if not cohort:
        raise EmptyRound(f"round {number} has no clients; check the cohort")
    minimum = len(cohort) if job.minimum is None else job.minimum
    if len(cohort) < minimum:
        raise TooFewClients(f"round {number} has {len(cohort)} clients, expected at least {minimum}")
    clients: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}

    def tell(name: str, done: bool = False) -> None:
        watch(_progress(job, "train", number, name, clients, len(cohort), started, done, len(refused)))

    def arrive() -> Iterator[Update]:
        for answer in carrier.answers(server, number, cohort, since):
            update, problem = answer.update, answer.problem
            if update is not None:
                try:
                    check_update(
                        update,
                        round=number,
                        personal=job.method.personal,
                        known=server.params,
                        max_examples=job.max_examples,
                    )
                except PersonaeError as error:
                    problem = error
            if problem is not None:
                refused[answer.client] = f"{type(problem).__name__}: {problem}"
                if isinstance(problem, PrivacyError) or len(cohort) - len(refused) < minimum:
                    raise problem
                tell(answer.client)
                continue
            assert update is not None, "an answer holds an update or a problem"
            clients[answer.client] = {
                "loss": update.metrics.get("loss"),
                "num_examples": update.num_examples,
                "bytes_up": update.num_bytes(),
                "bytes_down": answer.bytes_down,
            }
            if answer.settle is not None:
                answer.settle()
            tell(answer.client)
            del answer
            if job.clip_norm is not None:
                update = clipped(update, server.params, job.clip_norm)
            yield replace(update, since=number - 1)
            del update  # before the next client trains

    updates = Arriving(arrive(), job.rule)
    server = job.method.aggregate(server, updates)
    updates.finish()
    if broken := [n for n, v in (*server.params.items(), *server.extras.items()) if not is_finite(v)]:
        raise FederationError(
            f"round {number} ended in values that are not finite, in {broken[0]} first; it was not saved. Some update "
            "was finite but huge: set aggregation.clip_norm or a robust aggregation.rule, and resume"
        )
    tell(cohort[-1], done=True)
    record: dict[str, Any] = {"round": number, "seconds": time.perf_counter() - started, "clients": clients}
    return server, record | ({"refused": refused} if refused else {})


def load_parts(client: ClientRecord, got: Arrays, kept: Arrays, seed: int) -> None:
    """Load what was sent and what was kept; a name in neither starts from the client's own stream."""
    parts = {**got, **kept}
    missing = client.model.live().keys() - parts.keys()
    if missing:
        parts |= client.model.initial(stream(seed, client.name, "init"), missing.__contains__)
    client.model.load(parts)


def _past(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The round of each client's last update that counted."""
    return {name: record["round"] for record in records for name in record["clients"]}


def _traffic(records: Sequence[Mapping[str, Any]], names: Sequence[str], released_bytes: int) -> dict[str, Traffic]:
    """Bytes of the rounds, and of the released model that everyone downloads once to personalize."""
    total = {name: Traffic(0, released_bytes) for name in names}
    for record in records:
        for name, client in record["clients"].items():
            total[name] = total.get(name, Traffic()) + Traffic(client["bytes_up"], client["bytes_down"])
    return total


def _progress(
    job: Job,
    stage: Literal["train", "personalize"],
    number: int,
    name: str,
    clients: Mapping[str, Any],
    size: int,
    started: float,
    done: bool,
    refused: int = 0,
) -> Round:
    losses = [c["loss"] for c in clients.values() if c.get("loss") is not None]
    return Round(
        stage,
        number,
        job.rounds,
        name,
        len(clients),
        size,
        sum(losses) / len(losses) if losses else float("nan"),
        sum(c.get("bytes_up", 0) for c in clients.values()),
        sum(c.get("bytes_down", 0) for c in clients.values()),
        time.perf_counter() - started,
        done,
        refused,
    )


class Arriving:
    """A round's updates while they arrive: each exists only while it is looked at."""

    def __init__(self, updates: Iterator[Update], rule: Rule) -> None:
        self._updates, self._rule, self._walked = updates, rule, False

    def __iter__(self) -> Iterator[Update]:
        assert not self._walked, "updates are walked once; keep what is needed of them on the way"
        self._walked = True
        return self._updates

    def combined(self) -> Arrays:
        return self._rule(iter(self))

    def among(self, clients: Collection[str]) -> Updates:
        return Arriving((update for update in self if update.client in clients), self._rule)

    def finish(self) -> None:
        """Let the clients run that the method did not look at."""
        for _ in self._updates:
            pass


class Store(Protocol):
    """Where an engine puts what must outlive a round: memory, or a RunFolder."""

    def begun(self) -> AbstractContextManager[None]: ...
    def held(self) -> AbstractContextManager[None]: ...
    def restore(self) -> tuple[int, State, list[dict[str, Any]]] | None: ...
    def append_round(self, record: Mapping[str, Any]) -> None: ...
    def stage(self, client: str, round: int, kept: State) -> None: ...
    def kept(self, client: str) -> State: ...
    def commit(self, round: int, server: State) -> None: ...
    def save_released(self, released: State, backbone: str) -> None: ...
    def save_personal(self, client: str, personal: State, backbone: str) -> None: ...
    def has_personal(self, client: str, backbone: str) -> bool: ...
    def personal(self, client: str) -> State: ...
    def complete(self, cost: Mapping[str, Any]) -> None: ...


class _InMemory:
    """What a RunFolder does, without a folder."""

    def __init__(self) -> None:
        self._kept: dict[str, State] = {}
        self._personal: dict[str, State] = {}

    def begun(self) -> AbstractContextManager[None]:
        return nullcontext()

    held = begun

    def append_round(self, record: Mapping[str, Any]) -> None: ...
    def commit(self, round: int, server: State) -> None: ...
    def save_released(self, released: State, backbone: str) -> None: ...
    def complete(self, cost: Mapping[str, Any]) -> None: ...

    def restore(self) -> None:
        return None

    def stage(self, client: str, round: int, kept: State) -> None:
        self._kept[client] = kept

    def kept(self, client: str) -> State:
        return self._kept.get(client, State())

    def save_personal(self, client: str, personal: State, backbone: str) -> None:
        self._personal[client] = personal

    def has_personal(self, client: str, backbone: str) -> bool:
        return client in self._personal

    def personal(self, client: str) -> State:
        return self._personal[client]


class _Personal(Mapping[str, State]):
    """Personal states by client, read from the store when they are asked for."""

    def __init__(self, store: Store, names: Sequence[str]) -> None:
        self._store, self._names = store, names

    def __getitem__(self, client: str) -> State:
        if client not in self._names:
            raise KeyError(client)
        return self._store.personal(client)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
