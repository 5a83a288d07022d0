"""docs/recipes.md names every key with its default, and docs/summary.md every field."""

import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest

from personae import errors
from personae.continual import CONTINUAL
from personae.core import Method, Training
from personae.methods import METHODS
from personae.recipe.config import TITLE, WRAPPERS
from personae.recipe.schema import Recipe
from personae.sequence.config import Concept, Drawing, Lesson, Scoring, SequenceRecipe
from personae.study.config import StudyMachine, StudyRecipe

DOCS = Path(__file__).resolve().parents[2] / "docs"


def rows(text):
    """The cells of every row of the tables in a text, heads and lines left out."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| key", "| field"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def sections(file):
    """Text by heading, of any level."""
    found = re.split(r"^#+ (.*)$", (DOCS / file).read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def tables(kind, where):
    """(heading, dataclass) of a dataclass and of those in it, the method's aside."""
    yield f"[{where}]" if where else "The run", kind
    for name, hint in typing.get_type_hints(kind).items():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from tables(part, f"{where}.{name}".strip("."))


KINDS = {
    **dict(tables(Recipe, "")),
    **METHODS,
    **{f"[wrap.{name}]": kind for name, kind in WRAPPERS.items()},
    "[method.training], [method.adapt], [method.tail], [method.words]": Training,
    "Concept after concept": SequenceRecipe,
    "[[concepts]]": Concept,
    "[lesson]": Lesson,
    "[scoring]": Scoring,
    "[sampling] of concepts": Drawing,
    **{name: kind for name, kind in CONTINUAL.items() if dataclasses.fields(kind)},
    "Studies": StudyRecipe,
    "[machine] of a study": StudyMachine,
}


def expected(kind):
    """(key, default as it is written) of every field that is a value, or a table that a method needs."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        table = any(dataclasses.is_dataclass(part) for part in (hint, *typing.get_args(hint)))
        if hint is Method or (table and hint is not Training):
            continue
        if field.default is dataclasses.MISSING:
            yield field.name, "needed"
        elif field.default is None:
            yield field.name, "left out"
        else:
            yield field.name, f"`{json.dumps(field.default)}`"


@pytest.mark.parametrize("heading", KINDS)
def test_every_key_stands_in_the_docs_with_its_default(heading):
    said = [(key.strip("`"), default) for key, default, _ in rows(sections("recipes.md")[heading])]
    assert sorted(said) == sorted(expected(KINDS[heading]))


def test_no_table_is_described_that_does_not_exist():
    described = {heading for heading, text in sections("recipes.md").items() if rows(text)}
    assert described == set(KINDS)
    assert f"`{TITLE}`" in (DOCS / "recipes.md").read_text("utf-8")


@pytest.mark.parametrize("heading", KINDS)
def test_every_choice_stands_in_the_docs(heading):
    """The values of every key that takes only some."""
    text = sections("recipes.md")[heading]
    for hint in typing.get_type_hints(KINDS[heading]).values():
        for part in (hint, *typing.get_args(hint)):
            if typing.get_origin(part) is typing.Literal:
                missing = [v for v in typing.get_args(part) if (f'"{v}"' if isinstance(v, str) else str(v)) not in text]
                assert missing == []


def test_every_field_of_a_summary_is_explained(tiny_run):
    said = {
        heading: {name.strip(" `") for row in rows(text) for name in row[0].split(",")}
        for heading, text in sections("summary.md").items()
    }
    summary = tiny_run.summary
    assert said["The run"] == set(summary)
    assert said["Each client"] == {key for client in summary["clients"].values() for key in client}
    assert f"`format_version` is **{summary['format_version']}**" in sections("summary.md")["summary.json"]


def test_every_error_and_exit_code_is_explained():
    text = (DOCS / "errors.md").read_text("utf-8")
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.PersonaeError)]
    assert [kind.__name__ for kind in kinds if f"{kind.__name__}`" not in text] == []
    codes = {kind.exit_code for kind in kinds} | {0, 1, 130}
    assert [code for code in codes if f"| {code} |" not in text] == []
