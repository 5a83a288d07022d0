"""The embedded engine: server and clients in one process, one client at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from personae.artefact.run_folder import RunFolder
from personae.artefact.save import digest
from personae.core import (
    Arrays,
    Client,
    Job,
    Round,
    Rule,
    Run,
    State,
    Traffic,
    Update,
    Updates,
    ignore,
    stream,
)
from personae.engine.validate import check_update
from personae.errors import ClientFailed, ConfigError, EmptyRound


@dataclass(frozen=True)
class InProcess:
    """Runs a job's clients one after the other, adding their updates up as they finish.

    Memory holds one model, one update and one sum, whatever the number of clients. With a folder, the state after each
    `checkpoint_every` rounds is committed in one rename: a kill at any moment loses at most that many rounds, and a
    resume ends in the same bits. `resume` takes up a folder that exists, from round 0 if nothing was committed.
    """

    def run(self, job: Job, *, resume: bool = False, watch: Callable[[Round], None] = ignore) -> Run:
        """Raises: ConfigError, ArtefactError, or the FederationError that stopped a round."""
        if job.rounds < 0 or job.checkpoint_every < 1:
            raise ConfigError(
                f"rounds is {job.rounds}, expected at least 0; checkpoint_every is {job.checkpoint_every}, "
                "expected at least 1"
            )
        store: Store = _InMemory() if job.folder is None else RunFolder(job.folder)
        # Before there is a folder, so that a refused configuration leaves none behind.
        server = job.method.init(job.members.initial(job.seed))
        store.hold() if resume else store.create()
        try:
            begun = store.restore() if resume else None
            done, server, records = begun or (0, server, [])
            if begun is None:
                store.commit(0, server)
            for number in range(done + 1, job.rounds + 1):
                server, record = _round(job, store, server, number, watch)
                store.append_round(record)
                records.append(record)
                if number % job.checkpoint_every == 0 or number == job.rounds:
                    store.commit(number, server)
            released = job.method.release(server)
            started = time.perf_counter()
            names = _personalize(job, store, released, watch)
            traffic = _traffic(records, names, released.num_bytes())
            seconds = {
                "train_seconds": sum(record["seconds"] for record in records),
                "personalize_seconds": time.perf_counter() - started,
            }
            store.complete(
                {"stages": seconds, "traffic": {n: {"up": t.up, "down": t.down} for n, t in traffic.items()}}
            )
            return Run(released, _Personal(store, names), traffic, records)
        finally:
            store.release()


def _round(
    job: Job, store: Store, server: State, number: int, watch: Callable[[Round], None]
) -> tuple[State, dict[str, Any]]:
    """One round: every client of the cohort in name order, then the server."""
    started = time.perf_counter()
    cohort = sorted(job.members.cohort(number, job.seed))
    clients: dict[str, dict[str, Any]] = {}

    def arrive() -> Iterator[Update]:
        for name in cohort:
            update, down = _local(job, store, server, name, number)
            check_update(
                update,
                round=number,
                personal=job.method.personal,
                known=server.params,
                max_examples=job.max_examples,
            )
            clients[name] = {
                "loss": update.metrics.get("loss"),
                "num_examples": update.num_examples,
                "bytes_up": update.num_bytes(),
                "bytes_down": down,
            }
            watch(_progress(job, "train", number, name, clients, len(cohort), started, done=False))
            yield update
            del update  # before the next client trains

    updates = Arriving(arrive(), job.rule)
    if not cohort:
        raise EmptyRound(f"round {number} has no clients; check the cohort")
    server = job.method.aggregate(server, updates)
    updates.finish()
    watch(_progress(job, "train", number, cohort[-1], clients, len(cohort), started, done=True))
    return server, {"round": number, "seconds": time.perf_counter() - started, "clients": clients}


def _local(job: Job, store: Store, server: State, name: str, number: int) -> tuple[Update, int]:
    """One client's round. Returns its update and the bytes that it was sent."""
    got, kept, stage = job.method.broadcast(server, name), store.kept(name), "load"
    try:
        client = job.site.client(name, number, job.seed)
        load_parts(client, got.params, kept.params, job.seed)
        stage = "local"
        update, kept = job.method.local(client, got, kept)
    except Exception as error:
        raise ClientFailed(name, number, stage, error) from error
    store.stage(name, number, kept)
    return replace(update, since=number - 1), got.num_bytes()


def load_parts(client: Client, got: Arrays, kept: Arrays, seed: int) -> None:
    """Load what was sent and what was kept; a name in neither starts from the client's own stream."""
    parts = {**got, **kept}
    missing = client.model.live().keys() - parts.keys()
    if missing:
        parts |= client.model.initial(stream(seed, client.name, "init"), missing.__contains__)
    client.model.load(parts)


def personalize_one(job: Job, released: State, kept: State, name: str) -> State:
    """What one client samples with. Raises: ClientFailed."""
    try:
        client = job.site.client(name, "personalize", job.seed)
        load_parts(client, released.params, kept.params, job.seed)
        return job.method.personalize(client, released, kept)
    except Exception as error:
        raise ClientFailed(name, job.rounds, "personalize", error) from error


def _personalize(job: Job, store: Store, released: State, watch: Callable[[Round], None]) -> list[str]:
    """Every client, after training; those that a resumed run finds finished are not repeated. Returns their names."""
    started = time.perf_counter()
    names = [*sorted(job.members.train), *sorted(job.members.new)]
    backbone = digest(released.params)
    store.save_released(released, backbone)
    for count, name in enumerate(names, start=1):
        if not store.has_personal(name, backbone):
            store.save_personal(name, personalize_one(job, released, store.kept(name), name), backbone)
        watch(
            _progress(
                job,
                "personalize",
                job.rounds,
                name,
                {n: {} for n in names[:count]},
                len(names),
                started,
                done=count == len(names),
            )
        )
    return names


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
    *,
    done: bool,
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

    def create(self) -> None: ...
    def hold(self) -> None: ...
    def release(self) -> None: ...
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

    def create(self) -> None: ...
    def hold(self) -> None: ...
    def release(self) -> None: ...
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
