"""Adapters by style against one adapter for all: the same clients, words, steps, each variant at its best rate.

Every client has pictures in one style, or in a mixture of some, and its captions do not say which. "run": a variant's
whole run at one learning rate, judged by its personal models' loss on held-out pictures; rates are tried with the first
seed, and the others take the best one. All of a seed's runs begin with the words and descriptions of its first, "words
only", which has no adapters. "drawn": what personal models draw of things that the base model knows, beside real
renderings of the same things in the client's style. "sheets": every client's pictures side by side.

`weights` are ways to weigh the groups in what is shared by all; they change nothing else, and each is measured on the
groups of the first variant's runs.
"""

from __future__ import annotations

import math
from collections import Counter
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
from personae.artefact.save import load_state, save_state
from personae.core import State, pick, stream
from personae.data.emoji import STYLES, pack, scene_names
from personae.data.style_mixtures import shares_of
from personae.errors import ConfigError
from personae.evaluate.distances import kid
from personae.evaluate.features import Features, features_by_name
from personae.evaluate.grids import save_grid
from personae.evaluate.grouping import adjusted_rand, auroc
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
from personae.study.by_style import (
    WORDS_ONLY,
    held_names,
    kept_in,
    of_cluster,
    real_pictures,
    server_of,
    styles_of,
)
from personae.study.collaboration_report import answer
from personae.study.study import Answer, Cell, Row, file_name, where
from personae.study.variants import Variant

WORDS = "words only"
NO_ADAPTERS: Mapping[str, Any] = {"variant": WORDS, "rate": 0.0}

HALVINGS = 16
"""Ways to part the real pictures into two halves, over which the floor of a distance is averaged."""

