"""A client learns the weight of two Gaussians by gradient descent on the DDPM loss: how far from the truth it ends.

Many clients with the same weight, each with its own images, vectors in `d` dimensions. Beside the descent stand maximum
likelihood and the projection on the same images, and the formulas of docs/theory.md, sections 5 to 7. Errors are
mean squared ones times the number of images, which the formulas give as one number for every number of images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from personae.backbone.schedule import schedule
from personae.core import stream
from personae.data.mixture import gaussian_mixture
from personae.errors import ConfigError
from personae.evaluate.charts import COLOURS, chart, logarithmic, logarithmic_x
from personae.study.stats import log_slope
from personae.study.study import Answer, Cell, Chart, Entry, Row, Table, where
from personae.theory import two_components as theory

ALL = "all"
"""The level of a cell that trains on every step of the schedule, as one trains a network."""

MARKERS = "osD^v"
BLOCK = 4_000_000
"""Numbers drawn at once."""


@dataclass(frozen=True)
class MixingWeight:
    """Every |mu| with every dimension and every number of images, on the loss of all steps of the linear schedule.

    `times` adds single noise levels, in Ornstein-Uhlenbeck time. `repeats` is the number of clients; the standard error
    of a mean squared error is about sqrt(2 / repeats) of it. `every` takes one step of the schedule in so many.
    """

    weight: float
    norms: tuple[float, ...]
    dims: tuple[int, ...]
    images: tuple[int, ...]
    times: tuple[float, ...] = ()
    repeats: int = 400
    every: int = 40

    def __post_init__(self) -> None:
        problems = [] if 0 < self.weight < 1 else [f"weight is {self.weight}, expected between 0 and 1"]
        for name in ("norms", "dims", "images", "times"):
            values = getattr(self, name)
            if (not values and name != "times") or any(value <= 0 for value in values):
                problems.append(f"{name} is {list(values)}, expected numbers above 0")
        if self.repeats < 2:
            problems.append(f"repeats is {self.repeats}, expected at least 2")
        if not 1 <= self.every <= 1000:
            problems.append(f"every is {self.every}, expected 1 to 1000, the steps of the schedule")
        if problems:
            raise ConfigError("mixing_weight: " + "; ".join(problems))

    @property
    def all_levels(self) -> tuple[Tensor, Tensor]:
        return theory.noise_loss_levels(schedule(clip_sample=False), self.every)

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        levels: list[float | str] = [ALL, *self.times]
        return [
            {"norm": norm, "dim": dim, "images": images, "level": level}
            for norm in self.norms
            for dim in self.dims
            for images in self.images
            for level in levels
        ]

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        norm, dim, images, level = float(cell["norm"]), int(cell["dim"]), int(cell["images"]), cell["level"]
        clean, noise = (stream(seed, what, str(norm), dim, images) for what in ("images", "noise"))
        mu = torch.randn(dim, generator=clean).double()
        mu *= norm / mu.norm()
        x_0 = _in_blocks(lambda n: self._images(mu, n, clean), self.repeats, images, mu)
        if level == ALL:
            likeliest, trained = theory.maximum_likelihood(x_0, norm), theory.ddpm(x_0, norm, *self.all_levels)
            apart = float((trained - likeliest).square().mean() / (likeliest - self.weight).square().mean()) ** 0.5
            found = {"projection": theory.projection(x_0, norm), "likeliest": likeliest, "trained": trained}
            return {"apart": apart, **{name: self._errors(w_hat) for name, w_hat in found.items()}}
        t = float(level)
        signal, sigma = theory.signal_and_sigma(t)
        z = _in_blocks(lambda n: torch.randn(n, dim, generator=noise), self.repeats, images, mu)
        found = {
            "averaged": theory.ddpm(x_0, norm, torch.tensor([t]).double(), torch.ones(1).double()),
            "one_draw": theory.ddpm_one_draw(x_0, z, norm, t),
            "noised_projection": theory.projection(signal * x_0 + sigma * z, signal * norm),
            "target_projection": theory.projection(norm * theory.target(x_0, z, norm, t), norm),
        }
        return {name: self._errors(w_hat) for name, w_hat in found.items()}

    def answer(self, found: Sequence[Row]) -> Answer:
        whole = where(found, level=ALL)
        single = [row for row in found if row["level"] != ALL]
        findings: list[str] = []
        numbers: dict[str, Any] = {}
        tables, charts = [], []
        if whole:
            findings += self._accuracy(whole, numbers)
            tables.append(self._whole_table(whole))
        if len(self.images) > 1 and whole:
            findings += self._slopes(whole, numbers)
            charts.append(self._images_chart(whole))
        if len(self.dims) > 1 and whole:
            findings += self._dimensions(whole, numbers)
            charts.append(self._dims_chart(whole))
        if len(self.norms) > 2 and whole:
            findings += self._separations(whole, numbers)
            charts.append(self._norms_chart(whole))
        if single:
            findings += self._levels(single, numbers)
            tables.append(self._level_table(single))
            charts += [self._level_chart(where(single, norm=norm)) for norm in self.norms if where(single, norm=norm)]
        return Answer(findings, numbers, tables, charts)

    # --- measuring -----------------------------------------------------------------------------------------------

    def _images(self, mu: Tensor, n: int, rng: torch.Generator) -> Tensor:
        weights = torch.tensor([self.weight, 1 - self.weight])
        return gaussian_mixture(weights, torch.stack([mu, -mu]), n, rng).pixels

    def _errors(self, w_hat: Tensor) -> dict[str, Any]:
        """Mean squared error (not yet times n), its standard error, and the mean estimate."""
        squared = (w_hat - self.weight).square()
        error = float(squared.std()) / math.sqrt(len(squared))
        return {"mse": float(squared.mean()), "error": error, "mean": float(w_hat.mean())}

    def _expected(self, norm: float) -> float:
        """What n times the error of the trained weight tends to."""
        return theory.sandwich(self.weight, norm, *self.all_levels)[0]

    # --- what it says --------------------------------------------------------------------------------------------

    def _accuracy(self, rows: Sequence[Row], numbers: dict[str, Any]) -> list[str]:
        bounds = [theory.cramer_rao(self.weight, row["norm"]) for row in rows]
        scaled = [_scaled(row, "trained") for row in rows]
        ratios = [value / bound for (value, _), bound in zip(scaled, bounds, strict=True)]
        errors = [error / bound for (_, error), bound in zip(scaled, bounds, strict=True)]
        mean, error = fmean(ratios), math.sqrt(sum(e**2 for e in errors)) / len(errors)
        low, high = min(ratios), max(ratios)
        apart = [row["apart"] for row in rows]
        numbers["over_cramer_rao"] = {"mean": mean, "error": error, "lowest": low, "highest": high}
        numbers["apart"] = {"mean": fmean(apart), "highest": max(apart)}
        return [
            f"Gradient descent on the DDPM loss finds the weight {self.weight:g} with a mean squared error that is "
            f"{mean:.3f} ± {error:.3f} times the Cramér-Rao bound, over {len(rows)} cells of {self.repeats} clients "
            f"({low:.2f} to {high:.2f} in single cells).",
            f"On the same images, DDPM and maximum likelihood are {100 * fmean(apart):.1f} % as far from each other as "
            f"maximum likelihood is from the truth (root mean squares, averaged over cells; at most "
            f"{100 * max(apart):.1f} %).",
        ]

    def _slopes(self, rows: Sequence[Row], numbers: dict[str, Any]) -> list[str]:
        slopes = {}
        for norm in self.norms:
            for dim in self.dims:
                own = where(rows, norm=norm, dim=dim)
                if len(own) > 1:
                    points = [(row["images"], row["trained"]["mse"], row["trained"]["error"]) for row in own]
                    slopes[f"|mu| = {norm:g}, d = {dim}"] = _slope(points)
        numbers["slope_of_images"] = {at: {"slope": s, "error": e} for at, (s, e) in slopes.items()}
        if not slopes:
            return []
        said = "; ".join(f"{at}: {slope:.2f} ± {error:.2f}" for at, (slope, error) in slopes.items())
        return [f"Slopes of the error against the number of images, in logarithms; 1/n has -1: {said}."]

    def _dimensions(self, rows: Sequence[Row], numbers: dict[str, Any]) -> list[str]:
        said = []
        for norm in self.norms:
            points = self._by_dim(where(rows, norm=norm))
            if len(points) < 2:
                continue
            slope, error = _slope(points)
            numbers.setdefault("slope_of_dims", {})[f"{norm:g}"] = {"slope": slope, "error": error}
            low, high = (theory.mean_vector_bound(self.weight, norm, dim) for dim in (points[0][0], points[-1][0]))
            said.append(
                f"Slope of the error against the dimension, from d = {points[0][0]} to {points[-1][0]} at |mu| = "
                f"{norm:g}, in logarithms; 0 is no influence: {slope:+.3f} ± {error:.3f}. Between these, "
                f"w(1-w) + d/(4|mu|²) grows {high / low:.0f} times."
            )
        return said

    def _separations(self, rows: Sequence[Row], numbers: dict[str, Any]) -> list[str]:
        floor = self.weight * (1 - self.weight)
        own = where(rows, dim=self.dims[0], images=self.images[0])
        numbers["by_norm"] = {f"{row['norm']:g}": _scaled(row, "trained")[0] for row in own}
        near, far = own[0], own[-1]
        return [
            f"n times the error is {_text(near, 'trained')} at |mu| = {near['norm']:g} and {_text(far, 'trained')} at "
            f"{far['norm']:g}; with labels known it would be w(1-w) = {floor:.3f}."
        ]

    def _levels(self, rows: Sequence[Row], numbers: dict[str, Any]) -> list[str]:
        said = []
        for norm in self.norms:
            own = where(rows, norm=norm)
            if not own:
                continue
            limits = {t: theory.sandwich(self.weight, norm, *_one(t)) for t in sorted({row["level"] for row in own})}
            ratios = [_scaled(row, "averaged")[0] / limits[row["level"]][0] for row in own]
            drawn = [_scaled(row, "one_draw")[0] / limits[row["level"]][1] for row in own]
            numbers["over_limit"] = numbers.get("over_limit", []) + [
                {key: row[key] for key in ("norm", "dim", "images", "level")} | {"averaged": ratio, "one_draw": one}
                for row, ratio, one in zip(own, ratios, drawn, strict=True)
            ]
            bound, first = theory.cramer_rao(self.weight, norm), min(limits)
            best = min(limits, key=lambda t: limits[t][0])
            said.append(
                f"One noise level alone, |mu| = {norm:g}: the best of these is t = {best:g}, where |mu_t| = "
                f"{norm * math.exp(-best):.2f} and the formula is {limits[best][0] / bound:.2f} times the Cramér-Rao "
                f"bound; at t = {first:g} it is {limits[first][0] / bound:.1f} times, and with one noise per image "
                f"kept {limits[first][1] / bound:.0f} times. Measured over formula: {min(ratios):.2f} to "
                f"{max(ratios):.2f} with averaged noise, {min(drawn):.2f} to {max(drawn):.2f} with one draw."
            )
        return said

    def _by_dim(self, rows: Sequence[Row]) -> list[tuple[int, float, float]]:
        """(d, n times the error, standard error), averaged over the numbers of images."""
        points = []
        for dim in self.dims:
            own = [_scaled(row, "trained") for row in where(rows, dim=dim)]
            if own:
                error = math.sqrt(sum(e**2 for _, e in own)) / len(own)
                points.append((dim, fmean(value for value, _ in own), error))
        return points

    # --- tables ----------------------------------------------------------------------------------------------------

    def _whole_table(self, rows: Sequence[Row]) -> Table:
        columns = (
            *("|mu|", "d", "n", "DDPM, trained", "its limit (7.3)", "max. likelihood", "Cramér-Rao (6.3)"),
            *("projection", "formula (5.3)", "whole mean (5.1)", "DDPM to ML / ML to truth"),
        )
        entries: list[Sequence[Entry]] = []
        for row in rows:
            norm, dim = row["norm"], row["dim"]
            trained, likeliest, projected = (_text(row, name) for name in ("trained", "likeliest", "projection"))
            entries.append(
                [
                    *(norm, dim, row["images"], trained, self._expected(norm), likeliest),
                    *(theory.cramer_rao(self.weight, norm), projected, theory.projection_variance(self.weight, norm)),
                    *(theory.mean_vector_bound(self.weight, norm, dim), row["apart"]),
                ]
            )
        note = (
            f"n times the mean squared error over {self.repeats} clients ± one standard error, all noise levels, "
            f"w = {self.weight:g}. The projection and its formula, and the error of the whole mean, are those at t = 0."
        )
        return Table("All noise levels together", columns, entries, note)

    def _level_table(self, rows: Sequence[Row]) -> Table:
        columns = (
            *("|mu|", "d", "n", "t", "|mu_t|", "noise averaged", "limit (7.3)", "one draw", "limit (7.3) "),
            *("projection of x_t", "(5.3) (i)", "of the target", "(5.3) (ii)"),
        )
        entries: list[Sequence[Entry]] = []
        for row in rows:
            norm, t = row["norm"], row["level"]
            signal, sigma = theory.signal_and_sigma(t)
            averaged, one_draw = theory.sandwich(self.weight, norm, *_one(t))
            noised, of_target = (theory.projection_variance(self.weight, part * norm) for part in (signal, sigma))
            entries.append(
                [
                    *(norm, row["dim"], row["images"], t, signal * norm, _text(row, "averaged"), averaged),
                    *(_text(row, "one_draw"), one_draw, _text(row, "noised_projection"), noised),
                    *(_text(row, "target_projection"), of_target),
                ]
            )
        note = "As above. The limits are for many images: with fewer, w_hat may end at 0 or 1, which bounds its error."
        return Table("One noise level alone", columns, entries, note)

    # --- charts ----------------------------------------------------------------------------------------------------

    def _images_chart(self, rows: Sequence[Row]) -> Chart:
        norm = self.norms[0]
        ends = torch.tensor([min(self.images), max(self.images)]).double()

        def draw(axes: Axes) -> None:
            for dim in self.dims:
                bound = theory.mean_vector_bound(self.weight, norm, dim)
                axes.plot(ends, bound / ends, color=COLOURS["before"], linestyle=(0, (1, 1.5)), linewidth=1.4)
                axes.annotate(
                    f"d = {dim}", (ends[1], bound / ends[1]), (4, -3), textcoords="offset points", fontsize=8,
                    color=COLOURS["before"],
                )  # fmt: skip
            axes.plot([], [], color=COLOURS["before"], linestyle=(0, (1, 1.5)), label="whole mean, by d (5.1)")
            projected, least = theory.projection_variance(self.weight, norm), theory.cramer_rao(self.weight, norm)
            axes.plot(ends, projected / ends, color=COLOURS["up"], linestyle=(0, (4, 2)), label="projection (5.3)")
            axes.plot(ends, least / ends, color=COLOURS["ink"], linewidth=1.2, label="Cramér-Rao (6.3)")
            for place, dim in enumerate(self.dims):
                own = where(rows, norm=norm, dim=dim)
                axes.plot(
                    [row["images"] for row in own],
                    [row["trained"]["mse"] for row in own],
                    MARKERS[place % len(MARKERS)],
                    color=COLOURS["after"],
                    fillstyle="none",
                    markersize=5 + 2 * place,
                    label=f"DDPM, d = {dim}",
                )
            axes.set(xlabel="images of a client", title="Mean squared error of the weight", yscale="log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            logarithmic_x(axes, self.images)
            axes.margins(x=0.12)
            axes.legend(loc="lower left", fontsize=8)

        drawing = chart("images", 6.4, 4.6, draw, "Mean squared error of the weight against the number of images")
        caption = (
            f"|mu| = {norm:g}, w = {self.weight:g}, {self.repeats} clients a point. One shape of marker for "
            "each dimension; one dotted line for each, the error of the whole mean."
        )
        return Chart("images", drawing, caption)

    def _dims_chart(self, rows: Sequence[Row]) -> Chart:
        norm = self.norms[0]
        points = self._by_dim(where(rows, norm=norm))

        def draw(axes: Axes) -> None:
            bounds = [theory.mean_vector_bound(self.weight, norm, dim) for dim in self.dims]
            axes.plot(self.dims, bounds, color=COLOURS["before"], linestyle=(0, (1, 1.5)), label="whole mean (5.1)")
            _bounds(axes, self.weight, norm)
            dims, values, errors = zip(*points, strict=True)
            bars = [2 * error for error in errors]
            axes.errorbar(dims, values, bars, fmt="o", color=COLOURS["after"], markersize=5, label="DDPM, trained")
            axes.set(xlabel="dimensions", title="n times the mean squared error")
            logarithmic_x(axes, self.dims)
            logarithmic(axes)
            axes.legend(loc="upper left")

        drawing = chart("dims", 5.0, 3.6, draw, "Error of the weight against the dimension")
        caption = "Averaged over the numbers of images; bars, where they show, are two standard errors."
        return Chart("dims", drawing, caption)

    def _norms_chart(self, rows: Sequence[Row]) -> Chart:
        dim = self.dims[0]
        own = where(rows, dim=dim, images=self.images[0])
        fine = torch.linspace(min(self.norms), max(self.norms), 60).tolist()

        def draw(axes: Axes) -> None:
            lines: list[tuple[str, str, Any, Callable[[float], float]]] = [
                (
                    f"whole mean, d = {dim} (5.1)",
                    "before",
                    (0, (1, 1.5)),
                    lambda a: theory.mean_vector_bound(w, a, dim),
                ),
                ("projection (5.3)", "up", (0, (4, 2)), lambda a: theory.projection_variance(w, a)),
                ("Cramér-Rao (6.3)", "ink", "-", lambda a: theory.cramer_rao(w, a)),
                ("labels known", "real", "-", lambda a: w * (1 - w)),
            ]
            for label, tone, style, line in lines:
                axes.plot(fine, [line(a) for a in fine], color=COLOURS[tone], linestyle=style, label=label)
            for name, tone, marker, label in (
                ("projection", "up", "s", "projection"),
                ("trained", "after", "o", "DDPM, trained"),
            ):
                values, errors = zip(*(_scaled(row, name) for row in own), strict=True)
                at, bars = [row["norm"] for row in own], [2 * error for error in errors]
                axes.errorbar(at, values, bars, fmt=marker, color=COLOURS[tone], markersize=5, label=label)
            axes.set(xlabel="|mu|, half the distance of the means", title="n times the mean squared error")
            logarithmic(axes)
            axes.legend(loc="upper right", fontsize=8)

        w = self.weight
        drawing = chart("norms", 6.0, 4.2, draw, "Error of the weight against the separation")
        caption = (
            f"w = {w:g}, d = {dim}, n = {self.images[0]}; bars are two standard errors over {self.repeats} clients."
        )
        return Chart("norms", drawing, caption)

    def _level_chart(self, rows: Sequence[Row]) -> Chart:
        norm = rows[0]["norm"]
        fine = torch.logspace(math.log10(min(self.times)), math.log10(max(self.times)), 50).tolist()
        series = (
            ("averaged", 0, "after", "o", "noise averaged"),
            ("one_draw", 1, "before", "s", "one noise per image"),
        )

        def draw(axes: Axes) -> None:
            limits = [theory.sandwich(self.weight, norm, *_one(t)) for t in fine]
            for name, which, tone, marker, label in series:
                axes.plot(fine, [limit[which] for limit in limits], color=COLOURS[tone], label=f"{label}, limit (7.3)")
                values, errors = zip(*(_scaled(row, name) for row in rows), strict=True)
                bars = [2 * error for error in errors]
                at = [row["level"] for row in rows]
                axes.errorbar(
                    at, values, bars, fmt=marker, color=COLOURS[tone], markersize=5, label=f"{label}, trained"
                )
            _bounds(axes, self.weight, norm)
            axes.set(xlabel="time t of the noise level", title=f"n times the mean squared error, |mu| = {norm:g}")
            logarithmic_x(axes, [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5) if fine[0] <= t <= fine[-1]])
            logarithmic(axes)
            axes.legend(loc="upper right", fontsize=8)

        drawing = chart(f"levels-{norm:g}", 5.6, 4.2, draw, f"Error of the weight by noise level, |mu| {norm:g}")
        caption = (
            f"One noise level alone, d = {rows[0]['dim']}, n = {rows[0]['images']}, w = {self.weight:g}. Little noise "
            "tells nothing about the weight, much noise leaves the mean; between them the modes merge."
        )
        return Chart(f"levels-{norm:g}", drawing, caption)


# --- pieces --------------------------------------------------------------------------------------------------------


def _in_blocks(draw: Callable[[int], Tensor], repeats: int, images: int, mu: Tensor) -> Tensor:
    """Coordinates along mu of repeats x images vectors, which are never all in memory at once."""
    at_once = max(1, BLOCK // (images * len(mu)))
    counts = [min(at_once, repeats - start) for start in range(0, repeats, at_once)]
    return torch.cat([theory.along(draw(count * images), mu).view(count, images) for count in counts])


def _one(t: float) -> tuple[Tensor, Tensor]:
    return torch.tensor([t]).double(), torch.ones(1).double()


def _scaled(row: Row, name: str) -> tuple[float, float]:
    """n times the mean squared error, and its standard error."""
    return row["images"] * row[name]["mse"], row["images"] * row[name]["error"]


def _text(row: Row, name: str) -> str:
    value, error = _scaled(row, name)
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _slope(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Slope of log y against log x and its standard error, from (x, y, standard error of y)."""
    x, y, errors = zip(*points, strict=True)
    logs = [math.log(value) for value in x]
    centred = [value - fmean(logs) for value in logs]
    total = sum(c**2 for c in centred)
    error = math.sqrt(sum((c / total * e / value) ** 2 for c, value, e in zip(centred, y, errors, strict=True)))
    return log_slope(x, y), error


def _bounds(axes: Axes, w: float, norm: float) -> None:
    projected, least = theory.projection_variance(w, norm), theory.cramer_rao(w, norm)
    axes.axhline(projected, color=COLOURS["up"], linestyle=(0, (4, 2)), linewidth=1.4, label="projection (5.3)")
    axes.axhline(least, color=COLOURS["ink"], linewidth=1.2, label="Cramér-Rao (6.3)")
