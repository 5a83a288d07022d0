"""What the comparison of adapting clients says: tables, paired differences, charts.

A client of one seed is one pair: the same images, noise, references and starting seed under both methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from matplotlib.axes import Axes

from personae.evaluate.charts import COLOURS, chart, logarithmic, logarithmic_x
from personae.study.stats import Difference, Interval, by_seeds, interval
from personae.study.study import Answer, Chart, Entry, Row, Table, file_name, where

TONES = ("after", "before", "up", "down", "real", "ink")
FIGURES = {
    "loss": "held-out loss",
    "distance": "histogram distance",
    "kid": "kernel distance",
    "copy": "copy ratio",
}
OF_PICTURES = tuple(name for name in FIGURES if name != "loss")
"""What another way to draw can change."""

CHARTED = ("loss", "kid")
"""Of whose differences there is a chart."""

EVERYONE = "all"


People = Mapping[tuple[int, str], Mapping[str, Any]]
"""Figures by seed and client."""


def adaptation_answer(found: Sequence[Row], rivals: Sequence[str], redrawn: Sequence[str] = ()) -> Answer:
    """Every rival is subtracted from the first, and every rival from each of `redrawn`, who are the first's clients
    drawn otherwise: in the last stage alone, and with losses that are the first's."""
    everybody, ours = [rivals[0], *redrawn, *rivals[1:]], [rivals[0], *redrawn]
    trained, grid, final = (where(found, stage=stage) for stage in ("train", "adapt", "final"))
    images = sorted({row["images"] for row in grid}, key=lambda n: n or math.inf)
    findings: list[str] = []
    tables = [_trained_table(trained, rivals)] if trained else []
    before = _of_training_clients(trained, rivals)
    if before:
        tables.append(_trained_differences(rivals[0], before))
    charts = []
    if grid:
        tables.append(_spread_table(grid, rivals, images))
        charts.append(_rates_chart(grid, rivals, images))
        if len({row["steps"] for row in grid}) > 1:
            charts.append(_steps_chart(grid, rivals, images))
        findings = [_best_so_far(grid, rivals, count) for count in images]
    numbers: dict[str, Any] = {}
    if final:
        tables = [_final_table(final, grid, everybody, images), *tables]
        differences = _differences(final, everybody, ours, images)
        if differences:
            tables.insert(1, _paired_table(differences))
            charts[:0] = [
                _paired_chart(differences, our, figure)
                for our in dict.fromkeys(at[0] for at in differences)
                for figure in CHARTED
                if any(figure in found for at, found in differences.items() if at[0] == our)
            ]
        findings = [_sentence(at, found) for at, found in differences.items() if at[3] == EVERYONE]
        findings += [*_by_kind(differences), *_lost(final)]
        findings += [f"Training clients: {_verdicts(rivals[0], rival, found)}." for rival, found in before.items()]
        numbers["trained"] = [
            {"ours": rivals[0], "rival": rival, "figure": name, **found.numbers}
            for rival, by_figure in before.items()
            for name, found in by_figure.items()
        ]
        numbers["diverged"] = sum(len(row.get("diverged", ())) for row in final)
        numbers["paired"] = [
            {
                "ours": our,
                "rival": rival,
                "images": count,
                "kind": kind,
                "figure": name,
                **found.numbers,
            }
            for (our, rival, count, kind), by_figure in differences.items()
            for name, found in by_figure.items()
        ]
        moved = [c["population"] - row["population_before"] for row in final for c in people([row]).values()
                 if row["rival"] in ours and row["population_before"] is not None]  # fmt: skip
        numbers["largest_change_of_others"] = max(map(abs, moved), default=None)
        numbers["final"] = [dict(zip(tables[0].columns, row, strict=True)) for row in tables[0].rows]
    return Answer(findings, numbers, tables, charts)


def people(rows: Sequence[Row]) -> People:
    """Without those whose training diverged."""
    return {(row["seed"], name): figures for row in rows for name, figures in row.get("clients", {}).items()}


def _lost(rows: Sequence[Row]) -> list[str]:
    """Whom the comparison lacks: what is said of the others is too good for their method."""
    return [
        f"With {_count(row['images'])} images, {row['rival']} diverged for {', '.join(row['diverged'])} of seed "
        f"{row['seed']} at its chosen setting; these clients are in no figure."
        for row in rows
        if row.get("diverged")
    ]


