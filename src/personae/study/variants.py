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
from personae.study.stats import Difference, by_seeds, interval, unpaired_by_seeds
from personae.study.study import Answer, Cell, Chart, Entry, Row, Table, where

ROLES = {"train": "training clients", "new": "new clients"}
TONES = {"train": "real", "new": "after"}
FIGURES = {"heldout_loss": "held-out loss", "histogram_distance": "histogram distance", "kid": "kernel distance"}
KEPT = (*FIGURES, "heldout_loss_before", "histogram_distance_before", "copy_ratio", "role", "trained_parameters")

INTERVALS = (
    "Intervals take clients for independent, though those of a seed share its trained models: where the seeds' own "
    "means do not tell the difference as well, that is said."
)


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
                        numbers.append({**at, **difference.numbers})
                        if difference.pooled.excludes(0):
                            who = title if role in self.paired else f"{title}, on other images"
                            findings.append(_sentence(name, names[0], what, who, difference))
        if numbers and not findings:
            others = ", ".join(names[1:])
            findings = [f"{self.question}: no difference that can be told between {names[0]} and {others}."]
        columns = ("variant", "seeds", *(f"{ROLES[role]}: {what}" for role in self.roles for what in FIGURES.values()))
        note = f"Means over clients and seeds. Recipe: {self.recipe}. {INTERVALS}"
        kinds = (self._chart, self._differences) if len(names) > 1 else (self._chart,)
        drawn = [figure for figure in FIGURES if any(_values(found, names[0], role, figure) for role in self.roles)]
        charts = [draw(found, names, figure) for figure in drawn for draw in kinds]
        sizes = [
            {"variant": row["variant"], "trained": _trained_by_new(row), "parameters": row["parameters"]}
            for row in where(found, seed=found[0]["seed"])
        ]
        return Answer(
            findings, {"differences": numbers, "sizes": sizes}, [Table(self.question, columns, entries, note)], charts
        )

    def _difference(self, found: Sequence[Row], name: str, role: str, figure: str) -> Difference | None:
        """A variant minus the first one, over the clients of all seeds that both have measured; None of one client."""
        if name == self.variants[0].name:
            return None
        compared = by_seeds if role in self.paired else unpaired_by_seeds
        ours, theirs = (_values(found, which, role, figure) for which in (name, self.variants[0].name))
        apart = compared(ours, theirs)
        return apart if apart is not None and apart.pooled.num > 1 else None

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
                        pooled = difference.pooled
                        axes.plot([place, place], [pooled.low, pooled.high], color=tone, linewidth=2.2)
                        axes.plot(place, pooled.mean, "o", color=tone, markersize=6)
                axes.plot([], [], "o", color=tone, label=ROLES[role])
            axes.set_xticks(range(len(shown)), shown)
            axes.grid(visible=False, axis="x")
            title = f"{FIGURES[figure].capitalize()}: difference to '{names[0]}'"
            axes.set(title=title, xlabel=self.question, xlim=(-0.6, len(shown) - 0.4))
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

        name = f"{figure}_difference"
        drawing = chart(name, max(5.6, 1.15 * len(shown) + 2.4), 3.3, draw, f"{FIGURES[figure]} against {names[0]}")
        others = [ROLES[role] for role in self.roles if role not in self.paired]
        told = f", but {others[0]} hold other images in each, whose figures are no gain" if others else ""
        caption = f"Means with their 95 % interval over clients; below zero is better than the first variant{told}."
        return Chart(name, drawing, caption)


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


def _sentence(name: str, first: str, what: str, who: str, difference: Difference) -> str:
    pooled = difference.pooled
    way = "lower" if pooled.mean < 0 else "higher"
    change = f"{abs(pooled.mean):.3g} {way} ({pooled.low:+.3g} to {pooled.high:+.3g}, {pooled.num} values)"
    return f"{name} against {first}, {who}: {what} {change}{difference.reservation}."
