"""Clients that come when groups are there: are they told apart, does it help them, does it harm the others?

In every federation one style is withheld: its clients come in round `late_from`, and with them one client of each other
style. "together": nobody is late. "late": they come in that round. "without": they never come. "adapt": a newcomer of a
known style trains its adapter from its group's and from nothing, for so many rounds' worth of steps; its groups are
those of "without", and its oracle is what it has in "together".

Losses are those of everybody's adapter as the run leaves it: with `method.adapt.steps` 0 that is the group's, and says
what newcomers did to it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from personae.artefact.run_folder import RunFolder
from personae.data.emoji import STYLES
from personae.engine.in_process import personalize_one
from personae.errors import ConfigError
from personae.evaluate.charts import COLOURS, chart
from personae.evaluate.grouping import adjusted_rand, auroc
from personae.evaluate.loss import denoising_loss
from personae.methods.cluster_lora import NEWCOMER, ClusterLora, groups_of
from personae.recipe.build import build_clients, build_job
from personae.recipe.config import load_recipe
from personae.recipe.workflow import open_run
from personae.study.bench import adapting, trained
from personae.study.by_style import server_of, styles_of
from personae.study.study import Answer, Cell, Chart, Entry, Row, Table, where

KINDS = ("late", "without")


@dataclass(frozen=True)
class Newcomers:
    """`withheld` styles, one in each federation; for `adapt_rounds` rounds' worth of steps each, a newcomer trains."""

    recipe: str
    withheld: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    late_from: int = 6
    adapt_rounds: tuple[int, ...] = (0, 1, 2, 4, 8, 16)
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := [style for style in self.withheld if style not in STYLES]:
            raise ConfigError(f"withheld styles are {', '.join(unknown)}, expected some of {', '.join(STYLES)}")
        if not self.withheld or not self.seeds or not self.adapt_rounds or min(self.adapt_rounds) < 0:
            raise ConfigError("withheld styles, seeds, and adapt_rounds of 0 or more are needed")
        recipe = load_recipe(self.recipe, self.changes)
        if not isinstance(recipe.method, ClusterLora) or recipe.cohort is not None:
            raise ConfigError(
                f"{self.recipe} is of another method, or takes some of its clients in a round; expected cluster_lora "
                "with all, so that every newcomer comes when it is said to"
            )
        if not recipe.method.grouping_rounds < self.late_from <= recipe.rounds:
            raise ConfigError(
                f"late_from is {self.late_from}, expected more than the method's grouping_rounds "
                f"{recipe.method.grouping_rounds}, to the run's {recipe.rounds} rounds"
            )

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        together: list[dict[str, Any]] = [{"stage": "together", "seed": seed} for seed in self.seeds]
        federations: list[dict[str, Any]] = [
            {"stage": stage, "withheld": style, "seed": seed}
            for seed in self.seeds
            for style in self.withheld
            for stage in KINDS
        ]
        adapted: list[dict[str, Any]] = [
            {"stage": "adapt", "withheld": row["withheld"], "client": name, "seed": row["seed"]}
            for row in where(found, stage="late")
            if where(found, stage="without", withheld=row["withheld"], seed=row["seed"])
            for name in row["newcomers"]
            if row["styles"][name] != row["withheld"]
        ]
        return [*together, *federations, *adapted]

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        seed, style = seed + int(cell["seed"]), str(cell.get("withheld", ""))
        if cell["stage"] == "adapt":
            return self._adapt(cell, seed, folder)
        changes = list(self.changes)
        if cell["stage"] != "together":
            rounds = load_recipe(self.recipe, self.changes).rounds
            when = self.late_from if cell["stage"] == "late" else rounds + 1
            changes += [f"federation.late={_listed(self._late(style, seed))}", f"federation.late_from={when}"]
        done = trained(_folder(folder, cell), self.recipe, changes, seed)
        figures: dict[str, Any] = {
            "losses": {name: figure["heldout_loss"] for name, figure in done.summary["clients"].items()},
            "styles": styles_of(build_clients(done.recipe)),
        }
        if cell["stage"] == "late":
            facts = server_of(done.folder).facts
            figures["newcomers"] = {
                name: {
                    "likeness": facts[f"{NEWCOMER}likeness of {name}"],
                    "redundancy": facts[f"{NEWCOMER}redundancy of {name}"],
                }
                for name in self._late(style, seed)
            }
            figures["groups"] = groups_of(server_of(done.folder))
        return figures

    def _adapt(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        """Losses by rounds' worth of steps, from the newcomer's group's adapter and from nothing, with equal words."""
        name = str(cell["client"])
        run = open_run(_folder(folder, {**cell, "stage": "without"}))
        kept = RunFolder(_folder(folder, {**cell, "stage": "late"})).last_kept(name)
        clients, method = build_clients(run.recipe), run.recipe.method
        assert isinstance(method, ClusterLora), "checked when the study was read"
        losses: dict[str, list[float]] = {"group": [], "nothing": []}
        nothing = method.init(run.job.members.initial(seed))
        for start, released in (("group", run.released), ("nothing", nothing)):
            for rounds in self.adapt_rounds:
                how = dataclasses.replace(method.training, steps=rounds * method.training.steps)
                recipe = dataclasses.replace(run.recipe, method=adapting(method, how))
                job = build_job(recipe, clients, run.denoiser, None)
                own = personalize_one(job, released, kept, name)
                run.denoiser.load({**released.params, **own.params})
                losses[start].append(denoising_loss(run.denoiser, clients.data[name].heldout, seed=seed))
        return {"losses": losses, "style": styles_of(clients)[name]}

    # --- who is late -------------------------------------------------------------------------------------------------

    def _late(self, withheld: str, seed: int) -> list[str]:
        """All clients of the withheld style, and the first of each other one."""
        styles = styles_of(build_clients(load_recipe(self.recipe, [*self.changes, f"seed={seed}"])))
        first = {style: name for name, style in reversed(styles.items())}
        return sorted(name for name, style in styles.items() if style == withheld or first[style] == name)

    # --- the answer --------------------------------------------------------------------------------------------------

    def answer(self, found: Sequence[Row]) -> Answer:
        findings, tables, charts, numbers = [], [], [], dict[str, Any]()
        if late := where(found, stage="late"):
            newcomers = [
                {"name": name, "style": row["styles"][name], "new": row["styles"][name] == row["withheld"], **figures}
                for row in late
                for name, figures in row["newcomers"].items()
            ]
            numbers["auroc"] = {what: fmean(_auroc(row, what) for row in late) for what in ("likeness", "redundancy")}
            numbers["agreement"] = fmean(
                adjusted_rand([row["groups"][name] for name in row["styles"]], list(row["styles"].values()))
                for row in late
            )
            numbers["placed"] = {
                kind: fmean(right for row in late for right in _placed(row, kind == "unknown")) for kind in KNOWN
            }
            findings.append(
                f"Newcomers of an unknown style are told from those of known ones with an AUROC of "
                f"{numbers['auroc']['likeness']:.2f} by their descriptors and {numbers['auroc']['redundancy']:.2f} by "
                f"their first update, mean over {len(late)} federations. {numbers['placed']['known']:.0%} of known "
                f"styles join the group that most of their style are in, {numbers['placed']['unknown']:.0%} of unknown "
                f"ones a group of nobody who was there; groups agree with styles by an adjusted Rand index of "
                f"{numbers['agreement']:.2f}."
            )
            charts.append(_told_apart(newcomers))
        changes = [
            after["losses"][name] / before["losses"][name] - 1
            for after in late
            for before in where(found, stage="without", withheld=after["withheld"], seed=after["seed"])
            for name in after["losses"]
            if name not in after["newcomers"]
        ]
        if changes:
            numbers["others"] = {"mean": fmean(changes), "worst": max(changes)}
            findings.append(
                f"Held-out loss of those who were there changes by {fmean(changes):+.2%} on average when newcomers "
                f"come, by {max(changes):+.2%} at worst."
            )
        if adapted := self._adapted(found):
            numbers["adapted"] = adapted
            tables.append(self._table(adapted))
            charts.append(_curves(adapted, self.adapt_rounds))
            near = {
                start: [self._rounds_to(row["losses"][start], row["oracle"]) for row in adapted]
                for start in ("group", "nothing")
            }
            numbers["rounds"] = near
            way = {start: [self._rounds_of_the_way(row, start) for row in adapted] for start in near}
            numbers["rounds_of_the_way"] = way
            findings.append(
                f"To come within 5 % of its oracle's loss a newcomer of a known style needs {_said(near['group'])} "
                f"rounds' worth of steps from its group's adapter, {_said(near['nothing'])} from nothing (medians). To "
                f"go 95 % of the way there from its words alone, {_said(way['group'])} and {_said(way['nothing'])}."
            )
        return Answer(findings, numbers, tables, charts)

    def _adapted(self, found: Sequence[Row]) -> list[dict[str, Any]]:
        rows = []
        for row in where(found, stage="adapt"):
            for together in where(found, stage="together", seed=row["seed"]):
                rows.append({**row, "oracle": together["losses"][row["client"]]})
        return rows

    def _rounds_to(self, losses: Sequence[float], oracle: float) -> int | None:
        return next((n for n, loss in zip(self.adapt_rounds, losses, strict=True) if loss <= 1.05 * oracle), None)

    def _rounds_of_the_way(self, row: Mapping[str, Any], start: str) -> int | None:
        """Until nineteen twentieths of what lies between the words alone and the oracle are gone."""
        alone, oracle = row["losses"]["nothing"][0], row["oracle"]
        losses = zip(self.adapt_rounds, row["losses"][start], strict=True)
        return next((n for n, loss in losses if loss <= oracle + 0.05 * max(0.0, alone - oracle)), None)

    def _table(self, rows: Sequence[Mapping[str, Any]]) -> Table:
        entries: list[list[Entry]] = [
            [row["client"], row["style"], row["withheld"], start, row["oracle"], *row["losses"][start]]
            for row in rows
            for start in ("group", "nothing")
        ]
        columns = ("client", "style", "withheld", "from", "oracle", *(f"{n} rounds" for n in self.adapt_rounds))
        note = "Held-out loss after so many rounds' worth of steps; the oracle was there from the first round."
        return Table("Newcomers of known styles", columns, entries, note)


KNOWN = ("known", "unknown")


def _auroc(row: Row, what: str) -> float:
    """How well a figure tells unknown styles from known ones: less likeness, or more redundancy."""
    sign = -1 if what == "likeness" else 1
    scores = [sign * figures[what] for figures in row["newcomers"].values()]
    return auroc(scores, [row["styles"][name] == row["withheld"] for name in row["newcomers"]])


def _placed(row: Row, unknown: bool) -> list[bool]:
    """Of newcomers of known styles: is its group the one that most of those are in who were there? Of unknown ones: is
    nobody in its group who was there?"""
    found = []
    for name in row["newcomers"]:
        style, group = row["styles"][name], row["groups"][name]
        there = [other for other in row["styles"] if other not in row["newcomers"]]
        if (style == row["withheld"]) != unknown:
            continue
        if unknown:
            found.append(all(row["groups"][other] != group for other in there))
        else:
            own = [row["groups"][other] for other in there if row["styles"][other] == style]
            found.append(bool(own) and max(sorted(set(own)), key=own.count) == group)
    return found


def _said(rounds: Sequence[int | None]) -> str:
    """Their median; those that never came so far count as more than all others."""
    order = sorted(rounds, key=lambda n: math.inf if n is None else n)
    middle = order[(len(order) - 1) // 2]
    return "more than were tried" if middle is None else str(middle)


def _listed(names: Sequence[str]) -> str:
    return "[" + ",".join(f'"{name}"' for name in names) + "]"


def _folder(folder: Path, cell: Cell) -> Path:
    return folder / "runs" / "-".join(str(cell[key]) for key in ("stage", "withheld", "seed") if key in cell)


def _told_apart(newcomers: Sequence[Mapping[str, Any]]) -> Chart:
    def draw(axes: Axes) -> None:
        for new, colour, label in ((False, "after", "a known style"), (True, "before", "an unknown style")):
            own = [each for each in newcomers if each["new"] == new]
            axes.plot(
                [each["likeness"] for each in own],
                [each["redundancy"] for each in own],
                "o",
                color=COLOURS[colour],
                label=label,
                alpha=0.8,
            )
        axes.set(
            xlabel="cosine with the likest group",
            title="Newcomers: part of the first update that no group's adapter has",
        )
        axes.legend()

    drawing = chart("newcomers", 5.6, 3.4, draw, "newcomers by likeness and redundancy")
    return Chart("newcomers", drawing, "Left: unlike all groups. Up: their first update is unlike all adapters.")


def _curves(rows: Sequence[Mapping[str, Any]], rounds: Sequence[int]) -> Chart:
    def draw(axes: Axes) -> None:
        for start, colour in (("nothing", "before"), ("group", "after")):
            means = [fmean(row["losses"][start][at] / row["oracle"] for row in rows) for at in range(len(rounds))]
            axes.plot(rounds, means, "o-", color=COLOURS[colour], label=f"from {start}")
        axes.axhline(1.05, color=COLOURS["real"], linestyle=":", linewidth=1)
        axes.set(xlabel="rounds' worth of steps", title="Held-out loss of newcomers, by their oracle's")
        axes.legend()

    drawing = chart("adapted", 5.2, 3.2, draw, "loss of newcomers against steps")
    return Chart("adapted", drawing, "Mean over newcomers of known styles. Dotted: within 5 % of the oracle.")
