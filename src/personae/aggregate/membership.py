"""Who is in which group from round to round: groups are formed, newcomers join them, and they are kept up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from personae.aggregate.low_rank import Adapter
from personae.aggregate.newcomers import Familiar, Mixtures, familiar, trust
from personae.core import Arrays

OF, NEWCOMER, LIKELIER = "cluster of ", "newcomer: ", "likelier elsewhere: "
"""Fronts of facts: each client's group, what is known of newcomers, and for how many rounds running a client's
description was likelier of another group."""


@dataclass(frozen=True)
class Members:
    """Everybody's group by number from 0, how much each counts, 0 to 1, and the facts by which a server keeps both."""

    groups: Mapping[str, int]
    trusted: Mapping[str, float]
    facts: Mapping[str, Any]

    @property
    def count(self) -> int:
        return max(self.groups.values()) + 1

    def counts(self, name: str) -> float:
        """How much somebody does in its own group."""
        return 1.0 if name in self.settled else self.trusted[name]

    @property
    def settled(self) -> dict[str, int]:
        return _settled(self.groups, self.trusted)

    def shown(self, smallest: int) -> list[int]:
        """The groups with so many members, newcomers not among them; the largest where none has."""
        sizes = [
            sum(self.groups[name] == number and self.trusted[name] == 1 for name in self.groups)
            for number in range(self.count)
        ]
        return [number for number in range(self.count) if sizes[number] >= min(smallest, max(sizes))]


@dataclass(frozen=True)
class Grouping:
    """Groups of at least `smallest` clients, at most `most` of them, formed anew for whoever comes in the first
    `rounds`.

    Afterwards a newcomer joins the group that its description is likeliest from, or opens one of its own; in a round
    without one, a group may be split, two may be merged, or members move (`kept_up`). A newcomer counts more from one
    of its rounds to the next, wholly after `probation` of them.
    """

    most: int
    smallest: int
    rounds: int
    probation: int

    def after(
        self,
        facts: Mapping[str, Any],
        round_number: int,
        seen: Arrays,
        arrived: Sequence[str],
        adapters: Sequence[Adapter],
        change: Callable[[str], Adapter],
    ) -> Members:
        """The members in this round, after a server's state whose facts are `facts`.

        `seen` are everybody's descriptions, of length 1, and `adapters` the former groups'; `change` says how far a
        newcomer who is among the `arrived` went from its start.
        """
        before = groups_in(facts)
        told: dict[str, Any] = {name: fact for name, fact in facts.items() if name.startswith(NEWCOMER)}
        if before.keys() == seen.keys():
            groups: dict[str, int] = before
            if round_number > self.rounds:
                groups, likelier = self._kept_up(facts, before, seen, adapters)
                told |= likelier
        elif round_number <= self.rounds or not before:
            groups = self._formed(seen)
        else:
            groups, found = self._joining(facts, before, seen, arrived, adapters, change)
            new = sorted(seen.keys() - before.keys())
            told |= found | {f"{NEWCOMER}round of {name}": round_number for name in new}
            told |= {_times(name): 0 for name in new}
        trusted = self._trusted(groups, told)
        told |= {_times(name): told[_times(name)] + 1 for name in arrived if _times(name) in told}
        return Members(groups, trusted, told | {f"{OF}{name}": number for name, number in groups.items()})

    def _formed(self, seen: Arrays) -> dict[str, int]:
        from personae.aggregate.cluster import clustered, similarities  # slow to import

        names = sorted(seen)
        similar = similarities(torch.stack([seen[name] for name in names]))
        return dict(zip(names, clustered(similar, most=self.most, smallest=self.smallest), strict=True))

    def _joining(
        self,
        facts: Mapping[str, Any],
        before: Mapping[str, int],
        seen: Arrays,
        arrived: Sequence[str],
        adapters: Sequence[Adapter],
        change: Callable[[str], Adapter],
    ) -> tuple[dict[str, int], dict[str, float]]:
        """Everybody's group, newcomers' being those they are likeliest from, and what is found of newcomers."""
        settled = _settled(before, self._trusted(before, facts))
        known, mixtures = _familiar(settled, seen), Mixtures(adapters)
        groups, found = dict(before), dict[str, float]()
        for name in (name for name in arrived if name not in before):
            found[f"{NEWCOMER}likeness of {name}"] = float(known.likeness(seen[name]).max())
            found[f"{NEWCOMER}redundancy of {name}"] = mixtures.nearest(change(name))[1]
            opened = {other: group for other, group in groups.items() if group >= len(adapters)}
            so_far = _familiar({**settled, **opened}, seen)  # somebody of this round may have opened it for both
            number = so_far.group(seen[name])
            if number is None and len(so_far.sizes) >= self.most:
                number = int(so_far.likeness(seen[name]).argmax())
            groups[name] = len(so_far.sizes) if number is None else number
        return groups, found

    def _kept_up(
        self, facts: Mapping[str, Any], before: Mapping[str, int], seen: Arrays, adapters: Sequence[Adapter]
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Everybody's group after those that are there have been looked at again, and facts of whom another is likelier
        for. Newcomers on probation have no say; they go where the most alike of their group goes."""
        from personae.aggregate.cluster import kept_up  # slow to import

        settled = _settled(before, self._trusted(before, facts))
        names = sorted(settled)
        after, won = kept_up(
            torch.stack([seen[name] for name in names]),
            [settled[name] for name in names],
            adapters,
            [int(facts.get(f"{LIKELIER}{name}", 0)) for name in names],
            _familiar(settled, seen).threshold,
            most=self.most,
            smallest=self.smallest,
        )
        groups = dict(zip(names, after, strict=True))
        for name in sorted(before.keys() - groups.keys()):
            near = [other for other in names if settled[other] == before[name]]
            alike = [float(cosine_similarity(seen[name], seen[other], dim=0)) for other in near]
            groups[name] = groups[near[alike.index(max(alike))]]
        return groups, {f"{LIKELIER}{name}": n for name, n in zip(names, won, strict=True) if n}

    def _trusted(self, groups: Mapping[str, int], facts: Mapping[str, Any]) -> dict[str, float]:
        return {name: trust(facts.get(_times(name)), self.probation) for name in groups}


def groups_in(facts: Mapping[str, Any]) -> dict[str, int]:
    """The number of each client's group; nobody's, when these are facts of another method's state."""
    return {name.removeprefix(OF): int(number) for name, number in facts.items() if name.startswith(OF)}


def _times(client: str) -> str:
    return f"{NEWCOMER}rounds with {client}"


def _settled(groups: Mapping[str, int], trusted: Mapping[str, float]) -> dict[str, int]:
    """Those who count wholly, with their groups; of a group of newcomers alone, all."""
    whole = {group for name, group in groups.items() if trusted[name] == 1}
    return {name: group for name, group in groups.items() if trusted[name] == 1 or group not in whole}


def _familiar(groups: Mapping[str, int], seen: Arrays) -> Familiar:
    names = sorted(groups)
    return familiar(torch.stack([seen[name] for name in names]), [groups[name] for name in names])
