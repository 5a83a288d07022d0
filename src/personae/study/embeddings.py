"""Is a client's embedding its mixing weight? Read back from it, walked along, and started from in three ways.

"train": a SPIRE run per seed. "read": many made-up clients, each with its own mix of classes out of images that no
client trained on, adapt; a linear map from embedding to mix is fitted on half of them and asked about the others, who
share no image with them. "walk": straight lines between the embeddings of two training clients, drawn from. "start":
new clients adapt from the population's vector, from the mean of the training clients' vectors, and from the one of
these with the least loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from sklearn.linear_model import RidgeCV
from torch import Tensor

from personae.artefact.save import load_state
from personae.core import ClientData, Images, Training, stream
from personae.engine.together import personalize_many
from personae.errors import ConfigError
from personae.evaluate.charts import COLOURS, chart
from personae.evaluate.grids import save_grid
from personae.evaluate.histogram import class_histogram, histogram_distance
from personae.evaluate.loss import denoising_loss
from personae.local.fit import fit_together
from personae.personal.embedding import EMBEDDING, NULL_EMBEDDING
from personae.recipe.config import load_recipe
from personae.study.bench import Bench, open_bench, trained
from personae.study.stats import interval, paired
from personae.study.study import Answer, Cell, Chart, Entry, Picture, Row, Table, where

TOGETHER = 10
"""Made-up clients that adapt in one batch."""

STARTS = ("population", "mean", "nearest")
PER_COLUMN = 8
"""Images of each point of a walk in its picture."""


@dataclass(frozen=True)
class Embeddings:
    """`num_mixes` made-up clients per seed with `num_images` images each, their mixes Dirichlet(`alpha`).

    `walk_points` places on each of `num_walks` straight lines; `start_steps` of adapting are looked at. `num_drawn`
    images are drawn wherever classes are counted.
    """

    recipe: str
    seeds: tuple[int, ...]
    rate: float
    steps: int
    start_steps: tuple[int, ...]
    changes: tuple[str, ...] = ()
    num_mixes: int = 60
    num_images: int = 40
    alpha: float = 0.3
    num_walks: int = 3
    walk_points: int = 5
    num_drawn: int = 128
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.num_mixes < 4 or self.walk_points < 2:
            raise ConfigError(f"{self.num_mixes} mixes and {self.walk_points} points, expected at least 4 and 2")
        load_recipe(self.recipe, self.changes)

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        cells: list[dict[str, Any]] = []
        for seed in self.seeds:  # one after the other, so that an unfinished study has something to say
            cells.append({"stage": "train", "seed": seed})
            if len(found) < len(cells):
                return cells
            parts = range(0, self.num_mixes, TOGETHER)
            cells += [{"stage": "read", "seed": seed, "first": first} for first in parts]
            cells += [{"stage": "walk", "seed": seed, "walk": walk} for walk in range(self.num_walks)]
            cells += [
                {"stage": "start", "seed": seed, "start": start, "steps": steps}
                for start in STARTS
                for steps in self.start_steps
            ]
            if len(found) < len(cells):
                return cells
        return cells

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        own = folder / "runs" / f"seed{cell['seed']}"
        if cell["stage"] == "train":
            done = trained(own, self.recipe, self.changes, seed + int(cell["seed"]))
            return {"heldout_loss": done.summary["heldout_loss"]}
        bench = open_bench(own)
        if cell["stage"] == "read":
            return self._read(bench, int(cell["first"]))
        if cell["stage"] == "walk":
            return self._walked(bench, _trained_vectors(bench, own), int(cell["walk"]), folder, int(cell["seed"]))
        return self._started(bench, _trained_vectors(bench, own), str(cell["start"]), int(cell["steps"]))

    # --- reading back --------------------------------------------------------------------------------------------

    def _read(self, bench: Bench, first: int) -> Mapping[str, Any]:
        made = {f"mix{i}": self._mixed(bench, i) for i in range(first, min(first + TOGETHER, self.num_mixes))}
        how = Training(self.steps, self.rate, self.batch_size, decay="cosine")
        personal = personalize_many(bench.job(made, how), bench.released, list(made))
        people = {}
        for name, data in made.items():
            bench.model.load({**bench.released.params, **personal[name].params})
            counts = class_histogram(bench.features, bench.drawn(name, self.num_drawn))
            real = bench.label_counts(data)
            people[name] = {
                "vector": personal[name].params[EMBEDDING][0].tolist(),
                "shares": (real / real.sum()).tolist(),
                "distance": histogram_distance(counts, real),
            }
        return {"clients": people}

    def _mixed(self, bench: Bench, number: int) -> ClientData:
        """Images of new clients, which nobody trained on, drawn without replacement to a mix of their classes.

        Fewer than `num_images`, where a class has too few.
        """
        pool = _joined([part for name in bench.clients.new for part in _parts(bench.clients.data[name])])
        order = torch.randperm(len(pool), generator=stream(bench.recipe.seed, "halves"))
        pool = pool[order[number % 2 :: 2]]  # even and odd numbers share no image
        assert pool.labels is not None, "a bench has labels"
        rng, classes = stream(bench.recipe.seed, "mixes", number), len(bench.clients.label_names)
        draw = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=rng)))
        shares = torch.from_numpy(draw.dirichlet([self.alpha] * classes))
        wanted = torch.multinomial(shares, self.num_images, replacement=True, generator=rng).bincount(minlength=classes)
        chosen = []
        for label, count in enumerate(wanted.tolist()):
            index = (pool.labels == label).nonzero()[:, 0]
            chosen.append(index[torch.randperm(len(index), generator=rng)[:count]])
        own = pool[torch.cat(chosen)]
        return ClientData(own, own)

    # --- walking -------------------------------------------------------------------------------------------------

    def _walked(
        self, bench: Bench, vectors: Mapping[str, Tensor], walk: int, folder: Path, seed: int
    ) -> Mapping[str, Any]:
        names, rng = sorted(vectors), stream(bench.recipe.seed, "walk", walk)
        a, b = (names[i] for i in torch.randperm(len(names), generator=rng)[:2].tolist())
        shares, columns = [], []
        for point in range(self.walk_points):
            along = point / (self.walk_points - 1)
            vector = vectors[a].lerp(vectors[b], along)
            bench.model.load({**bench.released.params, EMBEDDING: vector})
            drawn = bench.drawn(f"walk{walk}", self.num_drawn)
            counts = class_histogram(bench.features, drawn).double()
            shares.append((counts / counts.sum()).tolist())
            columns.append(drawn[:PER_COLUMN])
        path = Path("pictures") / f"walk-{seed}-{walk}.png"
        (folder / path).parent.mkdir(exist_ok=True)
        save_grid(folder / path, torch.stack(columns, 1).flatten(0, 1), columns=self.walk_points)
        return {"from": a, "to": b, "shares": shares, "picture": str(path)}

    # --- starting ------------------------------------------------------------------------------------------------

    def _started(self, bench: Bench, vectors: Mapping[str, Tensor], start: str, steps: int) -> Mapping[str, Any]:
        how = Training(max(steps, 1), self.rate, self.batch_size)
        people = {}
        for name in bench.clients.new:
            client = bench.job({}, how).site.client(name, "personalize", bench.recipe.seed)
            began = self._vector(bench, vectors, client.data, start)
            bench.model.load({**bench.released.params, EMBEDDING: began})
            if steps:
                fit_together([client], lambda part: part == EMBEDDING, how)
            counts = class_histogram(bench.features, bench.drawn(name, self.num_drawn))
            people[name] = {
                "loss": denoising_loss(bench.model, client.data.heldout, seed=bench.recipe.seed),
                "distance": histogram_distance(counts, bench.label_counts(client.data)),
            }
        return {"clients": people}

    def _vector(self, bench: Bench, vectors: Mapping[str, Tensor], data: ClientData, start: str) -> Tensor:
        if start == "population":
            return bench.released.params[NULL_EMBEDDING]
        if start == "mean":
            return torch.stack(list(vectors.values())).mean(0)

        def loss(vector: Tensor) -> float:
            bench.model.load({**bench.released.params, EMBEDDING: vector})
            return denoising_loss(bench.model, data.train, seed=bench.recipe.seed)

        return min(vectors.values(), key=loss)

    # --- the answer ----------------------------------------------------------------------------------------------

    def answer(self, found: Sequence[Row]) -> Answer:
        parts = [_read_answer(where(found, stage="read")), _start_answer(where(found, stage="start"), self.start_steps)]
        parts.append(_walk_answer(where(found, stage="walk")))
        known = [part for part in parts if part is not None]
        return Answer(
            [finding for part in known for finding in part.findings],
            {key: value for part in known for key, value in part.numbers.items()},
            [table for part in known for table in part.tables],
            [drawn for part in known for drawn in part.charts],
            [picture for part in known for picture in part.pictures],
        )


def _trained_vectors(bench: Bench, folder: Path) -> dict[str, Tensor]:
    """[1, D] of every training client, as only an experiment may read them: all of them in one place."""
    return {
        name: load_state(folder / "clients" / f"{name}.safetensors").params[EMBEDDING] for name in bench.clients.train
    }


def _parts(data: ClientData) -> tuple[Images, Images]:
    return data.train, data.heldout


def _joined(parts: Sequence[Images]) -> Images:
    labels = [part.labels for part in parts if part.labels is not None]
    return Images(torch.cat([part.pixels for part in parts]), torch.cat(labels))


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
    told: list[ReadBack] = []
    explained = []
    for people in by_seed.values():
        vectors, shares = (np.array([client[key] for client in people]) for key in ("vector", "shares"))
        results, share = read_back(vectors, shares, [client["distance"] for client in people])
        told += results
        explained.append(share)
    read, guess, drawn = (fmean(getattr(one, key) for one in told) for key in ("read", "guessed", "drawn"))
    gain = paired([one.read for one in told], [one.guessed for one in told])
    entries: list[list[Entry]] = [
        ["the linear map, fitted on clients without a common image", read],
        ["the mean mix of those clients", guess],
        ["what the client's own model draws", drawn],
    ]
    note = f"{len(told)} made-up clients of {len(by_seed)} seeds, each half asked about by the other. 0 is equal."
    finding = (
        f"A client's mix of classes read from its embedding by a linear map fitted on other clients: total variation "
        f"{read:.3f}, against {guess:.3f} for guessing the mean mix ({gain.low:+.3f} to {gain.high:+.3f}); "
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
        {"reading": {**numbers, "gain_low": gain.low, "gain_high": gain.high}},
        [Table("How far from a client's mix of classes", ("source", "total variation"), entries, note)],
        [
            Chart(
                "read", drawing, "Every dot is a client that the map was not fitted on; below the line, reading helps."
            )
        ],
    )


def _walk_answer(rows: Sequence[Row]) -> Answer | None:
    if not rows:
        return None
    bends = []
    for row in rows:
        shares = np.array(row["shares"])
        along = np.linspace(0, 1, len(shares))[:, None]
        straight = (1 - along) * shares[0] + along * shares[-1]
        bends.append(float(np.abs(shares - straight).sum(1)[1:-1].mean() / 2) if len(shares) > 2 else 0.0)
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
        f"(total variation) from the straight mix of the two ends, which are {ends:.3f} apart."
    )
    pictures = [
        Picture(row["picture"], f"From {row['from']} (left column) to {row['to']} (right column), seed {row['seed']}.")
        for row in rows
    ]
    drawing = chart("walk", 5.2, 3.4, draw, "Class shares between two embeddings")
    shown = Chart("walk", drawing, "The four most frequent classes of the first walk.")
    return Answer([finding], {"walk": {"bend": fmean(bends), "ends": ends}}, (), [shown], pictures)


def _start_answer(rows: Sequence[Row], steps: Sequence[int]) -> Answer | None:
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
    for start in STARTS:
        for number in steps:
            loss, distance = (values(start, number, figure) for figure in ("loss", "distance"))
            if not loss:
                continue
            entries.append([start, number, fmean(loss.values()), fmean(distance.values())])
            base = values(STARTS[0], number, "loss")
            both = [at for at in loss if at in base]
            if start != STARTS[0] and len(both) > 1:
                gain = paired([loss[at] for at in both], [base[at] for at in both])
                numbers.append({"start": start, "steps": number, **vars(gain)})
                if gain.excludes(0):
                    way = "lower" if gain.mean < 0 else "higher"
                    findings.append(
                        f"Starting from the {start} instead of the population's vector, the held-out loss after "
                        f"{number} steps is {abs(gain.mean):.3g} {way} ({gain.low:+.3g} to {gain.high:+.3g})."
                    )

    def draw(axes: Axes) -> None:
        for start, tone in zip(STARTS, ("after", "before", "up"), strict=True):
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