# --- tables ----------------------------------------------------------------------------------------------------


def _trained_table(rows: Sequence[Row], rivals: Sequence[str]) -> Table:
    columns = ("method", "seeds", "loss", "distance", "kernel distance", "copy ratio", *NEW_BEFORE)
    entries: list[list[Entry]] = []
    for rival in rivals:
        own = where(rows, rival=rival)
        clients = [c for c in people(own).values() if c["role"] == "train"]
        means = [_mean(clients, key) for key in ("loss", "distance", "kid", "copy")]
        new = [c for c in people(own).values() if c["role"] == "new"]
        before = [_mean(new, key) if new else None for key in ("before", "distance_before")]
        entries.append([rival, len(own), *means, *before])
    note = (
        "Held-out images of the clients that trained, each with its personal model, at each recipe's own settings; "
        "those of new clients under the released model, before any adapting."
    )
    return Table("Training clients, and new ones before they adapt", columns, entries, note)


NEW_BEFORE = ("new clients: loss before", "new clients: distance before")

FINAL = (
    *("images", "method", "clients", "loss", "distance", "kernel distance", "its floor", "above the floor / rival's"),
    *(
        "copy ratio",
        "others' loss, released model",
        "change",
        "others' loss, adapted",
        "numbers trained",
        "bytes received",
        "settings",
    ),
)
FINAL_NOTE = (
    "Settings are learning rate x steps, chosen by the held-out loss of the clients of seeds that are not shown here; "
    "seeds deal the same images anew. An asterisk: the largest or smallest of those tried. Nothing is sent. The ratio "
    "of kernel distances above the floor of real against real stands only where the rival is three standard errors "
    "above it. Others' loss is that of training clients' held-out images: under what is shared after adapting (for an "
    "embedding the backbone with the population's vector, unchanged by construction; for a method that trains weights, "
    "these), and under the adapted model as it draws. Below a copy ratio of about 0.9, training images were copied."
)


def _final_table(rows: Sequence[Row], grid: Sequence[Row], rivals: Sequence[str], images: Sequence[int]) -> Table:
    entries = []
    for count in images:
        ours = where(rows, images=count, rival=rivals[0])
        for rival in rivals:
            if people(own := where(rows, images=count, rival=rival)):
                ratio = "" if rival == rivals[0] else _ratio(ours, own)
                settings = _settings(own, where(grid, rival=rival))
                entries.append([_count(count), rival, *_final_row(own, ratio), settings])
    used = sorted({c["kid_features"] for c in people(rows).values() if c.get("kid_features")})
    features = f" Features of the kernel distance: {', '.join(used)}." if used else ""
    return Table("New clients, each method at its best", FINAL, entries, FINAL_NOTE + features)


def _final_row(rows: Sequence[Row], ratio: Entry) -> list[Entry]:
    clients = list(people(rows).values())
    known = [row for row in rows if row["population_before"] is not None]
    changes = [c["population"] - row["population_before"] for row in known for c in people([row]).values()]
    return [
        len(clients),
        *(_mean(clients, key) for key in ("loss", "distance", "kid", "kid_floor")),
        *(ratio, _mean(clients, "copy"), _mean(clients, "population"), fmean(changes) if changes else None),
        _mean(clients, "others"),
        *(clients[0]["numbers"], clients[0]["bytes_received"]),
    ]


def _settings(rows: Sequence[Row], grid: Sequence[Row]) -> str:
    """Learning rate x steps, with an asterisk at what is at the edge of its grid."""

    def told(value: float, tried: set[float]) -> str:
        return f"{value:g}" + "*" * (len(tried) > 1 and value in (min(tried), max(tried)))

    rates, steps = ({row[key] for row in grid} for key in ("rate", "steps"))
    return ", ".join(sorted({f"{told(row['rate'], rates)} x {told(row['steps'], steps)}" for row in rows}))


def _ratio(ours: Sequence[Row], theirs: Sequence[Row]) -> Entry:
    """(our distance - floor) / (theirs - floor), from means over clients."""
    own, rival = ([c["kid"] - c["kid_floor"] for c in people(rows).values()] for rows in (ours, theirs))
    if len(rival) < 2 or not own:
        return None
    found = interval(rival)
    error = math.sqrt(sum((x - found.mean) ** 2 for x in rival) / (len(rival) - 1) / len(rival))
    return fmean(own) / found.mean if found.mean > 3 * error else "rival at the floor"


