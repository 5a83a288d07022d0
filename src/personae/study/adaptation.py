"""New clients adapt a trained model: every method, learning rate and number of steps, on the same images and noise.

Three stages. "train": each rival's recipe, for each seed. "adapt": on the seeds that are tuned on, every new client
from so many of its images, with each learning rate and number of steps. "final": on the other seeds, where the same
data are dealt to other clients, at the setting that was best for the first, so that nobody's own held-out images choose
for it, with enough samples for kernel distances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from personae.core import Training
from personae.errors import ClientFailed, ConfigError, DataError, Diverged
from personae.recipe.config import load_recipe
from personae.study.adaptation_report import adaptation_answer
from personae.study.bench import open_bench, trained
from personae.study.study import Answer, Cell, Row, where


@dataclass(frozen=True)
class Rival:
    """One method: a run's recipe, what is changed of it, and the learning rates that a new client tries; on a map,
    one for each number of images."""

    name: str
    recipe: str
    rates: tuple[float, ...]
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0:
            raise ConfigError(f"rates of {self.name!r} are {list(self.rates)}, expected at least one, all above 0")


@dataclass(frozen=True)
class Redrawn:
    """The first rival's clients, at its chosen settings, drawn otherwise: `changes` are overrides of "sampling"."""

    name: str
    changes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.changes or not all(change.startswith("sampling.") for change in self.changes):
            raise ConfigError(
                f"changes of {self.name!r} are {list(self.changes)}, expected at least one, all of 'sampling.'; what "
                "trains otherwise is a rival of its own"
            )


@dataclass(frozen=True)
class Adaptation:
    """Which rivals, seeds, numbers of images of each new client (0: all that it has) and numbers of steps.

    On `tuned_on`, the settings are chosen that are used on `seeds`. `changes` are overrides, "key=value", of every
    rival's recipe. `num_drawn` images are drawn per client in the grid, `num_final` at the chosen settings, where they
    meet at least `num_references` real images of the client's mix of classes. All others are compared with the first
    of `rivals`, and with each of `redrawn`.
    """

    rivals: tuple[Rival, ...]
    tuned_on: tuple[int, ...]
    seeds: tuple[int, ...]
    images: tuple[int, ...]
    steps: tuple[int, ...]
    changes: tuple[str, ...] = ()
    batch_size: int = 16
    num_drawn: int = 64
    num_final: int = 500
    num_references: int = 90
    redrawn: tuple[Redrawn, ...] = ()

    def __post_init__(self) -> None:
        names = [*(rival.name for rival in self.rivals), *(other.name for other in self.redrawn)]
        if len(set(names)) != len(names) or not all((self.rivals, self.tuned_on, self.seeds, self.images, self.steps)):
            raise ConfigError("rivals need names of their own, and there must be tuned_on, seeds, images and steps")
        if both := set(self.tuned_on) & set(self.seeds):
            raise ConfigError(
                f"seeds {sorted(both)} are also tuned on; settings are not chosen by those they are shown for"
            )
        if min(self.steps) < 1 or min(self.images) < 0 or self.num_references < 8:
            raise ConfigError(
                f"steps are {list(self.steps)}, images {list(self.images)} and num_references {self.num_references}, "
                "expected at least 1, 0 and 8"
            )
        for rival in self.rivals:
            load_recipe(rival.recipe, self._changes(rival))
        for other in self.redrawn:
            load_recipe(self.rivals[0].recipe, self._changes(self.rivals[0], other))

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        cells: list[dict[str, Any]] = []
        for seed in (*self.tuned_on, *self.seeds):  # one after the other: an unfinished study has something to say
            cells += [{"stage": "train", "rival": rival.name, "seed": seed} for rival in self.rivals]
            if len(found) < len(cells):
                break
            cells += self._grid(seed) if seed in self.tuned_on else self._final(seed, found)
            if len(found) < len(cells):
                break
        return cells

    def _grid(self, seed: int) -> list[dict[str, Any]]:
        return [
            {"stage": "adapt", "rival": rival.name, "seed": seed, "images": images, "rate": rate, "steps": steps}
            for images in self.images
            for rival in self.rivals
            for rate in rival.rates
            for steps in self.steps
        ]

    def _final(self, seed: int, found: Sequence[Row]) -> list[dict[str, Any]]:
        cells = []
        for images in self.images:
            for rival in self.rivals:
                rate, steps = self.chosen(found, rival.name, images)
                own = {"stage": "final", "rival": rival.name, "seed": seed, "images": images}
                cells.append({**own, "rate": rate, "steps": steps})
                if rival is self.rivals[0]:
                    cells += [{**cells[-1], "rival": other.name} for other in self.redrawn]
        return cells

    def chosen(self, found: Sequence[Row], rival: str, images: int) -> tuple[float, int]:
        """Learning rate and steps with the least held-out loss over all clients that are tuned on.

        A setting with which anybody's training diverged is left out.
        Raises: DataError, when that leaves none.
        """
        rows = where(found, stage="adapt", rival=rival, images=images)
        lost = {(row["rate"], row["steps"]) for row in rows if row.get("diverged")}
        losses: dict[tuple[float, int], list[float]] = {}
        for row in rows:
            if (row["rate"], row["steps"]) not in lost:
                losses.setdefault((row["rate"], row["steps"]), []).extend(c["loss"] for c in row["clients"].values())
        if not losses:
            raise DataError(f"{rival!r} with {images} images diverged at every learning rate; give it smaller ones")
        return min(sorted(losses), key=lambda setting: fmean(losses[setting]))

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        other = next((one for one in self.redrawn if one.name == cell["rival"]), None)
        rival = self.rivals[0] if other else next(one for one in self.rivals if one.name == cell["rival"])
        own = folder / "runs" / f"{rival.name}-{cell['seed']}"
        if cell["stage"] == "train":
            return self._trained(rival, int(cell["seed"]), seed, own)
        final = cell["stage"] == "final"
        bench = open_bench(own, load_recipe(rival.recipe, self._changes(rival, other)).sampling)
        how = Training(int(cell["steps"]), float(cell["rate"]), self.batch_size, decay="cosine")
        drawn, references = (self.num_final, self.num_references) if final else (self.num_drawn, 0)
        people, diverged = {}, []
        for name in bench.clients.new:
            try:
                people[name] = bench.adapted(name, how, int(cell["images"]), drawn, references)
            except ClientFailed as error:
                if not isinstance(error.__cause__, Diverged):
                    raise
                diverged.append(name)  # too large a learning rate is an answer, not a failure
        return {"clients": people, "diverged": diverged, "population_before": bench.population_before}

    def answer(self, found: Sequence[Row]) -> Answer:
        return adaptation_answer(found, [one.name for one in self.rivals], [one.name for one in self.redrawn])

    def _changes(self, rival: Rival, other: Redrawn | None = None) -> list[str]:
        return [*self.changes, *rival.changes, *(other.changes if other else ())]

    def _trained(self, rival: Rival, number: int, seed: int, folder: Path) -> Mapping[str, Any]:
        summary = trained(folder, rival.recipe, self._changes(rival), seed + number).summary
        told = {
            "role": "role",
            "loss": "heldout_loss",
            "distance": "histogram_distance",
            "kid": "kid",
            "copy": "copy_ratio",
            "before": "heldout_loss_before",
            "distance_before": "histogram_distance_before",
        }
        clients = {name: {key: c[k] for key, k in told.items()} for name, c in summary["clients"].items()}
        new = [c for c in summary["clients"].values() if c["role"] == "new"]
        return {"clients": clients, "numbers": new[0]["trained_parameters"] if new else None}
