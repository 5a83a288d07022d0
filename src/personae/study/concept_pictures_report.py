"""What the pictures of concepts say: the share that shows what was asked for, what is taken for what, and the grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from personae.evaluate.charts import COLOURS, chart
from personae.evaluate.matrix_chart import SCALE
from personae.study.concept_scenes import PLAIN, STRICT
from personae.study.stats import Interval, interval, paired
from personae.study.study import Answer, Chart, Entry, Picture, Row, Table, file_name, joined, where

UNTAUGHT = "untaught"

HOPED = {"alone": 0.9, "two": 0.6}
"""Alone: of the share of real pictures; two: of pictures in which both concepts are at their places."""

WORDS = {"two": "both", "three": "all three"}

ALONE = (
    *("learner", "pictures", "taken for itself", "low", "high", "autoencoder", "real", "chance", "drawn / real"),
    *("among nouns too", "autoencoder", "real", "drawn / real"),
)
SCENES = (
    *("learner", "pictures", "prompt alone", "with regions", "difference", "low", "high", "other order", "so with"),
    *("autoencoder", "real", "chance", "among nouns too", "so with", "real"),
)

NOTE_ALONE = (
    "A picture is taken for the concept whose real pictures in other styles than the one asked for it is most like; "
    "real pictures and what the autoencoder makes of them are judged alike. Among nouns too: the nouns' real pictures "
    "are candidates. Intervals are over prompts of concepts and seeds, as if the prompts of one concept, which share "
    "its word and model, were independent. The untaught model draws the nouns."
)
NOTE_SCENES = (
    "Every concept's place alone is judged, as a picture is. Other order: all of them are there, but not each at its "
    "place. Difference: with regions less without, from the same noises, and its 95 % interval, over arrangements. "
    "The real ones are scenes made of real pictures."
)


def best_judge(row: Row) -> str:
    """The feature map with the best mean of its two shares."""
    shares: Mapping[str, Mapping[str, float]] = row["shares"]
    return max(shares, key=lambda name: fmean(shares[name].values()))


def answer(found: Sequence[Row], learners: Sequence[str]) -> Answer:
    judged = where(found, stage="judge")
    if not judged:
        return Answer([f"{len(found)} measurements so far; no judge is chosen yet."])
    names = [UNTAUGHT, *learners]
    parts = [_judges(judged[0]), _alone(found, names)]
    parts += [_together(found, names, stage) for stage in WORDS]
    return joined(parts)


def _judges(row: Row) -> Answer:
    shares, best = row["shares"], best_judge(row)
    told = ", ".join(f"{share:.0%} {what}" for what, share in shares[best].items())
    others = "; ".join(f"{name} {fmean(found.values()):.0%}" for name, found in shares.items() if name != best)
    findings = [
        f"The judge is {best}: of real pictures of {row['concepts']} concepts, each compared with other styles', it "
        f"takes {told} for their own. On average of both {fmean(shares[best].values()):.0%}; {others}."
    ]
    findings += [f"Not compared, since it is not installed: {name}." for name in row["lacking"]]
    lines: list[list[Entry]] = [[name, *own.values(), 1 / row["concepts"]] for name, own in shares.items()]
    note = f"Share of real pictures that are taken for their own concept, over {row['sets']} sets of concepts."
    return Answer(findings, {"judge": best}, [Table("Judges", ("features", *shares[best], "chance"), lines, note)])


# --- shares -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """Of right pictures, one for each prompt of a concept or each arrangement, over all seeds.

    `swapped` is of those that hold the right concepts in another order.
    """

    right: Sequence[float]
    swapped: Sequence[float] = ()

    @property
    def mean(self) -> float:
        return fmean(self.right)


def shares_of(rows: Sequence[Row], what: str, how: str = PLAIN) -> Shares:
    right, swapped = [], []
    for row in rows:
        each = len(row[what][how]) // len(row["asked"])
        for at, asked in enumerate(row["asked"]):
            taken = row[what][how][at * each : (at + 1) * each]
            right.append(fmean(one == asked for one in taken))
            swapped.append(fmean(one != asked and sorted(one) == sorted(asked) for one in taken))
    return Shares(right, swapped)


def _num(rows: Sequence[Row], what: str) -> int:
    return sum(len(row[what][PLAIN]) for row in rows)


def _mean_of(rows: Sequence[Row], what: str, how: str) -> float | None:
    """None where that was not read: some concepts have no pictures of their nouns."""
    return shares_of(rows, what, how).mean if how in rows[0][what] else None


def _over(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


# --- alone ------------------------------------------------------------------------------------------------------------


def _alone(found: Sequence[Row], names: Sequence[str]) -> Answer:
    by_name = {name: rows for name in names if (rows := where(found, stage="alone", learner=name))}
    if not by_name:
        return Answer()
    findings, lines, numbers, charts, pictures = [], [], {}, [], []
    for name, rows in by_name.items():
        concepts = rows[0]["concepts"]
        plain, strict = (
            {what: _mean_of(rows, what, how) for what in ("drawn", "autoencoder", "real")} for how in (PLAIN, STRICT)
        )
        spread = interval(shares_of(rows, "drawn").right)
        ratios = [_over(own["drawn"], own["real"]) for own in (plain, strict)]
        lines.append(
            [
                *(name, _num(rows, "drawn"), plain["drawn"], spread.low, spread.high, plain["autoencoder"]),
                *(plain["real"], 1 / len(concepts), ratios[0]),
                *(strict["drawn"], strict["autoencoder"], strict["real"], ratios[1]),
            ]
        )
        numbers[name] = {**plain, "ratio": ratios[0], STRICT: {**strict, "ratio": ratios[1]}}
        findings.append(_told_alone(name, numbers[name], len(concepts)))
        key = file_name("confusion", name)
        drawing = confusion_chart(key, name, rows)
        charts.append(Chart(key, drawing, f"{name}: what is taken for what, one concept each."))
        pictures.append(Picture(rows[0]["picture"], f"{name}. Down: {', '.join(concepts)}. Across: real ones, drawn."))
    marks = (("drawn", 2, "after", "o"), ("through the autoencoder", 5, "up", "s"), ("real", 6, "real", "o"))
    charts.insert(0, _dots("alone", "One concept: taken for itself", lines, (*marks, ("chance", 7, "down", "|"))))
    return Answer(findings, {"alone": numbers}, [Table("Alone", ALONE, lines, NOTE_ALONE)], charts, pictures)


def _told_alone(name: str, own: Mapping[str, Any], count: int) -> str:
    strict, drawn, real = own[STRICT], own["drawn"], own["real"]
    told = (
        f"{name}, alone: {drawn:.0%} of drawn pictures are taken for their own among {count} concepts, {real:.0%} of "
    )
    told += f"real ones (chance {1 / count:.0%})"
    if own["ratio"] is not None:
        told += f": {own['ratio']:.2f} x as many"
    if strict["drawn"] is not None:
        told += (
            f". With the nouns' pictures among the candidates {strict['drawn']:.0%}, of real ones {strict['real']:.0%}"
        )
        if strict["ratio"] is not None:
            told += f": {strict['ratio']:.2f} x as many"
    ratios = {"among concepts": own["ratio"], "with nouns too": strict["ratio"]} if name != UNTAUGHT else {}
    if verdicts := [
        f"{'reached' if ratio >= HOPED['alone'] else 'missed'} {among}"
        for among, ratio in ratios.items()
        if ratio is not None
    ]:
        told += f". {HOPED['alone']:g} x was hoped for: {', '.join(verdicts)}"
    return told + "."


# --- together ---------------------------------------------------------------------------------------------------------


def _together(found: Sequence[Row], names: Sequence[str], stage: str) -> Answer:
    by_name = {name: rows for name in names if (rows := where(found, stage=stage, learner=name))}
    if not by_name:
        return Answer()
    findings, lines, numbers, pictures = [], [], {}, []
    for name, rows in by_name.items():
        own = {what: shares_of(rows, what) for what in ("without", "with", "autoencoder", "real")}
        strict = {what: _mean_of(rows, what, STRICT) for what in own}
        means = {what: share.mean for what, share in own.items()}
        gain = paired(own["with"].right, own["without"].right)
        chance = len(rows[0]["concepts"]) ** -len(rows[0]["asked"][0])
        lines.append(
            [
                *(name, _num(rows, "with"), means["without"], means["with"], gain.mean, gain.low, gain.high),
                *(fmean(own[arm].swapped) for arm in ("without", "with")),
                *(means["autoencoder"], means["real"], chance),
                *(strict[what] for what in ("without", "with", "real")),
            ]
        )
        numbers[name] = {**means, "difference": vars(gain), "chance": chance, STRICT: strict}
        findings.append(_told_together(name, stage, numbers[name]))
        pictures.append(Picture(rows[0]["picture"], _shown(name, rows[0])))
    findings += _best(stage, {name: own for name, own in numbers.items() if name != UNTAUGHT})
    marks = (("through the autoencoder", 9, "up", "s"), ("real", 10, "real", "o"), ("chance", 11, "down", "|"))
    arms = (("prompt alone", 2, "before", "o"), ("with regions", 3, "after", "o"))
    drawn = _dots(stage, f"{stage.capitalize()} concepts: {WORDS[stage]} at their places", lines, (*arms, *marks))
    table = Table(f"{stage.capitalize()} together", SCENES, lines, NOTE_SCENES)
    return Answer(findings, {stage: numbers}, [table], [drawn], pictures)


def _told_together(name: str, stage: str, own: Mapping[str, Any]) -> str:
    gain = Interval(**own["difference"])
    beside = (
        f"real scenes {own['real']:.0%}, through the autoencoder {own['autoencoder']:.0%}, chance {own['chance']:.1%}."
    )
    told = f"{name}, {stage} together: {WORDS[stage]} at their places in {own['without']:.0%} of pictures"
    if name == UNTAUGHT:  # its regions say what the prompt says
        return f"{told}; {beside}"
    told += f" by the prompt alone and in {own['with']:.0%} with regions; {beside} "
    if gain.num == 1 or not gain.excludes(0):
        return told + f"Regions make no difference that can be told: {gain.told('+.2f')}."
    return told + f"Regions {'help' if gain.mean > 0 else 'harm'}: {gain.told('+.2f')}."


def _best(stage: str, numbers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of two concepts, how the best learner stands to what was hoped for."""
    if stage not in HOPED or not numbers:
        return []
    share, name, how = max((own[arm], name, told) for name, own in numbers.items() for arm, told in ARMS.items())
    reached = "reached" if share >= HOPED[stage] else "missed"
    return [f"Best of {stage} together: {name} {how}, {share:.0%}; {HOPED[stage]:.0%} was hoped for: {reached}."]


