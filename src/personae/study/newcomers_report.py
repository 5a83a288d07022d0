"""What the study of newcomers found: findings, tables, charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from personae.evaluate.charts import COLOURS, chart
from personae.evaluate.grouping import adjusted_rand, auroc
from personae.study.study import Answer, Chart, Entry, Row, Table, where

NEAR = 0.05
"""A newcomer has arrived when its loss is at most so much above its oracle's."""

HARMLESS = 0.01
"""By so much the others' loss may change when newcomers come."""

STARTS = ("group", "nothing")
KNOWN = ("known", "unknown")


def answer(found: Sequence[Row]) -> Answer:
    findings, tables, charts, numbers = [], [], [], dict[str, Any]()
    if late := where(found, stage="late"):
        newcomers = [
            {"name": name, "style": row["styles"][name], "new": row["styles"][name] == row["withheld"], **figures}
            for row in late
            for name, figures in row["newcomers"].items()
        ]
        numbers |= _told(late)
        findings.append(
            f"Newcomers of an unknown style are told from those of known ones with an AUROC of "
            f"{numbers['auroc']['likeness']:.2f} by their descriptors and {numbers['auroc']['redundancy']:.2f} by "
            f"their first update, mean over {len(late)} federations. {numbers['placed']['known']:.0%} of known "
            f"styles join the group that most of their style are in, {numbers['placed']['unknown']:.0%} of unknown "
            f"ones a group of nobody who was there; groups agree with styles by an adjusted Rand index of "
            f"{numbers['agreement']:.2f}."
        )
        charts.append(_told_apart(newcomers))
    if there := _there(found):
        numbers["others"] = _changes(there)
        findings.append(_unharmed(there, numbers["others"]))
        tables.append(_others(there))
    if adapted := _adapted(found):
        near = {start: [first_near(row["losses"][start], row["oracle"]) for row in adapted] for start in STARTS}
        way = {start: [_first_of_the_way(row, start) for row in adapted] for start in STARTS}
        tried = len(adapted[0]["losses"]["group"]) - 1
        numbers |= {"adapted": adapted, "rounds": near, "rounds_of_the_way": way}
        numbers["a_quarter"] = [a_quarter(warm, cold, tried) for warm, cold in zip(*near.values(), strict=True)]
        findings.append(_fast(near, way, numbers["a_quarter"], tried))
        tables.append(_table(adapted, tried))
        charts.append(_curves(adapted, tried))
    return Answer(findings, numbers, tables, charts)


# --- told apart --------------------------------------------------------------------------------------------------


def _told(late: Sequence[Row]) -> dict[str, Any]:
    """Means over federations."""
    return {
        "auroc": {what: fmean(_auroc(row, what) for row in late) for what in ("likeness", "redundancy")},
        "agreement": fmean(
            adjusted_rand([row["groups"][name] for name in row["styles"]], list(row["styles"].values())) for row in late
        ),
        "placed": {kind: fmean(right for row in late for right in _placed(row, kind == "unknown")) for kind in KNOWN},
    }


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
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    drawing = chart("newcomers", 5.6, 3.4, draw, "newcomers by likeness and redundancy")
    return Chart("newcomers", drawing, "Left: unlike all groups. Up: their first update is unlike all adapters.")


# --- those who were there ----------------------------------------------------------------------------------------


def _there(found: Sequence[Row]) -> list[dict[str, Any]]:
    """Of each client that was there, its loss with newcomers and without them."""
    rows = []
    for late in where(found, stage="late"):
        of = {"withheld": late["withheld"], "seed": late["seed"]}
        for without in where(found, stage="without", **of):
            rows += [
                {**of, "client": name, "with": loss, "without": without["losses"][name]}
                for name, loss in late["losses"].items()
                if name not in late["newcomers"]
            ]
    return rows


