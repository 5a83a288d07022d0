"""What the comparison of adapters by style with others found: findings, tables, the map of groups, grids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes

from personae.data.style_mixtures import shares_of
from personae.evaluate.charts import COLOURS, chart, group_map
from personae.study.stats import Interval, interval, paired
from personae.study.study import Answer, Chart, Entry, Picture, Row, Table, where

PAPERS = (
    "The paper's own figures, of other data and other distances: a distance 0.6 times the rivals', alignment +40 %."
)


def answer(
    found: Sequence[Row], names: Sequence[str], rivals: Sequence[str], best: Mapping[str, float | None]
) -> Answer:
    """`names` begins with ours; `best` has the learning rate of each, as far as it is known."""
    rows = {name: where(found, stage="run", variant=name, rate=best[name]) for name in names}
    drawn = {name: where(found, stage="drawn", variant=name) for name in names}
    findings: list[str] = []
    tables, charts, pictures = [], [], []
    numbers: dict[str, Any] = {}
    if rows[names[0]]:
        grouped = [row for row in rows[names[0]] if "agreement" in row]
        if grouped:
            numbers["agreement"] = [row["agreement"] for row in grouped]
            findings.append(
                f"Groups agree with styles by an adjusted Rand index of {min(numbers['agreement']):.2f} or more, over "
                f"{len(grouped)} seeds; clients with a mixture of styles are not counted."
            )
            if strangers := [fmean(row["strangers"].values()) for row in grouped if row["strangers"]]:
                numbers["strangers"] = strangers
                findings.append(
                    "Clients of a style that nobody else has are told from the others by their descriptors alone with "
                    f"an AUROC of {interval(strangers).told('.2f')}, over seeds; each style in its turn."
                )
            numbers["mixtures"] = _mixtures(grouped)
            findings += [_where(style, found) for style, found in numbers["mixtures"].items()]
            charts.append(_map(grouped[0]))
        tables.append(_costs(rows))
    if drawn[names[0]]:
        styles = list(drawn[names[0]][0]["by_style"])
        numbers["figures"] = {name: _means(drawn[name], styles) for name in names if drawn[name]}
        tables.append(_figures(numbers["figures"], styles))
        findings += _drawn_in(names[0], drawn[names[0]], styles)
        charts.append(_distances(numbers["figures"], styles))
        if all(drawn[name] for name in rivals):
            told, numbers["against"] = _against(names[0], rivals, drawn, rows, styles)
            findings += told
        for row in where(found, stage="sheets"):
            pictures += [
                Picture(
                    sheet["picture"],
                    f"{client}, {sheet['style']}. Down: real; {names[0]}: its own model, with its words its group's "
                    f"adapter and the one for all; the own model of {', of '.join(names[1:])}.",
                )
                for client, sheet in row["sheets"].items()
            ]
    if weighed := [row for row in found if row["stage"] == "weights"]:
        tables.append(_weights(weighed))
        numbers["weights"] = [{key: row[key] for key in ("weights", "seed", "losses", "shares")} for row in weighed]
    return Answer(findings, numbers, tables, charts, pictures)


def _mixtures(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Of each mixture of styles: its clients, how many of them are in a group mostly of either style, and the bits that
    their descriptors leave open about the group, on average, beside those of clients with one style."""
    found: dict[str, dict[str, Any]] = {}
    for style in dict.fromkeys(style for row in rows for style in row["styles"].values() if not _is_pure(style)):
        own = [(row, name) for row in rows for name in row["styles"] if row["styles"][name] == style]
        pure = [(row, name) for row in rows for name in row["styles"] if _is_pure(row["styles"][name])]
        most = [_mostly(row, row["groups"][name]) for row, name in own]
        found[style] = {
            "clients": len(own),
            "with": {part: most.count(part) for part in shares_of(style)},
            "entropy": fmean(row["entropies"][name] for row, name in own),
            "entropy_of_others": fmean(row["entropies"][name] for row, name in pure) if pure else None,
        }
    return found


def _mostly(row: Row, group: int) -> str | None:
    """The style that most clients of one style in a group have; None where there are none of them."""
    styles = [row["styles"][name] for name in row["groups"] if row["groups"][name] == group]
    there = [style for style in styles if _is_pure(style)]
    return max(sorted(set(there)), key=there.count) if there else None


def _where(style: str, of: Mapping[str, Any]) -> str:
    told = ", ".join(f"{count} are in a group mostly of {own}" for own, count in of["with"].items())
    others = "" if of["entropy_of_others"] is None else f", clients of one style {of['entropy_of_others']:.2f}"
    return (
        f"Of {of['clients']} clients with {style}, {told}. Their descriptors leave {of['entropy']:.2f} bits open about "
        f"the group{others}."
    )


def _drawn_in(ours: str, rows: Sequence[Row], styles: Sequence[str]) -> list[str]:
    """Does who has two styles draw in both?"""
    found = []
    for style in (style for style in styles if not _is_pure(style)):
        told = {own: fmean(row["by_style"][style]["told"][own] for row in rows) for own in shares_of(style)}
        seen = ", ".join(f"{share:.0%} for {own}" for own, share in told.items())
        found.append(f"Of what clients of {ours} with {style} draw, a probe of five styles takes {seen}.")
    return found