SHOWN = 8
"""Pictures in a row of a sheet."""


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
        if WORDS in names:
            raise ConfigError(f"a variant is called {WORDS!r}, as the run is that all others begin with; rename it")
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
            if recipe.cohort is not None:
                raise ConfigError(
                    f"{self.recipe} takes {recipe.cohort} of its clients in a round, and everybody is to have a group; "
                    "expected all"
                )

    # --- what is to be measured --------------------------------------------------------------------------------------

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        words: list[dict[str, Any]] = [{"stage": "run", **NO_ADAPTERS, "seed": seed} for seed in self.seeds]
        if len(where(found, stage="run", variant=WORDS)) < len(words):
            return words
        first: list[dict[str, Any]] = [
            {"stage": "run", "variant": variant.name, "rate": rate, "seed": self.seeds[0]}
            for variant in self.variants
            for rate in self.rates
        ]
        if len(where(found, stage="run", seed=self.seeds[0])) < 1 + len(first):
            return [*words, *first]
        best: list[Mapping[str, Any]] = [
            {"variant": variant.name, "rate": best_rate(found, variant.name)} for variant in self.variants
        ]
        others = [{"stage": "run", **of, "seed": seed} for seed in self.seeds[1:] for of in best]
        runs = [*words, *first, *others]
        if len(where(found, stage="run")) < len(runs):
            return runs
        sheets = [{"stage": "sheets", "seed": self.seeds[0]}]
        best.append(NO_ADAPTERS)
        drawn = [{"stage": "drawn", **of, "seed": seed} for seed in self.seeds for of in best]
        weighed = [
            {"stage": "weights", "weights": variant.name, **best[0], "seed": seed}
            for seed in self.seeds
            for variant in self.weights
        ]
        return [*runs, *weighed, *drawn, *sheets]

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        seed += int(cell["seed"])
        if cell["stage"] == "run":
            return self._run(cell, seed, folder)
        if cell["stage"] == "weights":
            return self._weighed(cell, seed, folder)
        if cell["stage"] == "sheets":
            return self._sheets(int(cell["seed"]), folder)
        return self._drawn(cell, seed, folder)

    def _run(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        if cell["variant"] == WORDS:
            done = trained(_folder(folder, cell), self.recipe, [*self.changes, *WORDS_ONLY], seed)
        else:
            variant = next(variant for variant in self.variants if variant.name == cell["variant"])
            rate = [f"method.training.lr={cell['rate']}", f"method.adapt.lr={cell['rate']}"]
            kept = kept_in(_folder(folder, {**NO_ADAPTERS, "seed": cell["seed"]}))
            done = trained(_folder(folder, cell), self.recipe, [*self.changes, *variant.changes, *rate], seed, kept)
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
        if groups:
            groups = {name: groups[name] for name in styles}
            seen = torch.stack([server.extras[f"seen.{name}"] for name in styles])
            pure = [name for name, style in styles.items() if len(shares_of(style)) == 1]
            figures |= {
                "groups": groups,
                "agreement": adjusted_rand([groups[name] for name in pure], [styles[name] for name in pure]),
                "entropies": _entropies(groups, seen),
                "cosines": (normalize(seen, dim=1) @ normalize(seen, dim=1).T).tolist(),
                "shares": [server.facts.get(f"share {n}", 0.0) for n in range(int(server.facts["clusters"]))],
                "strangers": strangers(seen, list(styles.values())),
            }
        return figures

    # --- pictures ----------------------------------------------------------------------------------------------------

    def _drawn(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        run = open_run(_folder(folder, cell))
        clients = build_clients(run.recipe)
        styles = styles_of(clients, run.recipe.data.styles)
        by_style: dict[str, dict[str, Any]] = {}
        shown: dict[str, Tensor] = {}
        for style in dict.fromkeys(styles.values()):
            parts, told = [], []
            for place, client in enumerate(name for name, own in styles.items() if own == style):
                names = self._names(clients, client, style, place, seed)
                parts.append(self._draw(run.model(client), names, seed, client, _wording(run)))
                told += names
                shown[client] = parts[-1][:SHOWN]
                if cell["variant"] == self.variants[0].name:
                    shown |= self._shared_rows(run, client, names[:SHOWN], seed)
            by_style[style] = self._judged(torch.cat(parts), told, style, seed)
        kept = _kept_pictures(folder, str(cell["variant"]), int(cell["seed"]))
        kept.parent.mkdir(exist_ok=True)
        save_state(kept, State(extras=shown))
        return {"by_style": by_style}

    def _names(self, clients: Clients, client: str, style: str, place: int, seed: int) -> list[str]:
        """What a client draws, which comes at this place among those of its style: nothing that it holds."""
        order = torch.randperm(len(scene_names()), generator=stream(seed, "names", style)).tolist()
        names, own = [scene_names()[at] for at in order], held_names(clients, client)
        new = [name for name in names if name not in own]
        return [new[(place * self.num_names + at) % len(new)] for at in range(self.num_names)]

    def _draw(self, model: Model, names: Sequence[str], seed: int, client: str, wording: str) -> Tensor:
        told = [wording.format(thing=pack().things[name].phrase) for name in names]
        return draw(model, told, stream(seed, "drawn", client), steps=self.sampler_steps, guidance=self.guidance)

    def _shared_rows(self, run: SavedRun, client: str, names: Sequence[str], seed: int) -> dict[str, Tensor]:
        """What is drawn with the client's words and the adapters that it shares: its group's, and the one for all."""
        model, words, server = run.denoiser, pick(run.personal(client), is_word), server_of(run.folder)
        shared = {"group": of_cluster(server, groups_in(server.facts)[client]), "all": run.released.params}
        rows = {}
        for whose, adapter in shared.items():
            model.load({**adapter, **words})
            rows[f"{client}/{whose}"] = self._draw(model, names, seed, client, _wording(run))
        return rows

    def _sheets(self, number: int, folder: Path) -> Mapping[str, Any]:
        """A sheet for each client: real pictures, its personal model's, its group's, everybody's, other variants'."""
        names = [*(variant.name for variant in self.variants), WORDS]
        ours, *others = [load_state(_kept_pictures(folder, name, number)).extras for name in names]
        recipe = open_run(_folder(folder, {**NO_ADAPTERS, "seed": number})).recipe
        clients, turn, found = build_clients(recipe), Counter[str](), {}
        for client, style in styles_of(clients, recipe.data.styles).items():
            things = self._names(clients, client, style, turn[style], recipe.seed)[:SHOWN]
            turn[style] += 1
            rows = [ours[client], ours[f"{client}/group"], ours[f"{client}/all"], *(other[client] for other in others)]
            found[client] = {"style": style, "picture": f"pictures/{client}.png"}
            save_grid(
                folder / found[client]["picture"],
                torch.cat([real_pictures(style, things), *rows]),
                columns=len(things),
            )
        return {"sheets": found}

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
        names = [*(variant.name for variant in self.variants), WORDS]
        return answer(found, names, self.rivals, {name: best_rate(found, name) for name in names})


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


def strangers(seen: Tensor, styles: Sequence[str]) -> dict[str, float]:
    """How well clients of a style that nobody else has are told from the others by their descriptors, when it is that
    style's turn to be unknown: the area under the curve of the cosine with the likest style's centre.

    Of the others, each is compared with centres without it. `seen` has a descriptor in each row; clients with a mixture
    of styles are left out, and those who are alone with theirs. Chance is 0.5; empty, where one style is left or none.
    """
    pure = [at for at, style in enumerate(styles) if len(shares_of(style)) == 1 and styles.count(style) > 1]
    found: dict[str, float] = {}
    if len({styles[at] for at in pure}) < 2:
        return found
    for new in dict.fromkeys(styles[at] for at in pure):
        likeness = {}
        for at in pure:
            there = [k for k in pure if k != at and styles[k] != new]
            names = sorted({styles[k] for k in there})
            known = familiar(seen[there], [names.index(styles[k]) for k in there])
            likeness[at] = float(known.likeness(seen[at]).max())
        found[new] = auroc([-value for value in likeness.values()], [styles[at] == new for at in likeness])
    return found


def _kept_pictures(folder: Path, variant: str, number: int) -> Path:
    """What is shown of a variant's drawings: of each client the first, and by the adapters that it shares."""
    return folder / "pictures" / file_name(variant, f"{number}.safetensors")


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
