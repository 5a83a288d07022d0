"""What a message holds, and how messages go over a Grid.

A message is one ConfigRecord of scalars ("about") and, where a State travels, one Array that holds it in the format of
our files: no pickle, any dtype, and one decoder for disk and wire.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from personae.artefact.save import state_bytes, state_from_bytes
from personae.core import State
from personae.errors import RefusedUpdate

PROTOCOL = 1
HELLO, LOCAL, PERSONALIZE = "query.hello", "train.local", "train.personalize"
FORMAT = "personae.state"
MAX_NAME = 64

About = Mapping[str, Any]
MakeMessage = Callable[[RecordDict, int, str, float], Message]
"""From content, node, kind and seconds to live."""


def pack(about: Mapping[str, int | float | str | bool], state: State | None = None) -> RecordDict:
    records = RecordDict({"about": ConfigRecord({"protocol": PROTOCOL, **about})})
    if state is not None:
        records["state"] = ArrayRecord({"state": _array(state)})
    return records


def _array(state: State) -> Array:
    data = state_bytes(state)
    return Array("uint8", (len(data),), FORMAT, data)


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


def opened(message: Message, max_bytes: int = 2**16) -> tuple[dict[str, Any], State]:
    """What a reply holds. Raises: RefusedUpdate, also for an error that Flower reports; ArtefactError."""
    if message.has_error():
        raise RefusedUpdate(f"Flower reports: {str(message.error.reason)[:200]}")
    return unpack(message.content, max_bytes)


def problem_in(about: About) -> str | None:
    """The kind of error that a client reports; its word for it, if it is one."""
    problem = about.get("problem")
    if problem is None:
        return None
    is_word = isinstance(problem, str) and problem.isalnum() and len(problem) <= MAX_NAME
    return str(problem) if is_word else "an unnamed error"


def say(text: str) -> None:
    """A line in this side's own log."""
    print(f"personae: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Post:
    """Sends messages over a Grid and fetches the replies, one at a time."""

    grid: Grid
    make: MakeMessage
    seconds: float
    """How long a message lives."""

    def push(self, content: RecordDict, node: int, kind: str) -> str:
        (sent,) = self.grid.push_messages([self.make(content, node, kind, self.seconds)])
        return sent

    def sender(self, kind: str) -> Callable[[About, State, int], str]:
        """Sends States; nodes that are sent the same one after the other share its bytes."""
        last: tuple[State, Array] | None = None

        def send(about: About, state: State, node: int) -> str:
            nonlocal last
            if last is None or not _same(last[0], state):
                last = (state, _array(state))
            records = pack(about)
            records["state"] = ArrayRecord({"state": last[1]})
            return self.push(records, node, kind)

        return send

    def pull(self, waiting: Collection[str], until: float, enough: float = math.inf) -> Iterator[tuple[str, Message]]:
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


def _same(left: State, right: State) -> bool:
    """Whether two States hold the very same tensors and equal facts."""
    return all(
        a.keys() == b.keys() and all(a[name] is b[name] for name in a)
        for a, b in ((left.params, right.params), (left.extras, right.extras))
    ) and dict(left.facts) == dict(right.facts)
