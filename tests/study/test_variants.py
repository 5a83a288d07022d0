"""One thing changed at a time: differences are paired by client where they can be, and said with their interval."""

import pytest

from personae.errors import ConfigError
from personae.study.variants import Variant, Variants

STUDY = Variants("width", "digits/spire", (Variant("128"), Variant("4", ("backbone.embedding.width=4",))), (0, 1))


def client(loss, role="new"):
    return {"role": role, "heldout_loss": loss, "histogram_distance": loss / 2, "kid": None, "trained_parameters": 128}


def rows(study, worse=0.05):
    """Clients differ much from each other; the second variant is worse for each by nearly the same."""
    luck = {"c0": 0.1, "c1": 0.9, "c2": 0.5}
    found = []
    for cell in study.cells([]):
        more = worse if cell["variant"] == "4" else 0.0
        clients = {name: client(loss + more + 1e-3 * i * bool(more)) for i, (name, loss) in enumerate(luck.items())}
        found.append({**cell, "clients": clients, "parameters": 300_000})
    return found


def test_every_seed_in_turn_measures_every_variant():
    assert [(c["seed"], c["variant"]) for c in STUDY.cells([])] == [(0, "128"), (0, "4"), (1, "128"), (1, "4")]


def test_pairs_see_what_is_hidden_by_the_clients_differences():
    answer = STUDY.answer(rows(STUDY))
    loss = next(d for d in answer.numbers["differences"] if d["figure"] == "heldout_loss")
    assert loss["mean"] == pytest.approx(0.051) and loss["num"] == 6 and loss["low"] > 0.04
    assert any(
        finding.startswith("4 against 128, new clients: held-out loss 0.051 higher") for finding in answer.findings
    )

    unpaired = Variants("width", "digits/spire", STUDY.variants, (0, 1), paired=())
    loss = next(d for d in unpaired.answer(rows(unpaired)).numbers["differences"] if d["figure"] == "heldout_loss")
    assert loss["low"] < 0 < loss["high"]


def test_how_much_a_new_client_trains_is_kept():
    sizes = STUDY.answer(rows(STUDY)).numbers["sizes"]
    assert sizes == [{"variant": name, "trained": 128, "parameters": 300_000} for name in ("128", "4")]


def test_kernel_distances_are_compared_where_there_are_any():
    found = rows(STUDY)
    for row in found:
        for name, own in row["clients"].items():
            own["kid"] = {"c0": 1.0, "c1": 2.0, "c2": 4.0}[name] + (0.5 if row["variant"] == "4" else 0.0)
    answer = STUDY.answer(found)
    distance = next(d for d in answer.numbers["differences"] if d["figure"] == "kid")
    assert distance["mean"] == pytest.approx(0.5) and distance["low"] == pytest.approx(0.5)
    assert any("kernel distance 0.5 higher" in finding for finding in answer.findings)
    assert [chart.name for chart in answer.charts][-2:] == ["kid", "kid_difference"]


def test_no_difference_is_said_too():
    answer = STUDY.answer(rows(STUDY, worse=0.0))
    assert answer.findings == ["width: no difference that can be told between 128 and 4."]


def test_a_difference_that_seeds_alone_do_not_tell_is_said_to_be_one():
    found = rows(STUDY)
    for row in found:
        if row["variant"] == "4" and row["seed"] == 1:
            row["clients"] = {name: client(c["heldout_loss"] - 0.035) for name, c in row["clients"].items()}
    pooled = next(finding for finding in STUDY.answer(found).findings if "held-out loss" in finding)
    assert pooled.endswith("6 values) (not over seeds alone).")
    assert STUDY.answer(rows(STUDY)).findings[0].endswith("6 values).")
    one = [row for row in rows(STUDY) if row["seed"] == 0]
    assert STUDY.answer(one).findings[0].endswith("3 values) (of one seed).")


def test_other_images_are_said_to_be_others():
    unpaired = Variants("width", "digits/spire", STUDY.variants, (0, 1), paired=())
    found = unpaired.answer(rows(unpaired, worse=5.0))
    assert "new clients, on other images: held-out loss" in found.findings[0]
    assert "hold other images in each, whose figures are no gain" in found.charts[1].caption


def test_unfinished():
    assert STUDY.answer([]).tables == ()
    answer = STUDY.answer(rows(STUDY)[:1])
    assert answer.findings == [], "nothing was compared"
    assert [row[:2] for row in answer.tables[0].rows] == [["128", 1]]
    assert [chart.name for chart in answer.charts] == ["heldout_loss", "histogram_distance"], "no kernel distances"


def test_differences_are_drawn_beside_what_they_are_between():
    names = [chart.name for chart in STUDY.answer(rows(STUDY)).charts]
    assert names == [
        f"{figure}{end}" for figure in ("heldout_loss", "histogram_distance") for end in ("", "_difference")
    ]
    drawing = str(STUDY.answer(rows(STUDY)).charts[1].drawing)
    assert "held-out loss against 128" in drawing


@pytest.mark.parametrize("variants", [(), (Variant("a"),), (Variant("a"), Variant("a"))])
def test_problems_are_named(variants):
    with pytest.raises(ConfigError, match="two or more"):
        Variants("width", "digits/spire", variants, (0,))


def test_only_roles_are_paired():
    with pytest.raises(ConfigError, match="paired or roles name old, expected of train, new"):
        Variants("width", "digits/spire", STUDY.variants, (0,), paired=("new", "old"))