def _changes(there: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What newcomers change, as parts of the loss at the same round without them."""
    changes = {(row["withheld"], row["seed"], row["client"]): row["with"] / row["without"] - 1 for row in there}
    federations = [
        fmean(change for at, change in changes.items() if at[:2] == federation)
        for federation in dict.fromkeys(at[:2] for at in changes)
    ]
    return {
        "mean": fmean(changes.values()),
        "worst": max(changes.values()),
        "harmed": fmean(change > HARMLESS for change in changes.values()),
        "federations": federations,
    }


def _unharmed(there: Sequence[Mapping[str, Any]], changes: Mapping[str, Any]) -> str:
    small = [abs(change) <= HARMLESS for change in changes["federations"]]
    right = "as was hoped of all" if all(small) else "hoped for was that of all"
    ends = [fmean(row[which] for row in there) for which in ("with", "without")]
    return (
        f"The held-out loss of those who were there is {ends[0]:.4f} with newcomers, {ends[1]:.4f} without any: "
        f"newcomers change it by {changes['mean']:+.2%} on average, in {sum(small)} of {len(small)} federations by "
        f"less than {HARMLESS:.0%}; {right}. For {changes['harmed']:.0%} of these clients it is more than "
        f"{HARMLESS:.0%} higher, at worst by {changes['worst']:+.2%}."
    )


def _others(there: Sequence[Mapping[str, Any]]) -> Table:
    entries: list[list[Entry]] = []
    for withheld, seed in dict.fromkeys((row["withheld"], row["seed"]) for row in there):
        own = where(there, withheld=withheld, seed=seed)
        means = [fmean(row[which] for row in own) for which in ("with", "without")]
        changes = _changes(own)
        entries.append([withheld, seed, len(own), *means, changes["mean"], changes["worst"], changes["harmed"]])
    columns = ("withheld", "seed", "clients", "with newcomers", "without", "mean change", "worst")
    note = (
        "Mean held-out loss of the clients that were there from the first round, with newcomers and in the same "
        "federation without any. Changes are from without to with, client by client."
    )
    return Table("Those who were there", (*columns, f"more than {HARMLESS:.0%} higher"), entries, note)


# --- how fast ----------------------------------------------------------------------------------------------------


def _adapted(found: Sequence[Row]) -> list[dict[str, Any]]:
    rows = []
    for row in where(found, stage="adapt"):
        for together in where(found, stage="together", seed=row["seed"]):
            rows.append({**row, "oracle": together["losses"][row["client"]]})
    return rows


def first_near(losses: Sequence[float], oracle: float) -> int | None:
    """The round after which the loss is near the oracle's for the first time, 0 being the start; None: never."""
    return next((number for number, loss in enumerate(losses) if loss <= (1 + NEAR) * oracle), None)


def a_quarter(warm: int | None, cold: int | None, tried: int) -> bool | None:
    """Whether warm takes at most a quarter of cold's rounds; None where cold takes none, and nothing can be saved.

    Who is not there after all that were tried needs one more at least.
    """
    if cold == 0:
        return None
    return warm is not None and 4 * warm <= (tried + 1 if cold is None else cold)


def _first_of_the_way(row: Mapping[str, Any], start: str) -> int | None:
    """Until nineteen twentieths of what lies between the words alone and the oracle are gone."""
    alone, oracle = row["losses"]["nothing"][0], row["oracle"]
    enough = oracle + 0.05 * max(0.0, alone - oracle)
    return next((number for number, loss in enumerate(row["losses"][start]) if loss <= enough), None)


def _fast(
    near: Mapping[str, Sequence[int | None]],
    way: Mapping[str, Sequence[int | None]],
    quarters: Sequence[bool | None],
    tried: int,
) -> str:
    counted = [quarter for quarter in quarters if quarter is not None]
    idle = f", {len(quarters) - len(counted)} were near from nothing at once" if len(counted) < len(quarters) else ""
    right = "as was hoped of all" if counted and all(counted) else "hoped for was that of all"
    said = f"at most a quarter of them for {sum(counted)} of {len(counted)} newcomers{idle}; {right}"
    return (
        f"A newcomer of a known style that trains alone is within {NEAR:.0%} of its oracle's loss first after "
        f"{_said(near['group'], tried)} rounds from its group's adapter, after {_said(near['nothing'], tried)} from "
        f"nothing (medians; 0: before it trains): {said if counted else 'near from nothing at once, all of them'}. To "
        f"go 95 % of the way there from its words alone, {_said(way['group'], tried)} and "
        f"{_said(way['nothing'], tried)}."
    )


def _said(rounds: Sequence[int | None], tried: int) -> str:
    """Their median; those that never came so far count as more than all others."""
    order = sorted(rounds, key=lambda n: math.inf if n is None else n)
    middle = order[(len(order) - 1) // 2]
    return f"more than {tried}" if middle is None else str(middle)


def _table(rows: Sequence[Mapping[str, Any]], tried: int) -> Table:
    shown = sorted({0, tried, *(2**k for k in range(tried.bit_length()) if 2**k < tried)})
    entries: list[list[Entry]] = []
    for row in rows:
        for start in STARTS:
            losses = row["losses"][start]
            near = first_near(losses, row["oracle"])
            entries.append(
                [row["client"], row["style"], row["withheld"], start, row["oracle"], near, *(losses[n] for n in shown)]
            )
    columns = ("client", "style", "withheld", "from", "oracle", "first near", *(f"{n} rounds" for n in shown))
    note = (
        f"Held-out loss before and after rounds of a newcomer's own training; the oracle was there from the first "
        f"round. First near: the round after which the loss is at most {NEAR:.0%} above the oracle's."
    )
    return Table("Newcomers of known styles", columns, entries, note)


def _curves(rows: Sequence[Mapping[str, Any]], tried: int) -> Chart:
    oracle = fmean(row["oracle"] for row in rows)

    def draw(axes: Axes) -> None:
        for start, colour, label in (("nothing", "before", "cold: from nothing"), ("group", "after", "warm: group's")):
            means = [fmean(row["losses"][start][number] for row in rows) for number in range(tried + 1)]
            axes.plot(range(tried + 1), means, "o-", color=COLOURS[colour], label=label, markersize=4)
        axes.axhline(oracle, color=COLOURS["ink"], linewidth=1, label="oracle")
        axes.axhline((1 + NEAR) * oracle, color=COLOURS["real"], linestyle=":", linewidth=1)
        axes.set(xlabel="rounds of its own training", title="Held-out loss of newcomers")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    drawing = chart("adapted", 5.2, 3.2, draw, "loss of newcomers by round, warm and cold, and their oracles'")
    caption = f"Means over newcomers of known styles. Dotted: {NEAR:.0%} above the oracles' mean."
    return Chart("adapted", drawing, caption)
