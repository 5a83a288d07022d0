"""Reading a mix from a vector: found where it is, not found where it is not, and never fitted on who is asked about."""

import numpy as np
import pytest

from personae.errors import ConfigError
from personae.study.bench import open_bench
from personae.study.embeddings import Embeddings
from personae.study.embeddings_report import bend, counting_bend, read_back

RNG = np.random.default_rng(0)
SHARES = RNG.dirichlet([0.3] * 5, 40)
MAP = RNG.normal(size=(5, 16))
STUDY = Embeddings("digits/spire", (0,), rate=0.1, steps=5, start_steps=(0, 10), num_mixes=25, num_walks=2)


def test_a_linear_code_is_read_back():
    results, explained = read_back(SHARES @ MAP, SHARES, [0.5] * 40)
    assert explained > 0.95
    assert np.mean([one.read for one in results]) < 0.1 < np.mean([one.guessed for one in results])


def test_noise_says_nothing():
    results, explained = read_back(RNG.normal(size=(40, 16)), SHARES, [0.5] * 40)
    assert explained < 0.2
    assert np.mean([one.read for one in results]) > 0.9 * np.mean([one.guessed for one in results])


def test_nobody_is_in_the_fit_that_is_asked_about_them():
    """With one number for each client to be known by, a fit that holds the client would explain everything."""
    _, explained = read_back(np.eye(40), SHARES, [0.5] * 40)
    assert explained < 0.1


def test_each_half_is_asked_about_by_the_other():
    """The map of the even clients is another one than that of the odd: nothing can be told across."""
    vectors = np.where((np.arange(40) % 2 == 0)[:, None], SHARES @ MAP, SHARES @ -MAP)
    _, explained = read_back(vectors, SHARES, [0.5] * 40)
    assert explained < 0


def test_clients_of_different_halves_share_no_image(tiny_run):
    bench = open_bench(tiny_run.folder)
    even, odd = (
        {row.numpy().tobytes() for i in group for row in STUDY._mixed(bench, i).train.pixels}
        for group in ((0, 2, 4), (1, 3, 5))
    )
    assert even and odd and len(even & odd) <= 1  # two of the digits are equal in all pixels


def test_cells():
    assert STUDY.cells([]) == [{"stage": "train", "seed": 0}]
    cells = STUDY.cells([{"stage": "train", "seed": 0}])
    assert [c["first"] for c in cells if c["stage"] == "read"] == [0, 10, 20]
    assert len([c for c in cells if c["stage"] == "start"]) == 8


def row(start, steps, loss):
    people = {
        f"c{i}": {"loss": loss + i / 10 + 1e-3 * (i % 2) * (start != "population"), "distance": 0.3} for i in range(4)
    }
    return {"stage": "start", "seed": 0, "start": start, "steps": steps, "clients": people}


def test_the_answer_says_which_start_helps():
    rows = [
        row(start, 0, loss) for start, loss in (("population", 0.5), ("zero", 0.7), ("mean", 0.5), ("nearest", 0.3))
    ]
    rows.append(
        {
            "stage": "walk",
            "seed": 0,
            "walk": 0,
            "from": "a",
            "to": "b",
            "picture": "w.png",
            "shares": [[1, 0], [0.8, 0.2], [0, 1]],
        }
    )
    answer = STUDY.answer(rows)
    assert [f for f in answer.findings if f.startswith("Starting from the nearest")]
    assert [f for f in answer.findings if f.startswith("Starting from zero instead of the population's vector")]
    walk = answer.numbers["walk"]
    assert walk["bend"] == pytest.approx(0.3) and walk["ends"] == pytest.approx(1.0) and 0 < walk["counting"] < 0.1
    assert [picture.path for picture in answer.pictures] == ["w.png"]


def test_problems_are_named():
    with pytest.raises(ConfigError, match="expected at least 4 and 2"):
        Embeddings("digits/spire", (0,), 0.1, 5, (0,), num_mixes=2)


def test_counting_alone_bends_a_straight_walk_the_less_the_more_is_counted():
    straight = np.linspace(0, 1, 5)[:, None] * SHARES[0] + np.linspace(1, 0, 5)[:, None] * SHARES[1]
    assert bend(straight) == pytest.approx(0)
    few, many = (counting_bend(straight, number) for number in (100, 10_000))
    assert 0.02 < few < 0.2 and many == pytest.approx(few / 10, rel=0.3)
    assert bend(straight[[0, 4]]) == 0.0
