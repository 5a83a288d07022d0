"""The whole SPIRE loop on Gaussian mixtures, where the exact model is known: does it beat fine-tuning, and forget less?

Three stages. "train": every method once per seed, through the engine. "adapt": new clients learn on what was released,
over a grid of learning rates and steps. "variant": SPIRE with other paces of its embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from torch import Tensor

from personae.artefact.save import load_state
from personae.core import Method, Training, everything, stream, under
from personae.errors import ConfigError
from personae.evaluate.charts import COLOURS, chart, logarithmic
from personae.methods.fedavg_ft import FedAvgFT
from personae.methods.spire import Spire
from personae.personal.embedding import EMBEDDING, NULL_EMBEDDING
from personae.study.mixture_world import World, adapt, federate, make_world
from personae.study.stats import interval
from personae.study.study import Answer, Cell, Chart, Row, Table, where

SPIRE, FEDAVG, FINE_TUNED, BIAS = "SPIRE", "FedAvg", "FedAvg+FT", "bias on FedAvg"

RIVALS = {SPIRE: (SPIRE, under("embedding.")), FINE_TUNED: (FEDAVG, everything), BIAS: (FEDAVG, under("embedding."))}
"""How a new client adapts: on which trained model, and what of it moves."""

LOST = 1.0
"""A learned mean farther than this from the true one stands for something else: components have this width."""

Point = tuple[int, float, int]
"""Images, rate and steps of one point of the grid."""

COLOUR = {SPIRE: "after", FINE_TUNED: "before", BIAS: "up"}


@dataclass(frozen=True)
class Variant:
    """SPIRE with another rate of the logits, or another number of rounds in which they stay at zero."""

    name: str
    embedding_rate: float
    embedding_warmup_rounds: int


@dataclass(frozen=True)
class MixtureFederation:
    """The federation, its training, and the grid of new clients.

    A learning rate's share `late_factor` holds for the last 30 % of the rounds. A point of the grid counts as converged
    when a logit could travel `least_travel` in it: rate times steps, since Adam moves about its rate in a step.
    """

    seeds: tuple[int, ...]
    images: tuple[int, ...]
    rates: tuple[float, ...]
    steps: tuple[int, ...]
    training: Training
    fine_tuning: Training
    variants: tuple[Variant, ...] = ()
    num_components: int = 6
    width: int = 10
    norm: float = 3.0
    concentration: float = 0.3
    num_train: int = 20
    num_new: int = 12
    num_images: int = 300
    rounds: int = 150
    late_factor: float = 0.2
    embedding_rate: float = 2.5
    embedding_warmup_rounds: int = 15
    least_travel: float = 3.0

    def __post_init__(self) -> None:
        if not all((self.seeds, self.images, self.rates, self.steps)):
            raise ConfigError("there must be seeds, images, rates and steps")
        if self.num_components > self.width:
            raise ConfigError(f"{self.num_components} orthogonal means need as many dimensions, width is {self.width}")
        if (farthest := max(self.rates) * max(self.steps)) < self.least_travel:
            raise ConfigError(
                f"rates and steps go as far as {farthest:g}, below least_travel {self.least_travel:g}: no point of the "
                "grid would count; raise them"
            )

    @property
    def train(self) -> list[str]:
        return [f"c{k:02d}" for k in range(self.num_train)]

    @property
    def new(self) -> list[str]:
        return [f"n{k:02d}" for k in range(self.num_new)]

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        cells: list[Cell] = [
            {"stage": "train", "method": name, "number": n} for n in self.seeds for name in (SPIRE, FEDAVG)
        ]
        if len(found) < len(cells):
            return cells
        cells += [{"stage": "adapt", "method": name, "number": n} for n in self.seeds for name in RIVALS]
        return cells + [
            {"stage": "variant", "method": variant.name, "number": n} for n in self.seeds for variant in self.variants
        ]

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        number, name = int(cell["number"]), str(cell["method"])
        world = self.world(seed, number)
        if cell["stage"] == "adapt":
            return {"grid": self._adapted(world, name, _run_folder(folder, RIVALS[name][0], number))}
        return self._trained(world, name, _run_folder(folder, name, number))

    def answer(self, found: Sequence[Row]) -> Answer:
        return _answer(self, found)

    def world(self, seed: int, number: int) -> World:
        return make_world(
            [*self.train, *self.new],
            num_components=self.num_components,
            width=self.width,
            norm=self.norm,
            concentration=self.concentration,
            seed=seed + number,
        )

    # --- training -----------------------------------------------------------------------------------------------

    def method(self, name: str, *, late: bool) -> Method:
        """As it is for the first or the last part of the rounds."""
        training = replace(self.training, lr=self.late_factor * self.training.lr) if late else self.training
        if name == FEDAVG:
            # Fine-tuning comes once, at the end; without a null vector there is nothing to drop the condition for.
            last = self.fine_tuning if late else replace(self.fine_tuning, steps=0)
            return FedAvgFT(replace(training, condition_dropout=0.0), last)
        rates = {variant.name: (variant.embedding_rate, variant.embedding_warmup_rounds) for variant in self.variants}
        rate, warmup = rates.get(name, (self.embedding_rate, self.embedding_warmup_rounds))
        return Spire(training, self.fine_tuning, rate, embedding_warmup_rounds=warmup)

    def _trained(self, world: World, name: str, folder: Path) -> Mapping[str, Any]:
        run = federate(
            world,
            self.train,
            self.num_images,
            early=self.method(name, late=False),
            late=self.method(name, late=True),
            rounds=self.rounds,
            folder=folder,
        )
        shared = run.server.params
        personal = {client: {**shared, **run.personal[client].params} for client in self.train}
        figures = {
            "mean_errors": world.mean_errors(shared["means"]),
            "population": world.population_divergence(self.train, _population_logits(shared, name), shared["means"]),
            "clients": [world.divergence(c, own[EMBEDDING], own["means"]) for c, own in personal.items()],
        }
        if name == FEDAVG:
            plain = [world.divergence(client, shared[EMBEDDING], shared["means"]) for client in self.train]
            return figures | {"clients": plain, "fine_tuned": figures["clients"]}
        return figures

    # --- new clients --------------------------------------------------------------------------------------------

    def _adapted(self, world: World, name: str, folder: Path) -> list[dict[str, Any]]:
        """For every number of images, rate and number of steps: every new client's divergence, and the population's."""
        shared = load_state(folder / "server.safetensors").params
        start = {"means": shared["means"], EMBEDDING: _population_logits(shared, RIVALS[name][0])}
        each = [(client, num) for num in self.images for client in self.new]
        data = [world.images(client, num) for client, num in each]
        grid = []
        for rate in self.rates:
            how = Training(max(self.steps), rate, self.training.batch_size)
            rngs = [stream(world.seed, "adapt", client, num) for client, num in each]
            for steps, found in adapt(start, data, rngs, RIVALS[name][1], how, self.steps).items():
                for num in self.images:
                    rows = [row for row, (_, own) in enumerate(each) if own == num]
                    ends = [(found[EMBEDDING][row], found["means"][row]) for row in rows]
                    grid.append(
                        {
                            "images": num,
                            "rate": rate,
                            "steps": steps,
                            "clients": [world.divergence(c, *end) for c, end in zip(self.new, ends, strict=True)],
                            "population": self._population(world, name, shared, ends),
                        }
                    )
        return grid

    def _population(self, world: World, name: str, shared: Mapping[str, Tensor], ends: Sequence[Any]) -> float:
        """How far the average training client now is: SPIRE keeps the model with the null vector beside the adapted."""
        if name == SPIRE:
            return world.population_divergence(self.train, shared[NULL_EMBEDDING], shared["means"])
        return fmean(world.population_divergence(self.train, *end) for end in ends)


def _population_logits(shared: Mapping[str, Tensor], method: str) -> Tensor:
    """The vector that a new client starts from."""
    return shared[EMBEDDING if method == FEDAVG else NULL_EMBEDDING]


def _run_folder(folder: Path, method: str, number: int) -> Path:
    return folder / "runs" / f"{re.sub('[^a-z]+', '-', method.lower())}-{number}"


# --- what it says -------------------------------------------------------------------------------------------------


def _answer(study: MixtureFederation, found: Sequence[Row]) -> Answer:
    trained = {name: _by_seed(where(found, stage="train", method=name)) for name in (SPIRE, FEDAVG)}
    trained[FINE_TUNED] = _by_seed(where(found, stage="train", method=FEDAVG), "fine_tuned")
    trained |= {v.name: _by_seed(where(found, stage="variant", method=v.name)) for v in study.variants}
    trained = {name: values for name, values in trained.items() if values}
    if SPIRE not in trained:
        return Answer()
    lost = _lost(found)
    numbers: dict[str, Any] = {
        "training": {name: fmean(values) for name, values in trained.items()},
        "training_worst_seed": {name: max(values) for name, values in trained.items()},
        "population": {
            name: fmean(row["population"] for row in where(found, stage="train", method=name))
            for name in (SPIRE, FEDAVG)
            if name in trained
        },
        "lost_means": {name: sum(own.values()) for name, own in lost.items()},
        "spire_seeds_below_0.05": sum(value < 0.05 for value in trained[SPIRE]),
        "seeds": len(trained[SPIRE]),
    }
    findings = _training_findings(study, trained, lost)
    tables, charts = [_training_table(trained, found)], list[Chart]()
    if adapted := [n for n in study.seeds if all(where(found, stage="adapt", method=r, number=n) for r in RIVALS)]:
        more = _new_clients(study, found, adapted, [n for n in adapted if not lost[FEDAVG][n] and not lost[SPIRE][n]])
        numbers, findings = {**numbers, **more.numbers}, [*findings, *more.findings]
        tables, charts = [*tables, *more.tables], [*charts, *more.charts]
    return Answer(findings, numbers, tables, charts)


def _training_findings(
    study: MixtureFederation, trained: Mapping[str, Sequence[float]], lost: Mapping[str, Mapping[int, int]]
) -> list[str]:
    ours = trained[SPIRE]
    others = [f"{name} {fmean(v):.3f} (worst {max(v):.3f})" for name, v in trained.items() if name != SPIRE]
    counts = [f"{name} {sum(n.values())} of {study.num_components * len(n)}" for name, n in lost.items()]
    return [
        f"Training clients: SPIRE ends at a mean KL of {fmean(ours):.3f} nats (worst seed {max(ours):.3f}), below 0.05 "
        f"in {sum(value < 0.05 for value in ours)} of {len(ours)} seeds. The others: {', '.join(others) or 'not yet'}.",
        f"Means that are lost, farther than {LOST:g} from the true one, a component's own width: {', '.join(counts)}.",
    ]


def _lost(found: Sequence[Row]) -> dict[str, dict[int, int]]:
    """By method and seed: how many components no learned mean stands for."""
    lost: dict[str, dict[int, int]] = {}
    for row in found:
        if "mean_errors" in row:
            lost.setdefault(row["method"], {})[row["number"]] = sum(error > LOST for error in row["mean_errors"])
    return lost


def _by_seed(rows: Sequence[Row], key: str = "clients") -> list[float]:
    return [fmean(row[key]) for row in rows]


def _averages(found: Sequence[Row], numbers: Sequence[int], what: str) -> dict[Point, dict[str, float]]:
    """By images, rate and steps, then by rival: the mean over clients and these seeds."""
    values: dict[Point, dict[str, list[float]]] = {}
    for row in where(found, stage="adapt"):
        for point in row["grid"] if row["number"] in numbers else ():
            own = values.setdefault((point["images"], point["rate"], point["steps"]), {})
            own.setdefault(row["method"], []).append(fmean(point[what]) if what == "clients" else point[what])
    return {key: {name: fmean(own) for name, own in values[key].items()} for key in sorted(values)}


def _new_clients(
    study: MixtureFederation, found: Sequence[Row], numbered: Sequence[int], sound: Sequence[int]
) -> Answer:
    kl, after = _averages(found, numbered, "clients"), _averages(found, numbered, "population")
    converged = [key for key in kl if key[1] * key[2] >= study.least_travel]
    few = [key for key in converged if key[0] <= 100]
    whole = _averages(found, sound, "clients")
    won, won_whole = (
        sum(table[key][SPIRE] < table[key][FINE_TUNED] / 2 for key in few if key in table) for table in (kl, whole)
    )
    bias_gap = max((whole[key][BIAS] - whole[key][SPIRE] for key in converged if key in whole), default=None)
    forgotten = [after[key][FINE_TUNED] for key in converged]
    most = max(study.images)
    spans = {name: [kl[key][name] for key in converged if key[0] == most] for name in RIVALS}
    numbers = {
        "new_clients_half_of_fine_tuning": won,
        "new_clients_half_of_fine_tuning_where_no_mean_was_lost": won_whole,
        "new_clients_points": len(few),
        "largest_gap_of_bias_where_no_mean_was_lost": bias_gap,
        "seeds_where_no_mean_was_lost": len(sound),
        "population_after_fine_tuning": [min(forgotten), max(forgotten)],
        "span_with_most_images": {name: [min(values), max(values)] for name, values in spans.items()},
        "grid": [{"images": n, "rate": r, "steps": s, **kl[n, r, s]} for n, r, s in kl],
    }
    kept = after[converged[0]][SPIRE]
    findings = [
        f"New clients with at most 100 images: SPIRE's KL is below half of FedAvg+FT's at {won} of {len(few)} "
        "converged points of the grid.",
        f"With {most} images, over the converged points, SPIRE spans {min(spans[SPIRE]):.3f} to "
        f"{max(spans[SPIRE]):.3f} nats, FedAvg+FT {min(spans[FINE_TUNED]):.3f} to {max(spans[FINE_TUNED]):.3f}.",
        f"Forgetting: fine-tuning takes the population's KL to between {min(forgotten):.2f} and {max(forgotten):.2f}; "
        f"SPIRE's stays at {kept:.3f}, since nothing shared moves.",
    ]
    if bias_gap is not None:
        findings.append(
            f"In the {len(sound)} of {len(numbered)} seeds where neither method lost a mean: SPIRE below half of "
            f"FedAvg+FT at {won_whole} of {len(few)} points; logits alone on FedAvg's means, beside SPIRE's, at most "
            f"{bias_gap:+.3f} nats at any converged point."
        )
    unsound = (
        f" FedAvg or SPIRE lost a mean in {len(numbered) - len(sound)} of {len(numbered)} seeds; logits cannot mend it."
    )
    charts = [
        Chart("new-clients", _over_images(study, "new-clients", kl, converged, list(RIVALS)), NEW_CAPTION + unsound),
        Chart(
            "forgetting", _over_images(study, "forgetting", after, converged, [SPIRE, FINE_TUNED]), FORGETTING_CAPTION
        ),
    ]
    return Answer(findings, numbers, [_grid_table(kl, after, whole, converged)], charts)


NEW_CAPTION = (
    "KL(client || learned) of new clients, mean over clients and seeds. Line: median of the converged grid of learning "
    "rates and steps; band: its range."
)
FORGETTING_CAPTION = (
    "KL(average training client || model) after a new client has adapted. For FedAvg+FT of its own model; for SPIRE of "
    "the model with its null vector, which adapting leaves as it is. Line: median of the converged grid; band: range."
)


def _training_table(trained: Mapping[str, Sequence[float]], found: Sequence[Row]) -> Table:
    rows: list[list[Any]] = []
    for name, values in trained.items():
        over = interval(values)
        errors = [fmean(row["mean_errors"]) for row in found if row["method"] == name and "mean_errors" in row]
        rows.append([name, over.mean, over.low, over.high, max(values), fmean(errors) if errors else None, len(values)])
    columns = ["method", "KL, nats", "95 % from", "to", "worst seed", "distance of means", "seeds"]
    note = "KL(client || learned), mean over training clients, then over seeds; the interval is over seeds."
    return Table("Training clients", columns, rows, note)


def _grid_table(
    kl: Mapping[Point, Any], after: Mapping[Point, Any], whole: Mapping[Point, Any], converged: Sequence[Point]
) -> Table:
    columns = [
        "images",
        "rate",
        "steps",
        *RIVALS,
        f"{SPIRE}, sound",
        f"{BIAS}, sound",
        "population, SPIRE",
        "population, FedAvg+FT",
        "converged",
    ]
    rows = [
        [
            *key,
            *(kl[key][name] for name in RIVALS),
            *(whole[key][name] if key in whole else None for name in (SPIRE, BIAS)),
            after[key][SPIRE],
            after[key][FINE_TUNED],
            "yes" if key in converged else "",
        ]
        for key in kl
    ]
    note = (
        "KL in nats, mean over new clients and seeds. SPIRE and the bias train K numbers, FedAvg+FT the means as well. "
        "Sound: seeds in which neither method lost a mean."
    )
    return Table("New clients", columns, rows, note)


def _over_images(
    study: MixtureFederation, name: str, table: Mapping[Point, Any], converged: Sequence[Point], names: Sequence[str]
) -> Markup:
    """Chart "new-clients" or "forgetting"."""
    what = "KL of new clients" if name == "new-clients" else "KL of the population after adapting"

    def draw(axes: Axes) -> None:
        for rival in names:
            _band(axes, study, {key: table[key][rival] for key in converged}, rival)
        logarithmic(axes)
        axes.set_xscale("log")
        axes.set_xticks(study.images, [str(num) for num in study.images])
        axes.minorticks_off()
        axes.set(xlabel="images of the new client", title=f"{what} (nats, logarithmic)")
        axes.legend()

    return chart(name, 5.0, 3.3, draw, f"{what} against the number of images, by method")


def _band(axes: Axes, study: MixtureFederation, values: Mapping[Point, float], name: str) -> None:
    by_images = [sorted(value for key, value in values.items() if key[0] == num) for num in study.images]
    middle = [own[len(own) // 2] for own in by_images]
    colour = COLOURS[COLOUR[name]]
    low, high = [own[0] for own in by_images], [own[-1] for own in by_images]
    axes.fill_between(study.images, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(study.images, middle, color=colour, marker="o", linewidth=1.8, label=name)
