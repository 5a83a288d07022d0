"""The report of a run: one HTML file that needs nothing beside it.

Reads summary.json, rounds.jsonl, config.toml, environment.json and samples/ of a run folder. No model is loaded and
nothing is measured here, so that a report can be written anew at any time; the same folder gives the same bytes.
Whatever a run does not have is left out. Wording and looks are in templates/report.html.j2.
"""

from __future__ import annotations

import base64
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from io import StringIO
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib
import matplotlib.style
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from personae.artefact.save import FORMAT_VERSION, explained, read_json, write_bytes
from personae.errors import ArtefactError

Numbers = Mapping[str, Any]
"""What summary.json holds of one client."""

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
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"number": number, "count": count, "size": size, "duration": duration, "percent": percent}
    page = templates.get_template("report.html.j2").render(_contents(folder, summary))
    write_bytes(folder / "report.html", page.encode())
    return folder / "report.html"


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
        "loss_chart": _loss_chart(rounds),
        "smoothing": _window(len(rounds)),
        "dot_charts": [chart for key, title in DOTS.items() if (chart := _dots(key, title, shown_new, shown_train))],
        "traffic_chart": _traffic_chart(rounds),
        "rounds_bytes": {"up": sum(up for up, _ in up_down), "down": sum(down for _, down in up_down)},
        "table": _table(shown_train, shown_new, train, new),
        "stages": [(key.removesuffix("_seconds"), seconds) for key, seconds in (summary.get("stages") or {}).items()],
        "features": _flat(summary.get("features") or {}),
        "kid_features": sorted({str(c["kid_features"]) for c in clients.values() if c.get("kid_features")}),
        "versions": _flat(summary.get("versions") or {}),
        "environment": _flat(read_json(environment)) if environment.is_file() else [],
        "config": _text(folder / "config.toml"),
    }


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


def _pictures(folder: Path) -> dict[str, dict[str, Any]]:
    """By file name, so that a client's name is only ever looked up and never opened as a path."""
    return {path.stem: _picture(path) for path in sorted((folder / "samples").glob("*.png")) if path.is_file()}


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


def known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


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
    return f"{100 * part / whole:.2g} %" if known(part) and known(whole) and whole else "–"


def _values(clients: Mapping[str, Numbers], key: str) -> list[float]:
    return [client[key] for client in clients.values() if known(client.get(key))]


def _median(clients: Mapping[str, Numbers], key: str) -> float | None:
    values = _values(clients, key)
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
        "pictures": [(kind, pictures.get(file)) for kind, file in wanted.items() if new or kind != "before"],
        "bars": _class_bars(name, client, names),
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
    columns = [column for column in COLUMNS if _values({**train, **new}, column[2])]
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


# --- charts ------------------------------------------------------------------------------------------------------

COLOURS = {
    "ink": "#1c2128",
    "muted": "#5c6671",
    "line": "#d5dae0",
    "real": "#8b939c",
    "before": "#d55e00",
    "after": "#0072b2",
    "up": "#00805f",
    "down": "#a8508a",
}
"""Apart for colour-blind eyes too (after Okabe and Ito). In a chart, each becomes the page's variable of that name, so
that charts follow the page into the dark."""

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.parse_math": False,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "path",
}

DOTS = {
    "histogram_distance": "Histogram distance (0 is equal)",
    "heldout_loss": "Held-out loss (mean squared error)",
}


