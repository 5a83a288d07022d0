"""What the comparison of learners found: the table, how the average goes on, what is taken for what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from personae.evaluate.charts import chart
from personae.evaluate.forgetting import forgetting
from personae.evaluate.matrix_chart import matrix_chart
from personae.study.stats import Interval, interval, paired
from personae.study.study import Answer, Chart, Entry, Row, Table, file_name, where

COLUMNS = (
    "learner",
    "rate",
    "runs",
    "average gain",
    "by the word",
    "learning",
    "of the first's",
    "forgetting",
    "of the first's",
    "backward",
    "taken for itself",
    "drift",
    "bytes, after one",
    "and each more",
    "seconds a concept",
)

NOTE = (
    "Gains are in held-out loss, below the untaught model's. Average: over all concepts after the last one. By the "
    "word: how much lower that is than with the noun in the word's place; what else was gained is not the concept's. "
    "Learning: of each concept when it was new. Forgetting: how far below its best before the last concept an earlier "
    "one ends, mean over all but the last. Backward: that against when it was new. Drift: mean squared change of "
    "predictions about other things. Bytes: all that is kept. Each learner is at the rate that gave the highest "
    "average gain in the first order with the first seed, so that run is a little high for all, the more so the more "
    "rates were tried."
)


def answer(found: Sequence[Row], names: Sequence[str], best: Mapping[str, float | None]) -> Answer:
    """`best` has the learning rate of each learner that has been chosen."""
    rows = {n: where(found, stage="run", learner=n, rate=best[n]) for n in names if best[n] is not None}
    if not rows or names[0] not in rows:
        return Answer([f"{len(found)} runs so far; no learner's rate is chosen yet."])
    figures = {name: [_of(row) for row in own] for name, own in rows.items()}
    joint = [row for row in found if row["stage"] == "joint"]
    findings, compared = _told(names[0], rows, figures)
    tables = [_table(names[0], rows, figures, joint)]
    charts = [Chart("averages", chart("averages", 7.4, 4.2, _curves(rows), "Average gain"), "Mean gain of all so far.")]
    every = [gain for own in rows.values() for line in own[0]["gains"] for gain in line if gain is not None]
    span = (min(every), max(every))
    for name, own in rows.items():
        key = file_name("gains", name)
        drawing = matrix_chart(key, name, own[0]["concepts"], own[0]["gains"], span=span, digits=3)
        if drawing is not None:
            charts.append(Chart(key, drawing, f"{name}: gain on each concept after each concept."))
    numbers = {
        "figures": {name: [dict(one) for one in own] for name, own in figures.items()},
        "against the first": compared,
        "joint": [fmean(row["gain"]) for row in joint],
    }
    return Answer(findings, numbers, tables, charts)


def _of(row: Row) -> dict[str, Any]:
    """One run's figures."""
    found, last = forgetting(row["gains"]), row["right"][-1]
    return {
        "order": row["order"],
        "seed": row["seed"],
        "average": fmean(row["gains"][-1]),
        "learning": found.learning,
        "forgetting": found.forgetting,
        "backward": found.backward_transfer,
        "by_word": fmean(row["by_word"]),
        "right": fmean(last),
        "drift": row["drift"][-1],
        "bytes": row["bytes"][0],
        "more": (row["bytes"][-1] - row["bytes"][0]) / (len(row["bytes"]) - 1),
        "seconds": fmean(row["lesson_seconds"]),
    }


