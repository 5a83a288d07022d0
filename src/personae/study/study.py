"""A study: one question, answered by many small measurements that do not depend on each other's order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from markupsafe import Markup

Cell = Mapping[str, int | float | str | bool]
"""The settings of one measurement; they are its name."""

Row = Mapping[str, Any]
"""A cell's settings, and beside them what was measured."""

Entry = int | float | str | None


@dataclass(frozen=True)
class Table:
    """`rows` have one entry per column; None was not measured. `note` says what a reader must know."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing by `evaluate.charts.chart`, saved as charts/<name>.svg, and what it shows."""

    name: str
    drawing: Markup
    caption: str


@dataclass(frozen=True)
class Picture:
    """A grid of images in the study's folder, a path to a PNG file relative to it."""

    path: str
    caption: str


@dataclass(frozen=True)
class Answer:
    """What a study found, as far as it has come.

    `findings` are sentences with their numbers; `numbers` go to summary.json, for tests and other programs.
    """

    findings: Sequence[str] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    pictures: Sequence[Picture] = ()


def joined(parts: Sequence[Answer]) -> Answer:
    """One answer of several, in their order."""
    return Answer(
        [finding for part in parts for finding in part.findings],
        {key: value for part in parts for key, value in part.numbers.items()},
        [table for part in parts for table in part.tables],
        [drawn for part in parts for drawn in part.charts],
        [picture for part in parts for picture in part.pictures],
    )


class Study(Protocol):
    """A frozen dataclass whose fields are the keys of a recipe's [settings] table."""

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        """Everything that is to be measured, as far as it is known from what was found so far.

        Asked again whenever all of it is there: what depends on earlier rows is added then. Never takes one back.
        """
        ...

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        """Figures of one cell, as JSON holds them.

        All draws come from `stream(seed, ...)`: a cell measured again, or in another order or process, gives the same.
        `folder` is the study's; what a cell leaves there, a trained model, later cells may read.
        """
        ...

    def answer(self, found: Sequence[Row]) -> Answer:
        """Tables, charts and sentences, in the order of `cells`; also of a study that is not finished."""
        ...


def where(found: Sequence[Row], **settings: Any) -> list[Row]:
    """The rows whose entries are these."""
    return [row for row in found if all(key in row and row[key] == value for key, value in settings.items())]


def file_name(*parts: str) -> str:
    """Without spaces and commas, which a link in a page does not survive."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts))
