"""What pairs of a federated and a continual method found: what survives with clients, and what on the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from personae.continual.contract import Continual
from personae.continual.over_tasks import AVERAGED, refusal
from personae.core import Method, everything
from personae.evaluate.charts import chart
from personae.evaluate.forgetting import forgetting
from personae.evaluate.matrix_chart import matrix_chart
from personae.study.stats import Interval, paired
from personae.study.study import Answer, Chart, Entry, Row, Table, where

ALONE, UNPROTECTED = "local_only", "sequential_lora"
"""What federation, and what protection, is compared to."""

KINDS = ("things", "scenes")
"""Pictures of the seen world: things alone, and several of them."""

COLUMNS = {
    "average": "average gain",
    "learning": "learning",
    "forgetting": "forgetting",
    "backward": "backward",
    "things_own": "seen things, own",
    "scenes_own": "seen scenes, own",
    "shared": "shared gain",
    "shared_forgetting": "shared forgetting",
    "things_released": "seen things, shared",
    "scenes_released": "seen scenes, shared",
    "bytes_up": "bytes up",
    "bytes_kept": "bytes kept",
    "minutes": "CPU minutes",
}

NOTE = (
    "Means over clients. Gains are in held-out loss, below the untaught model's, which is told the noun. Average: over "
    "all of a client's concepts after the last one, with its own model. Learning: of each concept when it was new. "
    "Forgetting: how far below its best before the last concept an earlier one ends. Backward: the last gain less that "
    "when it was new. Shared: the same of what the server released, alone and asked by nouns. Seen: by how much the "
    "loss on pictures of pre-training is higher in the end. Bytes up: of one client in a round. Bytes kept: by one "
    "client in the end. CPU minutes: of everybody's learning."
)

PAIRS_NOTE = (
    "As defaults have them; shared_rep keeps each adapter's B. More pairs are allowed where it keeps more: what stays "
    "with the client is not averaged."
)


def answer(found: Sequence[Row], methods: Mapping[str, Method], continuals: Mapping[str, Continual]) -> Answer:
    """`methods` and `continuals` by their names, to tell which pairs are allowed."""
    allowed = _allowed(methods, continuals)
    rows = {pair: where(found, method=pair[0], continual=pair[1]) for pair in _pairs(found)}
    figures = {pair: _figures(own) for pair, own in rows.items()}
    count = sum(line[2] == "allowed" for line in allowed.rows)
    findings = [f"{count} of {len(allowed.rows)} pairs of methods are allowed."]
    numbers: dict[str, Any] = {"allowed": count, "figures": {_name(pair): own for pair, own in figures.items()}}
    if not rows:
        return Answer(["No pair is measured yet.", *findings], numbers, [allowed])
    federation, protection = _federation(rows), _protection(rows)
    numbers |= {"federation": federation, "protection": protection}
    findings = [
        *_best(figures),
        *(_compared(name, "clients alone", each) for name, each in federation.items()),
        *(_compared(name, UNPROTECTED, each) for name, each in protection.items()),
        *_shared(rows, figures),
        *findings,
    ]
    return Answer(findings, numbers, [_table(rows, figures), allowed], _charts(rows))


def _pairs(found: Sequence[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["method"], row["continual"]) for row in found))


def _name(pair: tuple[str, str]) -> str:
    return f"{pair[0]}, {pair[1]}"


# --- figures ----------------------------------------------------------------------------------------------------------


def _of_clients(rows: Sequence[Row], what: str = "gains") -> dict[tuple[int, str], dict[str, float]]:
    """The summaries of each client's matrix, by seed and client."""
    found = {}
    for row in rows:
        for client, gains in row[what].items():
            own = forgetting(gains)
            assert own.forgetting is not None and own.backward_transfer is not None, "a client has several concepts"
            found[row["seed"], client] = {
                "average": own.average,
                "learning": own.learning,
                "forgetting": own.forgetting,
                "backward": own.backward_transfer,
            }
    return found