def _is_pure(style: str) -> bool:
    return len(shares_of(style)) == 1


FIGURES = {
    "distance": "distance above the floor",
    "style": "style recognised",
    "style_real": "real: style",
    "named": "named",
    "alignment": "alignment",
    "alignment_real": "real: alignment",
}


def _means(rows: Sequence[Row], styles: Sequence[str]) -> dict[str, dict[str, float]]:
    """Style by style, over seeds."""
    return {s: {key: fmean(row["by_style"][s][key] for row in rows) for key in FIGURES} for s in styles}


def _against(
    ours: str,
    rivals: Sequence[str],
    drawn: Mapping[str, Sequence[Row]],
    rows: Mapping[str, Sequence[Row]],
    styles: Sequence[str],
) -> tuple[list[str], dict[str, Any]]:
    """In each style against the rival that is nearest there, on average against the one that is nearest on average.

    Differences are paired by seed: what clients of one federation have in common is no independent evidence.
    """
    by_seed = {name: {row["seed"]: row for row in drawn[name]} for name in (ours, *rivals)}
    losses = {name: {row["seed"]: fmean(row["losses"].values()) for row in rows[name]} for name in (ours, *rivals)}
    seeds = [seed for seed in by_seed[ours] if all(seed in by_seed[name] and seed in losses[name] for name in rivals)]
    if not seeds:
        return [], {}

    def figures(name: str, what: str, among: Sequence[str]) -> list[float]:
        return [fmean(by_seed[name][seed]["by_style"][style][what] for style in among) for seed in seeds]

    compared: dict[str, dict[str, Any]] = {}
    for key, among in [*((style, [style]) for style in styles), ("mean", list(styles))]:
        distances = {name: figures(name, "distance", among) for name in (ours, *rivals)}
        rival = min(rivals, key=lambda name: fmean(distances[name]))
        apart, above = paired(distances[ours], distances[rival]), fmean(distances[rival])
        ratio = fmean(distances[ours]) / above if _is_clear(distances[rival]) else None
        both = [*zip(distances[ours], distances[rival], strict=True)]
        logs = [math.log(a / b) for a, b in both] if min(map(min, both)) > 0 else None
        compared[key] = {"rival": rival, "ratio": ratio, "difference": vars(apart)}
        compared[key]["log_ratio"] = None if logs is None else vars(interval(logs))
    rival = compared["mean"]["rival"]
    loss = paired([losses[ours][seed] for seed in seeds], [losses[rival][seed] for seed in seeds])
    alignments = (figures(who, what, styles) for who, what in ((ours, "alignment"), (rival, "alignment")))
    alignment = paired(*alignments)
    room = fmean(figures(ours, "alignment_real", styles)) - fmean(figures(rival, "alignment", styles))
    told = [f"{len(seeds)} seeds. " + " ".join(_compared(key, ours, found) for key, found in compared.items())]
    told.append(_judged(ours, compared))
    told.append(
        f"Held-out loss of personal models, {ours} minus {rival}: {loss.told('+.4f')}. Alignment (LSA-1), {ours} minus "
        f"{rival}: {alignment.told('+.4f')}; real pictures minus {rival}: {room:+.4f}. {PAPERS}"
    )
    return told, {"compared": compared, "loss": vars(loss), "alignment": vars(alignment)}


def _compared(key: str, ours: str, found: Mapping[str, Any]) -> str:
    where_ = "On average" if key == "mean" else f"In {key}"
    told = Interval(**found["difference"]).told("+.4f")
    if found["ratio"] is None:
        return f"{where_} {found['rival']} is not clearly above the floor; {ours} differs from it by {told}."
    logs = found["log_ratio"]
    ends = [] if logs is None or logs["num"] < 2 else [math.exp(logs[end]) for end in ("low", "high")]
    span = f" (by its logarithm {ends[0]:.2f} to {ends[1]:.2f})" if ends else ""
    return f"{where_} {ours} is {found['ratio']:.2f}{span} times as far above the floor as {found['rival']}, {told}."


IN_ONE, ON_AVERAGE = 0.8, 1.0
"""How many times as far above the floor as the best rival personal models are to be at most."""


def _judged(ours: str, compared: Mapping[str, Mapping[str, Any]]) -> str:
    styles = {key: found["ratio"] for key, found in compared.items() if key != "mean" and found["ratio"] is not None}
    near, mean = [key for key, ratio in styles.items() if ratio <= IN_ONE], compared["mean"]["ratio"]
    one = f"reached in {', '.join(near)}" if near else "missed"
    whole = "not told" if mean is None else "reached" if mean <= ON_AVERAGE else "missed"
    return (
        f"Hoped for: {IN_ONE} times in one of {len(styles)} styles, which are as many chances: {one}; "
        f"{ON_AVERAGE} times on average: {whole}."
    )


