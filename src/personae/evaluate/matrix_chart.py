"""The chart of a matrix of scores: how well every concept is known after every other."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from personae.evaluate.charts import chart, known
from personae.evaluate.forgetting import Scores

SCALE = "cividis"
"""From dark blue to yellow, made to look alike to readers who are colour-blind (Nuñez et al. 2018)."""

ON_DARK, ON_LIGHT = "#ffffff", "#101010"
"""Of numbers. Cells keep their colours when the page is dark, and so do these."""

LONGEST = 16
"""Letters of a concept's name that are shown."""


def matrix_chart(
    name: str,
    title: str,
    concepts: Sequence[str],
    scores: Scores,
    *,
    span: tuple[float, float] | None = None,
    digits: int = 2,
) -> Markup | None:
    """A row for each moment, a column for each concept, a number in each cell; cells of None are empty.

    The text for screen readers holds the numbers, too. Charts with one `span`, the scores of the darkest and of the
    brightest cell, can be compared by eye; otherwise it is that of the scores.
    """
    cells = np.array([[float(v) if v is not None and known(v) else np.nan for v in row] for row in scores], dtype=float)
    found = cells[np.isfinite(cells)]
    if not found.size:
        return None
    low, high = span or (float(found.min()), float(found.max()))

    def draw(axes: Axes) -> None:
        colours = matplotlib.colormaps[SCALE]
        limits = matplotlib.colors.Normalize(low, high if high > low else low + 1, clip=True)
        axes.pcolormesh(np.ma.masked_invalid(cells), cmap=colours, norm=limits)
        for row, column in np.argwhere(np.isfinite(cells)):
            value = cells[row, column]
            colour = ON_LIGHT if _luminance(colours(limits(value))) > 0.18 else ON_DARK
            axes.text(column + 0.5, row + 0.5, f"{value:z.{digits}f}", ha="center", va="center", color=colour)
        labels = [_shown(concept) for concept in concepts]
        axes.set_xticks([at + 0.5 for at in range(len(labels))], labels, rotation=35, ha="left", rotation_mode="anchor")
        axes.set_yticks([at + 0.5 for at in range(len(labels))], [f"after {label}" for label in labels])
        axes.xaxis.tick_top()
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.invert_yaxis()
        axes.set_title(title)

    count = len(concepts)
    width = 1.9 + (0.32 + 0.08 * max(digits, 2)) * max(count, 3)
    return chart(f"matrix-{name}", width, 1.3 + 0.3 * max(count, 3), draw, _told(title, concepts, cells, digits))


def _told(title: str, concepts: Sequence[str], cells: np.ndarray, digits: int) -> str:
    """The numbers as text, row by row."""
    rows = []
    for concept, row in zip(concepts, cells, strict=True):
        told = (
            f"{other} {value:z.{digits}f}" for other, value in zip(concepts, row, strict=True) if np.isfinite(value)
        )
        rows.append(f"after {concept}: {', '.join(told)}")
    return f"{title}; {'; '.join(rows)}"


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance as WCAG 2 has it; white and black text are as well read at 0.18."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _shown(concept: str) -> str:
    return concept if len(concept) <= LONGEST else concept[: LONGEST - 1] + "…"
