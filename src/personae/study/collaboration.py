"""Adapters by style against one adapter for all: the same clients, words, steps, each variant at its best rate.

Every client has pictures in one style, or in a mixture of some, and its captions do not say which. "run": a variant's
whole run at one learning rate, judged by its personal models' loss on held-out pictures; rates are tried with the first
seed, and the others take the best one. "drawn": what these personal models draw of things that the base model knows,
beside real renderings of the same things in the client's style.

`weights` are ways to weigh the groups in what is shared by all; they change nothing else, and each is measured on the
groups of the first variant's runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from personae.aggregate.low_rank import read, stacked, written
from personae.aggregate.membership import groups_in
from personae.aggregate.newcomers import familiar
from personae.core import pick, stream
from personae.data.emoji import STYLES, pack, scene_names
from personae.data.style_mixtures import shares_of
from personae.errors import ConfigError
from personae.evaluate.distances import kid
from personae.evaluate.features import Features, features_by_name
from personae.evaluate.grids import save_grid
from personae.evaluate.grouping import adjusted_rand
from personae.evaluate.loss import denoising_loss
from personae.evaluate.text2image import StyleProbe, fit_style_probe, nearest_name
from personae.evaluate.text2image_features import statistics
from personae.infer.sample import draw
from personae.methods.cluster_lora import WITHHELD, ClusterLora
from personae.personal.tokens import is_word
from personae.recipe.build import Clients, build_clients
from personae.recipe.config import load_recipe
from personae.recipe.models import Model
from personae.recipe.saved import SavedRun
from personae.recipe.workflow import open_run
from personae.study.bench import trained
from personae.study.by_style import of_cluster, real_pictures, server_of, styles_of
from personae.study.collaboration_report import answer
from personae.study.study import Answer, Cell, Row, file_name, where
from personae.study.variants import Variant

HALVINGS = 16
"""Ways to part the real pictures into two halves, over which the floor of a distance is averaged."""

SHOWN = 8
"""Pictures in a row of a grid."""


@dataclass(frozen=True)
class Collaboration:
    """The first of `variants` is compared with the others, of which `rivals` are those it has to be better than.

    `rates` are learning rates of the adapters. Each client's model draws `num_names` things in `sampler_steps` of
    DPM-Solver++; `features` are those of the distances, `statistics` of pictures where none are named.
    """

    recipe: str
    variants: tuple[Variant, ...]
    rivals: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    weights: tuple[Variant, ...] = ()
    changes: tuple[str, ...] = ()
    num_names: int = 52
    sampler_steps: int = 20
    guidance: float = 3.0
    features: str | None = None

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if len(names) < 2 or len(set(names)) < len(names) or not set(self.rivals) <= set(names[1:]) or not self.rivals:
            raise ConfigError(
                f"variants are {names}, rivals {list(self.rivals)}; expected two or more variants, each with a name of "
                "its own, and as rivals one or more of them that are not the first"
            )
        if not self.rates or not self.seeds or not all(rate > 0 for rate in self.rates):
            raise ConfigError(f"rates are {list(self.rates)}, seeds {list(self.seeds)}; expected some, rates above 0")
        if self.features is not None:
            features_by_name(self.features)  # a package that is missing is better missed now than after all training
        if not 2 <= self.num_names <= len(scene_names()):
            raise ConfigError(f"num_names is {self.num_names}, expected 2 to {len(scene_names())}")
        for variant in (*self.variants, *self.weights):
            recipe = load_recipe(self.recipe, [*self.changes, *variant.changes])
            if not isinstance(recipe.method, ClusterLora) or "{thing}" not in (recipe.data.caption or ""):
                raise ConfigError(
                    f"{self.recipe} is of another method, or its data.caption has no {{thing}}; expected cluster_lora, "
                    "whose options vary here, and a caption into which things can be put"
                )

    # --- what is to be measured --------------------------------------------------------------------------------------

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        first: list[dict[str, Any]] = [
            {"stage": "run", "variant": variant.name, "rate": rate, "seed": self.seeds[0]}
            for variant in self.variants
            for rate in self.rates
        ]
        if len(where(found, stage="run", seed=self.seeds[0])) < len(first):
            return first
        best = [{"variant": variant.name, "rate": best_rate(found, variant.name)} for variant in self.variants]
        others = [{"stage": "run", **of, "seed": seed} for seed in self.seeds[1:] for of in best]
        if len(where(found, stage="run")) < len(first) + len(others):
            return [*first, *others]
        drawn = [{"stage": "drawn", **of, "seed": seed} for seed in self.seeds for of in best]
        weighed = [
            {"stage": "weights", "weights": variant.name, **best[0], "seed": seed}
            for seed in self.seeds
            for variant in self.weights
        ]
        return [*first, *others, *weighed, *drawn]

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        seed += int(cell["seed"])
        if cell["stage"] == "run":
            return self._run(cell, seed, folder)
        if cell["stage"] == "weights":
            return self._weighed(cell, seed, folder)
        return self._drawn(cell, seed, folder)

    def _run(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        variant = next(variant for variant in self.variants if variant.name == cell["variant"])
        rate = [f"method.training.lr={cell['rate']}", f"method.adapt.lr={cell['rate']}"]
        done = trained(_folder(folder, cell), self.recipe, [*self.changes, *variant.changes, *rate], seed)
        summary, styles = done.summary, styles_of(build_clients(done.recipe), done.recipe.data.styles)
        server = server_of(done.folder)
        figures = {
            "losses": {name: summary["clients"][name]["heldout_loss"] for name in styles},
            "styles": styles,
            "bytes_up": summary["bytes_up"],
            "bytes_down": summary["bytes_down"],
            "seconds": summary["wall_seconds"],
        }
        groups = groups_in(server.facts)
        if groups.keys() >= styles.keys():
            groups = {name: groups[name] for name in styles}
            seen = torch.stack([server.extras[f"seen.{name}"] for name in styles])
            pure = [name for name, style in styles.items() if len(shares_of(style)) == 1]
            figures |= {
                "groups": groups,
                "agreement": adjusted_rand([groups[name] for name in pure], [styles[name] for name in pure]),
                "entropies": _entropies(groups, seen),
                "cosines": (normalize(seen, dim=1) @ normalize(seen, dim=1).T).tolist(),
                "shares": [server.facts.get(f"share {n}", 0.0) for n in range(int(server.facts["clusters"]))],
            }
        return figures

    # --- pictures ----------------------------------------------------------------------------------------------------

    def _drawn(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        run = open_run(_folder(folder, cell))
        clients = build_clients(run.recipe)
        styles = styles_of(clients, run.recipe.data.styles)
        by_style: dict[str, dict[str, Any]] = {}
        grids = []
        for style in dict.fromkeys(styles.values()):
            order = torch.randperm(len(scene_names()), generator=stream(seed, "names", style)).tolist()
            names = [scene_names()[at] for at in order]
            parts, told = [], []
            for place, client in enumerate(name for name, own in styles.items() if own == style):
                new = [name for name in names if name not in _held(clients, client)]
                own = [new[(place * self.num_names + at) % len(new)] for at in range(self.num_names)]
                parts.append(self._of_client(run, client, own, seed))
                told += own
                if place == 0:
                    grids.append(self._rows(run, client, style, own[:SHOWN], parts[0][:SHOWN], seed))
            by_style[style] = self._judged(torch.cat(parts), told, style, seed)
        (folder / "pictures").mkdir(exist_ok=True)
        path = f"pictures/{file_name(str(cell['variant']), str(cell['seed']))}.png"
        save_grid(folder / path, torch.cat(grids), columns=SHOWN)
        return {"by_style": by_style, "picture": path}

    def _of_client(self, run: SavedRun, client: str, names: Sequence[str], seed: int) -> Tensor:
        return self._draw(run.model(client), names, seed, client, _wording(run))

    def _draw(self, model: Model, names: Sequence[str], seed: int, client: str, wording: str) -> Tensor:
        told = [wording.format(thing=pack().things[name].phrase) for name in names]
        return draw(model, told, stream(seed, "drawn", client), steps=self.sampler_steps, guidance=self.guidance)

    def _rows(
        self, run: SavedRun, client: str, style: str, names: Sequence[str], personal: Tensor, seed: int
    ) -> Tensor:
        """Real ones; the client's own; with its words and its group's adapter; with these and the one for all."""
        model, words, server = run.denoiser, pick(run.personal(client), is_word), server_of(run.folder)
        rows = [real_pictures(style, names), personal]
        group = groups_in(server.facts).get(client)
        for adapter in (*([] if group is None else [of_cluster(server, group)]), run.released.params):
            model.load({**adapter, **words})
            rows.append(self._draw(model, names, seed, client, _wording(run)))
        return torch.cat(rows)

    def _judged(self, drawn: Tensor, names: Sequence[str], style: str, seed: int) -> dict[str, Any]:
        features = _features(self.features)
        real = features.extract(real_pictures(style, scene_names()))
        made = features.extract(drawn)
        size = min(50, len(made), len(real) // 2)
        found = kid(made, real, features=features.name, subset_size=size, subsets=100, seed=seed)
        floor = fmean(
            kid(real, real, features=features.name, subset_size=size, subsets=20, seed=number).floor
            for number in range(HALVINGS)
        )
        centre, shares = normalize(real.mean(0), dim=0), shares_of(style)
        told = {own: _probe().score(drawn, [own] * len(drawn)).drawn.overall.share for own in shares}
        name = {own: nearest_name(drawn, names, [own] * len(drawn)).drawn.top_1.share for own in shares}
        return {
            "distance": found.mean - floor,
            "floor": floor,
            "distance_std": found.std,
            "style": sum(told.values()),
            "told": told,
            "style_real": sum(share * _probe().real.by_style[own].share for own, share in shares.items()),
            "named": sum(share * name[own] for own, share in shares.items()),
            "alignment": float((normalize(made, dim=1) @ centre).mean()),
            "alignment_real": float((normalize(real, dim=1) @ centre).mean()),
        }

    # --- what is shared by all, under other weights ------------------------------------------------------------------

    def _weighed(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        """The loss of the adapter for all on every style's held-out pictures, and each group's share in it."""
        variant = next(variant for variant in self.weights if variant.name == cell["weights"])
        run = open_run(_folder(folder, cell))
        server, clients = server_of(run.folder), build_clients(run.recipe)
        method = load_recipe(self.recipe, [*self.changes, *variant.changes]).method
        assert isinstance(method, ClusterLora), "checked when the study was read"
        shown = [n for n in range(int(server.facts["clusters"])) if f"{WITHHELD} {n}" not in server.facts]
        clusters = [read(of_cluster(server, number)) for number in shown]
        styles = styles_of(clients, run.recipe.data.styles)
        groups = groups_in(server.facts)
        weights = method.weights(groups, clusters, shown, server.extras)
        adapter = written(stacked(clusters, [weights[number] for number in shown]))
        losses: dict[str, list[float]] = {}
        for name, style in styles.items():
            run.denoiser.load({**adapter, **pick(run.personal(name), is_word)})
            found = denoising_loss(run.denoiser, clients.data[name].heldout, seed=seed)
            losses.setdefault(style, []).append(found)
        of_group = {number: next(styles[n] for n in styles if groups[n] == number) for number in shown}
        return {
            "losses": {style: fmean(values) for style, values in losses.items()},
            "shares": {f"{number} ({of_group[number]})": weights[number] for number in shown},
        }

    # --- the answer --------------------------------------------------------------------------------------------------

    def answer(self, found: Sequence[Row]) -> Answer:
        names = [variant.name for variant in self.variants]
        return answer(found, names, self.rivals, {name: best_rate(found, name) for name in names})


def _held(clients: Clients, name: str) -> set[str]:
    """The names of a client's pictures. It is judged by others: it could draw its own from memory."""
    every, data = list(pack().things), clients.data[name]
    labels = [images.labels for images in (data.train, data.heldout) if images.labels is not None]
    return {every[label] for each in labels for label in each.tolist()}


