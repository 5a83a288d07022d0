"""The charts of the report: SVG to be put into its page, without scripts, fonts or colours of their own.

A chart of nothing is None. The same numbers give the same bytes.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import matplotlib
import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

Numbers = Mapping[str, Any]
"""What summary.json holds of one client."""

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
"""What has a dot chart, and its title."""


MOST_CLASSES = 100
"""More have no bars: nobody could see one."""


def class_bars(name: str, client: Numbers, names: Sequence[str]) -> Markup | None:
    """Shares of classes among real images, and among samples. None for more than MOST_CLASSES."""
    keys = {"real": "labels", "before": "sampled_labels_before", "after": "sampled_labels"}
    series = {kind: client[key] for kind, key in keys.items() if client.get(key) and sum(client[key]) > 0}
    if not series:
        return None
    classes = max(len(counts) for counts in series.values())
    if classes > MOST_CLASSES:
        return None
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
    return chart(f"bars-{_key(name)}", width, height, draw, label)


def loss_chart(rounds: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Median and range over the clients of each round."""
    found = [(record["round"], known_values(record["clients"], "loss")) for record in rounds]
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
            logarithmic(axes)
        scale = ", logarithmic" if axes.get_yscale() == "log" else ""
        axes.set(xlabel="round", title=f"Training loss (mean squared error{scale})")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.margins(x=0.02)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="upper right")

    return chart("loss", 5.0, 3.0, draw, "Training loss by round: median and range over clients")


def traffic_chart(rounds: Sequence[Mapping[str, Any]]) -> Markup | None:
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

    return chart("traffic", 5.0, 3.0, draw, "Bytes sent and received by all clients, cumulative by round")


def dot_chart(key: str, title: str, new: Mapping[str, Numbers], train: Mapping[str, Numbers]) -> Markup | None:
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

    return chart(f"dots{key}", 5.0, 0.8 + 0.27 * max(len(rows), 3), draw, f"{title}, client by client")


def group_map(labels: Sequence[str], groups: Sequence[int], cosines: Sequence[Sequence[float]]) -> Markup:
    """How like each other clients' descriptors are, darker for more, with lines wherever another group begins.

    All are in one order.
    """
    low = min(0.9, *(value for row in cosines for value in row))

    def draw(axes: Axes) -> None:
        axes.pcolormesh(cosines, cmap="Greys", vmin=low, vmax=1.0)
        for at, (a, b) in enumerate(pairwise(groups), start=1):
            if a != b:
                axes.axhline(at, color=COLOURS["before"], linewidth=1.6)
                axes.axvline(at, color=COLOURS["before"], linewidth=1.6)
        axes.set_yticks([at + 0.5 for at in range(len(labels))], [_short(label, 40) for label in labels])
        axes.set_xticks([at + 0.5 for at in range(len(groups))], [str(group) for group in groups])
        axes.grid(visible=False)
        axes.invert_yaxis()
        axes.set(xlabel="group", title=f"Cosines of descriptors: white {low:.2f}, black 1", aspect=1)

    height = 1.2 + 0.22 * max(len(labels), 4)
    return chart("groups", height + 2.0, height, draw, "cosines of clients' descriptors, and their groups")


# --- pieces ------------------------------------------------------------------------------------------------------


def known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def known_values(clients: Mapping[str, Numbers], key: str) -> list[float]:
    return [client[key] for client in clients.values() if known(client.get(key))]


def window(num_rounds: int) -> int:
    """Rounds that a point of a smoothed curve is the mean of: odd, about a thirtieth of the run."""
    return num_rounds // 60 * 2 + 1


def _smooth(values: Sequence[float]) -> list[float]:
    half = window(len(values)) // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _short(value: Any, length: int) -> str:
    text = str(value)
    return text if len(text) <= length else text[: length - 1] + "…"


def _key(name: str) -> str:
    """Letters that tell one client's chart from another's, whatever it is called."""
    return name.encode().hex()


def logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def logarithmic_x(axes: Axes, at: Sequence[float]) -> None:
    """With ticks at these places only; matplotlib's own would be formulas, which charts do not draw."""
    axes.set(xscale="log")
    axes.set_xticks(at, [f"{value:g}" for value in at])
    axes.set_xticks([], minor=True)


def chart(name: str, width: float, height: float, draw: Callable[[Axes], None], label: str) -> Markup:
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
