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

JOINT = "joint"
"""The name, among learners, of all concepts at once."""

Figures = Mapping[str, Sequence[Mapping[str, Any]]]
"""By learner, those of each of its runs."""

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


def answer(found: Sequence[Row], best: Mapping[str, float | None], ours: Sequence[str]) -> Answer:
    """`best` has the learning rate of each learner that has been chosen, and of all concepts at once."""
    names = [name for name in best if name != JOINT]
    rows = {n: where(found, learner=n, rate=best[n]) for n in names if best[n] is not None}
    if not rows or names[0] not in rows:
        return Answer([f"{len(found)} runs so far; no learner's rate is chosen yet."])
    figures = {name: [_of(row) for row in own] for name, own in rows.items()}
    joint = where(found, learner=JOINT, rate=best.get(JOINT))
    findings, compared = _told(names[0], figures)
    shown = [each for each in ours if each in figures]
    less = {each: _less_others(figures, each, [name for name in figures if name not in ours]) for each in shown}
    findings += [_beside_others(each, less[each]) for each in shown if less[each]]
    tables = [_table(names[0], rows, figures, joint)]
    if any(less.values()):
        tables.append(_less_table(less))
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
        "ours less others": {
            each: {name: {what: vars(one) for what, one in by.items()} for name, by in others.items()}
            for each, others in less.items()
        },
        "joint": [fmean(row["gains"][-1]) for row in joint],
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


def _told(first: str, figures: Figures) -> tuple[list[str], dict[str, Any]]:
    """Sentences, and each learner's differences to the first, paired by order and seed."""
    lost = interval([one["forgetting"] for one in figures[first]])
    told = [
        f"{first} loses {lost.told('.4f')} of held-out gain on an earlier concept, over {lost.num} runs"
        f"{_errors_above([one['forgetting'] for one in figures[first]])}."
    ]
    compared: dict[str, Any] = {}
    for name in list(figures)[1:]:
        ours, theirs = _pairs(figures, name, first)
        if not ours:
            continue
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


def _pairs(figures: Figures, *names: str) -> tuple[list[Mapping[str, Any]], ...]:
    """The figures of those runs of each that all have, by order and seed."""
    by_run = [{(one["order"], one["seed"]): one for one in figures[name]} for name in names]
    shared = [key for key in by_run[0] if all(key in runs for runs in by_run)]
    return tuple([runs[key] for key in shared] for runs in by_run)


def _less_others(figures: Figures, name: str, others: Sequence[str]) -> dict[str, dict[str, Interval]]:
    """What `name` has of each of SIDES less what each of the others has, by its name."""
    pairs = {other: _pairs(figures, name, other) for other in others}
    return {
        other: {what: paired([one[what] for one in ours], [one[what] for one in theirs]) for what in SIDES}
        for other, (ours, theirs) in pairs.items()
        if ours
    }


def _beside_others(name: str, less: Mapping[str, Mapping[str, Interval]]) -> str:
    """Who is better and who is worse than `name`; from one run that is no more than who is above whom."""
    parts = []
    for what, (title, better) in SIDES.items():
        sides: dict[str, list[str]] = {"better than": [], "worse than": [], "not told apart from": []}
        for other, by in less.items():
            told = by[what].excludes(0) or (by[what].num == 1 and by[what].mean != 0)
            side = ("better than" if by[what].mean * better > 0 else "worse than") if told else "not told apart from"
            sides[side].append(other)
        parts.append(f"{title} " + ", ".join(f"{side} {', '.join(who)}" for side, who in sides.items() if who))
    alone = all(by[what].num == 1 for by in less.values() for what in SIDES)
    return f"{name}: {'; '.join(parts)}{' (one run each: no chance told)' if alone else ''}."


def _less_table(less: Mapping[str, Mapping[str, Mapping[str, Interval]]]) -> Table:
    columns = ("ours", "less", "runs", *(title for title, _ in SIDES.values()))
    lines: list[list[Entry]] = [
        [each, other, next(iter(by.values())).num, *(by[what].starred("+.4f") for what in SIDES)]
        for each, others in less.items()
        for other, by in others.items()
    ]
    note = "Differences over the same orders and seeds, 95 % intervals where there are two or more; * excludes 0."
    return Table("Ours less each other", columns, lines, note)


SIDES = {"average": ("average gain", 1), "drift": ("drift", -1)}
"""What ours are compared with others in: its title, and which way is better."""

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
    figures: Figures,
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
        gain = fmean(fmean(row["gains"][-1]) for row in joint)
        right = fmean(fmean(row["right_in_the_end"]) for row in joint)
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