def best_rate(found: Sequence[Row], variant: str) -> float | None:
    """The learning rate with the lowest mean held-out loss of personal models, of those tried with the first seed."""
    rows = where(found, stage="run", variant=variant)
    tried = [row for row in rows if row["seed"] == rows[0]["seed"]]
    return min(tried, key=lambda row: fmean(row["losses"].values()))["rate"] if tried else None


def _entropies(groups: Mapping[str, int], seen: Tensor) -> dict[str, float]:
    """In bits, how far each client's descriptor leaves open which group it is from, as those are without it; 0 of a
    client that is alone in its group. `seen` has a descriptor in each row."""
    found, numbers = {}, list(groups.values())
    for at, name in enumerate(groups):
        others = [k for k in range(len(numbers)) if k != at]
        there = sorted({numbers[k] for k in others})
        if numbers[at] not in there:
            found[name] = 0.0
            continue
        known = familiar(seen[others], [there.index(numbers[k]) for k in others])
        chances = known.chances(seen[at])[:-1]  # the last is for none of them
        found[name] = float(torch.special.entr(chances / chances.sum()).sum()) / math.log(2)
    return found


def _folder(folder: Path, cell: Cell) -> Path:
    return folder / "runs" / f"{cell['variant']}-{cell['rate']:g}-{cell['seed']}"


def _wording(run: SavedRun) -> str:
    """What clients say of their pictures, with {thing} for the name."""
    return str(run.recipe.data.caption)


@lru_cache(maxsize=1)
def _probe() -> StyleProbe:
    return fit_style_probe(STYLES)


@lru_cache(maxsize=1)
def _features(name: str | None) -> Features:
    found = None if name is None else features_by_name(name)
    return found or statistics()