def _figures(rows: Sequence[Row]) -> dict[str, float | None]:
    """Of one pair, over clients and seeds."""
    own, shared = list(_of_clients(rows).values()), None
    if rows[0]["shared"] is not None:
        shared = list(_of_clients(rows, "shared").values())
    return {
        **{key: fmean(one[key] for one in own) for key in own[0]},
        **{f"{kind}_own": fmean(v for row in rows for v in row["seen"][kind]["own"].values()) for kind in KINDS},
        "shared": None if shared is None else fmean(one["average"] for one in shared),
        "shared_forgetting": None if shared is None else fmean(one["forgetting"] for one in shared),
        **{f"{kind}_released": _released(rows, kind)[-1] if shared else None for kind in KINDS},
        "bytes_up": fmean(sent for row in rows for own in row["bytes_up"].values() for sent in own),
        "bytes_kept": fmean(value for row in rows for value in row["bytes_kept"].values()),
        "minutes": fmean(row["learning_seconds"] for row in rows) / 60,
    }


def _released(rows: Sequence[Row], kind: str) -> list[float]:
    """After each task, by how much the loss on pictures of the seen world is higher, mean over seeds."""
    return [fmean(values) for values in zip(*(row["seen"][kind]["released"] for row in rows), strict=True)]


def _federation(rows: Mapping[tuple[str, str], Sequence[Row]]) -> dict[str, dict[str, Any]]:
    """Pairs against the same continual method of clients that send nothing."""
    return {
        _name(pair): differences
        for pair, own in rows.items()
        if pair[0] != ALONE and (differences := _differences(own, rows.get((ALONE, pair[1]), ())))
    }


def _protection(rows: Mapping[tuple[str, str], Sequence[Row]]) -> dict[str, dict[str, Any]]:
    """Pairs against the same federated method without protection."""
    return {
        _name(pair): differences
        for pair, own in rows.items()
        if pair[1] != UNPROTECTED and (differences := _differences(own, rows.get((pair[0], UNPROTECTED), ())))
    }


def _differences(ours: Sequence[Row], theirs: Sequence[Row]) -> dict[str, Any]:
    """Paired by seed and client; empty where nothing is shared."""
    a, b = _of_clients(ours), _of_clients(theirs)
    both = [key for key in a if key in b]
    return {
        what: vars(paired([a[key][what] for key in both], [b[key][what] for key in both]))
        for what in ("average", "learning", "forgetting")
        if both
    }


# --- sentences --------------------------------------------------------------------------------------------------------