ARMS = {"without": "by the prompt alone", "with": "with regions"}


def _shown(name: str, row: Row) -> str:
    captions = "; ".join(f"{at}: {said}" for at, said in enumerate(row["captions"][: row["num_shown"]], 1))
    few = row["num_columns"]
    return f"{name}. Across: {few} by the prompt alone, {few} with regions, a real scene. Down: {captions}."


# --- charts -----------------------------------------------------------------------------------------------------------


def confusion_chart(key: str, title: str, rows: Sequence[Row]) -> Markup:
    """Shares of pictures of each concept (down) that are taken for each (across): drawn, and real ones beside them."""
    names = rows[0]["concepts"]
    halves = [_confusion(rows, what, names) for what in ("drawn", "real")]
    count = len(names)

    def draw(axes: Axes) -> None:
        colours = matplotlib.colormaps[SCALE]
        for half, (cells, what) in enumerate(zip(halves, ("drawn", "real"), strict=True)):
            left = half * (count + 0.5)
            axes.pcolormesh(np.arange(count + 1) + left, np.arange(count + 1), cells, cmap=colours, vmin=0, vmax=1)
            axes.text(left + count / 2, count + 0.5, what, ha="center", va="center", fontweight="bold")
            for row, column in np.ndindex(count, count):
                value = cells[row, column]
                shade = "#101010" if value > 0.5 else "#ffffff"
                axes.text(left + column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", color=shade)
        at = [half * (count + 0.5) + column + 0.5 for half in (0, 1) for column in range(count)]
        axes.set_xticks(at, [*names, *names], rotation=35, ha="left", rotation_mode="anchor")
        axes.set_yticks(np.arange(count) + 0.5, names)
        axes.xaxis.tick_top()
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set(
            ylim=(count + 0.8, 0), xlim=(0, 2 * count + 0.5), title=f"{title}: asked for (down), taken for (across)"
        )

    told = "; ".join(
        f"{what} {asked}: " + ", ".join(f"{taken} {value:.2f}" for taken, value in zip(names, line, strict=True))
        for what, cells in zip(("drawn", "real"), halves, strict=True)
        for asked, line in zip(names, cells, strict=True)
    )
    return chart(key, 1.6 + 1.0 * count, 1.5 + 0.32 * count, draw, f"{title}; {told}")


def _confusion(rows: Sequence[Row], what: str, names: Sequence[str]) -> np.ndarray:
    counts = np.zeros((len(names), len(names)))
    for row in rows:
        taken = row[what][PLAIN]
        each = len(taken) // len(row["asked"])
        for at, one in enumerate(taken):
            counts[names.index(row["asked"][at // each]), names.index(one)] += 1
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def _dots(name: str, title: str, lines: Sequence[Sequence[Any]], marks: Sequence[tuple[str, int, str, str]]) -> Chart:
    """`marks` are a label, a column of the lines, a colour and a marker."""

    def draw(axes: Axes) -> None:
        for label, column, colour, marker in marks:
            known = [(line[column], at) for at, line in enumerate(lines) if line[column] is not None]
            axes.plot(*zip(*known, strict=True), marker, color=COLOURS[colour], markersize=7, label=label)
        axes.set_yticks(range(len(lines)), [str(line[0]) for line in lines])
        axes.set(xlim=(-0.02, 1.02), ylim=(len(lines) - 0.5, -0.5), title=title)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    told = "; ".join(f"{line[0]}: " + ", ".join(f"{m[0]} {line[m[1]]:.2f}" for m in marks) for line in lines)
    return Chart(name, chart(f"pictures-{name}", 7.0, 1.2 + 0.34 * len(lines), draw, f"{title}; {told}"), title + ".")
