"""How well K weights are learned on known means: three estimators beside the errors that theory gives.

Every table entry is n E|w_hat - w|^2 over repeats with data of their own. DDPM training is compared with maximum
likelihood on the same data, where the two should nearly agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from personae.backbone.schedule import schedule
from personae.core import stream
from personae.errors import ConfigError
from personae.evaluate.charts import COLOURS, chart, logarithmic
from personae.study.stats import log_slope
from personae.study.study import Answer, Cell, Chart, Row, Table
from personae.theory.components import (
    cramer_rao,
    learn_logits,
    maximum_likelihood,
    oracle_error,
    project,
    projection_error,
)

INFORMATION_DRAWS = 100_000
"""Points of every component that the Fisher information is averaged over."""

CLOSE = 0.2
"""DDPM training agrees with maximum likelihood when their distance is below this part of the latter's error."""

COLOUR = {"projection": "before", "likelihood": "up", "ddpm": "after"}
NAMES = {"projection": "projection", "likelihood": "maximum likelihood", "ddpm": "DDPM training"}


@dataclass(frozen=True)
class Case:
    """K orthogonal means of norm sqrt(2) * separation in D dimensions; weights equal, or as 1 : 2 : ... : K."""

    components: int
    width: int
    separation: float
    equal: bool
    images: int

    def __post_init__(self) -> None:
        if not 2 <= self.components <= self.width or self.separation <= 0 or self.images < 1:
            raise ConfigError(f"{self} is no case: expected 2 <= components <= width, a separation and images above 0")

    @property
    def weights(self) -> Tensor:
        parts = torch.arange(1, self.components + 1).double()
        return torch.ones_like(parts) / self.components if self.equal else parts / parts.sum()

    @property
    def means(self) -> Tensor:
        return math.sqrt(2) * self.separation * torch.eye(self.components, self.width, dtype=torch.float64)


@dataclass(frozen=True)
class Components:
    """`cases`, and two rows of cases that differ from the first one in one thing: `widths`, `images`.

    `repeats` data sets for projection and maximum likelihood; the first `trained` of them for DDPM training too.
    """

    cases: tuple[Case, ...]
    widths: tuple[int, ...]
    images: tuple[int, ...]
    repeats: int = 400
    trained: int = 60
    steps: int = 1500
    lr: float = 0.02

    def __post_init__(self) -> None:
        if not self.cases or not 1 <= self.trained <= self.repeats:
            raise ConfigError(f"{len(self.cases)} cases, {self.trained} trained of {self.repeats} repeats")

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        first = vars(self.cases[0])
        rows = [vars(case) for case in self.cases]
        rows += [{**first, "width": width} for width in self.widths]
        rows += [{**first, "images": images} for images in self.images]
        return [dict(row) for index, row in enumerate(rows) if row not in rows[:index]]

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        case = Case(**cell)  # type: ignore[arg-type]
        key = "-".join(str(value) for value in cell.values())
        weights, means = case.weights, case.means
        x_0 = _drawn(case, self.repeats, stream(seed, "images", key))
        likelihood = maximum_likelihood(x_0, means)
        alpha_bar = schedule(clip_sample=False).alpha_bar.double()
        logits = learn_logits(
            x_0[: self.trained], means, alpha_bar, steps=self.steps, lr=self.lr, rng=stream(seed, "noise", key)
        )
        ddpm = logits.softmax(1)
        information = stream(seed, "information", key)
        return {
            "projection": _error(project(x_0, means), weights, case),
            "projection_theory": projection_error(weights, means),
            "likelihood": _error(likelihood, weights, case),
            "bound": cramer_rao(weights, means, INFORMATION_DRAWS, information),
            "oracle": oracle_error(weights),
            "ddpm": _error(ddpm, weights, case),
            "likelihood_same_data": _error(likelihood[: self.trained], weights, case),
            "distance": _rms(ddpm, likelihood[: self.trained]),
            "likelihood_distance": _rms(likelihood[: self.trained], weights),
        }

    def answer(self, found: Sequence[Row]) -> Answer:
        return _answer(self, found)


def _drawn(case: Case, repeats: int, rng: torch.Generator) -> Tensor:
    """Shapes: [repeats, images, width]."""
    labels = torch.multinomial(case.weights, repeats * case.images, replacement=True, generator=rng)
    noise = torch.randn(repeats, case.images, case.width, generator=rng, dtype=torch.float64)
    return noise.add_(case.means[labels].view_as(noise))


def _error(found: Tensor, weights: Tensor, case: Case) -> float:
    return case.images * float((found - weights).square().sum(1).mean())


def _rms(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().sum(1).mean().sqrt())


# --- what it says -------------------------------------------------------------------------------------------------


