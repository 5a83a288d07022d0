"""What one client's part of a text-to-image model gives, and what it costs: adapters, words, vectors, side by side.

A client has a few pictures of one subject: a style that the model never saw, or a drawn person. A part is trained on
them at several learning rates; the one with the lowest loss on the client's own held-out pictures counts. Measured on
other pictures than those: is the subject recognised in what is drawn, does the model still draw other things as before,
how many bytes is the part, how long did it take.

"shared": what a part needs that is trained on public styles, once. "base": the model alone. "part": everything else.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from torch import Tensor

from personae.backbone.shipped import model_folder
from personae.core import ClientData, Images, State, stream
from personae.data.emoji import SEEN_STYLES, STYLES, WITHOUT_STYLE, caption, named, pack
from personae.data.identities import identity
from personae.engine.in_process import personalize_one
from personae.errors import ConfigError
from personae.evaluate.charts import COLOURS, chart
from personae.evaluate.grids import save_grid
from personae.evaluate.loss import denoising_loss
from personae.evaluate.text2image import StyleProbe, fit_style_probe, nearest_name
from personae.evaluate.text2image_features import renderings, statistics
from personae.evaluate.text2image_subject import copying, drift, score_subjects
from personae.infer.sample import draw
from personae.recipe import personal
from personae.recipe.build import Clients, build_job
from personae.recipe.models import Model, build_denoiser
from personae.recipe.schema import Recipe
from personae.recipe.workflow import open_run
from personae.study.bench import adapting, trained
from personae.study.study import Answer, Cell, Chart, Entry, Picture, Row, Table, file_name, where

NAME = "own"
WORD = f"<{NAME}>"

OTHER_PERSONS = 7
"""Whom a drawn person is told apart from."""

REFERENCES = 16
"""Pictures of every person that nobody trains on."""

HELD_OUT = 4
"""Of a client's pictures, to choose the learning rate by."""


@dataclass(frozen=True)
class Subject:
    """What a client has `images` pictures of: things in one style, or one person, by the number, in a drawn style."""

    name: str
    kind: Literal["style", "identity"]
    style: str
    person: int = 0
    images: int = 12


@dataclass(frozen=True)
class Part:
    """`method` as in `personae personalize`, with changes "key=value" of its recipe; or `shared`, the recipe of a run
    that is trained first, with these changes, whose method then personalizes."""

    name: str
    rates: tuple[float, ...]
    method: personal.Part = "lora"
    changes: tuple[str, ...] = ()
    shared: str | None = None

    def __post_init__(self) -> None:
        if not self.rates or not all(rate > 0 for rate in self.rates):
            raise ConfigError(f"part {self.name!r}: rates are {list(self.rates)}, expected one or more above 0")


