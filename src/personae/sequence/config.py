"""The recipe of a run that goes on: concepts, one after the other, and the method that keeps the earlier ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tomli_w

from personae.continual import CONTINUAL
from personae.continual.contract import Continual
from personae.core import CONCEPT, NAME_RULE, SAFE_NAME, Task, Training
from personae.errors import ConfigError
from personae.recipe.config import ALONE, SEQUENCE, TITLE, change, check_fields, nearest, plain
from personae.recipe.schema import Data, Machine

METHOD = SEQUENCE
"""The table of the method; its `name` is a key of CONTINUAL."""


@dataclass(frozen=True)
class Concept:
    """What is taught: a name, from which the word <name> is made, what it is one of, and its pictures.

    `data` is of one of the sources that are one client's by themselves: "folder", "identity" or "thing".
    """

    name: str
    noun: str
    data: Data

    def __post_init__(self) -> None:
        if not SAFE_NAME.fullmatch(self.name):
            raise ConfigError(f"{self.name!r} cannot be a concept's name; use {NAME_RULE}")
        if not self.noun.split():
            raise ConfigError(f'concept {self.name!r} has no noun; say what it is one of, such as "dog"')
        if self.data.partition is not None or self.data.source not in ALONE:
            raise ConfigError(
                f"concept {self.name!r} has source {self.data.source!r}; expected one of {', '.join(ALONE)}, undivided"
            )
        if self.data.source == "folder" and self.data.path is None:
            raise ConfigError(f"concept {self.name!r} has no data.path, in which its pictures lie")

    @property
    def word(self) -> str:
        return f"<{self.name.lower()}>"


@dataclass(frozen=True)
class Lesson:
    """How a concept is learned: `stretches` of `training`, after each of which a stopped lesson can be taken up."""

    training: Training
    stretches: int = 10

    def __post_init__(self) -> None:
        if min(self.stretches, self.training.steps) < 1:
            raise ConfigError(
                f"{self.stretches} stretches of {self.training.steps} training steps; expected at least 1 of each"
            )


@dataclass(frozen=True)
class Scoring:
    """What is measured and drawn after each concept.

    On held-out pictures: `loss_grid` timesteps with `loss_draws` noises each, and `draws` of them for
    diffusion-classifier scores. `num_images` pictures are drawn of the concept; `num_general` captions of other things
    show how far the model has moved.
    """

    loss_grid: int = 10
    loss_draws: int = 4
    draws: int = 16
    num_images: int = 4
    num_general: int = 24

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"scoring: {name} is {value}, expected at least 1")


@dataclass(frozen=True)
class Drawing:
    """How concepts are drawn: `steps` of DPM-Solver++."""

    steps: int = 20
    guidance: float = 3.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise ConfigError(f"guidance is {self.guidance}, expected a finite number")


@dataclass(frozen=True)
class SequenceRecipe:
    """One run of one client. `model` is a text-to-image pipeline's folder, or the name of one that is shipped.

    `wording` is said of pictures that come without captions, with {concept} for "a <rex>", and whenever a concept is
    drawn or asked about. A word has `num_vectors` vectors. `num_prior` pictures of a noun and `num_prompts` captions of
    other things are there for methods that ask for them.
    """

    name: str
    model: str
    lesson: Lesson
    seed: int = 0
    concepts: tuple[Concept, ...] = ()
    wording: str = CONCEPT
    num_vectors: int = 1
    num_prior: int = 32
    num_prompts: int = 200
    scoring: Scoring = field(default_factory=Scoring)
    sampling: Drawing = field(default_factory=Drawing)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        for name in ("num_vectors", "num_prior", "num_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        if CONCEPT not in self.wording:
            raise ConfigError(
                f"wording {self.wording!r} says the same of every concept; put {CONCEPT} where it belongs"
            )
        refuse_used([], [concept.name for concept in self.concepts])

    def task(self, concept: Concept) -> Task:
        return Task(concept.name, concept.word, concept.noun, self.wording)


def refuse_used(known: Sequence[str], names: Sequence[str]) -> None:
    """Raises: ConfigError, when two concepts would have one word."""
    seen = {name.lower(): name for name in known}
    for name in names:
        if name.lower() in seen:
            raise ConfigError(
                f"a concept cannot be called {name!r}: {seen[name.lower()]!r}, taught before, has the word "
                f"<{name.lower()}>, also if it was forgotten since; choose another name"
            )
        seen[name.lower()] = name


def parse_sequence(table: Mapping[str, Any], where: str) -> tuple[SequenceRecipe, Continual]:
    """Raises: ConfigError, naming every problem in `where`."""
    problems: list[str] = []
    rest = {key: value for key, value in table.items() if key not in (METHOD, TITLE)}
    recipe = check_fields(SequenceRecipe, rest, "", problems)
    own, method = table.get(METHOD), None
    name = own.get("name") if isinstance(own, dict) else None
    if not isinstance(own, dict) or not isinstance(name, str) or name not in CONTINUAL:
        problems.append(f"{METHOD}.name: {name!r} is unknown{nearest(str(name), CONTINUAL)}")
    else:
        fields = {key: value for key, value in own.items() if key != "name"}
        method = check_fields(CONTINUAL[name], fields, f"{METHOD}.", problems)
    if problems or recipe is None or method is None:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(f"{where} has {len(problems)} problem{'s' if len(problems) > 1 else ''}:{lines}")
    return recipe, method


def sequence_toml(recipe: SequenceRecipe, method: Continual) -> str:
    """With every value filled in; `parse_sequence` gives the same back."""
    return tomli_w.dumps({**plain(recipe), METHOD: {"name": method_name(method), **plain(method)}})


def method_name(method: Continual) -> str:
    return next(name for name, kind in CONTINUAL.items() if type(method) is kind)


def own_recipe(model: str, method: str, name: str, overrides: Sequence[str] = ()) -> tuple[SequenceRecipe, Continual]:
    """For somebody who teaches a model concepts as they come: no concepts yet, and our choice of all else.

    `overrides` are "key=value", such as "continual.weight=100". Raises: ConfigError.
    """
    rate = RATES.get(method, 1e-3)
    table: dict[str, Any] = {
        "name": name,
        "model": model,
        "lesson": {"training": {"steps": 40, "lr": rate, "batch_size": 4, "optimizer": "adamw"}},
        METHOD: {"name": method, **copy.deepcopy(dict(SETTINGS.get(method, {})))},
    }
    for override in overrides:
        change(table, override)
    return parse_sequence(table, f"what {model} is to learn with")


RATES = {
    "c_lora": 5e-4,
    "cns": 0.1,
    "custom_diffusion": 2e-3,
    "dreambooth": 5e-4,
    "dsc": 2e-4,
    "ewc": 5e-4,
    "merged_lora": 2e-4,
    "mix_of_show": 5e-4,
    "orthogonal": 5e-4,
    "sequential_lora": 2e-4,
    "textual_inversion": 2e-2,
}
"""Learning rates where nobody says otherwise: the best of those tried on the tiny model (recipe continual/compare)."""

CONSOLIDATION = {"steps": 100, "lr": 2e-4, "batch_size": 4, "optimizer": "adamw"}
"""Of DSC, where nobody says otherwise."""

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "cns": {"overlap_weight": 100.0, "distance_weight": 10.0},
    "dsc": {"consolidation": CONSOLIDATION},
}
"""What goes with these rates, or has to be said."""