def _best(figures: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    best = max(figures, key=lambda pair: figures[pair]["average"])
    own = figures[best]
    told = [
        f"Of {len(figures)} pairs, {_name(best)} ends with the highest average gain, {own['average']:.4f}; a concept "
        f"has {own['learning']:.4f} when it is new."
    ]
    if nothing := [_name(pair) for pair, each in figures.items() if each["learning"] <= 0]:
        told.append(
            f"Concepts gain nothing when they are new, so that there is nothing to forget: {'; '.join(nothing)}."
        )
    general = [
        f"{_name(pair)} ({each['things_own']:+.4f} and {each['scenes_own']:+.4f})"
        for pair, each in figures.items()
        if min(each["things_own"], each["scenes_own"]) < 0
    ]
    if general:
        told.append(
            "Clients' own models have a lower loss on seen things alone or on seen scenes, too, which nobody taught: a "
            f"part of the gains is not the concepts': {'; '.join(general)}."
        )
    return told


def _compared(name: str, other: str, differences: Mapping[str, Any]) -> str:
    average, lost = (Interval(**differences[what]) for what in ("average", "forgetting"))
    told = "better than" if average.mean > 0 else "worse than"
    verdict = told if average.excludes(0.0) else "not to be told from"
    return f"{name}: {verdict} {other} in average gain, {_said(average)}; forgetting {_said(lost)}."


def _said(found: Interval) -> str:
    if found.num == 1:
        return f"{found.mean:+.4f}, of one client's run"
    return f"{found.told('+.4f')}, {found.num} runs of a client"


def _shared(
    rows: Mapping[tuple[str, str], Sequence[Row]], figures: Mapping[tuple[str, str], Mapping[str, Any]]
) -> list[str]:
    told = []
    for pair, own in figures.items():
        if own["shared"] is None:
            continue
        before = {kind: fmean(row["seen"][kind]["untaught"] for row in rows[pair]) for kind in KINDS}
        things, scenes = (own[f"{kind}_released"] / before[kind] for kind in KINDS)
        told.append(
            f"{_name(pair)}: what the server releases in the end, alone and asked by nouns, gains {own['shared']:+.4f} "
            f"on the clients' concepts, where their own models gain {own['average']:+.4f}; it forgets "
            f"{own['shared_forgetting']:+.4f}. Its loss changes by {things:+.1%} on seen things alone and by "
            f"{scenes:+.1%} on seen scenes."
        )
    return told


# --- tables and charts ------------------------------------------------------------------------------------------------


def _table(
    rows: Mapping[tuple[str, str], Sequence[Row]], figures: Mapping[tuple[str, str], Mapping[str, Any]]
) -> Table:
    lines: list[list[Entry]] = [
        [*pair, len(rows[pair]), *(own[key] for key in COLUMNS)] for pair, own in figures.items()
    ]
    return Table("Pairs that were measured", ("federated", "continual", "seeds", *COLUMNS.values()), lines, NOTE)


def _allowed(methods: Mapping[str, Method], continuals: Mapping[str, Continual]) -> Table:
    """Every pair, with what is averaged or why it is refused."""
    lines: list[list[Entry]] = []
    for name, method in methods.items():
        for other, continual in continuals.items():
            reason = refusal(method, continual)
            averaged = "nothing is sent" if method.personal is everything else AVERAGED.get(type(continual), "")
            lines.append([name, other, "allowed" if reason is None else "refused", reason or averaged])
    return Table("All pairs", ("federated", "continual", "", "what is averaged, or why not"), lines, PAIRS_NOTE)


def _charts(rows: Mapping[tuple[str, str], Sequence[Row]]) -> list[Chart]:
    about = "Mean gain over a client's concepts so far, with its own model; mean over clients."
    charts = [Chart("averages", chart("averages", 6.4, 3.8, _averages(rows), "Average gain by task"), about)]
    for kind in KINDS if any(own[0]["shared"] is not None for own in rows.values()) else ():
        drawing = chart(f"seen-{kind}", 6.4, 3.4, _seen(rows, kind), f"Loss on seen {kind} by task")
        charts.append(Chart(f"seen-{kind}", drawing, f"What was released, alone, on seen {kind}: up is worse."))
    every = [gain for own in rows.values() for line in _first(own)[1] for gain in line if gain is not None]
    for pair, own in rows.items():
        concepts, gains = _first(own)
        key = f"gains-{'-'.join(pair)}"
        cells = matrix_chart(key, _name(pair), concepts, gains, span=(min(every), max(every)), digits=3)
        if cells is not None:
            client = next(iter(own[0]["gains"]))
            charts.append(Chart(key, cells, f"{_name(pair)}: gain on each concept of {client} after each."))
    return charts


def _first(rows: Sequence[Row]) -> tuple[Sequence[str], Sequence[Sequence[float | None]]]:
    """One client's concepts and gains."""
    client, gains = next(iter(rows[0]["gains"].items()))
    return rows[0]["concepts"][client], gains


def _averages(rows: Mapping[tuple[str, str], Sequence[Row]]) -> Any:
    def draw(axes: Axes) -> None:
        for number, (pair, own) in enumerate(rows.items()):
            every = [forgetting(gains).averages for row in own for gains in row["gains"].values()]
            means = [fmean(line[at] for line in every if len(line) > at) for at in range(max(map(len, every)))]
            _line(axes, number, pair, means)
        axes.set(xlabel="concepts learned", title="Average gain over the concepts so far")

    return draw


def _seen(rows: Mapping[tuple[str, str], Sequence[Row]], kind: str) -> Any:
    def draw(axes: Axes) -> None:
        for number, (pair, own) in enumerate(rows.items()):
            if own[0]["shared"] is not None:
                _line(axes, number, pair, _released(own, kind))
        axes.set(xlabel="concepts learned", title=f"Loss on seen {kind}, above the untaught model's")

    return draw


def _line(axes: Axes, number: int, pair: tuple[str, str], values: Sequence[float]) -> None:
    """A pair has the same colour and marker in both charts."""
    style = "--" if pair[0] == ALONE else "-"
    axes.plot(
        range(1, len(values) + 1),
        values,
        style,
        color=f"C{number % 10}",
        label=_name(pair),
        marker="os^vDPX*<>hd"[number % 12],
        markersize=4,
        linewidth=1.2,
    )
    axes.set_xticks(range(1, len(values) + 1))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
