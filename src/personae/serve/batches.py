"""Requests that wait a moment for others, so that the model sees several at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Work = TypeVar("Work")
Answer = TypeVar("Answer")


class Full(Exception):
    """As many requests wait as may."""


@dataclass
class Batches(Generic[Work, Answer]):
    """One thread works, a batch at a time; a batch holds requests of one kind, in the order in which they came.

    `kind` says which belong together, `size` how much room one takes of `room`. `work` gives an answer for each.
    """

    work: Callable[[Sequence[Work]], Sequence[Answer]]
    kind: Callable[[Work], Any]
    size: Callable[[Work], int]
    room: int
    seconds: float
    waiting: int
    _queue: list[tuple[Work, asyncio.Future[Answer]]] = field(default_factory=list)
    _came: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, request: Work) -> Answer:
        """Raises: Full; what `work` raises, to everyone in the batch."""
        if len(self._queue) >= self.waiting:
            raise Full
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._queue.append((request, answer))
        self._came.set()
        return await answer

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._came.wait()
            await asyncio.sleep(self.seconds)
            batch = self._next()
            if not self._queue:
                self._came.clear()
            wanted = [(request, answer) for request, answer in batch if not answer.done()]  # some clients went away
            if not wanted:
                continue
            try:
                answers = await asyncio.to_thread(self.work, [request for request, _ in wanted])
            except Exception as error:
                for _, answer in wanted:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, future), answered in zip(wanted, answers, strict=True):
                if not future.done():
                    future.set_result(answered)

    def _next(self) -> list[tuple[Work, asyncio.Future[Answer]]]:
        """The oldest request and the next ones of its kind, as far as there is room."""
        first, used = self.kind(self._queue[0][0]), 0
        taken: list[tuple[Work, asyncio.Future[Answer]]] = []
        rest: list[tuple[Work, asyncio.Future[Answer]]] = []
        for entry in self._queue:
            fits = not taken or used + self.size(entry[0]) <= self.room
            if self.kind(entry[0]) == first and fits:
                taken.append(entry)
                used += self.size(entry[0])
            else:
                rest.append(entry)
        self._queue[:] = rest
        return taken
