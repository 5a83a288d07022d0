"""Where one way to adapt wins, and where it loses: over worlds of training clients, and over a new client's images.

"train": each rival in each world. "adapt": every new client of that world from so many of its images, each rival with
the learning rate that is given for so many. Nothing is tuned here, so no new client's held-out images choose for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from personae.core import Training
from personae.errors import ConfigError
from personae.evaluate.charts import chart
from personae.recipe.config import load_recipe
from personae.study.adaptation import Rival
from personae.study.bench import open_bench, trained
from personae.study.stats import Difference, Interval, by_seeds
from personae.study.study import Answer, Cell, Chart, Entry, Row, Table, where

FIGURES = {"loss": "held-out loss", "distance": "class-histogram distance"}

DIVERGING = "RdBu"
"""From red, where the first rival is worse, over white to blue, where it is better; told apart by colour-blind eyes."""


@dataclass(frozen=True)
class World:
    """Training clients of one number and kind: what is changed of every rival's recipe, as overrides "key=value"."""

    name: str
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Advantage:
    """The first of `rivals` is the one that the others are compared with, in every one of `worlds`; each has a learning
    rate for each number of images.

    `images` are numbers of a new client's images, which it adapts from in `steps` steps; `num_drawn` pictures are drawn
    of each. `changes` are for everybody.
    """

    worlds: tuple[World, ...]
    rivals: tuple[Rival, ...]
    images: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)
    steps: int = 200
    batch_size: int = 16
    num_drawn: int = 64
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, names, least in (
            ("worlds", [world.name for world in self.worlds], 1),
            ("rivals", [rival.name for rival in self.rivals], 2),
        ):
            if len(names) < least or len(set(names)) < len(names):
                raise ConfigError(f"{what} are {names}, expected {least} or more, each with a name of its own")
        if not self.seeds or not self.images or min(*self.images, self.steps) < 1:
            raise ConfigError("seeds, and numbers of images and of steps of at least 1, are needed")
        for rival in self.rivals:
            if len(rival.rates) != len(self.images):
                raise ConfigError(
                    f"rival {rival.name!r}: rates are {list(rival.rates)}, expected one for each of images "
                    f"{list(self.images)}"
                )
            for world in self.worlds:
                load_recipe(rival.recipe, self._changes(world, rival))

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        cells: list[dict[str, Any]] = []
        for seed in self.seeds:
            for world in self.worlds:  # one after the other: an unfinished study has something to say
                own = [{"world": world.name, "rival": rival.name, "seed": seed} for rival in self.rivals]
                cells += [{"stage": "train", **each} for each in own]
                if len(found) < len(cells):
                    return cells
                cells += [{"stage": "adapt", **each, "images": images} for each in own for images in self.images]
                if len(found) < len(cells):
                    return cells
        return cells

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        world = next(world for world in self.worlds if world.name == cell["world"])
        rival = next(rival for rival in self.rivals if rival.name == cell["rival"])
        own = folder / "runs" / f"{self.worlds.index(world)}-{rival.name}-{cell['seed']}"
        if cell["stage"] == "train":
            run = trained(own, rival.recipe, self._changes(world, rival), seed + int(cell["seed"]))
            losses = [c["heldout_loss"] for c in run.summary["clients"].values() if c["role"] == "train"]
            return {"loss": fmean(losses)}
        bench, images = open_bench(own), int(cell["images"])
        how = Training(self.steps, rival.rates[self.images.index(images)], self.batch_size, decay="cosine")
        keys = ("kind", *FIGURES)
        people = {name: bench.adapted(name, how, images, self.num_drawn, 0) for name in bench.clients.new}
        return {"clients": {name: {key: told[key] for key in keys} for name, told in people.items()}}

    def _changes(self, world: World, rival: Rival) -> list[str]:
        return [*self.changes, *world.changes, *rival.changes]

    # --- the answer --------------------------------------------------------------------------------------------------

    def answer(self, found: Sequence[Row]) -> Answer:
        first, *others = (rival.name for rival in self.rivals)
        findings, charts = [], []
        rows: list[list[Entry]] = []
        numbers: dict[str, Any] = {}
        for other in others:
            for key, title in FIGURES.items():
                cells = [
                    [self._difference(found, w.name, first, other, n, key) for n in self.images] for w in self.worlds
                ]
                rows += [
                    [
                        other,
                        title,
                        world.name,
                        images,
                        cell.pooled.num,
                        *_bounds(cell.pooled),
                        *_bounds(cell.over_seeds)[1:],
                    ]
                    for world, line in zip(self.worlds, cells, strict=True)
                    for images, cell in zip(self.images, line, strict=True)
                    if cell is not None
                ]
                if all(cell is None for line in cells for cell in line):
                    continue
                findings.append(_told(first, other, title, cells))
                name = f"{other}-{key}"
                numbers[name] = [[None if cell is None else cell.numbers for cell in line] for line in cells]
                drawing = self._map(name, f"{title}: {first} minus {other}", cells)
                charts.append(Chart(name, drawing, f"Blue where {first} is better; {MARKS}."))
        columns = ("against", "figure", "world", "images", "pairs", "difference", "from", "to", "over seeds from", "to")
        note = (
            f"Mean differences, {first} minus the other, over the same new clients, with 95 % intervals over them, and "
            "over the means of the seeds, whose clients share trained models."
        )
        tables = (Table("Paired differences", columns, rows, note),) if rows else ()
        return Answer(findings, numbers, tables, charts)

    def _difference(
        self, found: Sequence[Row], world: str, first: str, other: str, images: int, key: str
    ) -> Difference | None:
        """Over all new clients of all seeds that both have adapted; None without any."""
        values: dict[str, dict[tuple[int, Any], float]] = {first: {}, other: {}}
        for seed in self.seeds:
            for rival, own in values.items():
                for row in where(found, stage="adapt", world=world, rival=rival, seed=seed, images=images):
                    own |= {(seed, name): client[key] for name, client in row["clients"].items()}
        return by_seeds(values[first], values[other])

    def _map(self, name: str, title: str, cells: Sequence[Sequence[Difference | None]]) -> Markup:
        means = np.array([[np.nan if cell is None else cell.pooled.mean for cell in line] for line in cells])
        most = float(np.nanmax(np.abs(means))) or 1.0

        def draw(axes: Axes) -> None:
            limits = matplotlib.colors.Normalize(-most, most)
            axes.pcolormesh(np.ma.masked_invalid(-means), cmap=matplotlib.colormaps[DIVERGING], norm=limits)
            for row, line in enumerate(cells):
                for column, cell in enumerate(line):
                    if cell is not None:
                        dark = abs(cell.pooled.mean) > 0.7 * most
                        mark = "**" if cell.holds_over_seeds else "*" if cell.pooled.excludes(0) else ""
                        text = f"{cell.pooled.mean:+.3f}{mark}"
                        colour = "#ffffff" if dark else "#101010"
                        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour)
            axes.set_xticks([at + 0.5 for at in range(len(self.images))], [str(images) for images in self.images])
            axes.set_yticks([at + 0.5 for at in range(len(cells))], [world.name for world in self.worlds])
            axes.set(xlabel="images of a new client", title=title)
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            axes.invert_yaxis()

        told = "; ".join(
            f"{world.name}, {images} images: {cell.pooled.mean:+.4f}"
            for world, line in zip(self.worlds, cells, strict=True)
            for images, cell in zip(self.images, line, strict=True)
            if cell is not None
        )
        height = 1.2 + 0.42 * len(self.worlds)
        return chart(f"map-{name}", 2.4 + 0.95 * len(self.images), height, draw, f"{title}; {told}")


MARKS = "* where the interval over clients excludes 0, ** where that over the seeds' means does, too"


def _bounds(found: Interval) -> list[Entry]:
    return [found.mean, *([None, None] if found.num == 1 else [found.low, found.high])]


def _told(first: str, other: str, title: str, cells: Sequence[Sequence[Difference | None]]) -> str:
    known = [cell for line in cells for cell in line if cell is not None and cell.pooled.num > 1]
    sides = [[cell for cell in known if cell.pooled.excludes(0) and sign * cell.pooled.mean < 0] for sign in (1, -1)]
    better, worse = (f"{len(side)} ({sum(cell.holds_over_seeds for cell in side)} over seeds alone)" for side in sides)
    return (
        f"{title}: {first} is better than {other} in {better} of {len(known)} places of the map, worse in {worse}; in "
        "the others the interval holds 0. Of so many intervals one in twenty excludes 0 by chance."
    )
