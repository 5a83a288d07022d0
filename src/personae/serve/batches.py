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


@dataclass(eq=False)
class Waiting(Generic[Work, Answer]):
    owner: str
    request: Work
    answer: asyncio.Future[Answer]


@dataclass
class Batches(Generic[Work, Answer]):
    """One thread works, a batch at a time; a batch holds requests of one kind, in the order in which they came.

    `kind` says which belong together, `size` how much one takes of `room`. `work` gives an answer for each. Of
    `waiting` places one owner may take `each`.
    """

    work: Callable[[Sequence[Work]], Sequence[Answer]]
    kind: Callable[[Work], Any]
    size: Callable[[Work], int]
    room: int
    seconds: float
    waiting: int
    each: int
    _queue: list[Waiting[Work, Answer]] = field(default_factory=list)
    _came: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, owner: str, request: Work) -> Answer:
        """Who is cancelled gives its place up. Raises: Full; what `work` raises for this request."""
        self._queue[:] = [entry for entry in self._queue if not entry.answer.done()]
        own = sum(entry.owner == owner for entry in self._queue)
        if len(self._queue) >= self.waiting or own >= self.each:
            raise Full
        entry: Waiting[Work, Answer] = Waiting(owner, request, asyncio.get_running_loop().create_future())
        self._queue.append(entry)
        self._came.set()
        return await entry.answer

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._came.wait()
            await asyncio.sleep(self.seconds)
            batch = self._next()
            if not self._queue:
                self._came.clear()
            await self._answer([entry for entry in batch if not entry.answer.done()])

    async def _answer(self, batch: Sequence[Waiting[Work, Answer]]) -> None:
        """What fails for several is tried for each alone, so that nobody is told of another's request."""
        if not batch:
            return
        try:
            answers = await asyncio.to_thread(self.work, [entry.request for entry in batch])
            pairs = list(zip(batch, answers, strict=True))
        except Exception as error:
            if len(batch) > 1:
                for entry in batch:
                    await self._answer([entry])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for entry, answer in pairs:
            if not entry.answer.done():
                entry.answer.set_result(answer)

    def _next(self) -> list[Waiting[Work, Answer]]:
        """The oldest request and the next ones of its kind, as far as there is room."""
        taken: list[Waiting[Work, Answer]] = []
        rest: list[Waiting[Work, Answer]] = []
        used = 0
        for entry in self._queue:
            alike = not taken or self.kind(entry.request) == self.kind(taken[0].request)
            if alike and (not taken or used + self.size(entry.request) <= self.room):
                taken.append(entry)
                used += self.size(entry.request)
            else:
                rest.append(entry)
        self._queue[:] = rest
        return taken
