"""A Grid inside one process: Flower's message types without its processes, for fast tests."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Message, Metadata, RecordDict
from flwr.serverapp import Grid

from personae.core import Job, Run, Watch, ignore
from personae.engine.flower import client_app, serve_grid, simulated
from personae.engine.patience import Patience

Bend = Callable[[int, Message], Message | None]
"""What becomes of a node's reply: another message, or None when it never arrives."""


def as_it_is(node: int, reply: Message) -> Message:
    return reply


@dataclass
class LoopbackGrid(Grid):
    """Nodes 1 to `num_nodes`, each with a Context of its own; a message is answered when it is pulled.

    `bend` may lose or change replies, `late` holds a node's replies back for so many pulls, `started` says when a node
    was last started.
    """

    app: Callable[[Message, Context], Message]
    num_nodes: int
    bend: Bend = as_it_is
    late: dict[int, int] = field(default_factory=dict)
    offline: set[int] = field(default_factory=set)
    started: dict[int, str] = field(default_factory=dict)
    pushed: list[Message] = field(default_factory=list)
    """Everything that was ever sent to a node."""
    replied: list[Message] = field(default_factory=list)
    """Everything that a node ever answered, before it was bent."""
    _waiting: dict[str, Message] = field(default_factory=dict)
    _held: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._contexts = {
            node: Context(1, node, {"partition-id": node - 1, "num-partitions": self.num_nodes}, RecordDict(), {})
            for node in range(1, self.num_nodes + 1)
        }

    def make(self, content: RecordDict, node: int, kind: str, seconds: float = 3600.0) -> Message:
        """Flower makes messages only inside a running task; this one says where it comes from by itself."""
        metadata = Metadata(
            run_id=1,
            message_id=uuid.uuid4().hex,
            src_node_id=0,
            dst_node_id=node,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=seconds,
            message_type=kind,
        )
        return Message(metadata=metadata, content=content)  # type: ignore[call-overload,no-any-return]

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self._contexts if node not in self.offline]

    def get_nodes(self) -> Iterable[Any]:
        """Of Flower's NodeInfo, what a server looks at."""
        return [SimpleNamespace(node_id=n, last_activated_at=self.started.get(n, "")) for n in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = []
        for message in messages:
            self.pushed.append(message)
            self._waiting[message.metadata.message_id] = message
            self._held[message.metadata.message_id] = self.late.get(message.metadata.dst_node_id, 0)
            sent.append(message.metadata.message_id)
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for name in list(message_ids):
            message = self._waiting.get(name)
            if message is None or message.metadata.dst_node_id in self.offline:
                continue
            if self._held[name] > 0:
                self._held[name] -= 1
                continue
            del self._waiting[name]
            node = message.metadata.dst_node_id
            reply = self.app(message, self._contexts[node])
            self.replied.append(reply)
            bent = self.bend(node, reply)
            if bent is not None:
                yield bent

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        raise NotImplementedError("a loopback grid runs outside of Flower's tasks")

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, *_: Any, **__: Any) -> Message:
        return self.make(content, dst_node_id, message_type)


@dataclass(frozen=True)
class Loopback:
    """An engine: a job through Flower's messages, in this process. `grid` is what a test looks at afterwards."""

    patience: Patience = Patience(deadline_seconds=10.0, least_seconds=0.1, wait_seconds=1.0)
    bend: Bend = as_it_is
    late: dict[int, int] = field(default_factory=dict)
    offline: set[int] = field(default_factory=set)
    started: dict[int, str] = field(default_factory=dict)
    grids: list[LoopbackGrid] = field(default_factory=list)

    def run(self, job: Job, *, resume: bool = False, watch: Watch = ignore) -> Run:
        names: Sequence[str] = [*sorted(job.members.train), *sorted(job.members.new)]
        app = client_app(simulated(job, names))
        grid = LoopbackGrid(app, len(names), self.bend, self.late, self.offline, self.started)
        self.grids.append(grid)
        return serve_grid(job, grid, resume=resume, watch=watch, patience=self.patience, make=grid.make)
