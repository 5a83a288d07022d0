"""The report of a run: one HTML file that needs nothing beside it.

Reads summary.json, rounds.jsonl, config.toml, environment.json, samples/ and the last checkpoint of a run folder. No
model is loaded and nothing is measured here, so that a report can be written anew at any time; the same folder gives
the same bytes. Whatever a run does not have is left out. Wording and looks are in templates/report.html.j2, drawings in
charts.py.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch.nn.functional import normalize

from personae.aggregate.membership import NEWCOMER, groups_in
from personae.artefact.run_folder import RunFolder
from personae.artefact.save import FORMAT_VERSION, explained, read_json, write_bytes
from personae.errors import ArtefactError
from personae.evaluate.charts import (
    DOTS,
    Numbers,
    class_bars,
    dot_chart,
    group_map,
    known,
    known_values,
    loss_chart,
    traffic_chart,
    window,
)
from personae.methods.cluster_lora import SEEN

ALL_SHOWN = 30
"""Up to this many clients, everyone is shown; beyond, the first `SHOWN` by name of each role."""

SHOWN = 12


def write_report(folder: Path) -> Path:
    """Write report.html into a run folder that holds a summary.json, and return its path.

    Raises: ArtefactError, when the summary is missing, damaged or of another format version, or a file cannot be read.
    """
    path = folder / "summary.json"
    if not path.is_file():
        raise ArtefactError(f"{folder} holds no summary.json; measure the run first with: personae evaluate {folder}")
    summary = read_json(path)
    if not isinstance(summary, dict) or summary.get("format_version") != FORMAT_VERSION:
        found = summary.get("format_version") if isinstance(summary, dict) else "no version"
        raise ArtefactError(
            f"{path} has format version {found}, this version of personae reads {FORMAT_VERSION}; "
            "install the version that wrote it"
        )
    page = page_of("report.html.j2", _contents(folder, summary))
    write_bytes(folder / "report.html", page.encode())
    return folder / "report.html"


def page_of(template: str, contents: Mapping[str, Any], *folders: Path) -> str:
    """A page of one look; `template` is looked for in `folders` too. Every text is escaped."""
    templates = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent / "templates"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"number": number, "count": count, "size": size, "duration": duration, "percent": percent}
    return templates.get_template(template).render(contents)


def _contents(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the template names."""
    clients: dict[str, Numbers] = dict(sorted(summary.get("clients", {}).items()))
    train = {name: client for name, client in clients.items() if client.get("role") != "new"}
    new = {name: client for name, client in clients.items() if client.get("role") == "new"}
    shown = len(clients) if len(clients) <= ALL_SHOWN else SHOWN
    shown_train, shown_new = dict(list(train.items())[:shown]), dict(list(new.items())[:shown])
    rounds, pictures, names = _rounds(folder), _pictures(folder), summary.get("label_names") or []
    up_down = [(c.get("bytes_up", 0), c.get("bytes_down", 0)) for record in rounds for c in record["clients"].values()]
    environment = folder / "environment.json"
    return {
        "about": {
            key: summary.get(key)
            for key in (
                "recipe",
                "method",
                "engine",
                "seed",
                "rounds",
                "wall_seconds",
                "bytes_up",
                "bytes_down",
                "heldout_loss",
                "model_parameters",
            )
        },
        "num_train": len(train),
        "num_new": len(new),
        "not_shown": {"train": len(train) - len(shown_train), "new": len(new) - len(shown_new)},
        "typical": {
            "up": median(up for up, _ in up_down) if up_down else None,
            "down": median(down for _, down in up_down) if up_down else None,
            "new_down": _median(new, "bytes_down"),
            "new_trained": _median(new, "trained_parameters"),
            "new_file": _median(new, "personal_file_bytes"),
            "train_trained": _median(train, "trained_parameters"),
            "train_file": _median(train, "personal_file_bytes"),
        },
        "mean": {key: _mean_pair(new, key) for key in ("histogram_distance", "heldout_loss")},
        "new": [_card(name, client, pictures, names) for name, client in shown_new.items()],
        "train": [_card(name, client, pictures, names) for name, client in shown_train.items()],
        "previews": _previews(folder),
        "loss_chart": loss_chart(rounds),
        "smoothing": window(len(rounds)),
        "dot_charts": [
            chart for key, title in DOTS.items() if (chart := dot_chart(key, title, shown_new, shown_train))
        ],
        "traffic_chart": traffic_chart(rounds),
        "left_out": _left_out(rounds),
        "groups": _groups(folder),
        "rounds_bytes": {"up": sum(up for up, _ in up_down), "down": sum(down for _, down in up_down)},
        "table": _table(shown_train, shown_new, train, new),
        "stages": [(key.removesuffix("_seconds"), seconds) for key, seconds in (summary.get("stages") or {}).items()],
        "features": _flat(summary.get("features") or {}),
        "kid_features": sorted({str(c["kid_features"]) for c in clients.values() if c.get("kid_features")}),
        "versions": _flat(summary.get("versions") or {}),
        "environment": _flat(read_json(environment)) if environment.is_file() else [],
        "config": _text(folder / "config.toml"),
    }