@dataclass(frozen=True)
class Parts:
    """`model` is a pipeline's folder, or the name of one that is shipped.

    `steps` of training of `batch_size` pictures for everybody; `num_drawn` pictures of the subject and `num_unrelated`
    of other things are drawn by every part, in `sampler_steps` of DPM-Solver++."""

    model: str
    subjects: tuple[Subject, ...]
    parts: tuple[Part, ...]
    seeds: tuple[int, ...] = (0,)
    steps: int = 400
    num_drawn: int = 64
    num_unrelated: int = 48
    sampler_steps: int = 20
    batch_size: int = 4

    def __post_init__(self) -> None:
        for what, names in (("subjects", [s.name for s in self.subjects]), ("parts", [p.name for p in self.parts])):
            if not names or len(set(names)) < len(names):
                raise ConfigError(f"{what} are {names}, expected one or more, each with a name of its own")
        if not self.seeds or min(self.steps, self.batch_size, self.num_drawn - 1, self.num_unrelated - 1) < 1:
            raise ConfigError("seeds, at least 1 step of 1 picture, and 2 drawn pictures of each kind are needed")
        for subject in self.subjects:
            if subject.kind == "style" and subject.style not in STYLES:
                raise ConfigError(f"subject {subject.name!r}: style {subject.style!r} is none of {', '.join(STYLES)}")
            if subject.images <= HELD_OUT:
                raise ConfigError(f"subject {subject.name!r}: {subject.images} images, expected more than {HELD_OUT}")

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        shared: list[dict[str, Any]] = [
            {"stage": "shared", "part": part.name, "seed": seed}
            for seed in self.seeds
            for part in self.parts
            if part.shared is not None
        ]
        if len(where(found, stage="shared")) < len(shared):
            return shared
        both = [(seed, subject.name) for seed in self.seeds for subject in self.subjects]
        base = [{"stage": "base", "subject": subject, "seed": seed} for seed, subject in both]
        own = [
            {"stage": "part", "part": part.name, "subject": subject, "rate": rate, "seed": seed}
            for seed, subject in both
            for part in self.parts
            for rate in part.rates
        ]
        return [*shared, *base, *own]

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        seed += int(cell["seed"])
        part = next((part for part in self.parts if part.name == cell.get("part")), None)
        if cell["stage"] == "shared" and part is not None:
            run = trained(_run(folder, part, cell), str(part.shared), [*self._on_model(), *part.changes], seed)
            return {"seconds": run.summary["wall_seconds"], "bytes": run.released.num_bytes()}
        subject = next(subject for subject in self.subjects if subject.name == cell["subject"])
        own = pictures_of(subject, seed, part is not None and "tokens" in part.method and part.shared is None)
        if part is None:
            model: Model = build_denoiser(self._recipe(None, 1.0), _shape(own.data))
            figures: dict[str, Any] = {"loss": denoising_loss(model, own.data.heldout, draws=4, seed=seed)}
        else:
            model, figures = self._personalized(part, float(cell["rate"]), own.data, seed, folder, cell)
        return {**figures, **self._scores(model, subject, own, seed, folder, cell)}

    # --- the pieces of a measurement ---------------------------------------------------------------------------------

    def _on_model(self) -> list[str]:
        return [f"backbone.folder={self.model}"]

    def _recipe(self, part: Part | None, rate: float) -> Recipe:
        method = "lora" if part is None else part.method
        changes = [f"method.training.lr={rate}", f"method.adapt.lr={rate}", f"method.adapt.steps={self.steps}"]
        changes += [f"method.{stage}.batch_size={self.batch_size}" for stage in ("training", "adapt")]
        changes += [f"machine.threads={torch.get_num_threads()}", *(() if part is None else part.changes)]
        return personal.personal_recipe(Path(self.model), Path("."), method, "person", name=NAME, overrides=changes)

    def _personalized(
        self, part: Part, rate: float, data: ClientData, seed: int, folder: Path, cell: Cell
    ) -> tuple[Model, dict[str, Any]]:
        if part.shared is None:
            recipe, released = self._recipe(part, rate), State()
        else:
            run = open_run(_run(folder, part, cell))
            told = {"lr": rate, "steps": self.steps, "batch_size": self.batch_size}
            how = dataclasses.replace(run.recipe.method.adapt, **told)  # type: ignore[attr-defined]
            recipe = dataclasses.replace(run.recipe, method=adapting(run.recipe.method, how))
            released = run.released
        recipe = dataclasses.replace(recipe, seed=seed, engine="in_process", cohort=None)
        model = build_denoiser(recipe, _shape(data))
        started = time.process_time()
        job = build_job(recipe, Clients({NAME: data}, (NAME,), (), ()), model, None)
        state = personalize_one(job, released, State(), NAME)
        seconds = time.process_time() - started
        model.load({**released.params, **state.params})
        loss = denoising_loss(model, data.heldout, draws=4, seed=seed)
        moved = {name: value for name, value in state.params.items() if not name.startswith("null_embedding.")}
        bytes_ = sum(value.numel() * value.element_size() for value in moved.values())
        numbers = sum(value.numel() for value in moved.values())
        return model, {"loss": loss, "numbers": numbers, "bytes": bytes_, "seconds": seconds}

    def _scores(self, model: Model, subject: Subject, own: Own, seed: int, folder: Path, cell: Cell) -> dict[str, Any]:
        told = [own.captions[at % len(own.captions)] for at in range(self.num_drawn)]
        drawn = draw(model, told, stream(seed, "drawn", subject.name), steps=self.sampler_steps)
        base = _of_base(self.model, self.num_unrelated, self.sampler_steps, seed)
        unrelated = _unrelated(self.num_unrelated, seed)
        strange = draw(model, unrelated, stream(seed, "unrelated"), steps=self.sampler_steps)
        found = drift(base, strange, statistics())
        copied = copying(drawn, own.data.train.pixels, own.data.heldout.pixels)
        figures: dict[str, Any] = {
            "drift": found.features.mean,
            "drift_pixels": found.pixels.mean,
            "copy": copied.copy_ratio,
        }
        if subject.kind == "style":
            styles, names = [subject.style] * len(drawn), [own.names[at % len(own.names)] for at in range(len(drawn))]
            score = _probe().score(drawn, styles)
            content = nearest_name(drawn, names, styles)
            figures |= {"found": score.drawn.overall.share, "found_real": score.real.by_style[subject.style].share}
            figures |= {"named": content.drawn.top_1.share, "named_real": content.worn.top_1.share}
        else:
            likeness = score_subjects({subject.name: drawn}, _persons(subject), statistics())[subject.name]
            figures |= {"found": likeness.drawn.nearest.share, "found_real": likeness.real.nearest.share}
            figures |= {"margin": likeness.drawn.margin.mean, "margin_real": likeness.real.margin.mean}
        (folder / "pictures").mkdir(exist_ok=True)
        name = file_name(*(str(cell[key]) for key in ("part", "subject", "rate", "seed") if key in cell))
        save_grid(folder / "pictures" / f"{name}.png", torch.cat([drawn[:8], strange[:8]]), columns=8)
        return figures | {"picture": f"pictures/{name}.png"}

    # --- the answer --------------------------------------------------------------------------------------------------

    def answer(self, found: Sequence[Row]) -> Answer:
        tables, charts, pictures, findings, numbers = [], [], [], [], []
        for subject in self.subjects:
            rows = [row for row in [_mean(where(found, stage="base", subject=subject.name), "the model alone")] if row]
            for part in self.parts:
                if best := self._best(found, part, subject):
                    rows.append(_mean(best, part.name))
                    pictures.append(
                        Picture(best[0]["picture"], f"{subject.name}, {part.name}: the subject, other things.")
                    )
            if len(rows) > 1:
                base = rows[0]
                numbers += [{"subject": subject.name, **row} for row in rows]
                tables.append(_table(subject, rows))
                charts.append(_chart(subject, rows[1:], base))
                winner = max(rows[1:], key=lambda row: row["found"])
                findings.append(
                    f"{subject.name}: recognised in {base['found']:.0%} of what the model alone draws, in "
                    f"{winner['found']:.0%} with {winner['name']} ({winner['bytes']:,.0f} bytes, drift "
                    f"{winner['drift']:.2f}), the most of {len(rows) - 1} parts; real pictures: "
                    f"{winner['found_real']:.0%}, chance: {1 / _num_candidates(subject):.0%}."
                )
                if "margin" in base:
                    likest = max(rows[1:], key=lambda row: row["margin"])
                    findings.append(
                        f"{subject.name}: likeness to the person, less that to others, goes from {base['margin']:.2f} "
                        f"to {likest['margin']:.2f} with {likest['name']} ({likest['bytes']:,.0f} bytes, drift "
                        f"{likest['drift']:.2f}); real pictures: {base['margin_real']:.2f}."
                    )
                nearest = min(rows[1:], key=lambda row: row["loss"])
                findings.append(
                    f"{subject.name}: the loss on pictures held out goes from {base['loss']:.2f} to "
                    f"{nearest['loss']:.2f} with {nearest['name']} ({nearest['bytes']:,.0f} bytes, drift "
                    f"{nearest['drift']:.2f}); by it the rates were chosen."
                )
        return Answer(findings, {"rows": numbers}, tables, charts, pictures)

    def _best(self, found: Sequence[Row], part: Part, subject: Subject) -> Sequence[Row]:
        """The rows of all seeds at the rate with the lowest mean loss on held-out pictures."""
        by_rate = {
            rate: where(found, stage="part", part=part.name, subject=subject.name, rate=rate) for rate in part.rates
        }
        whole = {rate: rows for rate, rows in by_rate.items() if len(rows) == len(self.seeds)}
        return min(whole.values(), key=lambda rows: fmean(row["loss"] for row in rows), default=())


