"""Ways to learn concept after concept, side by side: what each still knows in the end, and what it paid for it.

"run": a learner teaches its model all concepts, in one order, with one seed and one learning rate, each in a folder of
its own. Rates are tried in the first order with the first seed, and the one with the best average gain in the end goes
on. "joint" has all concepts' pictures at once, which no learner has: a reference from above, at its own best rate.

A gain is by how much the loss on a concept's held-out pictures is below the untaught model's, which reads its noun.
What of it the word does is told by the same model's loss with the noun in the word's place. All learners of one order
and seed see the same pictures, start from the same numbers and are asked the same noises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from personae.core import stream
from personae.errors import ConfigError
from personae.recipe.config import change, read_table
from personae.sequence.config import METHOD, parse_sequence
from personae.sequence.joint import learn_jointly
from personae.sequence.report import gains_of, right_of
from personae.sequence.workflow import begin_sequence, open_sequence
from personae.study.learning_report import JOINT, answer
from personae.study.study import Answer, Cell, Row, where


@dataclass(frozen=True)
class Learner:
    """A method by its name in a recipe, with changes "key=value"; `rates` are learning rates to choose from."""

    name: str
    method: str
    rates: tuple[float, ...]
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Learning:
    """`recipe` gives the model, the lesson and the concepts; the first of `learners` is what forgetting is a share of.

    `orders` of the concepts: as they are listed, and others by lot. `joint` are the learning rates of all concepts at
    once, without which that is left out. `ours` are compared with every other learner. `changes` are for everybody.
    """

    recipe: str
    learners: tuple[Learner, ...]
    seeds: tuple[int, ...] = (0,)
    orders: int = 1
    joint: tuple[float, ...] = ()
    ours: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [learner.name for learner in self.learners]
        if not names or len(set(names)) < len(names) or JOINT in names:
            raise ConfigError(
                f"learners are {names}; expected one or more, each with a name of its own, none {JOINT!r}"
            )
        if unknown := sorted(set(self.ours) - set(names)):
            raise ConfigError(f"ours are {', '.join(unknown)}, who are none of the learners, {', '.join(names)}")
        if not self.seeds or self.orders < 1:
            raise ConfigError(f"seeds are {list(self.seeds)} and orders {self.orders}; expected some, and at least 1")
        for learner in self.learners:
            if not learner.rates or not all(rate > 0 for rate in learner.rates):
                raise ConfigError(f"learner {learner.name!r}: rates are {list(learner.rates)}, expected some above 0")
            if len(self._table(learner, learner.rates[0], 0, 0)["concepts"]) < 2:
                raise ConfigError(f"{self.recipe} has fewer than two concepts; nothing can be forgotten")
            parse_sequence(self._table(learner, learner.rates[0], 0, 0), f"learner {learner.name!r}")

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        first: list[dict[str, Any]] = [
            {"stage": "run", "learner": learner.name, "rate": rate, "order": 0, "seed": self.seeds[0]}
            for learner in self.learners
            for rate in learner.rates
        ]
        joint: dict[str, Any] = {"stage": JOINT, "learner": JOINT, "order": 0}
        first += [{**joint, "rate": rate, "seed": self.seeds[0]} for rate in self.joint]
        if len(found) < len(first):
            return first
        others = [
            {
                "stage": "run",
                "learner": learner.name,
                "rate": self.best(found, learner.name),
                "order": order,
                "seed": seed,
            }
            for order in range(self.orders)
            for seed in self.seeds
            for learner in self.learners
            if (order, seed) != (0, self.seeds[0])
        ]
        if self.joint:
            others += [{**joint, "rate": self.best(found, JOINT), "seed": seed} for seed in self.seeds[1:]]
        return [*first, *others]

    def best(self, found: Sequence[Row], name: str) -> float | None:
        """The rate with the best average gain in the end; None until all were tried."""
        rates = {learner.name: learner.rates for learner in self.learners} | {JOINT: self.joint}
        tried = where(found, learner=name, order=0, seed=self.seeds[0])
        if len(tried) < len(rates[name]) or not tried:
            return None
        return float(max(tried, key=lambda row: fmean(row["gains"][-1]))["rate"])

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        if cell["stage"] == JOINT:
            table = self._table(self.learners[0], float(cell["rate"]), 0, seed + int(cell["seed"]))
            return learn_jointly(*parse_sequence(table, JOINT))
        learner = next(each for each in self.learners if each.name == cell["learner"])
        name = f"{learner.name.replace(' ', '-')}-{cell['rate']:g}-{cell['order']}-{cell['seed']}"
        runs = folder / "runs" / name
        if (runs / "config.toml").is_file():
            saved = open_sequence(runs)
        else:
            table = self._table(learner, float(cell["rate"]), int(cell["order"]), seed + int(cell["seed"]))
            saved = begin_sequence(*parse_sequence(table, name), runs)
        saved.finish()
        events = saved.events
        return {
            "concepts": [event["concept"] for event in events],
            "gains": gains_of(events),
            "right": right_of(events),
            "taken": {name: score["taken"] for name, score in events[-1]["scores"].items()},
            "drift": [event["drift"] for event in events],
            "by_word": [score["noun"] - score["loss"] for score in events[-1]["scores"].values()],
            "facts": events[-1]["facts"],
            "bytes": [event["bytes"] for event in events],
            "lesson_seconds": [event["seconds"] for event in events],
            "run": f"runs/{name}",
        }

    def answer(self, found: Sequence[Row]) -> Answer:
        names = [learner.name for learner in self.learners]
        return answer(found, {name: self.best(found, name) for name in (*names, JOINT)}, self.ours)

    def _table(self, learner: Learner, rate: float, order: int, seed: int) -> dict[str, Any]:
        """The recipe's, for one run."""
        table, _ = read_table(self.recipe, [*self.changes, f"lesson.training.lr={rate}", f"seed={seed}"])
        table[METHOD] = {"name": learner.method}
        for each in learner.changes:
            change(table, each)
        change(table, f"machine.threads={torch.get_num_threads()}")
        if order:
            places = torch.randperm(len(table["concepts"]), generator=stream(0, "order", order)).tolist()
            table["concepts"] = [table["concepts"][place] for place in places]
        return table
