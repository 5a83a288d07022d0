"""Means that were learned, and imperfectly: how much of a new client's error is the backbone's?

Three stages. "bias": two components with a wrong mean and any amount of images, from formulas. "true": new clients on
the true means. "learned": the same new clients, with the same images, on means that SPIRE learned through the engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from personae.core import Training, stream
from personae.errors import ConfigError
from personae.evaluate.charts import COLOURS, chart, logarithmic
from personae.methods.spire import Spire
from personae.study.mixture_world import SCHEDULE, World, federate, make_world
from personae.study.stats import log_slope
from personae.study.study import Answer, Cell, Chart, Row, Table, where
from personae.theory.components import high_noise_limit, learn_logits, matched, two_component_limit

TOLERANCE = 1.25
"""A backbone is said to be good enough when weights on it are at most this factor worse than on the true means."""

MARKS = ("o", "s", "^", "D", "v")


@dataclass(frozen=True)
class Federation:
    """Who trained the means: so many clients with so many images each."""

    clients: int
    images: int


@dataclass(frozen=True)
class ImperfectBackbone:
    """Two components with `scales` and `degrees` of error; federations of SPIRE, each trained for all of `rounds`.

    `num_new` new clients learn their weights from each number of `images`, in `learning_steps` at `learning_rate` on
    the frozen means.
    """

    seeds: tuple[int, ...]
    federations: tuple[Federation, ...]
    rounds: tuple[int, ...]
    images: tuple[int, ...]
    training: Training
    scales: tuple[float, ...] = (0.6, 0.8, 1.0, 1.25, 1.5)
    degrees: tuple[float, ...] = (10.0, 20.0, 40.0)
    two_weight: float = 0.1
    two_norm: float = 2.0
    num_components: int = 6
    width: int = 10
    norm: float = 3.0
    concentration: float = 0.3
    num_new: int = 12
    late_factor: float = 0.2
    embedding_rate: float = 2.5
    warmup_share: float = 0.1
    learning_steps: int = 300
    learning_rate: float = 0.05

    def __post_init__(self) -> None:
        if not all((self.seeds, self.federations, self.rounds, self.images)):
            raise ConfigError("there must be seeds, federations, rounds and images")

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        cells: list[Cell] = [{"stage": "bias", "scale": scale, "degrees": 0.0} for scale in self.scales]
        cells += [{"stage": "bias", "scale": 1.0, "degrees": degrees} for degrees in self.degrees]
        for number in self.seeds:
            cells.append({"stage": "true", "number": number})
            cells += [
                {
                    "stage": "learned",
                    "number": number,
                    "clients": f.clients,
                    "client_images": f.images,
                    "rounds": rounds,
                }
                for f in self.federations
                for rounds in self.rounds
            ]
        return cells

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        if cell["stage"] == "bias":
            return self._bias(float(cell["scale"]), float(cell["degrees"]))
        world = self._world(seed, int(cell["number"]))
        if cell["stage"] == "true":
            return {"backbone_error": 0.0, **self._new_clients(world, world.means)}
        learned = self._backbone(world, cell, folder)
        learned = learned[matched(learned, world.means)]
        errors = (learned - world.means).norm(dim=1)
        return {"backbone_error": float(errors.square().mean().sqrt()), **self._new_clients(world, learned)}

    def answer(self, found: Sequence[Row]) -> Answer:
        return _answer(self, found)

    # --- pieces -------------------------------------------------------------------------------------------------

    @property
    def new(self) -> list[str]:
        return [f"n{k:02d}" for k in range(self.num_new)]

    def _bias(self, scale: float, degrees: float) -> Mapping[str, Any]:
        alpha_bar, angle = SCHEDULE.alpha_bar.double(), math.radians(degrees)
        mean = torch.tensor([self.two_norm, 0.0], dtype=torch.float64)
        wrong = scale * self.two_norm * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        weights = torch.tensor([self.two_weight, 1 - self.two_weight], dtype=torch.float64)
        high = high_noise_limit(weights, torch.stack([mean, -mean]), torch.stack([wrong, -wrong]))
        every = two_component_limit(self.two_weight, self.two_norm, scale, degrees, alpha_bar)
        return {"high_noise": float(high[0]), "all_levels": every}

    def _world(self, seed: int, number: int) -> World:
        most = max(federation.clients for federation in self.federations)
        return make_world(
            [*_train(most), *self.new],
            num_components=self.num_components,
            width=self.width,
            norm=self.norm,
            concentration=self.concentration,
            seed=seed + number,
        )

    def _backbone(self, world: World, cell: Cell, folder: Path) -> Tensor:
        rounds = int(cell["rounds"])
        slow = replace(self.training, lr=self.late_factor * self.training.lr)
        early, late = (
            Spire(training, training, self.embedding_rate, embedding_warmup_rounds=round(self.warmup_share * rounds))
            for training in (self.training, slow)
        )
        names, images = _train(int(cell["clients"])), int(cell["client_images"])
        path = folder / "runs" / f"{cell['number']}-{len(names)}-{images}-{rounds}"
        run = federate(world, names, images, early=early, late=late, rounds=rounds, folder=path)
        return run.server.params["means"].double()

    def _new_clients(self, world: World, means: Tensor) -> Mapping[str, Any]:
        """For every number of images, over the new clients: error of the weights, and divergence of the density.

        `limit` is the error of the weights that the mean of infinitely many images alone would give, and `kl_given` the
        divergence with the true weights on these means.
        """
        weights = torch.stack([world.weights[name] for name in self.new])
        limits = torch.stack([high_noise_limit(own, world.means, means) for own in weights])
        given = [world.divergence(name, own.log(), means) for name, own in zip(self.new, weights, strict=True)]
        rows = []
        for num in self.images:
            x_0 = torch.stack([world.images(name, num).pixels.double() for name in self.new])
            logits = learn_logits(
                x_0,
                means,
                SCHEDULE.alpha_bar.double(),
                steps=self.learning_steps,
                lr=self.learning_rate,
                rng=stream(world.seed, "learn", num),
            )
            kl = [world.divergence(name, own, means) for name, own in zip(self.new, logits, strict=True)]
            rows.append({"images": num, "weight_error": _rms(logits.softmax(1), weights), "kl": fmean(kl)})
        return {"limit": _rms(limits, weights), "kl_given": fmean(given), "learned": rows}


def _train(num: int) -> list[str]:
    return [f"c{k:02d}" for k in range(num)]


def _rms(found: Tensor, true: Tensor) -> float:
    """The root of the mean squared distance |w_hat - w|."""
    return float((found - true).square().sum(1).mean().sqrt())


# --- what it says -------------------------------------------------------------------------------------------------


def _answer(study: ImperfectBackbone, found: Sequence[Row]) -> Answer:
    findings: list[str] = []
    numbers: dict[str, Any] = {}
    tables: list[Table] = []
    charts: Sequence[Chart] = ()
    if bias := where(found, stage="bias"):
        worst = max(bias, key=lambda row: abs(row["all_levels"] - study.two_weight))
        high = max(abs(row["high_noise"] - study.two_weight) for row in bias)
        numbers["bias"] = [{k: row[k] for k in ("scale", "degrees", "high_noise", "all_levels")} for row in bias]
        findings.append(
            f"Two components, |mu| = {study.two_norm:g}, w = {study.two_weight:g}, unlimited images: over all noise "
            f"levels a wrong mean moves the weight by at most {abs(worst['all_levels'] - study.two_weight):.4f} "
            f"(scale {worst['scale']:g}, {worst['degrees']:g} degrees), over high noise alone by up to {high:.3f}."
        )
        tables.append(_bias_table(bias))
    learned, true = where(found, stage="learned"), where(found, stage="true")
    seeds = {row["number"] for row in true}
    pairs = [row for row in learned if row["number"] in seeds]
    if pairs:
        more = _learned(study, pairs, {row["number"]: row for row in true})
        numbers, findings = {**numbers, **more.numbers}, [*findings, *more.findings]
        tables, charts = [*tables, *more.tables], more.charts
    return Answer(findings, numbers, tables, charts)


def _learned(study: ImperfectBackbone, pairs: Sequence[Row], true: Mapping[int, Row]) -> Answer:
    tolerated = {num: _tolerated(pairs, true, num) for num in study.images}
    floors = {num: fmean(_of(row, num)["weight_error"] for row in true.values()) for num in study.images}
    most, least = max(study.images), min(study.images)
    errors = [row["backbone_error"] for row in pairs]
    numbers: dict[str, Any] = {
        "tolerated_backbone_error": {str(num): value for num, value in tolerated.items()},
        "weight_error_on_true_means": {str(num): value for num, value in floors.items()},
        "backbone_errors": [min(errors), max(errors)],
    }
    worst = max(pairs, key=lambda row: float(row["backbone_error"]))
    findings = [
        f"Federations left the means {min(errors):.2f} to {max(errors):.2f} from the true ones (root mean square), "
        f"whose norm is {study.norm:g}.",
        f"With {least} images a new client's weights are within {TOLERANCE - 1:.0%} of those on the true means up to a "
        f"backbone error of {tolerated[least]:.2f}, with {most} images up to {tolerated[most]:.2f}.",
        f"The worst backbone ({worst['backbone_error']:.2f}) leaves a weight error of "
        f"{_of(worst, most)['weight_error']:.3f} with {most} images, where the true means leave "
        f"{_of(true[worst['number']], most)['weight_error']:.3f}, and where the mean of the images alone would end at "
        f"{worst['limit']:.3f}.",
    ]
    if len(pairs) > 1:
        slope = log_slope(errors, [_of(row, most)["kl"] for row in pairs])
        given = fmean(row["kl_given"] for row in pairs)
        added = fmean(_of(row, most)["kl"] for row in pairs) - given
        numbers |= {"kl_slope": slope, "kl_with_true_weights": given, "kl_added_by_learning": added}
        findings.append(
            f"The divergence grows with the backbone's error to the power {slope:.2f}. Over all backbones, means that "
            f"are wrong cost {given:.3f} nats with the true weights; weights learned from {most} images change that by "
            f"{added:+.3f}."
        )
    charts = [
        Chart("weights", _scatter(study, pairs, true, "weight_error"), WEIGHTS_CAPTION),
        Chart("divergence", _scatter(study, pairs, true, "kl"), KL_CAPTION),
    ]
    return Answer(findings, numbers, [_learned_table(study, pairs, true)], charts)


def _tolerated(pairs: Sequence[Row], true: Mapping[int, Row], num: int) -> float:
    """The largest backbone error below which every backbone was good enough for clients with `num` images."""
    bad = [
        row["backbone_error"]
        for row in pairs
        if _of(row, num)["weight_error"] > TOLERANCE * _of(true[row["number"]], num)["weight_error"]
    ]
    return max(
        (row["backbone_error"] for row in pairs if row["backbone_error"] < min(bad, default=math.inf)), default=0.0
    )


WEIGHTS_CAPTION = (
    "Error of new clients' weights, root mean square of |w_hat - w|, on means that were learned. One mark per "
    "backbone; dashed: the same clients and images on the true means, mean over seeds."
)
KL_CAPTION = "KL(new client || learned) on the same backbones. Dashed: on the true means."


def _of(row: Row, num: int) -> Mapping[str, float]:
    return next(entry for entry in row["learned"] if entry["images"] == num)


def _bias_table(bias: Sequence[Row]) -> Table:
    rows = [[row["scale"], row["degrees"], row["all_levels"], row["high_noise"]] for row in bias]
    columns = ["scale", "degrees", "all noise levels", "high noise only"]
    return Table("Two components: the weight that unlimited images end at", columns, rows)


def _learned_table(study: ImperfectBackbone, pairs: Sequence[Row], true: Mapping[int, Row]) -> Table:
    columns = ["clients", "images each", "rounds", "backbone error", "KL, true weights", "limit of the mean"]
    columns += [f"{what}, n = {num}" for what in ("weight error", "KL") for num in study.images]
    groups: dict[tuple[Any, ...], list[Row]] = {("", "", "true means"): list(true.values())}
    for row in pairs:
        groups.setdefault((row["clients"], row["client_images"], row["rounds"]), []).append(row)
    rows: list[list[Any]] = []
    for key, own in groups.items():
        # Rounded, since the true means leave 1e-16 where nothing is meant.
        entries = [round(fmean(row[name] for row in own), 6) for name in ("backbone_error", "kl_given", "limit")]
        for what in ("weight_error", "kl"):
            entries += [fmean(_of(row, num)[what] for row in own) for num in study.images]
        rows.append([*key, *entries])
    note = f"Means over {len(true)} seeds. Errors are root mean squares over components or new clients; KL in nats."
    return Table("New clients on means that a federation learned", columns, rows, note)


def _scatter(study: ImperfectBackbone, pairs: Sequence[Row], true: Mapping[int, Row], what: str) -> Any:
    shown = [study.images[0], study.images[len(study.images) // 2], study.images[-1]]
    colours = [COLOURS["before"], COLOURS["up"], COLOURS["after"]]

    def draw(axes: Axes) -> None:
        for num, colour, mark in zip(shown, colours, MARKS, strict=False):
            at = [row["backbone_error"] for row in pairs]
            axes.plot(at, [_of(row, num)[what] for row in pairs], mark, color=colour, markersize=5, label=f"n = {num}")
            level = fmean(_of(row, num)[what] for row in true.values())
            axes.axhline(level, color=colour, linewidth=1, linestyle=(0, (4, 3)))
        logarithmic(axes)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        title = "Error of the weights" if what == "weight_error" else "KL in nats"
        axes.set(xlabel="backbone error: distance of the means", title=f"{title} (logarithmic)")
        axes.legend()

    return chart(what, 5.0, 3.4, draw, "Error of new clients against the backbone's error, by number of images")
