"""A study's recipe is read as strictly as a run's, and written back in full."""

import tomllib

import pytest

from personae.errors import ConfigError
from personae.recipe.config import load_recipe, read_table, recipe_folders
from personae.study.config import parse_study, study_toml
from personae.study.study import where

STUDIES = sorted(
    str(path.relative_to(folder).with_suffix(""))
    for folder in recipe_folders()
    for path in folder.rglob("*.toml")
    if "\nstudy = " in path.read_text("utf-8")
)


@pytest.mark.parametrize("name", STUDIES)
def test_every_shipped_study_is_read_and_written_back(name):
    recipe, study = parse_study(*read_table(name))
    assert study.cells([]) and recipe.title
    assert parse_study(tomllib.loads(study_toml(recipe, study)), "again") == (recipe, study)


@pytest.mark.parametrize("name", STUDIES)
def test_every_run_within_a_study_is_a_valid_recipe(name):
    _, study = parse_study(*read_table(name))
    for part in (*getattr(study, "variants", ()), *getattr(study, "rivals", ())):
        if hasattr(part, "changes"):
            load_recipe(getattr(part, "recipe", None) or study.recipe, [*study.changes, *part.changes])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rivals": [{"name": "spire", "recipe": "digits/spire"}]}, "settings.rivals.0.rates: missing"),
        (
            {"rivals": [{"name": "spire", "recipe": "digits/spire", "rates": [0.1], "steps": 3}]},
            "settings.rivals.0.steps: unknown key",
        ),
        ({"rivals": [{"name": "spire", "recipe": "digits/spire", "rates": [-1.0]}]}, "all above 0"),
        ({"seeds": "all"}, "settings.seeds"),
    ],
)
def test_problems_inside_lists_of_tables_are_named(changes, told):
    table, where_ = read_table("unseen/one_class")
    with pytest.raises(ConfigError, match=told):
        parse_study({**table, "settings": {**table["settings"], **changes}}, where_)


def test_where():
    rows = [{"a": 1, "b": 2}, {"a": 1}, {"a": 2, "b": 2}]
    assert where(rows, a=1) == rows[:2] and where(rows, a=1, b=2) == rows[:1] and where(rows, c=None) == []
