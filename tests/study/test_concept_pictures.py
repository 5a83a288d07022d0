"""Pictures of concepts are judged at their places: real ones pass, exchanged ones do not."""

import pytest
import tomli_w
import torch

from personae.core import CONCEPT
from personae.data.emoji import LAYOUTS, PLACES, Scene, drawn_scenes
from personae.errors import ConfigError
from personae.recipe.config import read_table
from personae.study import concept_pictures
from personae.study.concept_pictures import UNTAUGHT, ConceptPictures
from personae.study.concept_pictures_report import PLAIN, answer, best_judge, shares_of
from personae.study.concept_scenes import Arrangement, box_of, composed, cropped, style_of
from personae.study.learning import Learner
from personae.study.workflow import open_study, run_study

LEARNERS = (Learner("first", "sequential_lora", (0.002,)),)
FEW = {"per_prompt": 2, "num_pairs": 4, "num_triples": 2, "steps": 1}
LITTLE = (
    *("lesson.stretches=1", "lesson.training.steps=1", "lesson.training.batch_size=2", "sampling.steps=1"),
    *(
        "scoring.loss_grid=2",
        "scoring.loss_draws=1",
        "scoring.draws=2",
        "scoring.num_images=1",
        "scoring.num_general=2",
    ),
)


@pytest.fixture
def study(untrained):
    return ConceptPictures(LEARNERS, changes=(f"model={untrained}",), **FEW)


@pytest.fixture
def ready(study, tmp_path):
    return study._ready({"stage": "alone", "learner": UNTAUGHT, "seed": 0, "judge": "pooled8"}, 0, tmp_path)


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_every_region_says_the_whole_with_one_concept():
    plan = Arrangement(("rex", "tom"), "beside", "{b} right of {a}", "a flat drawing of {concept}")
    said, nouns = {"rex": "<rex>", "tom": "<tom> cat"}, {"rex": "animal", "tom": "cat"}
    assert plan.told(said) == "a flat drawing of a <tom> cat right of a <rex>"
    left, right = plan.regions(said, nouns)
    assert (left.box, left.caption) == ((0, 0, 0.5, 1), "a flat drawing of a cat right of a <rex>")
    assert (right.box, right.caption) == ((0.5, 0, 1, 1), "a flat drawing of a <tom> cat right of an animal")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_boxes_hold_their_place_and_no_other(layout):
    boxes = {place: box_of(place) for place in LAYOUTS[layout].places}
    for place in boxes:
        (down, across), size = PLACES[place], 32
        middle = ((across + 8) / size, (down + 8) / size)
        inside = [p for p, (left, t, r, b) in boxes.items() if left <= middle[0] <= r and t <= middle[1] <= b]
        assert inside == [place]


def test_arrangements_use_every_layout_and_no_order_twice(study):
    plans = study.arrangements(["a", "b", "c"], 2, 0)
    assert plans == study.arrangements(["a", "b", "c"], 2, 0) != study.arrangements(["a", "b", "c"], 2, 1)
    assert {plan.layout for plan in plans} == {name for name, own in LAYOUTS.items() if len(own.places) == 2}
    assert len({plan.concepts for plan in plans}) == 4
    assert all(len(plan.concepts) == 3 for plan in study.arrangements(["a", "b", "c"], 3, 0))


def test_real_scenes_are_those_of_the_pack(ready):
    plan = Arrangement(("moo", "bot", "nana"), "beside, one below", "{a} left of {b} and {c} below", "flat {concept}")
    scenes, groups = composed(ready.world, [plan])
    assert torch.equal(scenes, drawn_scenes([Scene("fluent-emoji-flat", plan.layout, ("cow", "robot", "banana"), "")]))
    assert groups == [["fluent-emoji-flat"] * 3] and style_of("a drawing") is None
    assert torch.equal(cropped(scenes[0], "bottom"), scenes[0, :, 16:, 8:24])


# --- judging ----------------------------------------------------------------------------------------------------------


