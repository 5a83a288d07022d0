"""One recipe with one thing changed at a time: what the embedding's width, place, and the federation's habits matter.

Every variant is a whole run, kept in the study's folder with its own report. Clients of one seed hold the same images
in every variant that does not change the partition, so that differences to the first variant are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from personae.errors import ConfigError
from personae.evaluate.charts import COLOURS, chart
from personae.recipe.config import load_recipe
from personae.study.bench import trained
from personae.study.stats import Interval, interval, paired, unpaired
from personae.study.study import Answer, Cell, Chart, Entry, Row, Table, where

ROLES = {"train": "training clients", "new": "new clients"}
TONES = {"train": "real", "new": "after"}
FIGURES = {"heldout_loss": "held-out loss", "histogram_distance": "histogram distance"}
KEPT = (*FIGURES, "heldout_loss_before", "histogram_distance_before", "kid", "copy_ratio", "role", "trained_parameters")


@dataclass(frozen=True)
class Variant:
    """What is changed of the study's recipe, as overrides "key=value"."""

    name: str
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variants:
    """`question` is what the variants differ in, for the report. The first one is what the others are compared with.

    `paired` names the roles, of "train" and "new", whose clients hold the same images in every variant, so that they
    are compared one by one; `roles` those that are compared at all.
    """

    question: str
    recipe: str
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    changes: tuple[str, ...] = ()
    paired: tuple[str, ...] = ("train", "new")
    roles: tuple[str, ...] = ("train", "new")

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if len(names) < 2 or len(set(names)) != len(names) or not self.seeds:
            raise ConfigError(f"variants are {names}, expected two or more with names of their own, and seeds")
        if unknown := {*self.paired, *self.roles} - set(ROLES):
            raise ConfigError(f"paired or roles name {', '.join(sorted(unknown))}, expected of {', '.join(ROLES)}")
        for variant in self.variants:
            load_recipe(self.recipe, [*self.changes, *variant.changes])

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        return [{"variant": variant.name, "seed": seed} for seed in self.seeds for variant in self.variants]

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        variant = next(variant for variant in self.variants if variant.name == cell["variant"])
        own = folder / "runs" / f"{self.variants.index(variant)}-{cell['seed']}"
        done = trained(own, self.recipe, [*self.changes, *variant.changes], seed + int(cell["seed"]))
        clients = {name: {key: figures[key] for key in KEPT} for name, figures in done.summary["clients"].items()}
        return {
            "clients": clients,
            "bytes_up": done.summary["bytes_up"],
            "parameters": done.summary["model_parameters"],
        }

    def answer(self, found: Sequence[Row]) -> Answer:
        names = [variant.name for variant in self.variants if where(found, variant=variant.name)]
        if not names:
            return Answer()
        entries: list[list[Entry]] = []
        findings, numbers = [], []
        for name in names:
            row: list[Entry] = [name, len(where(found, variant=name))]
            for role in self.roles:
                for figure in FIGURES:
                    values = _values(found, name, role, figure)
                    row.append(fmean(values.values()) if values else None)
            entries.append(row)
            for role, title in ((role, ROLES[role]) for role in self.roles):
                for figure, what in FIGURES.items():
                    difference = self._difference(found, name, role, figure)
                    if difference is not None:
                        at = {"variant": name, "than": names[0], "clients": role, "figure": figure}
                        numbers.append({**at, **vars(difference)})
                        if difference.excludes(0):
                            findings.append(_sentence(name, names[0], what, title, difference))
        if not findings:
            findings = [f"{self.question}: no difference that can be told from {', '.join(names)}."]
        columns = ("variant", "seeds", *(f"{ROLES[role]}: {what}" for role in self.roles for what in FIGURES.values()))
        note = f"Means over clients and seeds. Recipe: {self.recipe}."
        kinds = (self._chart, self._differences) if len(names) > 1 else (self._chart,)
        charts = [draw(found, names, figure) for figure in FIGURES for draw in kinds]
        sizes = [
            {"variant": row["variant"], "trained": _trained_by_new(row), "parameters": row["parameters"]}
            for row in where(found, seed=found[0]["seed"])
        ]
        return Answer(
            findings, {"differences": numbers, "sizes": sizes}, [Table(self.question, columns, entries, note)], charts
        )

    def _difference(self, found: Sequence[Row], name: str, role: str, figure: str) -> Interval | None:
        """A variant minus the first one, over the clients of all seeds that both have measured."""
        ours, theirs = (_values(found, which, role, figure) for which in (name, self.variants[0].name))
        if name == self.variants[0].name or min(len(ours), len(theirs)) < 2:
            return None
        if role in self.paired:
            both = [at for at in ours if at in theirs]
            return paired([ours[at] for at in both], [theirs[at] for at in both]) if both else None
        return unpaired(list(ours.values()), list(theirs.values()))

    def _chart(self, found: Sequence[Row], names: Sequence[str], figure: str) -> Chart:
        shown = _in_order(names)

        def draw(axes: Axes) -> None:
            for offset, (role, tone) in enumerate((role, TONES[role]) for role in self.roles):
                for at, name in enumerate(shown):
                    values = list(_values(found, name, role, figure).values())
                    if not values:
                        continue
                    mean, place = interval(values), at + (offset - 0.5) * 0.24
                    axes.plot([place] * len(values), values, "o", color=COLOURS[tone], markersize=2.5, alpha=0.35)
                    axes.plot([place, place], [mean.low, mean.high], color=COLOURS[tone], linewidth=2.2)
                    axes.plot(place, mean.mean, "o", color=COLOURS[tone], markersize=6)
                axes.plot([], [], "o", color=COLOURS[tone], label=ROLES[role])
            axes.set_xticks(range(len(shown)), shown)
            axes.grid(visible=False, axis="x")
            axes.set(title=FIGURES[figure].capitalize(), xlabel=self.question, xlim=(-0.6, len(shown) - 0.4))
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

        drawing = chart(figure, max(5.6, 1.15 * len(names) + 2.4), 3.3, draw, f"{FIGURES[figure]} by variant")
        return Chart(figure, drawing, "Small dots are clients, large ones means with their 95 % interval over clients.")

    def _differences(self, found: Sequence[Row], names: Sequence[str], figure: str) -> Chart:
        """What the findings say: each variant minus the first one."""
        shown = [name for name in _in_order(names) if name != names[0]]

        def draw(axes: Axes) -> None:
            axes.axhline(0, color=COLOURS["ink"], linewidth=0.8)
            for offset, role in enumerate(self.roles):
                tone = COLOURS[TONES[role]]
                for at, name in enumerate(shown):
                    if difference := self._difference(found, name, role, figure):
                        place = at + (offset - 0.5) * 0.24
                        axes.plot([place, place], [difference.low, difference.high], color=tone, linewidth=2.2)
                        axes.plot(place, difference.mean, "o", color=tone, markersize=6)
                axes.plot([], [], "o", color=tone, label=ROLES[role])
            axes.set_xticks(range(len(shown)), shown)
            axes.grid(visible=False, axis="x")
            title = f"{FIGURES[figure].capitalize()}: difference to '{names[0]}'"
            axes.set(title=title, xlabel=self.question, xlim=(-0.6, len(shown) - 0.4))
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

        name = f"{figure}_difference"
        drawing = chart(name, max(5.6, 1.15 * len(shown) + 2.4), 3.3, draw, f"{FIGURES[figure]} against {names[0]}")
        return Chart(name, drawing, "Means with their 95 % interval; below zero is better than the first variant.")


def _in_order(names: Sequence[str]) -> Sequence[str]:
    """Numbers by size, others as the recipe has them."""
    return sorted(names, key=float) if all(name.isdecimal() for name in names) else names


def _trained_by_new(row: Row) -> int | None:
    """How many numbers a new client trains; None where there is none."""
    numbers = [client["trained_parameters"] for client in row["clients"].values() if client["role"] == "new"]
    return max(numbers, default=None)


def _values(found: Sequence[Row], variant: str, role: str, figure: str) -> dict[tuple[int, str], float]:
    """By seed and client."""
    return {
        (row["seed"], name): client[figure]
        for row in where(found, variant=variant)
        for name, client in row["clients"].items()
        if client["role"] == role and client[figure] is not None
    }


def _sentence(name: str, first: str, what: str, who: str, difference: Interval) -> str:
    way = "lower" if difference.mean < 0 else "higher"
    change = (
        f"{abs(difference.mean):.3g} {way} ({difference.low:+.3g} to {difference.high:+.3g}, {difference.num} values)"
    )
    return f"{name} against {first}, {who}: {what} {change}."