# --- a client's pictures ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Own:
    """A client's images, and the captions of what is drawn to judge its part; of a style also the names in them."""

    data: ClientData
    captions: tuple[str, ...]
    names: tuple[str, ...] = ()


def pictures_of(subject: Subject, seed: int, with_word: bool) -> Own:
    """`with_word` says the subject by WORD; without it, captions leave open what is particular."""
    if subject.kind == "style":
        order = torch.randperm(len(named("common")), generator=stream(seed, "names", subject.name)).tolist()
        names = [named("common")[at] for at in order]
        said = f"a {WORD} drawing of {{thing}}" if with_word else WITHOUT_STYLE
        texts = [said.format(thing=pack().things[name].phrase) for name in names]
        images = Images(renderings(subject.style, names[: subject.images]), captions=tuple(texts[: subject.images]))
        return Own(_split(images), tuple(texts[subject.images :]), tuple(names[subject.images :]))
    said = f"a drawing of {WORD}" if with_word else "a drawing of a person"
    pixels = identity(subject.style, subject.person, subject.images).images.pixels
    return Own(_split(Images(pixels, captions=(said,) * len(pixels))), (said,))


def _split(images: Images) -> ClientData:
    numbers = torch.arange(len(images))
    return ClientData(images[numbers[:-HELD_OUT]], images[numbers[-HELD_OUT:]])