def test_real_pictures_in_the_place_of_drawn_ones_score_as_they_do(study, ready, monkeypatch):
    """By the prompt alone, what is at the places is exchanged."""
    plans = study.arrangements(list(ready.world.known), 2, 0)
    turned = [Arrangement(plan.concepts[::-1], plan.layout, plan.wording, plan.prompt) for plan in plans]
    shown = iter(
        [
            p
            for pair in zip(composed(ready.world, turned)[0], composed(ready.world, plans)[0], strict=True)
            for p in pair
        ]
    )
    monkeypatch.setattr(
        concept_pictures, "draw", lambda model, captions, *_, **__: next(shown)[None].repeat(2, 1, 1, 1)
    )
    row, sheet, columns = study._together(ready, plans)
    real, drawn, exchanged = (shares_of([row], what) for what in ("real", "with", "without"))
    assert drawn.right == real.right and real.mean > 0
    assert exchanged.swapped == pytest.approx(real.right) and exchanged.mean <= 1 - real.mean
    assert sheet.shape == (len(plans) * 5, 3, 32, 32) and columns == 5


def test_alone_a_copy_of_a_real_picture_scores_as_that_one(study, ready, monkeypatch):
    asked = [(name, style_of(prompt)) for name in ready.world.known for prompt in study.prompts for _ in range(2)]
    copies = torch.stack([ready.world.real(name, style, 0)[0] for name, style in asked])
    monkeypatch.setattr(concept_pictures, "draw", lambda *_, **__: copies)
    row, _, _ = study._alone(ready)
    assert shares_of([row], "drawn").right == shares_of([row], "real").right
    assert 0.5 < shares_of([row], "drawn").mean < 1 and shares_of([row], "drawn", "and nouns").mean < 0.9
    monkeypatch.setattr(concept_pictures, "draw", lambda *_, **__: copies.roll(len(copies) // 5, 0))
    assert shares_of([study._alone(ready)[0]], "drawn").mean < 0.3


def test_the_judge_that_tells_real_pictures_apart_is_chosen(study, tmp_path, monkeypatch):
    blind = concept_pictures.pooled(1)
    monkeypatch.setattr(concept_pictures, "JUDGES", {"blind": lambda: blind, "pooled8": concept_pictures.pooled})
    row = study.measure({"stage": "judge"}, 0, tmp_path)
    assert row["concepts"] == 5 and row["sets"] == 100 and best_judge(row) == "pooled8"
    assert row["shares"]["pooled8"]["alone"] > 0.8 > 0.6 > row["shares"]["blind"]["alone"]


# --- the whole --------------------------------------------------------------------------------------------------------


def test_it_stops_and_goes_on_to_the_same_numbers(untrained, tmp_path, monkeypatch):
    monkeypatch.setattr(concept_pictures, "JUDGES", {"pooled8": concept_pictures.pooled})
    table, _ = read_table("continual/sequential_lora", LITTLE)
    lessons = tmp_path / "lessons.toml"
    concepts = [{**each, "data": {**each["data"], "num_images": 4}} for each in table["concepts"][:2]]
    lessons.write_text(tomli_w.dumps({**table, "model": str(untrained), "concepts": concepts}), "utf-8")
    settings = {
        "recipe": str(lessons),
        "per_prompt": 1,
        "num_pairs": 1,
        "num_triples": 0,
        "steps": 1,
        "learners": [{"name": "first", "method": "sequential_lora", "rates": [0.002]}],
    }
    recipe = tmp_path / "study.toml"
    recipe.write_text(tomli_w.dumps({"name": "x", "study": "concept_pictures", "settings": settings}), "utf-8")
    whole = run_study(recipe, tmp_path / "whole")
    assert [row["stage"] for row in whole.rows] == ["judge", "taught", "alone", "two", "alone", "two"]
    lines = (tmp_path / "whole" / "cells.jsonl").read_text("utf-8").splitlines()
    (tmp_path / "whole" / "cells.jsonl").write_text("\n".join(lines[:3]) + "\n", "utf-8")
    before = whole.rows
    assert len(before) == 3 and open_study(tmp_path / "whole").finish().rows[:3] == before
    again = [line.split('"seconds"')[0] for line in lines]
    after = (tmp_path / "whole" / "cells.jsonl").read_text("utf-8").splitlines()
    assert [line.split('"seconds"')[0] for line in after] == again
    assert all((tmp_path / "whole" / picture.path).is_file() for picture in whole.answer.pictures)


# --- the answer -------------------------------------------------------------------------------------------------------

JUDGE = {"stage": "judge", "shares": {"x": {"alone": 0.9, "at a place": 0.8}}, "lacking": [], "concepts": 2, "sets": 1}


def alone(name, taken):
    read = {PLAIN: list("ab")}
    return {
        "stage": "alone",
        "learner": name,
        "seed": 0,
        "concepts": ["a", "b"],
        "asked": ["a", "b"],
        "drawn": {PLAIN: list(taken)},
        "real": read,
        "autoencoder": read,
        "picture": "pictures/x.png",
    }


def two(name, without, with_):
    read = {PLAIN: [["a", "b"], ["b", "a"]]}
    pairs = [{PLAIN: [list(each) for each in taken]} for taken in (without, with_)]
    return {
        "stage": "two",
        "learner": name,
        "seed": 0,
        "concepts": ["a", "b"],
        "asked": read[PLAIN],
        "captions": ["one", "other"],
        "num_shown": 2,
        "num_columns": 2,
        "picture": "pictures/y.png",
        "real": read,
        "autoencoder": read,
        "without": pairs[0],
        "with": pairs[1],
    }


def test_the_answer_in_numbers():
    found = [JUDGE, alone("first", "aabbbbbb"), alone(UNTAUGHT, "bbbbbbbb")]
    found.append(two("first", ["ab", "ba", "ba", "ab"], ["ab", "aa", "ba", "ba"]))
    told = answer(found, ["first"])
    # alone: of a's four two are right, of b's four all
    own = told.numbers["alone"]["first"]
    assert (own["drawn"], own["real"], own["ratio"]) == (0.75, 1, 0.75)
    assert told.numbers["alone"][UNTAUGHT]["drawn"] == 0.5
    assert "0.75 x as many" in " ".join(told.findings) and "0.9 x was hoped for: missed" in " ".join(told.findings)
    # two: without 1 of 2 and 1 of 2; with 1 of 2 and 2 of 2
    own = told.numbers["two"]["first"]
    assert (own["without"], own["with"], own["chance"]) == (0.5, 0.75, 0.25)
    assert own["difference"]["mean"] == pytest.approx(0.25) and own["difference"]["num"] == 2
    assert told.tables[-1].rows[0][7:9] == [0.5, 0]  # the other order: two of four, and none: both are the same
    assert "Best of two together: first with regions, 75%; 60% was hoped for: reached." in told.findings
    assert "no difference that can be told" in " ".join(told.findings)
    untaught = answer([JUDGE, two(UNTAUGHT, ["ab", "aa"], ["ab", "aa"])], ["first"]).findings
    assert untaught[-1].startswith("untaught, two together: both at their places in 50% of pictures; real scenes 100%")
    assert [table.title for table in told.tables] == ["Judges", "Alone", "Two together"]
    names = [chart.name for chart in told.charts]
    assert names == ["alone", "confusion-untaught", "confusion-first", "two"]
    assert "drawn a: a 0.50, b 0.50; drawn b: a 0.00, b 1.00" in told.charts[2].drawing
    assert "1: one; 2: other" in told.pictures[-1].caption


def test_regions_that_always_help_are_said_to():
    rows = [two("first", ["aa", "aa"], ["ab", "ba"]), two("first", ["ab", "bb"], ["ab", "ba"]) | {"seed": 1}]
    told = answer([JUDGE, *rows], ["first"])
    assert told.numbers["two"]["first"]["difference"]["mean"] == 0.75
    rows = [two("first", ["aa", "aa"], ["ab", "ba"])] * 2
    assert "Regions help: +1.00" in " ".join(answer([JUDGE, *rows], ["first"]).findings)


def test_an_unfinished_study_says_so(study):
    assert "no judge is chosen yet" in answer([], ["first"]).findings[0]
    assert [cell["stage"] for cell in study.cells([])] == ["judge", "taught"]
    found = [JUDGE, {"stage": "taught", "learner": "first", "seed": 0}]
    cells = study.cells(found)
    assert [(c["learner"], c["stage"]) for c in cells[2:]] == [
        (name, stage) for name in (UNTAUGHT, "first") for stage in ("alone", "two", "three")
    ]
    assert {cell["judge"] for cell in cells[2:]} == {"x"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learners": ()}, "learners are"),
        ({"learners": (Learner("x", "ewc", (0.1, 0.2)),)}, "one rate each"),
        ({"learners": (Learner(UNTAUGHT, "ewc", (0.1,)),)}, "no name 'untaught'"),
        ({"per_prompt": 0}, "per_prompt is 0"),
        ({"prompts": ("a flat drawing",)}, "each with {concept}"),
        ({"prompts": (f"a drawing of {CONCEPT}",)}, "say one of cartoon, flat, clipart"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ConceptPictures(**{"learners": LEARNERS, **change})