def _is_clear(distances: Sequence[float]) -> bool:
    """Whether the mean is three standard errors above the floor; of one seed, above it."""
    error = stdev(distances) / math.sqrt(len(distances)) if len(distances) > 1 else 0.0
    return fmean(distances) > 3 * error


def _costs(rows: Mapping[str, Sequence[Row]]) -> Table:
    entries: list[list[Entry]] = [
        [
            name,
            own[0]["rate"],
            len(own),
            fmean(fmean(row["losses"].values()) for row in own),
            fmean(row["agreement"] for row in own) if "agreement" in own[0] else None,
            fmean(row["bytes_up"] for row in own),
            fmean(row["bytes_down"] for row in own),
            fmean(row["seconds"] for row in own),
        ]
        for name, own in rows.items()
        if own
    ]
    columns = (
        "variant",
        "learning rate",
        "seeds",
        "held-out loss",
        "adjusted Rand index",
        "bytes up",
        "bytes down",
        "seconds",
    )
    note = (
        "Each at the rate with the lowest held-out loss of personal models with the first seed, whose own losses are a "
        "little low by that. Bytes of all clients together. All begin with words and descriptions that the last line's "
        "run learned; its bytes and seconds are to be added to theirs."
    )
    return Table("Runs", columns, entries, note)


def _figures(figures: Mapping[str, Mapping[str, Mapping[str, float]]], styles: Sequence[str]) -> Table:
    entries: list[list[Entry]] = [
        [name, style, *(of[style][key] for key in FIGURES)] for style in styles for name, of in figures.items()
    ]
    note = (
        "Of what personal models draw: the kernel distance to real renderings of that style, less the distance between "
        "two halves of these, mean over halvings; the share that a probe of five styles takes for it, or for one of a "
        "mixture's; the share whose nearest rendering is the thing that was asked for; the mean cosine with the centre "
        "of the style's renderings (LSA-1)."
    )
    return Table("What personal models draw", ("variant", "style", *FIGURES.values()), entries, note)


def _weights(rows: Sequence[Row]) -> Table:
    """By weights, over seeds; the difference to the first is paired by seed."""
    styles = list(rows[0]["losses"])
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row["weights"], []).append(row)
    first = {row["seed"]: fmean(row["losses"].values()) for row in next(iter(by_name.values()))}
    entries: list[list[Entry]] = []
    for name, own in by_name.items():
        means = {row["seed"]: fmean(row["losses"].values()) for row in own}
        both = [seed for seed in means if seed in first]
        apart = paired([means[seed] for seed in both], [first[seed] for seed in both]).told("+.5f")
        shares = ", ".join(f"{group} {share:.2f}" for group, share in own[0]["shares"].items())
        of_styles = [fmean(row["losses"][style] for row in own) for style in styles if style in own[0]["losses"]]
        entries.append([name, fmean(means.values()), apart, *of_styles, shares])
    note = (
        "Held-out loss of the adapter for all, with each client's own words, by how the groups are weighed; shares of "
        "the first seed. DED and SNT are our reconstruction of ingredients of which only the names are published."
    )
    columns = ("weights", "mean loss", "minus the first", *styles, "shares")
    return Table("What all share, by weights", columns, entries, note)


def _map(row: Row) -> Chart:
    order = sorted(row["styles"], key=lambda name: (*_beside(row["styles"][name]), row["groups"][name], name))
    place = {name: at for at, name in enumerate(row["styles"])}
    cosines = [[row["cosines"][place[a]][place[b]] for b in order] for a in order]
    labels = [f"{name}, {row['styles'][name]}" for name in order]
    drawing = group_map(labels, [row["groups"][name] for name in order], cosines)
    return Chart("groups", drawing, "Clients of the first seed, by style: a line wherever another group begins.")


def _beside(style: str) -> tuple[str, float, str]:
    """By what to sort, so that a mixture stands next to the style that most of it is."""
    shares = shares_of(style)
    most = max(shares, key=lambda own: shares[own])
    return most, -shares[most], style


def _distances(figures: Mapping[str, Mapping[str, Mapping[str, float]]], styles: Sequence[str]) -> Chart:
    tones = ("after", "before", "up", "down", "real", "muted", "ink")

    def draw(axes: Axes) -> None:
        for number, (name, of) in enumerate(figures.items()):
            axes.plot(
                [of[style]["distance"] for style in styles],
                [at + 0.12 * (number - len(figures) / 2) for at in range(len(styles))],
                "o" if number == 0 else "s",
                color=COLOURS[tones[number % len(tones)]],
                markersize=7 if number == 0 else 5,
                label=name,
            )
        axes.axvline(0, color=COLOURS["real"], linewidth=1, linestyle=":")
        axes.set_yticks(range(len(styles)), styles)
        axes.invert_yaxis()
        axes.set(title="Distance to real pictures above the floor (0: as far as real ones)")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    drawing = chart("distances", 7.4, 0.9 + 0.5 * len(styles), draw, "distances by style and variant")
    return Chart("distances", drawing, "Of personal models' pictures, means over seeds. Left is better.")
