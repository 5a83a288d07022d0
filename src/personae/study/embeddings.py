"""Is a client's embedding its mixing weight? Read back from it, walked along, and started from in four ways.

"train": a SPIRE run per seed. "read": many made-up clients, each with its own mix of classes out of images that no
client trained on, adapt; a linear map from embedding to mix is fitted on half of them and asked about the others, who
share no image with them. "walk": straight lines between the embeddings of two training clients, drawn from. "start":
new clients adapt from the population's vector, which is learned, from zero, from the mean of the training clients'
vectors, and from the one of these with the least loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from personae.artefact.save import load_state
from personae.core import ClientData, Images, Training, joined, stream
from personae.engine.together import personalize_many
from personae.errors import ConfigError
from personae.evaluate.grids import save_grid
from personae.evaluate.histogram import class_histogram, histogram_distance
from personae.evaluate.loss import denoising_loss
from personae.local.fit import fit_together
from personae.personal.embedding import EMBEDDING, NULL_EMBEDDING
from personae.recipe.config import load_recipe
from personae.study.bench import Bench, open_bench, trained
from personae.study.embeddings_report import embeddings_answer
from personae.study.study import Answer, Cell, Row

TOGETHER = 10
"""Made-up clients that adapt in one batch."""

STARTS = ("population", "zero", "mean", "nearest")
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
        pool = joined([part for name in bench.clients.new for part in _parts(bench.clients.data[name])])
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
        if start == "zero":
            return torch.zeros_like(bench.released.params[NULL_EMBEDDING])
        if start == "mean":
            return torch.stack(list(vectors.values())).mean(0)

        def loss(vector: Tensor) -> float:
            bench.model.load({**bench.released.params, EMBEDDING: vector})
            return denoising_loss(bench.model, data.train, seed=bench.recipe.seed)

        return min(vectors.values(), key=loss)

    # --- the answer ----------------------------------------------------------------------------------------------

    def answer(self, found: Sequence[Row]) -> Answer:
        return embeddings_answer(found, STARTS, self.start_steps, self.num_drawn)


def _trained_vectors(bench: Bench, folder: Path) -> dict[str, Tensor]:
    """[1, D] of every training client, as only an experiment may read them: all of them in one place."""
    return {
        name: load_state(folder / "clients" / f"{name}.safetensors").params[EMBEDDING] for name in bench.clients.train
    }


def _parts(data: ClientData) -> tuple[Images, Images]:
    return data.train, data.heldout
