"""Reading a study's recipe: the same TOML and --set as a run's, told apart by the key `study`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tomli_w

from personae.errors import ConfigError
from personae.recipe.config import check_fields, nearest, plain
from personae.study import STUDIES
from personae.study.study import Study


@dataclass(frozen=True)
class StudyMachine:
    """`workers` processes measure side by side, each with `threads` threads; the figures do not depend on workers."""

    threads: int = 1
    workers: int = 1

    def __post_init__(self) -> None:
        if min(self.threads, self.workers) < 1:
            raise ConfigError(f"threads is {self.threads} and workers {self.workers}, expected at least 1")


@dataclass(frozen=True)
class StudyRecipe:
    """One study. `study` names its kind, a key of `STUDIES`; `settings` are that kind's fields."""

    name: str
    study: str
    title: str = ""
    seed: int = 0
    machine: StudyMachine = field(default_factory=StudyMachine)


def parse_study(table: Mapping[str, Any], where: str) -> tuple[StudyRecipe, Study]:
    """Raises: ConfigError, naming every problem in `where`."""
    problems: list[str] = []
    rest = {key: value for key, value in table.items() if key != "settings"}
    recipe = check_fields(StudyRecipe, rest, "", problems)
    kind, study = table.get("study"), None
    if not isinstance(kind, str) or kind not in STUDIES:
        problems.append(f"study: {kind!r} is unknown{nearest(str(kind), STUDIES)}")
    else:
        study = check_fields(STUDIES[kind], table.get("settings", {}), "settings.", problems)
    if problems or recipe is None or study is None:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(f"{where} has {len(problems)} problem{'s' if len(problems) > 1 else ''}:{lines}")
    return recipe, study


def study_toml(recipe: StudyRecipe, study: Study) -> str:
    """With every value filled in; `parse_study` gives the same back."""
    return tomli_w.dumps({**plain(recipe), "settings": plain(study)})