def _told(
    first: str, rows: Mapping[str, Sequence[Row]], figures: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[list[str], dict[str, Any]]:
    """Sentences, and each learner's differences to the first, paired by order and seed."""
    lost = interval([one["forgetting"] for one in figures[first]])
    told = [
        f"{first} loses {lost.told('.4f')} of held-out gain on an earlier concept, over {lost.num} runs"
        f"{_errors_above([one['forgetting'] for one in figures[first]])}."
    ]
    compared: dict[str, Any] = {}
    by_run = {name: {(one["order"], one["seed"]): one for one in own} for name, own in figures.items()}
    for name in list(figures)[1:]:
        shared = [key for key in by_run[first] if key in by_run[name]]
        if not shared:
            continue
        ours, theirs = ([by_run[who][key] for key in shared] for who in (name, first))
        differences = {
            what: vars(paired([one[what] for one in ours], [one[what] for one in theirs]))
            for what in ("average", "by_word", "learning", "forgetting", "drift")
        }
        ratios = {what: _ratio(ours, theirs, what) for what in ("learning", "forgetting")}
        compared[name] = {"differences": differences, "ratios": ratios}
        parts = [f"{verb} {ratios[what]:.2f} x as much" for what, verb in VERBS.items() if ratios[what] is not None]
        told.append(
            f"{name} against {first}: {', '.join([*parts, ''])}average gain "
            f"{Interval(**differences['average']).told('+.4f')}, drift {Interval(**differences['drift']).told('+.4f')}."
        )
    halved = [
        name
        for name, found in compared.items()
        if None not in found["ratios"].values()
        and found["ratios"]["forgetting"] <= LOST
        and found["ratios"]["learning"] >= LEARNED
    ]
    told.append(
        f"At most {LOST} x the forgetting of {first} with at least {LEARNED} x its learning: "
        f"{', '.join(halved) or 'nobody'}."
    )
    return told, compared


VERBS = {"forgetting": "forgets", "learning": "learns"}

LOST, LEARNED = 0.5, 0.95
"""Of the first's, what was hoped for."""

ERRORS = 3
"""So many standard errors above 0 is the first's forgetting to be, before it is worth being a share of."""


def _errors_above(forgotten: Sequence[float]) -> str:
    if len(forgotten) < 2:
        return ", of which one says nothing of chance"
    error = stdev(forgotten) / math.sqrt(len(forgotten))
    errors = fmean(forgotten) / error if error else math.inf
    return f": {errors:.1f} standard errors ({ERRORS} hoped for: {'reached' if errors >= ERRORS else 'missed'})"


def _ratio(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], what: str) -> float | None:
    """None, where theirs is nothing that could be a multiple of."""
    base = fmean(one[what] for one in theirs)
    return fmean(one[what] for one in ours) / base if base > 0 else None


def _table(
    first: str,
    rows: Mapping[str, Sequence[Row]],
    figures: Mapping[str, Sequence[Mapping[str, Any]]],
    joint: Sequence[Row],
) -> Table:
    lines: list[list[Entry]] = []
    for name, own in figures.items():
        mean = {key: fmean(one[key] for one in own) for key in own[0] if key not in ("order", "seed")}
        lines.append(
            [
                name,
                rows[name][0]["rate"],
                len(own),
                mean["average"],
                mean["by_word"],
                mean["learning"],
                _ratio(own, figures[first], "learning"),
                mean["forgetting"],
                _ratio(own, figures[first], "forgetting"),
                mean["backward"],
                mean["right"],
                mean["drift"],
                int(mean["bytes"]),
                int(mean["more"]),
                mean["seconds"],
            ]
        )
    if joint:
        gain, right = (fmean(fmean(row[key]) for row in joint) for key in ("gain", "right_in_the_end"))
        lines.append(["all at once", joint[0]["rate"], len(joint), gain, *[None] * 6, right, *[None] * 4])
    return Table("Learners", COLUMNS, lines, NOTE)


def _curves(rows: Mapping[str, Sequence[Row]]) -> Any:
    def draw(axes: Axes) -> None:
        for number, (name, own) in enumerate(rows.items()):
            count = len(own[0]["gains"])
            means = [fmean(fmean(row["gains"][at][: at + 1]) for row in own) for at in range(count)]
            axes.plot(
                range(1, count + 1), means, label=name, marker="os^vDPX*<>hd"[number % 12], markersize=4, linewidth=1.2
            )
        axes.set(xlabel="concepts learned", title="Average gain over the concepts so far")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return draw
