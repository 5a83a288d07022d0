"""What the study of embeddings says: mixes read back, walks between clients, starts of a new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from sklearn.linear_model import RidgeCV

from personae.evaluate.charts import COLOURS, chart
from personae.study.stats import difference, interval
from personae.study.study import Answer, Chart, Entry, Picture, Row, Table, joined, where


def embeddings_answer(found: Sequence[Row], starts: Sequence[str], steps: Sequence[int], num_drawn: int) -> Answer:
    """`starts` and `steps` of the new embeddings that were tried, the first of `starts` what others are compared with.

    At each point of a walk, `num_drawn` samples were counted.
    """
    parts = [
        _read_answer(where(found, stage="read")),
        _start_answer(where(found, stage="start"), starts, steps),
        _walk_answer(where(found, stage="walk"), num_drawn),
    ]
    return joined([part for part in parts if part is not None])


@dataclass(frozen=True)
class ReadBack:
    """Of one client that was not in the fit: total variation between its mix and what was read, or guessed."""

    read: float
    guessed: float
    drawn: float


def read_back(vectors: np.ndarray, shares: np.ndarray, drawn: Sequence[float]) -> tuple[list[ReadBack], float]:
    """Even clients by a ridge regression from vector to mix that was fitted on the odd ones, and the other way round.

    "Guessed" is the mean mix of those it was fitted on. Also the share of the variance that is explained, over all
    clients. The penalty is chosen within the fit.

    Shapes: vectors [N, D], shares [N, classes].
    """
    told, guessed = np.empty_like(shares), np.empty_like(shares)
    for half in (0, 1):
        fitted = RidgeCV(alphas=np.logspace(-3, 4, 15)).fit(vectors[1 - half :: 2], shares[1 - half :: 2])
        positive = np.clip(fitted.predict(vectors[half::2]), 0, None)
        told[half::2] = positive / np.maximum(positive.sum(1, keepdims=True), 1e-12)
        guessed[half::2] = shares[1 - half :: 2].mean(0)
    explained = 1 - ((told - shares) ** 2).sum() / ((guessed - shares) ** 2).sum()
    rows = zip(told, guessed, shares, drawn, strict=True)
    return [ReadBack(_variation(t, s), _variation(g, s), d) for t, g, s, d in rows], float(explained)


def _variation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).sum() / 2)


def _read_answer(rows: Sequence[Row]) -> Answer | None:
    by_seed: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).extend(row["clients"].values())
    by_seed = {seed: people for seed, people in by_seed.items() if len(people) >= 4}
    if not by_seed:
        return None
    by_client: dict[tuple[int, int], ReadBack] = {}
    explained = []
    for seed, people in by_seed.items():
        vectors, shares = (np.array([client[key] for client in people]) for key in ("vector", "shares"))
        results, share = read_back(vectors, shares, [client["distance"] for client in people])
        by_client |= {(seed, number): one for number, one in enumerate(results)}
        explained.append(share)
    told = list(by_client.values())
    read, guess, drawn = (fmean(getattr(one, key) for one in told) for key in ("read", "guessed", "drawn"))
    gain = difference({at: one.read - one.guessed for at, one in by_client.items()})
    apart = gain.pooled
    entries: list[list[Entry]] = [
        ["the linear map, fitted on clients without a common image", read],
        ["the mean mix of those clients", guess],
        ["what the client's own model draws", drawn],
    ]
    note = f"{len(told)} made-up clients of {len(by_seed)} seeds, each half asked about by the other. 0 is equal."
    finding = (
        f"A client's mix of classes read from its embedding by a linear map fitted on other clients: total variation "
        f"{read:.3f}, against {guess:.3f} for guessing the mean mix, {apart.told('+.3f')}{gain.reservation}; "
        f"{100 * fmean(explained):.0f} % of the variance between clients explained."
    )

    def draw(axes: Axes) -> None:
        for one in told:
            axes.plot(one.guessed, one.read, "o", color=COLOURS["after"], markersize=4, alpha=0.6)
        top = max(one.guessed for one in told)
        axes.plot([0, top], [0, top], color=COLOURS["muted"], linewidth=0.8)
        axes.set(
            xlabel="guessing the mean mix", ylabel="read from the embedding", title="Total variation to the real mix"
        )
        axes.set(xlim=(0, None), ylim=(0, None))

    drawing = chart("read", 4.4, 3.8, draw, "Mix of classes read from embeddings, client by client")
    numbers = {"read": read, "guessed": guess, "drawn": drawn, "explained": fmean(explained), "clients": len(told)}
    return Answer(
        [finding],
        {"reading": {**numbers, "gain": gain.numbers}},
        [Table("How far from a client's mix of classes", ("source", "total variation"), entries, note)],
        [
            Chart(
                "read", drawing, "Every dot is a client that the map was not fitted on; below the line, reading helps."
            )
        ],
    )


def bend(shares: np.ndarray) -> float:
    """Mean total variation of the mixes between the ends of a walk to the straight line between these.

    Shapes: shares [points, classes].
    """
    between = _straight(shares)[1:-1]
    return float(np.abs(shares[1:-1] - between).sum(1).mean() / 2) if len(between) else 0.0


REPEATS = 200


def counting_bend(shares: np.ndarray, num_drawn: int) -> float:
    """What `bend` finds on a walk that is straight, as each of its points is counted from `num_drawn` samples only."""
    draw, mixes = np.random.default_rng(0), _straight(shares)
    return fmean(
        bend(np.stack([draw.multinomial(num_drawn, mix) for mix in mixes]) / num_drawn) for _ in range(REPEATS)
    )


def _straight(shares: np.ndarray) -> np.ndarray:
    along = np.linspace(0, 1, len(shares))[:, None]
    mixes = (1 - along) * shares[0] + along * shares[-1]
    return mixes / mixes.sum(1, keepdims=True)


def _walk_answer(rows: Sequence[Row], num_drawn: int) -> Answer | None:
    if not rows:
        return None
    bends = [bend(np.array(row["shares"])) for row in rows]
    counted = fmean(counting_bend(np.array(row["shares"]), num_drawn) for row in rows)
    ends = fmean(float(np.abs(np.array(row["shares"][0]) - np.array(row["shares"][-1])).sum() / 2) for row in rows)
    first = rows[0]

    def draw(axes: Axes) -> None:
        shares = np.array(first["shares"])
        for label in np.argsort(-shares.max(0))[:4]:
            axes.plot(
                np.linspace(0, 1, len(shares)), shares[:, label], marker="o", markersize=4, label=f"class {label}"
            )
        axes.set(xlabel=f"from {first['from']} to {first['to']}", ylabel="share of samples", ylim=(0, 1))
        axes.set(title="Classes along a straight line between two embeddings")
        axes.legend(loc="best")

    finding = (
        f"Along straight lines between two clients' embeddings, the classes drawn are on average {fmean(bends):.3f} "
        f"(total variation) from the straight mix of the two ends, which are {ends:.3f} apart; counting {num_drawn} "
        f"samples anew at each point would show {counted:.3f} on a straight walk, from equal noise, as here, less."
    )
    pictures = [
        Picture(row["picture"], f"From {row['from']} (left column) to {row['to']} (right column), seed {row['seed']}.")
        for row in rows
    ]
    drawing = chart("walk", 5.2, 3.4, draw, "Class shares between two embeddings")
    shown = Chart("walk", drawing, "The four most frequent classes of the first walk.")
    return Answer([finding], {"walk": {"bend": fmean(bends), "counting": counted, "ends": ends}}, (), [shown], pictures)


def _start_answer(rows: Sequence[Row], starts: Sequence[str], steps: Sequence[int]) -> Answer | None:
    losses = {
        (row["start"], row["steps"], row["seed"], name): client
        for row in rows
        for name, client in row["clients"].items()
    }
    if not losses:
        return None

    def values(start: str, number: int, figure: str) -> dict[tuple[int, str], float]:
        return {at[2:]: c[figure] for at, c in losses.items() if at[:2] == (start, number)}  # type: ignore[misc]

    entries: list[list[Entry]] = []
    findings, numbers = [], []
    for start in starts:
        for number in steps:
            loss, distance = (values(start, number, figure) for figure in ("loss", "distance"))
            if not loss:
                continue
            entries.append([start, number, fmean(loss.values()), fmean(distance.values())])
            base = values(starts[0], number, "loss")
            both = [at for at in loss if at in base]
            if start != starts[0] and len(both) > 1:
                apart = difference({at: loss[at] - base[at] for at in both})
                gain = apart.pooled
                numbers.append({"start": start, "steps": number, **apart.numbers})
                if gain.excludes(0):
                    way = "lower" if gain.mean < 0 else "higher"
                    told = start if start == "zero" else f"the {start}"
                    findings.append(
                        f"Starting from {told} instead of the population's vector, the held-out loss after "
                        f"{number} steps is {abs(gain.mean):.3g} {way} ({gain.low:+.3g} to {gain.high:+.3g})"
                        f"{apart.reservation}."
                    )

    def draw(axes: Axes) -> None:
        for start, tone in zip(starts, ("after", "real", "before", "up"), strict=True):
            means = [(n, interval(list(values(start, n, "loss").values()))) for n in steps if values(start, n, "loss")]
            axes.plot([n for n, _ in means], [m.mean for _, m in means], color=COLOURS[tone], marker="o", label=start)
        axes.set(xlabel="steps", title="Held-out loss of new clients, by start of the embedding")
        axes.set_xticks(steps)
        axes.legend(loc="best")

    table = Table("Starts of a new embedding", ("start", "steps", "held-out loss", "histogram distance"), entries)
    drawing = chart("start", 5.2, 3.4, draw, "Held-out loss by start and steps")
    shown = Chart(
        "start", drawing, "The mean and the nearest need the training clients' embeddings, which stay with them."
    )
    return Answer(findings, {"starts": numbers}, [table], [shown])
