"""Streams of tasks: which concept a client has pictures of in which round.

A word's name is known to everybody, since all clients share one model; so words are named by their place in the stream,
and only the client knows which concept it has there.
"""

from __future__ import annotations

from dataclasses import dataclass

from personae.core import ClientData, Given, Task
from personae.errors import ConfigError


def word_at(place: int) -> str:
    """The word of a client's first concept is that of place 1."""
    return f"<concept-{place}>"


@dataclass(frozen=True)
class Period:
    """A task, its pictures, and for how many rounds the client has them."""

    task: Task
    data: ClientData
    rounds: int
    given: Given = Given()


@dataclass(frozen=True)
class TaskStream:
    """One client's tasks, one after the other without a gap, the first one from round `begins` on.

    Raises: ConfigError, without a task, for rounds below 1, for a name that is used twice, or a word of another place.
    """

    periods: tuple[Period, ...]
    begins: int = 1

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        problems = [] if names else ["it has no task"]
        if self.begins < 1:
            problems.append(f"it begins in round {self.begins}, expected 1 or later")
        for place, period in enumerate(self.periods, 1):
            task = period.task
            if period.rounds < 1:
                problems.append(f"{task.name!r} has {period.rounds} rounds, expected at least 1")
            if task.word != word_at(place):
                problems.append(f"{task.name!r} has the word {task.word!r}, expected {word_at(place)!r}, by its place")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            problems.append(f"tasks are called {', '.join(twice)} twice")
        if problems:
            raise ConfigError(f"a stream of tasks: {'; '.join(problems)}")

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(period.task for period in self.periods)

    @property
    def last_rounds(self) -> tuple[int, ...]:
        """Of each task."""
        ends, before = [], self.begins - 1
        for period in self.periods:
            ends.append(before := before + period.rounds)
        return tuple(ends)

    def at(self, round: int) -> int | None:
        """Which task a round has, the first being 0; None before the first one and after the last."""
        if round < self.begins:
            return None
        return next((index for index, last in enumerate(self.last_rounds) if round <= last), None)
