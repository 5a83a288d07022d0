"""Learners side by side, on the smallest model."""

import pytest

from personae.errors import ConfigError
from personae.study.learning import Learner, Learning
from personae.study.learning_report import answer

LEARNERS = (Learner("first", "sequential_lora", (0.1, 0.2)), Learner("second", "ewc", (0.1,)))


def row(learner, rate, gains, order=0, seed=0):
    return {
        "stage": "run",
        "learner": learner,
        "rate": rate,
        "order": order,
        "seed": seed,
        "concepts": ["a", "b", "c"],
        "gains": gains,
        "right": [[1.0, None, None], [0.5, 1.0, None], [0.5, 0.75, 1.0]],
        "taken": {},
        "drift": [0.1, 0.2, 0.3],
        "by_word": [0.1, 0.2, 0.3],
        "bytes": [100, 110, 120],
        "lesson_seconds": [1.0, 2.0, 3.0],
        "run": "runs/x",
    }


FORGETS = [[0.4, None, None], [0.1, 0.5, None], [0.0, 0.1, 0.6]]
KEEPS = [[0.4, None, None], [0.4, 0.4, None], [0.3, 0.4, 0.5]]


@pytest.fixture
def study():
    return Learning("continual/sequential_lora", LEARNERS, seeds=(0, 1), orders=2, joint=(0.3, 0.4))


def test_rates_are_tried_once_and_the_best_goes_on(study):
    first = study.cells([])
    tried = [("first", 0.1), ("first", 0.2), ("second", 0.1), ("joint", 0.3), ("joint", 0.4)]
    assert [(cell["learner"], cell["rate"]) for cell in first] == tried
    at_once = [{**first[3], "gains": [[0.5, 0.5, 0.5]]}, {**first[4], "gains": [[0.6, 0.6, 0.5]]}]
    found = [row("first", 0.1, FORGETS), row("first", 0.2, KEEPS), row("second", 0.1, KEEPS), *at_once]
    assert study.cells(found[:2]) == first
    cells = study.cells(found)
    assert list(cells[:5]) == list(first) and len(cells) == 5 + 3 * 2 + 1
    assert {cell["rate"] for cell in cells[5:] if cell["learner"] == "first"} == {0.2}
    assert [(cell["rate"], cell["seed"]) for cell in cells[5:] if cell["stage"] == "joint"] == [(0.4, 1)]


def test_the_answer_in_numbers():
    found = [row("first", 0.1, FORGETS), row("second", 0.1, KEEPS)]
    told = answer(found, {"first": 0.1, "second": 0.1}, [])
    # first: best before the last 0.4 and 0.5, in the end 0 and 0.1; second: 0.4 and 0.4, then 0.3 and 0.4
    figures = {name: own[0] for name, own in told.numbers["figures"].items()}
    assert figures["first"]["forgetting"] == pytest.approx(0.4)
    assert figures["second"]["forgetting"] == pytest.approx(0.05)
    assert figures["first"]["learning"] == pytest.approx(0.5)
    assert figures["first"]["average"] == pytest.approx(0.7 / 3)
    assert figures["first"]["right"] == pytest.approx(0.75) and figures["first"]["more"] == 10
    ratios = told.numbers["against the first"]["second"]["ratios"]
    assert ratios == pytest.approx({"learning": 1.3 / 1.5, "forgetting": 0.125})
    assert [line[0] for line in told.tables[0].rows] == ["first", "second"]
    assert figures["first"]["by_word"] == pytest.approx(0.2) and len(told.tables[0].rows[0]) == len(
        told.tables[0].columns
    )
    assert len(told.charts) == 3 and len(told.findings) == 3
    assert "over 1 runs, of which one says nothing of chance" in told.findings[0]
    assert told.findings[2].endswith("with at least 0.95 x its learning: nobody.")


def test_what_was_hoped_for_is_judged():
    more = [[0.4, None, None], [0.1, 0.5, None], [0.1, 0.1, 0.6]]
    learns = [[0.5, None, None], [0.5, 0.5, None], [0.45, 0.5, 0.5]]
    found = [row("first", 0.1, gains, order) for order, gains in enumerate((FORGETS, FORGETS, more))]
    told = answer([*found, row("second", 0.1, learns)], dict.fromkeys(("first", "second"), 0.1), [])
    assert "over 3 runs: 23.0 standard errors (3 hoped for: reached)" in told.findings[0]
    assert told.findings[2].endswith("its learning: second.")
    spread = [*found[:2], row("first", 0.1, KEEPS, 2), row("first", 0.1, KEEPS, 3)]
    assert "(3 hoped for: missed)" in answer(spread, {"first": 0.1}, []).findings[0]


def test_there_is_no_multiple_of_nothing():
    still = [[0.4, None, None], [0.4, 0.4, None], [0.4, 0.4, 0.4]]
    told = answer([row("first", 0.1, still), row("second", 0.1, FORGETS)], dict.fromkeys(("first", "second"), 0.1), [])
    assert told.numbers["against the first"]["second"]["ratios"]["forgetting"] is None
    assert told.findings[1].startswith("second against first: learns 1.25 x as much, average gain -0.1667")


def test_ours_are_laid_beside_every_other():
    rates = dict.fromkeys(("first", "second", "third"), 0.1) | {"joint": 0.3}
    at_once = {"stage": "joint", "learner": "joint", "rate": 0.3, "order": 0, "seed": 0, "gains": [[0.5, 0.6, 0.7]]}
    found = [row("first", 0.1, FORGETS), row("second", 0.1, KEEPS), row("third", 0.1, FORGETS)]
    found += [{**at_once, "right_in_the_end": [1.0, 1.0, 0.5]}]
    told = answer(found, rates, ["second"])
    less = told.numbers["ours less others"]["second"]
    assert list(less) == ["first", "third"] and less["third"]["average"]["mean"] == pytest.approx(0.5 / 3)
    assert told.findings[-1] == (
        "second: average gain better than first, third; drift not told apart from first, third "
        "(one run each: no chance told)."
    )
    assert told.tables[1].rows[0] == ["second", "first", 1, "+0.1667", "+0.0000"]
    assert told.numbers["joint"] == [pytest.approx(0.6)] and told.tables[0].rows[-1][:4] == [
        "all at once",
        0.3,
        1,
        pytest.approx(0.6),
    ]

    apart = [
        row(name, 0.1, gains, seed=seed)
        for seed in (0, 1, 2)
        for name, gains in (("first", FORGETS), ("second", KEEPS))
    ]
    for each in apart:
        each["drift"] = [0.1, 0.2, 0.3 + 0.1 * (each["seed"] - 1) * (each["learner"] == "second")]
    told = answer(apart, dict.fromkeys(("first", "second"), 0.1), ["second"]).findings[-1]
    assert told == "second: average gain better than first; drift not told apart from first."


def test_an_unfinished_study_says_so():
    assert "no learner's rate is chosen yet" in answer([], {"first": None}, []).findings[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learners": ()}, "learners are"),
        ({"learners": LEARNERS[:1] * 2}, "a name of its own"),
        ({"learners": (Learner("joint", "ewc", (0.1,)),)}, "none 'joint'"),
        ({"learners": (Learner("x", "ewc", ()),)}, "rates are"),
        ({"learners": (Learner("x", "ewcc", (0.1,)),)}, "did you mean 'ewc'"),
        ({"orders": 0}, "at least 1"),
        ({"ours": ("third",)}, "ours are third, who are none of the learners, first, second"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Learning(**{"recipe": "continual/sequential_lora", "learners": LEARNERS, **change})