def _spread_table(rows: Sequence[Row], rivals: Sequence[str], images: Sequence[int]) -> Table:
    columns = ("images", "method", "over the grid", "setting", "loss", "distance", "copy ratio", "others' loss")
    entries: list[list[Entry]] = []
    for count in images:
        for rival in rivals:
            ranked = sorted(_by_setting(rows, rival, count).items(), key=lambda item: _mean(item[1], "loss"))
            if not ranked:
                continue
            for title, (setting, clients) in {
                "best": ranked[0],
                "median": ranked[len(ranked) // 2],
                "worst": ranked[-1],
            }.items():
                means = [_mean(clients, key) for key in ("loss", "distance", "copy", "population")]
                entries.append([_count(count), rival, title, f"{setting[0]:g} x {setting[1]}", *means])
    note = "Every learning rate x number of steps; ranked by the mean held-out loss of all new clients and seeds."
    return Table("How much the settings matter", columns, entries, note)


def _best_so_far(rows: Sequence[Row], rivals: Sequence[str], count: int) -> str:
    """Of a study that has not come to its end: what its grid shows, and what that is worth."""
    best = {}
    for rival in rivals:
        if found := _by_setting(rows, rival, count):
            best[rival] = min(_mean(clients, "loss") for clients in found.values())
    told = ", ".join(f"{rival} {loss:.3f}" for rival, loss in sorted(best.items(), key=lambda item: item[1]))
    seeds = len({row["seed"] for row in rows})
    return (
        f"With {_count(count)} images, least held-out loss over the grid: {told}. "
        f"{seeds} seed{'s' * (seeds > 1)} so far, settings picked on the clients that they are shown for: a first look."
    )


def _matches(rivals: Sequence[str], ours: Sequence[str]) -> list[tuple[str, str]]:
    """Who is compared with whom."""
    return [(our, rival) for our in ours for rival in rivals if rival not in ours or our != rival == ours[0]]


At = tuple[str, str, int, str]
Differences = Mapping[At, Mapping[str, Difference]]
"""By ours, rival, images and kind, then by figure."""


def _differences(rows: Sequence[Row], rivals: Sequence[str], ours: Sequence[str], images: Sequence[int]) -> Differences:
    found: dict[At, dict[str, Difference]] = {}
    for count in images:
        clients = {rival: people(where(rows, rival=rival, images=count)) for rival in rivals}
        for our, rival in _matches(rivals, ours):
            kinds = sorted({client["kind"] for client in clients[our].values()}, reverse=True)
            for kind in (EVERYONE, *kinds):
                own = {at: client for at, client in clients[our].items() if kind in (EVERYONE, client["kind"])}
                figures = FIGURES if our == ours[0] else OF_PICTURES
                apart = {name: by_seeds(_each(own, name), _each(clients[rival], name)) for name in figures}
                if told := {name: one for name, one in apart.items() if one is not None}:
                    found[(our, rival, count, kind)] = told
    return found


def _of_training_clients(rows: Sequence[Row], rivals: Sequence[str]) -> Mapping[str, Mapping[str, Difference]]:
    """The first minus each other, by rival and figure, with the personal models of those who trained."""
    clients = {rival: people(where(rows, rival=rival)) for rival in rivals}
    own = {name: {at: c for at, c in found.items() if c["role"] == "train"} for name, found in clients.items()}
    found = {
        rival: {name: by_seeds(_each(own[rivals[0]], name), _each(own[rival], name)) for name in FIGURES}
        for rival in rivals[1:]
    }
    return {rival: told for rival, by in found.items() if (told := {k: v for k, v in by.items() if v is not None})}


def _each(clients: People, figure: str) -> dict[tuple[int, str], float]:
    return {at: client[figure] for at, client in clients.items() if client.get(figure) is not None}


def _trained_differences(ours: str, differences: Mapping[str, Mapping[str, Difference]]) -> Table:
    titles = [title for figure in FIGURES.values() for title in (figure, "over seeds")]
    entries: list[list[Entry]] = [
        [ours, rival, found["loss"].pooled.num, *_texts(found)] for rival, found in differences.items()
    ]
    note = (
        f"{BELOW} Personal models of those who trained, at each recipe's own settings, all seeds; central training has "
        "one model for all."
    )
    return Table("Training clients, paired differences", ("ours", "minus", "pairs", *titles), entries, note)


def _paired_table(differences: Differences) -> Table:
    titles = [title for figure in FIGURES.values() for title in (figure, "over seeds")]
    columns = ("images", "new clients' classes", "ours", "minus", "pairs", *titles)
    entries: list[list[Entry]] = [
        [_count(count), kind, our, rival, next(iter(found.values())).pooled.num, *_texts(found)]
        for (our, rival, count, kind), found in differences.items()
    ]
    note = (
        "Mean paired difference and its 95 % interval by Student's t: over all clients, as if they were independent, "
        "though clients of a seed share its trained models, and over the means of the seeds, which errs to the other "
        f"side with few of them. {BELOW} Seen: the mix of classes of a client that "
        "trained; mixed: half and half those of two; absent: a class that nobody had."
    )
    return Table("Paired differences", columns, entries, note)


BELOW = "Below 0 ours is better, of the copy ratio above 0; * excludes 0."


def _texts(found: Mapping[str, Difference]) -> list[str]:
    both = [(found[name].pooled, found[name].over_seeds) if name in found else () for name in FIGURES]
    return [text for pair in both for text in (map(_text, pair) if pair else ("", ""))]


def _sentence(at: At, found: Mapping[str, Difference]) -> str:
    our, rival, count, _ = at
    return f"With {_count(count)} images, {_verdicts(our, rival, found)}."


def _verdicts(ours: str, rival: str, found: Mapping[str, Difference]) -> str:
    def verdict(difference: Difference) -> str:
        if not difference.pooled.excludes(0):
            return "no difference that can be told"
        return ("lower" if difference.pooled.mean < 0 else "higher") + difference.reservation

    parts = [
        f"{title} {verdict(found[name])}, {_text(found[name].pooled)}"
        for name, title in FIGURES.items()
        if name in found
    ]
    return f"{ours} against {rival}: {'; '.join(parts)}"


def _by_kind(differences: Differences) -> list[str]:
    """Where it wins and where it loses: one sentence for each number of images and kind of new clients."""
    told = []
    known = [at for at, found in differences.items() if at[3] != EVERYONE and "loss" in found]
    for our, count, kind in dict.fromkeys((at[0], *at[2:]) for at in known):
        own = {at[1]: found for at, found in differences.items() if (at[0], *at[2:]) == (our, count, kind)}
        losses = {rival: found["loss"] for rival, found in own.items()}
        sides = {
            "below": {rival: loss for rival, loss in losses.items() if loss.pooled.high < 0},
            "above": {rival: loss for rival, loss in losses.items() if loss.pooled.low > 0},
        }
        undecided = [rival for rival in losses if not any(rival in side for side in sides.values())]
        parts = [
            f"{side} that of {', '.join(rival + loss.reservation for rival, loss in found.items())}"
            for side, found in sides.items()
            if found
        ]
        parts += [f"not told apart from {', '.join(undecided)}"] * bool(undecided)
        told.append(
            f"With {_count(count)} images and classes {KIND[kind]}, {our}'s held-out loss is {'; '.join(parts)}."
        )
    return told


KIND = {
    "seen": "as one training client has them",
    "mixed": "of two training clients",
    "absent": "that nobody had",
    "new": "of their own",
}
"""What new clients of a kind hold."""


# --- charts ----------------------------------------------------------------------------------------------------


def _paired_chart(differences: Differences, ours: str, figure: str) -> Chart:
    rows = [(at[1:], found[figure].pooled) for at, found in differences.items() if at[0] == ours and figure in found]
    title = FIGURES[figure]

    def draw(axes: Axes) -> None:
        for line, (_, apart) in enumerate(rows):
            tone = "muted" if not apart.excludes(0) else "after" if apart.mean < 0 else "before"
            axes.plot([apart.low, apart.high], [line, line], color=COLOURS[tone], linewidth=2.4)
            axes.plot(apart.mean, line, "o", color=COLOURS[tone], markersize=6)
        axes.axvline(0, color=COLOURS["ink"], linewidth=0.8)
        axes.set_yticks(range(len(rows)), [f"{rival}, {_count(n)} images, {kind}" for (rival, n, kind), _ in rows])
        axes.set(ylim=(len(rows) - 0.4, -0.6), title=f"{title.capitalize()}: {ours} minus rival, 95 % interval")
        axes.spines["left"].set_visible(False)

    name = file_name("paired", ours, figure)
    drawing = chart(name, 7.0, 0.9 + 0.26 * len(rows), draw, f"Paired differences of the {title}")
    return Chart(name, drawing, f"Left of the line {ours} is better. Grey where the interval holds 0.")


def _rates_chart(rows: Sequence[Row], rivals: Sequence[str], images: Sequence[int]) -> Chart:
    def line(axes: Axes, rival: str, count: int, tone: str, style: Any) -> None:
        means = {setting: _mean(c, "loss") for setting, c in _by_setting(rows, rival, count).items()}
        rates = sorted({rate for rate, _ in means})
        per_rate = [[loss for (r, _), loss in means.items() if r == rate] for rate in rates]
        axes.plot(rates, [min(p) for p in per_rate], color=COLOURS[tone], linestyle=style, marker="o", markersize=4)
        axes.fill_between(rates, [min(p) for p in per_rate], [max(p) for p in per_rate], color=COLOURS[tone], alpha=0.1)

    def draw(axes: Axes) -> None:
        _lines(axes, rivals, images, line)
        logarithmic(axes)
        logarithmic_x(axes, [10.0**power for power in range(-5, 1)])
        axes.set(xlabel="learning rate", title="Held-out loss of new clients (logarithmic)")

    drawing = chart("rates", 6.0, 3.6, draw, "Held-out loss against the learning rate")
    caption = "Best number of steps for each learning rate; the band reaches to the worst. Dashed: more images."
    return Chart("rates", drawing, caption)


def _steps_chart(rows: Sequence[Row], rivals: Sequence[str], images: Sequence[int]) -> Chart:
    def line(axes: Axes, rival: str, count: int, tone: str, style: Any) -> None:
        means = {setting: _mean(c, "distance") for setting, c in _by_setting(rows, rival, count).items()}
        steps = sorted({number for _, number in means})
        per_step = [[distance for (_, s), distance in means.items() if s == number] for number in steps]
        axes.plot(steps, [min(p) for p in per_step], color=COLOURS[tone], linestyle=style, marker="o", markersize=4)
        axes.plot(steps, [median(p) for p in per_step], color=COLOURS[tone], linestyle=style, linewidth=0.8, alpha=0.6)

    def draw(axes: Axes) -> None:
        _lines(axes, rivals, images, line)
        logarithmic_x(axes, sorted({row["steps"] for row in rows}))
        axes.set(xlabel="steps", ylim=(0, None), title="Class-histogram distance of new clients")

    drawing = chart("steps", 6.0, 3.6, draw, "Histogram distance against the number of steps")
    return Chart("steps", drawing, "Best learning rate for each number of steps, and thin the median one.")


def _lines(
    axes: Axes, rivals: Sequence[str], images: Sequence[int], line: Callable[[Axes, str, int, str, Any], None]
) -> None:
    styles = ("-", (0, (4, 2)), (0, (1, 1.5)))
    for rival, tone in zip(rivals, TONES, strict=False):
        for count, style in zip(images, styles, strict=False):
            line(axes, rival, count, tone, style)
        axes.plot([], [], color=COLOURS[tone], label=rival)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


# --- pieces ----------------------------------------------------------------------------------------------------


def _by_setting(rows: Sequence[Row], rival: str, count: int) -> Mapping[tuple[float, int], list[Mapping[str, Any]]]:
    """Everybody's figures by learning rate and steps."""
    found: dict[tuple[float, int], list[Mapping[str, Any]]] = {}
    for row in where(rows, rival=rival, images=count):
        if not row.get("diverged"):
            found.setdefault((row["rate"], row["steps"]), []).extend(row["clients"].values())
    return found


def _mean(clients: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [client[key] for client in clients if client.get(key) is not None]
    return fmean(values) if values else math.nan


def _count(images: int) -> str:
    return str(images) if images else "all"


def _text(found: Interval) -> str:
    return found.starred("+.3g") if found.num > 1 else ""  # a single seed has no interval
