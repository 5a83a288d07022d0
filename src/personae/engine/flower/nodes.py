"""Which client sits at which of Flower's nodes, as the server finds out by asking them."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Message

from personae.core import SAFE_NAME, Facts
from personae.engine.flower.wire import HELLO, Post, opened, pack, problem_in, say
from personae.engine.seat import disagreement
from personae.errors import PersonaeError, RefusedUpdate

ASK_AGAIN_SECONDS = 30.0
"""After which a node that did not say who it is, or was turned away, is asked again."""


@dataclass(frozen=True)
class _Owed:
    """A message that a client has not answered."""

    message: str
    node: int


@dataclass
class Nodes:
    """Who is there. Nodes are asked for their names; those that do not fit are turned away, and asked again later."""

    post: Post
    ours: Facts
    """What a node must agree with."""
    new: Collection[str]
    """Clients that take no part in training."""
    wait_seconds: float
    at: dict[str, int] = field(default_factory=dict)
    """Node of each client that said hello and whose node is there."""
    strangers: dict[int, str] = field(default_factory=dict)
    """Nodes that were turned away, and why."""
    _asked: dict[str, int] = field(default_factory=dict)
    """Nodes by the message that asked for their name."""
    _asked_at: dict[int, float] = field(default_factory=dict)
    """When each node was last asked."""
    _there: dict[int, str] = field(default_factory=dict)
    """When each node was last started, by the SuperLink's clock."""
    _owing: dict[str, _Owed] = field(default_factory=dict)
    """Clients that were too late. They get no other message, or a queue would grow, before they have answered or their
    node was started anew."""

    def wait_for(self, enough: Callable[[Sequence[str]], bool], what: str, whom: str) -> Sequence[str]:
        """The training clients that can be reached, once they are enough or the time is over."""
        until, said = time.monotonic() + self.wait_seconds, False
        while True:
            self._greet()
            names = sorted(n for n in self.at if n not in self.new and n not in self._owing)
            if enough(names) or time.monotonic() >= until:
                return names
            if not said:
                here = ", ".join(names) or "nobody"
                say(f"{what} waits for {whom}; {here} can be reached{self.turned_away()}")
                said = True
            time.sleep(min(0.5, self.wait_seconds / 10))

    def turned_away(self) -> str:
        return f" (turned away: {'; '.join(sorted(set(self.strangers.values())))})" if self.strangers else ""

    def owes(self, name: str, message: str) -> None:
        """A client did not answer a message in time."""
        self._owing[name] = _Owed(message, self.at[name])

    def _greet(self) -> None:
        """Ask every node that is not known who it is; only those that are new are waited for, a few seconds."""
        now = time.monotonic()
        self._forget_who_left({node.node_id: node.last_activated_at for node in self.post.grid.get_nodes()}, now)
        fresh = self._ask(now)
        until = now + (min(30.0, self.wait_seconds / 4) if fresh else 0.0)
        came = {}
        for asked, message in self.post.pull(self._asked, until):
            came[self._asked.pop(asked)] = message
        for node in sorted(came):
            if node not in self.at.values():
                self._meet(node, came[node])

    def _forget_who_left(self, there: dict[int, str], now: float) -> None:
        """A node that was started anew is a new one: it may be another client, and answers nothing from before."""
        stayed = {node for node, started in there.items() if self._there.get(node) == started}
        self.at = {name: node for name, node in self.at.items() if node in stayed}
        self._asked = {message: node for message, node in self._asked.items() if node in stayed}
        self._asked_at = {node: at for node, at in self._asked_at.items() if node in stayed}
        # Whoever was turned away may have changed; and with every node that goes, a name may have become free.
        all_stayed = len(stayed) == len(self._there)
        self.strangers = {
            node: why
            for node, why in self.strangers.items()
            if all_stayed and now < self._asked_at[node] + ASK_AGAIN_SECONDS
        }
        self._there = there
        answered = {asked for asked, _ in self.post.pull([owed.message for owed in self._owing.values()], 0.0)}
        self._owing = {
            name: owed for name, owed in self._owing.items() if owed.message not in answered and owed.node in stayed
        }

    def _ask(self, now: float) -> bool:
        """Ask whoever is unknown and was not asked just now. Whether one of them was never asked before."""
        quiet = {node for node in self._asked.values() if now < self._asked_at[node] + ASK_AGAIN_SECONDS}
        unknown = self._there.keys() - {*self.at.values(), *self.strangers, *quiet}
        fresh = unknown - self._asked_at.keys()
        for node in sorted(unknown):
            self._asked_at[node] = now
            self._asked[self.post.push(pack({}), node, HELLO)] = node
        return bool(fresh)

    def _meet(self, node: int, message: Message) -> None:
        try:
            about, _ = opened(message)
            self.at[self._fitting(about)] = node
        except PersonaeError as error:
            self.strangers[node] = str(error)
            say(f"a node was turned away: {error}")

    def _fitting(self, about: Mapping[str, object]) -> str:
        """The name of a client that may take part. Raises: RefusedUpdate."""
        name = about.get("client")
        if not isinstance(name, str) or not SAFE_NAME.fullmatch(name):
            raise RefusedUpdate(f"a node failed to introduce itself ({problem_in(about) or 'no usable name'})")
        if (differs := disagreement(self.ours, about)) is not None:
            raise RefusedUpdate(f"client {name!r}: {differs}")
        if name in self.at:
            raise RefusedUpdate(f"client {name!r} sits at two nodes; stop one of them")
        return name
