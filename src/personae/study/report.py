"""The report of a study: findings first, then charts, tables and how it was made. One HTML file."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from personae.artefact.save import read_json, write_bytes
from personae.evaluate.charts import COLOURS
from personae.evaluate.report import page_of
from personae.study.config import StudyRecipe
from personae.study.study import Answer, Entry, Picture, Table

NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
"""A page of HTML knows them; a file must say them."""

TEMPLATES = Path(__file__).parent / "templates"


def write_study_report(folder: Path, recipe: StudyRecipe, answer: Answer, done: int, cells: int, cpu: float) -> Path:
    """charts/*.svg and report.html, from what a study found so far."""
    (folder / "charts").mkdir(exist_ok=True)
    for chart in answer.charts:
        write_bytes(folder / "charts" / f"{chart.name}.svg", standalone(chart.drawing).encode())
    contents = {
        "recipe": recipe,
        "answer": answer,
        "tables": [(table, [[shown(entry) for entry in row] for row in table.rows]) for table in answer.tables],
        "pictures": [(picture, _data(folder, picture)) for picture in answer.pictures],
        "done": done,
        "cells": cells,
        "cpu_minutes": cpu / 60,
        "config": (folder / "config.toml").read_text("utf-8"),
        "environment": _environment(folder),
    }
    write_bytes(folder / "report.html", page_of("study.html.j2", contents, TEMPLATES).encode())
    return folder / "report.html"


def markdown(table: Table) -> str:
    """The table for a page of the documentation."""
    return "\n".join([*markdown_rows(table.columns, table.rows), *(["", table.note] if table.note else [])])


def markdown_rows(heads: Sequence[str], rows: Sequence[Sequence[Entry]]) -> list[str]:
    """Lines of a table; a bar inside a cell, as in |mu|, is written so that it does not end the cell."""
    lines = [heads, ["---"] * len(heads), *([shown(entry) for entry in row] for row in rows)]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def shown(entry: Entry) -> str:
    """Numbers with four digits that matter; nothing for what was not measured."""
    if entry is None or (isinstance(entry, float) and math.isnan(entry)):
        return ""
    if isinstance(entry, float):
        return f"{entry:.0f}" if abs(entry) >= 10_000 else f"{entry:.4g}"
    return str(entry)


def standalone(markup: Markup) -> str:
    """An SVG file of its own: with the colours that its page would bring, and a white ground."""
    drawing = str(markup)  # as Markup, what is put in would be escaped
    for name, code in COLOURS.items():
        drawing = drawing.replace(f"var(--{name})", code)
    return drawing.replace("<svg ", f"<svg {NAMESPACES} ", 1).replace("max-width", "background: white; max-width", 1)


def _data(folder: Path, picture: Picture) -> str:
    return base64.b64encode((folder / picture.path).read_bytes()).decode()


def _environment(folder: Path) -> Sequence[tuple[str, Any]]:
    about = read_json(folder / "environment.json")
    return [*about["versions"].items(), *((k, v) for k, v in about.items() if k != "versions" and v != "")]
