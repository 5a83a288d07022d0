"""Both halves of participants whose concepts arrive over rounds, in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from personae.continual.contract import words_of
from personae.core import Arrays, Client, Denoiser, stream
from personae.data.tasks import TaskStream
from personae.engine.population import Population, draw_cohort
from personae.errors import ConfigError, FederationError


@dataclass(frozen=True)
class TaskPopulation:
    """Clients by name, the streams of their tasks, and the model that each of them works in, one after the other.

    Who trains takes part while it has a task. Whoever has a task for the last time in a round takes part in that round;
    of the others so many are drawn that there are `cohort_size` (everyone when None). A `new` client has one task, and
    learns it when all rounds are over.

    Raises: ConfigError, as a Population does; when a stream is missing, a new client has several tasks, or the model
    has fewer words than a client has tasks.
    """

    model: Denoiser
    streams: Mapping[str, TaskStream]
    train: Sequence[str]
    new: Sequence[str] = ()
    cohort_size: int | None = None

    def __post_init__(self) -> None:
        data = {name: each.periods[-1].data for name, each in self.streams.items()}
        Population(self.model, data, self.train, self.new, self.cohort_size)  # refuses what cannot be
        if many := [name for name in self.new if len(self.streams[name].periods) > 1]:
            raise ConfigError(f"{', '.join(many)} are new and have several tasks; they learn one, when all is over")
        live, names = self.model.live(), (*self.train, *self.new)
        longest = max(names, key=lambda name: len(self.streams[name].periods))
        if lost := [t.word for t in self.streams[longest].tasks if not words_of(t) & live.keys()]:
            raise ConfigError(f"client {longest!r} has tasks for which the model has no word: {', '.join(lost)}")

    @property
    def rounds(self) -> int:
        """After so many everybody's tasks are over."""
        return max(self.streams[name].last_rounds[-1] for name in self.train)

    def initial(self, seed: int) -> Arrays:
        return self.model.initial(stream(seed, "server", "init"))

    def cohort(self, round: int, seed: int, known: Sequence[str]) -> Sequence[str]:
        there = [name for name in self.train if name in known and self.streams[name].at(round) is not None]
        due = [name for name in there if round in self.streams[name].last_rounds]
        if self.cohort_size is None:
            return sorted(there)
        rest = [name for name in there if name not in due]
        return sorted([*due, *draw_cohort(rest, max(0, self.cohort_size - len(due)), round, seed)])

    def client(self, name: str, when: int | str, seed: int) -> Client:
        """After the rounds all of its tasks are there, and the last one's pictures."""
        own = self.streams[name]
        place = own.at(when) if isinstance(when, int) else len(own.periods) - 1
        if place is None:
            raise FederationError(f"client {name!r} has no task in round {when}")
        period, tasks = own.periods[place], own.tasks[: place + 1]
        rng, ends = stream(seed, name, when), when in own.last_rounds
        return Client(name, period.data, self.model, rng, tasks=tasks, given=period.given, ends_task=ends)
