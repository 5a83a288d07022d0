"""Charts by themselves; their place in the page is tested in test_report.py."""

import re
from xml.etree import ElementTree

import pytest

from personae.evaluate.charts import DOTS, class_bars, dot_chart, group_map, loss_chart, traffic_chart, window

CLIENT = {"labels": [3, 1, 0], "sampled_labels": [2, 2, 1], "histogram_distance": 0.35, "heldout_loss": 0.12}
NEW = CLIENT | {"role": "new", "sampled_labels_before": [1, 1, 1], "histogram_distance_before": 0.5}
ROUNDS = [
    {"round": at, "clients": {name: {"loss": loss / at, "bytes_up": 2_000, "bytes_down": 3_000} for name in "ab"}}
    for at, loss in enumerate((0.9, 0.8, 0.7, 0.6), 1)
]


def parsed(chart: str) -> ElementTree.Element:
    """The elements of a chart, as the page around it would read them."""
    return ElementTree.fromstring(f'<html xmlns:xlink="http://www.w3.org/1999/xlink">{chart}</html>')[0]


def dots(new: dict, train: dict, key: str = "histogram_distance") -> str | None:
    return dot_chart(key, DOTS[key], new, train)


@pytest.fixture(scope="module")
def charts():
    """One of each kind."""
    return {
        "bars": class_bars("n1", NEW, ["cat", "dog", "a rather long name"]),
        "dots": dots({"n1": NEW}, {"c1": CLIENT}),
        "loss": loss_chart(ROUNDS),
        "traffic": traffic_chart(ROUNDS),
    }


def test_the_same_numbers_give_the_same_bytes(charts):
    assert loss_chart(ROUNDS) == charts["loss"]


def test_every_chart_says_what_it_shows(charts):
    assert {kind: parsed(chart).get("aria-label") for kind, chart in charts.items()} == {
        "bars": "Class proportions of n1: real, before, after",
        "dots": "Histogram distance (0 is equal), client by client",
        "loss": "Training loss by round: median and range over clients",
        "traffic": "Bytes sent and received by all clients, cumulative by round",
    }


def test_every_colour_is_a_variable_of_the_page(charts):
    colours = {found for chart in charts.values() for found in re.findall(r"(?:fill|stroke): ([^;\"]+)", chart)}
    assert not [colour for colour in colours if not colour.startswith("var(--") and colour != "none"]
    assert {"var(--before)", "var(--after)", "var(--real)", "var(--up)", "var(--down)"} <= colours


def test_charts_in_one_page_share_no_id(charts):
    both = [*charts.values(), class_bars("n2", NEW, []), dots({"n1": NEW}, {}, "heldout_loss")]
    ids = [element.get("id") for chart in both for element in parsed(chart).iter() if element.get("id")]
    assert len(ids) == len(set(ids))


def test_text_from_a_run_is_no_markup():
    name = """<script>alert("&'")</script>"""
    assert name in parsed(class_bars(name, CLIENT, [name] * 3)).get("aria-label")
    assert "<script" not in dots({name: NEW}, {})


def test_text_from_a_run_is_no_formula():
    name = r"$\frac$"  # would be an error in a formula
    assert name in class_bars(name, CLIENT, [name] * 3)


def test_letters_that_no_font_has_are_no_reason_to_fail():
    assert "客户" in class_bars("客户", CLIENT, ["猫", "狗"])


def test_many_classes_leave_out_names_and_no_bar():
    chart = class_bars("c1", {"labels": [1] * 62, "sampled_labels": [1] * 62}, [f"a long name {i}" for i in range(62)])
    assert chart.count("fill: var(--real)") == chart.count("fill: var(--after)") == 62
    assert len(set(re.findall('id="[^"]*-(xtick_[0-9]+)"', chart))) == 11


def test_of_more_classes_than_anybody_can_see_there_are_no_bars():
    assert class_bars("c1", {"labels": [1] * 101, "sampled_labels": [1] * 101}, []) is None


def test_the_map_of_groups_has_a_line_wherever_another_group_begins():
    cosines = [[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]]
    one, two, three = (
        group_map(["anna", "ben", "cleo"], groups, cosines) for groups in ([0] * 3, [0, 0, 1], [0, 1, 2])
    )
    lines = [chart.count("stroke: var(--before)") for chart in (one, two, three)]
    assert lines == [0, 2, 4]
    assert parsed(two).get("aria-label") == "cosines of clients' descriptors, and their groups"


def test_a_chart_of_nothing_is_none():
    for nothing in (None, [], [0, 0, 0]):
        assert class_bars("c1", {"labels": nothing, "sampled_labels": nothing}, []) is None
    assert dots({}, {"c1": {"histogram_distance": None}, "c2": {"histogram_distance": float("nan")}}) is None
    assert loss_chart([{"round": 1, "clients": {"a": {"loss": None}, "b": {}}}]) is None
    assert traffic_chart([{"round": 1, "clients": {"a": {"bytes_up": 0, "bytes_down": 0}}}]) is None


@pytest.mark.parametrize(("num_rounds", "expected"), [(0, 1), (4, 1), (59, 1), (60, 3), (300, 11)])
def test_long_curves_are_smoothed_over_an_odd_number_of_rounds(num_rounds, expected):
    assert window(num_rounds) == expected