def _chart(name: str, width: float, height: float, draw: Callable[[Axes], None], label: str) -> Markup:
    """Draw one pair of axes, `width` x `height` inches, as SVG for the page, its colours being variables."""
    buffer = StringIO()
    with matplotlib.style.context(["default", {**STYLE, "svg.hashsalt": name}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a client may be named in any script
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        about = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=about)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{re.sub('[^a-z0-9]', '', name.lower())}-", svg)
    for colour, code in COLOURS.items():
        svg = svg.replace(code, f"var(--{colour})")
    view = f'<svg class="chart" role="img" aria-label="{Markup.escape(label)}" style="max-width: {width * 110:.0f}px" '
    svg = re.sub(r'<svg .*?(viewBox=".*?").*?>', lambda found: view + found[1] + ">", svg, count=1, flags=re.DOTALL)
    return Markup(re.sub(r"\s*\n\s*", "\n", svg))


def _class_bars(name: str, client: Numbers, names: Sequence[str]) -> Markup | None:
    """Shares of classes among real images, and among samples."""
    keys = {"real": "labels", "before": "sampled_labels_before", "after": "sampled_labels"}
    series = {kind: client[key] for kind, key in keys.items() if client.get(key) and sum(client[key]) > 0}
    if not series:
        return None
    classes = max(len(counts) for counts in series.values())
    labels = [_short(names[i] if i < len(names) else i, 12) for i in range(classes)]
    longest = max(map(len, labels))
    step = -(-classes // (20 if longest <= 2 else 12))
    width, height = (3.9, 2.25) if client.get("role") == "new" else (3.5, 1.65 if longest <= 3 else 2.0)

    def draw(axes: Axes) -> None:
        bar = 0.82 / len(series)
        for index, (kind, counts) in enumerate(series.items()):
            at = [i + (index - (len(series) - 1) / 2) * bar for i in range(len(counts))]
            axes.bar(at, [100 * n / sum(counts) for n in counts], bar * 0.94, color=COLOURS[kind])
        axes.set_xticks(range(0, classes, step), labels[::step])
        if longest > 3:
            axes.tick_params(axis="x", rotation=40)
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        axes.grid(visible=False, axis="x")
        axes.spines["left"].set_visible(False)
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.set_xlim(-0.6, classes - 0.4)
        axes.set_xlabel("class")

    label = f"Class proportions of {name}: {', '.join(series)}"
    return _chart(f"bars-{_key(name)}", width, height, draw, label)


def _key(name: str) -> str:
    """Letters that tell one client's chart from another's, whatever it is called."""
    return name.encode().hex()


def _short(value: Any, length: int) -> str:
    text = str(value)
    return text if len(text) <= length else text[: length - 1] + "…"


def _window(num_rounds: int) -> int:
    """Rounds that a point of a smoothed curve is the mean of: odd, about a thirtieth of the run."""
    return num_rounds // 60 * 2 + 1


def _smooth(values: Sequence[float]) -> list[float]:
    half = _window(len(values)) // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _loss_chart(rounds: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Median and range over the clients of each round."""
    found = [(record["round"], _values(record["clients"], "loss")) for record in rounds]
    numbers = [(at, losses) for at, losses in found if losses]
    if not numbers:
        return None
    at = [at for at, _ in numbers]
    low, middle, high = (_smooth([pick(losses) for _, losses in numbers]) for pick in (min, median, max))

    def draw(axes: Axes) -> None:
        axes.fill_between(at, low, high, color=COLOURS["after"], alpha=0.2, linewidth=0, label="range over clients")
        axes.plot(
            at, middle, color=COLOURS["after"], linewidth=1.8, marker="o" if len(at) < 4 else None, label="median"
        )
        if min(low) > 0 and max(high) / min(low) > 5:
            _logarithmic(axes)
        scale = ", logarithmic" if axes.get_yscale() == "log" else ""
        axes.set(xlabel="round", title=f"Training loss (mean squared error{scale})")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.margins(x=0.02)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="upper right")

    return _chart("loss", 5.0, 3.0, draw, "Training loss by round: median and range over clients")


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _traffic_chart(rounds: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Bytes of all clients, added up over the rounds. None when nothing was sent."""
    at, totals = [0], {"up": [0.0], "down": [0.0]}
    for record in rounds:
        at.append(record["round"])
        for way, total in totals.items():
            total.append(total[-1] + sum(client.get(f"bytes_{way}", 0) for client in record["clients"].values()))
    peak = max(totals["up"][-1], totals["down"][-1])
    if not peak:
        return None
    unit, divisor = next(((u, d) for u, d in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if peak >= d), ("B", 1))

    def draw(axes: Axes) -> None:
        scaled = {way: [value / divisor for value in total] for way, total in totals.items()}
        axes.plot(at, scaled["up"], color=COLOURS["up"], linewidth=4.5, alpha=0.45)
        axes.plot(at, scaled["down"], color=COLOURS["down"], linewidth=1.6, linestyle=(0, (4, 2)))
        axes.set(xlabel="round", title=f"Traffic so far, all clients ({unit})", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.margins(x=0.02)
        axes.legend(["sent by clients", "received by clients"], loc="upper left")

    return _chart("traffic", 5.0, 3.0, draw, "Bytes sent and received by all clients, cumulative by round")


def _dots(key: str, title: str, new: Mapping[str, Numbers], train: Mapping[str, Numbers]) -> Markup | None:
    """One line per client: its number, and for a new client where it came from."""
    rows = [
        (name, float(client[key]), client.get(f"{key}_before"))
        for name, client in [*new.items(), *train.items()]
        if known(client.get(key))
    ]
    if not rows:
        return None
    num_new = sum(name in new for name, *_ in rows)

    def draw(axes: Axes) -> None:
        for line, (_, after, before) in enumerate(rows):
            if before is not None and known(before):
                arrow = {"arrowstyle": "-|>", "color": COLOURS["muted"], "linewidth": 1, "shrinkA": 4, "shrinkB": 4}
                axes.annotate("", (after, line), (before, line), arrowprops=arrow)
                axes.plot(before, line, "o", color=COLOURS["before"], markersize=7, fillstyle="none", mew=1.6)
            axes.plot(after, line, "o", color=COLOURS["after"], markersize=7)
        if 0 < num_new < len(rows):
            axes.axhline(num_new - 0.5, color=COLOURS["muted"], linewidth=0.8, linestyle=(0, (2, 2)))
        labels = [_short(name, 18) + (" (new)" if name in new else "") for name, *_ in rows]
        axes.set_yticks(range(len(rows)), labels)
        axes.set(title=title, ylim=(len(rows) - 0.4, -0.6))
        axes.set_xlim(0 if key == "histogram_distance" else None, None)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))

    return _chart(f"dots{key}", 5.0, 0.8 + 0.27 * max(len(rows), 3), draw, f"{title}, client by client")