def _groups(folder: Path) -> dict[str, Any] | None:
    """The map of groups and what the server found of newcomers, where a method groups its clients."""
    server = RunFolder(folder).server()
    groups = {} if server is None else groups_in(server.facts)
    if server is None or not groups:
        return None
    order = sorted(groups, key=lambda name: (groups[name], name))
    seen = normalize(torch.stack([server.extras[f"{SEEN}.{name}"] for name in order]), dim=1)
    late = [name for name in order if f"{NEWCOMER}likeness of {name}" in server.facts]
    return {
        "chart": group_map(order, [groups[name] for name in order], (seen @ seen.T).tolist()),
        "shares": [(number, server.facts.get(f"share {number}")) for number in sorted(set(groups.values()))],
        "members": {number: [n for n in order if groups[n] == number] for number in sorted(set(groups.values()))},
        "newcomers": [
            (name, groups[name], *(server.facts[f"{NEWCOMER}{what} of {name}"] for what in FOUND)) for name in late
        ],
    }


FOUND = ("round", "likeness", "redundancy")
"""What the server found of a newcomer: when it came, its cosine with the likest group, what no group had of it."""


# --- reading -----------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    with explained(path, "reading"):
        return path.read_text("utf-8")


def _rounds(folder: Path) -> list[dict[str, Any]]:
    """One record per round. A line that a kill cut short is left out, as a resume does."""
    records = []
    for line in _text(folder / "rounds.jsonl").splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def _left_out(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By client and kind of problem: how often, in which round first, and what was said then."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for record in rounds:
        for client, problem in record.get("refused", {}).items():
            kind, _, text = str(problem).partition(": ")
            row = found.setdefault((client, kind), {"client": client, "kind": kind, "times": 0})
            row.setdefault("first", record["round"])
            row.setdefault("text", text)
            row["times"] += 1
    return [found[key] for key in sorted(found)]


def _pictures(folder: Path) -> dict[str, dict[str, Any]]:
    """By file name, so that a client's name is only ever looked up and never opened as a path."""
    return {path.stem: _picture(path) for path in sorted((folder / "samples").glob("*.png")) if path.is_file()}


def _previews(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """By round."""
    found = sorted((folder / "previews").glob("*.png"))
    return [(int(path.stem), _picture(path)) for path in found if path.stem.isdecimal()]


def _picture(path: Path) -> dict[str, Any]:
    """A PNG as it is, and the size that it says it has. Raises: ArtefactError, when it is not a PNG."""
    with explained(path, "reading"):
        data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        raise ArtefactError(f"{path} is not a PNG or was cut short; remove it or draw the samples again")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    return {"data": base64.b64encode(data).decode(), "width": width, "height": height}


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested dict as rows: {"a": {"b": 1}} is [("a.b", "1")]."""
    if isinstance(value, Mapping):
        inner = [(f"{prefix}.{key}" if prefix else str(key), part) for key, part in value.items()]
        return [row for name, part in inner for row in _flat(part, name)]
    if isinstance(value, list):
        return [(prefix, ", ".join(str(part) for part in value))]
    return [(prefix, "–" if value is None else str(value))]


# --- numbers for people ------------------------------------------------------------------------------------------


def number(value: Any, digits: int = 3) -> str:
    """Fixed digits; smaller than these can show, in powers of ten; a dash when unknown."""
    if not known(value):
        return "–"
    if value and abs(value) < 10**-digits:
        mantissa, exponent = f"{value:.1e}".split("e")
        raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa}×10{raised}".replace("-", "−")
    return f"{value:.{digits}f}".replace("-", "−")


def count(value: Any) -> str:
    return f"{round(value):,}" if known(value) else "–"


def size(value: Any) -> str:
    """Bytes in the unit, a power of 1000, that keeps the number below 1000."""
    if not known(value):
        return "–"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    digits = 0 if unit == "B" else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"


def duration(seconds: Any) -> str:
    if not known(seconds):
        return "–"
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def percent(part: Any, whole: Any) -> str:
    if not (known(part) and known(whole) and whole):
        return "–"
    share = 100 * part / whole
    return f"{share:.0f} %" if share >= 99.5 else f"{share:.2g} %"


def _median(clients: Mapping[str, Numbers], key: str) -> float | None:
    values = known_values(clients, key)
    return median(values) if values else None


def _mean_pair(clients: Mapping[str, Numbers], key: str) -> tuple[float, float] | None:
    """(before, after), over the clients that have both."""
    both = [client for client in clients.values() if known(client.get(f"{key}_before")) and known(client.get(key))]
    return (fmean(client[f"{key}_before"] for client in both), fmean(client[key] for client in both)) if both else None


# --- clients -----------------------------------------------------------------------------------------------------


def _card(name: str, client: Numbers, pictures: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What is shown of one client: its grids, its class proportions, its two main numbers."""
    new = client.get("role") == "new"
    wanted = {"real": f"{name}-real", "before": f"{name}-before", "after" if new else "personal": name}
    return {
        "name": name,
        "client": {
            key: client[key] if known(client.get(key)) else None
            for key in (
                "num_images",
                "num_heldout",
                "histogram_distance",
                "histogram_distance_before",
                "heldout_loss",
                "heldout_loss_before",
            )
        },
        "pictures": [
            (kind, pictures.get(file)) for kind, file in wanted.items() if new or kind != "before" or file in pictures
        ],
        "has_before": wanted["before"] in pictures,
        "bars": class_bars(name, client, names),
    }


COLUMNS: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
    ("Data", "images", "num_images", count),
    ("Data", "held out", "num_heldout", count),
    ("Fit", "held-out loss", "heldout_loss", lambda value: number(value, 4)),
    ("Fit", "histogram distance", "histogram_distance", number),
    ("Samples", "KID", "kid", lambda value: number(value, 4)),
    ("Samples", "KID floor", "kid_floor", lambda value: number(value, 4)),
    ("Samples", "Fréchet", "frechet", lambda value: number(value, 2)),
    ("Samples", "precision", "precision", lambda value: number(value, 2)),
    ("Samples", "recall", "recall", lambda value: number(value, 2)),
    ("Copying", "nearest distance", "nearest_train_distance", number),
    ("Copying", "copy ratio", "copy_ratio", lambda value: number(value, 2)),
    ("Cost", "parameters trained", "trained_parameters", count),
    ("Cost", "personal file", "personal_file_bytes", size),
    ("Cost", "sent", "bytes_up", size),
    ("Cost", "received", "bytes_down", size),
)
"""Group, heading, key in the summary, how it is written."""


def _table(
    shown_train: Mapping[str, Numbers],
    shown_new: Mapping[str, Numbers],
    train: Mapping[str, Numbers],
    new: Mapping[str, Numbers],
) -> dict[str, Any]:
    """Numbers of the shown clients, and the median over all of each role. Columns that nobody fills are left out."""
    columns = [column for column in COLUMNS if known_values({**train, **new}, column[2])]
    groups = [group for group, *_ in columns]
    firsts = [index == 0 or groups[index - 1] != group for index, group in enumerate(groups)]
    bodies = []
    for title, shown, everyone in (("New clients", shown_new, new), ("Training clients", shown_train, train)):
        middle = {key: _median(everyone, key) for _, _, key, _ in columns}
        middle |= {f"{key}_before": _median(everyone, f"{key}_before") for _, _, key, _ in columns}
        rows = [(name, _cells(client, columns)) for name, client in shown.items()]
        bodies.append((title, rows, (len(everyone), _cells(middle, columns)) if len(everyone) > 1 else None))
    return {
        "groups": [(group, groups.count(group)) for group in dict.fromkeys(groups)],
        "headings": [(heading, first) for (_, heading, *_), first in zip(columns, firsts, strict=True)],
        "bodies": [body for body in bodies if body[1]],
    }


def _cells(client: Numbers, columns: Iterable[tuple[str, str, str, Callable[[Any], str]]]) -> list[dict[str, str]]:
    return [
        {
            "value": write(client.get(key)),
            "before": write(client[f"{key}_before"]) if known(client.get(f"{key}_before")) else "",
            "spread": write(client[f"{key}_std"]) if known(client.get(f"{key}_std")) else "",
        }
        for _, _, key, write in columns
    ]
