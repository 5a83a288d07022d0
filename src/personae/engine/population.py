"""Both halves of the participants, in one process: one model in memory, whatever the number of clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from personae.core import NAME_RULE, SAFE_NAME, Arrays, Client, ClientData, Denoiser, joined, stream
from personae.errors import ConfigError, FederationError

POOLED = "pooled"


@dataclass(frozen=True)
class Population:
    """Clients by name, their data, and the model that each of them works in, one after the other.

    `train` take part in rounds, `cohort_size` of them at a time (all when None); `new` come afterwards. Of those who
    train, `late` ones are there from round `late_from` on.

    Raises: ConfigError, when names are missing, doubled or without data, the cohort is out of range, or nobody is there
    from the first round.
    """

    model: Denoiser
    data: Mapping[str, ClientData]
    train: Sequence[str]
    new: Sequence[str] = ()
    cohort_size: int | None = None
    late: Sequence[str] = ()
    late_from: int = 1

    def __post_init__(self) -> None:
        names = [*self.train, *self.new]
        problems = []
        if not self.train:
            problems.append("no client takes part in training")
        if len(set(names)) != len(names):
            problems.append(f"names are used twice: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
        if unsafe := [name for name in names if not SAFE_NAME.fullmatch(name)]:
            problems.append(f"names that cannot be files: {', '.join(map(repr, unsafe))}; use {NAME_RULE}")
        if lost := [name for name in names if name not in self.data]:
            problems.append(f"no data for {', '.join(lost)}")
        if self.cohort_size is not None and not 1 <= self.cohort_size <= len(self.train):
            problems.append(
                f"cohort is {self.cohort_size}, expected 1 to {len(self.train)}, the number of training clients"
            )
        if lost := sorted(set(self.late) - set(self.train)):
            problems.append(f"late clients {', '.join(lost)} do not train; who does: {', '.join(self.train)}")
        elif self.late and self.late_from <= 1:
            problems.append(f"clients are late, and late_from is {self.late_from}; say from which round, 2 or later")
        elif self.train and set(self.late) == set(self.train):
            problems.append(f"every client is late: nobody is there before round {self.late_from}")
        if problems:
            raise ConfigError("; ".join(problems))

    def initial(self, seed: int) -> Arrays:
        return self.model.initial(stream(seed, "server", "init"))

    def cohort(self, round: int, seed: int, known: Sequence[str]) -> Sequence[str]:
        """A uniform sample without replacement, in name order; everyone, when not more can be reached."""
        there = arrived([name for name in self.train if name in known], self.late, self.late_from, round)
        return draw_cohort(there, self.cohort_size, round, seed)

    def client(self, name: str, when: int | str, seed: int) -> Client:
        return Client(name, self.data[name], self.model, stream(seed, name, when))


@dataclass(frozen=True)
class Roster:
    """Clients that are not known before they come: whoever can be reached trains, but for those named in `new`."""

    model: Denoiser
    cohort_size: int | None = None
    new: Sequence[str] = ()
    late: Sequence[str] = ()
    late_from: int = 1

    @property
    def train(self) -> Sequence[str]:
        return ()

    def initial(self, seed: int) -> Arrays:
        return self.model.initial(stream(seed, "server", "init"))

    def cohort(self, round: int, seed: int, known: Sequence[str]) -> Sequence[str]:
        there = arrived(sorted(known), self.late, self.late_from, round)
        return draw_cohort(there, self.cohort_size, round, seed)

    def client(self, name: str, when: int | str, seed: int) -> Client:
        raise FederationError(f"client {name!r} is at its own machine; the server holds nobody's data")


def arrived(names: Sequence[str], late: Sequence[str], late_from: int, round: int) -> list[str]:
    """Who of the names is there in this round."""
    return [name for name in names if round >= late_from or name not in late]


def draw_cohort(names: Sequence[str], size: int | None, round: int, seed: int) -> list[str]:
    """`size` of the names, each as likely as any other, in name order; all of them when there are no more."""
    if size is None or size >= len(names):
        return sorted(names)
    chosen = torch.randperm(len(names), generator=stream(seed, "cohort", round))[:size]
    return sorted(names[i] for i in chosen.tolist())


@dataclass(frozen=True)
class Pooled:
    """The same clients with the training images of all of them in one place: the centralized reference.

    One participant, "pooled", trains; afterwards every original client personalizes and is measured as before.
    """

    members: Population

    def __post_init__(self) -> None:
        if POOLED in (*self.members.train, *self.members.new):
            raise ConfigError(f"a client is called {POOLED!r}, as the pooled data are; rename it")
        if self.members.late:
            raise ConfigError("nobody can be late where all data are pooled; leave out federation.late")

    @property
    def train(self) -> Sequence[str]:
        return self.members.train

    @property
    def new(self) -> Sequence[str]:
        return self.members.new

    def initial(self, seed: int) -> Arrays:
        return self.members.initial(seed)

    def cohort(self, round: int, seed: int, known: Sequence[str]) -> Sequence[str]:
        return [POOLED]

    def client(self, name: str, when: int | str, seed: int) -> Client:
        if name != POOLED:
            return self.members.client(name, when, seed)
        parts = [self.members.data[train] for train in sorted(self.members.train)]
        data = ClientData(joined([p.train for p in parts]), joined([p.heldout for p in parts]))
        return Client(POOLED, data, self.members.model, stream(seed, POOLED, when))