def _answer(study: Components, found: Sequence[Row]) -> Answer:
    if not found:
        return Answer()
    listed = [vars(case) for case in study.cases]
    cases = [row for row in found if {key: row[key] for key in listed[0]} in listed]
    widths, images = _along(study, found, "width"), _along(study, found, "images")
    ratios = [row["distance"] / row["likelihood_distance"] for row in found]
    theory = [abs(row["projection"] / row["projection_theory"] - 1) for row in found]
    numbers: dict[str, Any] = {
        "agreement": {"worst": max(ratios), "below": sum(r < CLOSE for r in ratios), "cases": len(ratios)},
        "projection_off_theory": max(theory),
        "likelihood_over_bound": {_name(row): row["likelihood"] / row["bound"] for row in found},
    }
    findings = [
        f"DDPM training and maximum likelihood on the same images: their distance is below {CLOSE:.0%} of the latter's "
        f"error in {sum(r < CLOSE for r in ratios)} of {len(ratios)} cases, at most {max(ratios):.1%}.",
        f"The projection's error is within {max(theory):.1%} of its exact formula in every case ({study.repeats} "
        "repeats).",
        f"Maximum likelihood is between {min(r['likelihood'] / r['bound'] for r in found):.2f} and "
        f"{max(r['likelihood'] / r['bound'] for r in found):.2f} times the Cramér-Rao bound.",
    ]
    charts = []
    if len(images) > 1:
        slopes = {
            name: log_slope([row["images"] for row in images], [row[name] / row["images"] for row in images])
            for name in NAMES
        }
        numbers["slope_against_images"] = slopes
        told = ", ".join(f"{slope:.2f} for {NAMES[name]}" for name, slope in slopes.items())
        findings.append(f"Error against the number of images, log on log, has slope {told}; theory says -1.")
        charts.append(Chart("images", _images_chart(images), IMAGES_CAPTION))
    if len(widths) > 1:
        slopes = {name: log_slope([r["width"] for r in widths], [r[name] for r in widths]) for name in NAMES}
        numbers["slope_against_width"] = slopes
        told = ", ".join(f"{slope:+.3f} for {NAMES[name]}" for name, slope in slopes.items())
        findings.append(
            f"Against the width, {widths[0]['width']} to {widths[-1]['width']}, it is {told}; theory says 0."
        )
        charts.append(Chart("width", _width_chart(widths), WIDTH_CAPTION))
    return Answer(findings, numbers, [_table("Cases", cases, study), *_rows_table(study, widths, images)], charts)


IMAGES_CAPTION = "E|w_hat - w|^2 against the number of images. Lines: exact error of the projection, Cramér-Rao bound."
WIDTH_CAPTION = "n E|w_hat - w|^2 against the width D at equal means and weights. Lines: what theory gives, without D."


def _along(study: Components, found: Sequence[Row], what: str) -> list[Row]:
    """The rows that differ from the first case in one setting only, in its order."""
    first = vars(study.cases[0])
    rows = [row for row in found if all(row[key] == value for key, value in first.items() if key != what)]
    return sorted(rows, key=lambda row: int(row[what]))


def _name(row: Row) -> str:
    shares = "equal" if row["equal"] else "unequal"
    return f"K={row['components']} D={row['width']} separation={row['separation']:g} {shares} n={row['images']}"


def _table(title: str, rows: Sequence[Row], study: Components) -> Table:
    columns = ["K", "D", "separation", "weights", "n", "projection", "its formula", "maximum likelihood"]
    columns += ["Cramér-Rao", "oracle", "DDPM", "maximum likelihood, same data", "distance / error"]
    entries = [
        [
            *(row[key] for key in ("components", "width", "separation")),
            "equal" if row["equal"] else "unequal",
            *(row[key] for key in ("images", "projection", "projection_theory", "likelihood", "bound", "oracle")),
            *(row[key] for key in ("ddpm", "likelihood_same_data")),
            row["distance"] / row["likelihood_distance"],
        ]
        for row in rows
    ]
    note = (
        f"n E|w_hat - w|^2 over {study.repeats} data sets; DDPM training and the columns after it over {study.trained} "
        "of them. Oracle: with every image's component known."
    )
    return Table(title, columns, entries, note)


def _rows_table(study: Components, widths: Sequence[Row], images: Sequence[Row]) -> list[Table]:
    named = {"Against the width": widths, "Against the number of images": images}
    return [_table(title, rows, study) for title, rows in named.items() if len(rows) > 1]


def _images_chart(rows: Sequence[Row]) -> Any:
    def draw(axes: Axes) -> None:
        at = [row["images"] for row in rows]
        for name, colour in COLOUR.items():
            errors = [row[name] / row["images"] for row in rows]
            axes.plot(at, errors, "o", color=COLOURS[colour], markersize=5, label=NAMES[name])
        for name, colour in (("projection_theory", "before"), ("bound", "up")):
            axes.plot(at, [row[name] / row["images"] for row in rows], color=COLOURS[colour], linewidth=1.2)
        logarithmic(axes)
        axes.set_xscale("log")
        axes.set_xticks(at, [str(num) for num in at])
        axes.minorticks_off()
        axes.set(xlabel="images", title="Mean squared error of the weights (logarithmic)")
        axes.legend()

    return chart("images", 5.0, 3.3, draw, "Mean squared error of the weights against the number of images")


def _width_chart(rows: Sequence[Row]) -> Any:
    def draw(axes: Axes) -> None:
        at = [row["width"] for row in rows]
        for name, colour in COLOUR.items():
            axes.plot(at, [row[name] for row in rows], "o", color=COLOURS[colour], markersize=5, label=NAMES[name])
        for name, colour in (("projection_theory", "before"), ("bound", "up")):
            axes.plot(at, [row[name] for row in rows], color=COLOURS[colour], linewidth=1.2)
        axes.set_xscale("log")
        axes.set_xticks(at, [str(num) for num in at])
        axes.minorticks_off()
        axes.set(xlabel="width D", title="n times the mean squared error", ylim=(0, None))
        axes.legend()

    return chart("width", 5.0, 3.3, draw, "n times the mean squared error against the width")
