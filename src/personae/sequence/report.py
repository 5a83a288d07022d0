"""The report of a model that learns concept after concept: what it still knows, and what each concept cost."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from personae.artefact.save import read_json, write_bytes, write_json
from personae.continual.contract import Continual
from personae.evaluate.forgetting import Forgetting, forgetting
from personae.evaluate.matrix_chart import matrix_chart
from personae.evaluate.report import page_of
from personae.sequence.config import SequenceRecipe, method_name

TEMPLATES = Path(__file__).parent / "templates"

Matrix = list[list[float | None]]


def write_sequence_report(
    folder: Path, recipe: SequenceRecipe, method: Continual, events: Sequence[Mapping[str, Any]]
) -> Path:
    """summary.json and report.html, from what happened so far."""
    learned = [event for event in events if event["event"] == "learn"]
    gone = {event["concept"]: event["remains"] for event in events if event["event"] == "forget"}
    names = [event["concept"] for event in learned]
    losses, taken = losses_of(learned), right_of(learned)
    gains = gains_of(learned)
    measured = _measured(gains)
    summary = {
        "name": recipe.name,
        "model": recipe.model,
        "method": method_name(method),
        "seed": recipe.seed,
        "concepts": names,
        "forgotten": sorted(gone),
        "losses": losses,
        "gains": gains,
        "taken_for_itself": taken,
        "drift": [event["drift"] for event in learned],
        "bytes": [event["bytes"] for event in learned],
        "seconds": [event["seconds"] for event in learned],
        "forgetting": None if measured is None else vars(measured),
    }
    write_json(folder / "summary.json", summary)
    contents = {
        "recipe": recipe,
        "method": method_name(method),
        "about": str(type(method).__doc__).split("\n\n")[0],
        "learned": learned,
        "gone": gone,
        "measured": measured,
        "gain_chart": matrix_chart("gain", "Gain in held-out loss", names, gains, digits=3) if names else None,
        "taken_chart": matrix_chart("taken", "Taken for itself", names, taken, span=(0, 1)) if names else None,
        "grid": _grid(folder, names),
        "config": (folder / "config.toml").read_text("utf-8"),
        "environment": _environment(folder),
    }
    write_bytes(folder / "report.html", page_of("sequence.html.j2", contents, TEMPLATES).encode())
    return folder / "report.html"


def losses_of(learned: Sequence[Mapping[str, Any]]) -> Matrix:
    """Held-out loss of every concept (columns) after every concept (rows); None where it was not measured."""
    return _matrix(learned, lambda name, score: float(score["loss"]))


def gains_of(learned: Sequence[Mapping[str, Any]]) -> Matrix:
    """By how much these losses are below the untaught model's, to which a concept's word is its noun."""
    untaught = [event["untaught"] for event in learned]
    return [
        [None if loss is None else before - loss for before, loss in zip(untaught, row, strict=True)]
        for row in losses_of(learned)
    ]


def right_of(learned: Sequence[Mapping[str, Any]]) -> Matrix:
    """The share of a concept's held-out pictures that diffusion-classifier scores take for that concept."""
    return _matrix(learned, lambda name, score: score["taken"][name] / sum(score["taken"].values()))


def _matrix(learned: Sequence[Mapping[str, Any]], value: Any) -> Matrix:
    names = [event["concept"] for event in learned]
    return [
        [value(name, event["scores"][name]) if name in event["scores"] else None for name in names] for event in learned
    ]


def _measured(scores: Matrix) -> Forgetting | None:
    """None where an entry is missing: somebody's pictures were gone, or a concept was."""
    whole = all(row[at] is not None for number, row in enumerate(scores) for at in range(number + 1))
    return forgetting(scores) if scores and whole else None


def _grid(folder: Path, names: Sequence[str]) -> list[tuple[str, list[str | None]]]:
    """Concepts down, moments across: a strip of pictures each, as data of PNG files."""
    return [(name, [_picture(folder / "samples" / moment / f"{name}.png") for moment in names]) for name in names]


def _picture(path: Path) -> str | None:
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else None


def _environment(folder: Path) -> Sequence[tuple[str, Any]]:
    path = folder / "environment.json"
    about = read_json(path) if path.is_file() else {"versions": {}}
    return [*about["versions"].items(), *((k, v) for k, v in about.items() if k != "versions" and v != "")]
