"""The server's half: a carrier that brings States to clients as Flower's messages, and their answers back."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from personae.artefact.save import explained, load_state, read_json, save_state, write_json
from personae.core import Facts, Job, Run, State, Update, Watch, ignore
from personae.engine.flower.nodes import Nodes
from personae.engine.flower.wire import LOCAL, PERSONALIZE, MakeMessage, Post, opened, problem_in, say
from personae.engine.patience import Patience
from personae.engine.rounds import Answer, Since, Store, serve
from personae.engine.seat import introduction
from personae.engine.validate import check_privacy
from personae.errors import (
    ArtefactError,
    ClientFailed,
    ClientSilent,
    FederationError,
    PersonaeError,
    PrivacyError,
    RefusedUpdate,
    TooFewClients,
)

Told = Callable[[str, Facts], None]
"""Hears what each client says of its personal model."""


def serve_grid(
    job: Job,
    grid: Grid,
    *,
    resume: bool = False,
    watch: Watch = ignore,
    patience: Patience | None = None,
    make: MakeMessage | None = None,
    told: Told = lambda client, figures: None,
) -> Run:
    """A whole run over a Grid; `make` makes messages, where Flower's own cannot.

    Raises: what `engine.rounds.serve` does, and TooFewClients after waiting in vain.
    """
    how_long = patience or Patience()

    def carrier(store: Store) -> _OverGrid:
        ours = introduction(job.method, job.members.initial(job.seed))
        # Nobody works on what is older than the deadline; some slack for clocks.
        post = Post(grid, make or _message, how_long.deadline_seconds + 60.0)
        nodes = Nodes(post, ours, frozenset(job.members.new), how_long.wait_seconds)
        return _OverGrid(job, _run_name(job), post, nodes, how_long, told)

    return serve(job, carrier, resume=resume, watch=watch)


def server_app(main: Callable[[Grid, Mapping[str, Any]], None]) -> ServerApp:
    """A Flower app that calls `main` with the grid and the run's configuration."""
    app = ServerApp()

    @app.main()
    def begin(grid: Grid, context: Context) -> None:
        main(grid, context.run_config)

    return app


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


@dataclass(frozen=True)
class _OverGrid:
    """Carries States as Flower's messages; what it remembers from round to round is in `nodes`."""

    job: Job
    run: str
    post: Post
    nodes: Nodes
    patience: Patience
    told: Told

    def known(self, number: int) -> Sequence[str]:
        """Waits, and says so, until as many clients as a round needs can be reached."""
        needed = self.job.minimum or max(1, len(self.job.members.train))
        names = self.nodes.wait_for(lambda names: len(names) >= needed, f"round {number}", f"{needed} clients")
        if len(names) < needed:
            raise TooFewClients(
                f"round {number}: {len(names)} clients can be reached after {self.patience.wait_seconds:g} s, expected "
                f"at least {needed}{self.nodes.turned_away()}. Start more nodes, or lower federation.minimum, and "
                "resume"
            )
        return names

    def everyone(self, since: Since) -> Sequence[str]:
        """Training clients first, then those who come afterwards. Waits for all who took part or are expected."""
        new = set(self.job.members.new)
        expected = {*since.now, *new}
        self.nodes.wait_for(lambda _: expected <= self.nodes.at.keys(), "the end", ", ".join(sorted(expected)))
        known = {*self.nodes.at, *self.job.members.train, *since.now} - new
        return [*sorted(known), *sorted(new)]

    def answers(self, server: State, number: int, cohort: Sequence[str], since: Since) -> Iterator[Answer]:
        """In the cohort's order. One reply is in memory at a time: one that comes before its turn waits in a file."""
        down, waiting = self._send_round(server, number, cohort, since)
        minimum = len(cohort) if self.job.minimum is None else self.job.minimum
        limit = 2 * server.num_bytes() + 2**20
        times, started = list[float](), time.monotonic()
        early: dict[str, Callable[[], Answer]] = {}
        for name in cohort:
            answer: Answer | None = early.pop(name)() if name in early else None
            while answer is None and time.monotonic() < started + self.patience.deadline(times, minimum):
                until = started + self.patience.deadline(times, minimum)
                for asked, message in self.post.pull(waiting, until, enough=1):
                    who = waiting.pop(asked)
                    came = self._answer(message, who, number, down[who], limit)
                    if came.problem is None:  # a failure says nothing of how long honest work takes
                        times.append(time.monotonic() - started)
                    if who == name:
                        answer = came
                    else:
                        early[who] = _put_aside(came, self.job.folder)
                    del message, came
                if not waiting and answer is None:
                    break
            if answer is None:
                late = {who: message for message, who in waiting.items()}
                if name in late:
                    self.nodes.owes(name, late[name])
                seconds = time.monotonic() - started
                silent = ClientSilent(f"client {name!r} did not answer round {number} within {seconds:.0f} s")
                answer = Answer(name, down[name], problem=silent)
            yield answer
            del answer

    def _send_round(
        self, server: State, number: int, cohort: Sequence[str], since: Since
    ) -> tuple[dict[str, int], dict[str, str]]:
        """Bytes that each client was sent, and whose answer each message waits for."""
        down: dict[str, int] = {}
        waiting: dict[str, str] = {}
        send = self.post.sender(LOCAL)
        for name in cohort:
            got = self.job.method.broadcast(server, name)
            past = {"since": since.now.get(name, 0), "committed": since.committed.get(name, 0)}
            down[name] = got.num_bytes()
            waiting[send({"run": self.run, "round": number, **past}, got, self.nodes.at[name])] = name
        return down, waiting

    def _answer(self, message: Message, name: str, number: int, bytes_down: int, limit: int) -> Answer:
        try:
            about, sent = opened(message, limit)
            if (problem := problem_in(about)) is not None:
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
        send = self.post.sender(PERSONALIZE)
        for name in names:
            if name in self.nodes.at:
                own = {"run": self.run, "round": self.job.rounds, "since": since.now.get(name, 0)}
                waiting[send(own, released, self.nodes.at[name])] = name
        until, done = time.monotonic() + self.patience.deadline_seconds, set[str]()
        failed = dict.fromkeys(set(names) - set(waiting.values()), "is not there")
        for name in names:
            while name in waiting.values() and time.monotonic() < until:
                for asked, message in self.post.pull(waiting, until, enough=1):
                    who = waiting.pop(asked)
                    try:
                        figures = _figures(message, who)
                        done.add(who)
                        self.told(who, figures)
                    except PersonaeError as error:
                        failed[who] = str(error)
            if name in done:
                yield name
            else:
                say(f"client {name!r} was not personalized: it {failed.get(name, 'did not answer')}")


def _figures(message: Message, name: str) -> Facts:
    """What a client says of its personal model. Raises: RefusedUpdate, when it has none; ArtefactError."""
    about, _ = opened(message)
    if (problem := problem_in(about)) is not None or about.get("client") != name:
        raise RefusedUpdate(f"failed with {problem or 'an answer that is not its own'}")
    return {key.removeprefix("figure."): value for key, value in about.items() if key.startswith("figure.")}


def _put_aside(answer: Answer, folder: Path | None) -> Callable[[], Answer]:
    """A function that gives the answer back, whose State has meanwhile been in a file."""
    update = answer.update
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