@lru_cache(maxsize=4)
def _persons(subject: Subject) -> Mapping[str, Tensor]:
    """Pictures that nobody trained on: of the subject, its later ones, and of other persons in the same style."""
    others = range(subject.person + 1, subject.person + 1 + OTHER_PERSONS)
    references = {f"person {n}": identity(subject.style, n, REFERENCES).images.pixels for n in others}
    own = identity(subject.style, subject.person, subject.images + REFERENCES).images.pixels
    return {subject.name: own[subject.images :], **references}


@lru_cache(maxsize=1)
def _probe() -> StyleProbe:
    return fit_style_probe(STYLES)


# --- drawing ---------------------------------------------------------------------------------------------------------


def _unrelated(count: int, seed: int) -> list[str]:
    """Captions of common things in seen styles."""
    names = named("common")
    order = torch.randperm(len(names), generator=stream(seed, "unrelated names"))[:count].tolist()
    return [caption(SEEN_STYLES[at % len(SEEN_STYLES)], names[place]) for at, place in enumerate(order)]


@lru_cache(maxsize=4)
def _of_base(model: str, count: int, steps: int, seed: int) -> Tensor:
    from personae.backbone.pipeline import open_pipeline

    return draw(open_pipeline(model_folder(model)), _unrelated(count, seed), stream(seed, "unrelated"), steps=steps)


def _shape(data: ClientData) -> tuple[int, ...]:
    return tuple(data.train.pixels.shape[1:])


def _run(folder: Path, part: Part, cell: Cell) -> Path:
    return folder / "runs" / f"{part.name}-{cell['seed']}"


# --- tables and charts ------------------------------------------------------------------------------------------------

COLUMNS = {
    "found": "recognised",
    "found_real": "real pictures",
    "named": "named",
    "named_real": "real pictures: named",
    "margin": "likeness, less others'",
    "margin_real": "that of real pictures",
    "drift": "drift",
    "copy": "copy ratio",
    "loss": "held-out loss",
    "bytes": "bytes",
    "seconds": "seconds",
    "rate": "learning rate",
}


def _mean(rows: Sequence[Row], name: str) -> dict[str, Any]:
    """Over seeds; empty without rows."""
    keys = [key for key in COLUMNS if rows and rows[0].get(key) is not None]
    return {"name": name, **{key: fmean(row[key] for row in rows) for key in keys}} if rows else {}


def _num_candidates(subject: Subject) -> int:
    """Among how many a picture is recognised."""
    return len(STYLES) if subject.kind == "style" else OTHER_PERSONS + 1


def _table(subject: Subject, rows: Sequence[Mapping[str, Any]]) -> Table:
    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    entries: list[list[Entry]] = [[row["name"], *(row.get(key) for key in keys)] for row in rows]
    what = f"{_num_candidates(subject)} {'styles' if subject.kind == 'style' else 'persons'}"
    note = (
        f"Recognised: share of drawn pictures that a probe takes for the subject among {what}. Drift: how far pictures "
        "of other things moved, 1 being the distance between two of them. Bytes of the part alone, in float32; seconds "
        "of one processor."
    )
    return Table(subject.name, ("part", *(COLUMNS[key] for key in keys)), entries, note)


def _chart(subject: Subject, rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> Chart:
    lines = sorted(rows, key=lambda row: row["bytes"])
    key, what = ("found", "recognised") if subject.kind == "style" else ("margin", "likeness, less others'")

    def draw(axes: Axes) -> None:
        places = range(len(lines))
        axes.plot([row[key] for row in lines], places, "o", color=COLOURS["after"], markersize=7, label=what)
        axes.plot([row["drift"] for row in lines], places, "s", color=COLOURS["down"], markersize=5, label="drift")
        for each, tone, style, whose in ((key, "before", "--", "model alone"), (f"{key}_real", "real", ":", "real")):
            axes.axvline(base[each], color=COLOURS[tone], linewidth=1, linestyle=style, label=f"{what}: {whose}")
        axes.set_yticks(places, [f"{row['name']}, {row['bytes']:,.0f} bytes" for row in lines])
        axes.set(title=subject.name, ylim=(-0.6, len(lines) - 0.4))
        axes.set_xlim(left=min(-0.03, axes.get_xlim()[0]))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    height = 1.2 + 0.34 * len(lines)
    drawing = chart(f"parts-{subject.name}", 6.6, height, draw, f"what parts give for {subject.name}")
    return Chart(
        file_name(subject.name), drawing, "Small parts below. To the right is better for dots and worse for squares."
    )
