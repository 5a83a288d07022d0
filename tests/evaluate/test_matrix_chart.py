"""The numbers of a matrix stand in its chart, drawn and told."""

import re
import string
from xml.etree import ElementTree

import pytest

from personae.evaluate import charts
from personae.evaluate.matrix_chart import ON_DARK, ON_LIGHT, matrix_chart

SCORES = [[0.8, None, None], [0.9, 0.625, None], [0.5, 0.7, -0.001]]
NAMES = ["rex", "tom", "pip"]
HREF = "{http://www.w3.org/1999/xlink}href"


def parsed(chart):
    """The elements of a chart, as the page around it would read them."""
    return ElementTree.fromstring(f'<html xmlns:xlink="http://www.w3.org/1999/xlink">{chart}</html>')[0]


def outlines(chart):
    """Of every text of a chart the outlines that it is drawn with, letter by letter."""
    groups = [each for each in parsed(chart).iter() if re.search(r"-text_[0-9]+$", each.get("id") or "")]
    return [[use.get(HREF).rsplit("-", 1)[1] for use in group.iter() if use.get(HREF)] for group in groups]


@pytest.fixture(scope="module")
def read():
    """A function from a chart to its texts, as somebody who knows the letters reads them."""
    known = string.ascii_lowercase + 'S0123456789.… <>$\\/"'
    spelled = charts.chart("letters", 9.0, 1.0, lambda axes: axes.set(title=known, xticks=[], yticks=[]), "")
    (numbers,) = outlines(spelled)
    letters = dict(zip(numbers, known, strict=True))
    return lambda chart: ["".join(letters[number] for number in text) for text in outlines(chart)]


def places(chart):
    """Where every text begins, from the left and from the top."""
    pattern = r'-text_[0-9]+">.*?translate\(([0-9.]+) ([0-9.]+)\)'
    return [(float(x), float(y)) for x, y in re.findall(pattern, chart, flags=re.DOTALL)]


def test_every_number_is_drawn_under_its_concept_and_beside_its_moment(read):
    chart = matrix_chart("small", "Share recognised", NAMES, SCORES)
    at = dict(zip(read(chart), places(chart), strict=True))
    rows = [["0.80"], ["0.90", "0.62"], ["0.50", "0.70", "0.00"]]
    words = [*NAMES, *(f"after {name}" for name in NAMES), "Share recognised"]
    assert sorted(at) == sorted([*words, *(number for row in rows for number in row)])
    for name, row in zip(NAMES, rows, strict=True):
        assert all(abs(at[number][1] - at[f"after {name}"][1]) < 4 for number in row)
    assert [at[f"after {name}"][1] for name in NAMES] == sorted(at[f"after {name}"][1] for name in NAMES)
    for column, name in enumerate(NAMES):
        below = [row[column] for row in rows if column < len(row)]
        assert all(abs(at[number][0] - at[name][0]) < 20 and at[number][1] > at[name][1] for number in below)


def test_the_text_for_screen_readers_has_the_numbers_too():
    label = parsed(matrix_chart("small", "Share recognised", NAMES, SCORES, digits=1)).get("aria-label")
    assert label == (
        "Share recognised; after rex: rex 0.8; after tom: rex 0.9, tom 0.6; after pip: rex 0.5, tom 0.7, pip 0.0"
    )


def test_the_upper_triangle_is_empty():
    chart = matrix_chart("small", "Share", NAMES, SCORES)
    assert len(re.findall(r"fill: #(?!ffffff|101010)[0-9a-f]{6}", chart)) == 6


def test_numbers_are_dark_on_bright_cells_and_bright_on_dark_ones():
    chart = matrix_chart("two", "Share", ["rex", "tom"], [[0.0, None], [0.1, 1.0]])
    assert chart.count(f"fill: {ON_DARK}") == 2 and chart.count(f"fill: {ON_LIGHT}") == 1


def test_one_span_gives_equal_scores_equal_colours():
    def colours(scores, **how):
        return set(re.findall(r"fill: (#[0-9a-f]{6})", matrix_chart("one", "", ["rex"], scores, **how)))

    assert colours([[0.5]], span=(0.0, 1.0)) != colours([[0.7]], span=(0.0, 1.0))
    assert colours([[0.5]]) == colours([[0.7]]), "alone, each is all of its own scale"
    assert colours([[2.0]], span=(0.0, 1.0)) == colours([[1.0]], span=(0.0, 1.0)), "beyond the span is its end"


def test_text_from_a_run_is_no_markup_and_no_formula(read):
    odd = """<b>"$\\frac$"</b>"""
    chart = matrix_chart("odd", odd, [odd], [[0.5]])
    assert parsed(chart).get("aria-label").startswith(odd) and "<b>" not in chart
    assert odd in read(chart)


def test_a_long_name_is_cut_in_the_chart_and_whole_in_its_text(read):
    name = "a lamp with a very long name"
    chart = matrix_chart("long", "", [name], [[0.5]])
    assert "a lamp with a v…" in read(chart) and f"after {name}" in chart


@pytest.mark.parametrize("scores", [[], [[None]], [[float("nan")]]])
def test_a_chart_of_nothing_is_none(scores):
    assert matrix_chart("none", "", ["rex"] * len(scores), scores) is None
