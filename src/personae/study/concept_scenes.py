"""Concepts at named places: what is asked for, real pictures of it, and for what a judge takes what is at a place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personae.continual.contract import Continual
from personae.core import CONCEPT, ClientData
from personae.data.emoji import LAYOUTS, PLACES, SEEN_STYLES, STYLES, pack
from personae.data.sources import shrink
from personae.evaluate.concept_match import Known, References, nearest_concepts, references
from personae.evaluate.features import Features
from personae.evaluate.text2image_features import renderings
from personae.infer.regions import Region
from personae.sequence.concepts import read_concept
from personae.sequence.config import Concept, SequenceRecipe

PLAIN, STRICT = "among concepts", "and nouns"
"""What a picture is told among: the concepts, or these and what the nouns say."""

# --- what is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrangement:
    """Some concepts in one picture, in the order of the layout's places, and how that is said."""

    concepts: tuple[str, ...]
    layout: str
    wording: str
    prompt: str

    @property
    def places(self) -> tuple[str, ...]:
        return LAYOUTS[self.layout].places

    def told(self, said: Mapping[str, str]) -> str:
        """With these words for the concepts."""
        phrases = dict(zip("abc", (with_article(said[name]) for name in self.concepts), strict=False))
        return self.prompt.replace(CONCEPT, self.wording.format(**phrases))

    def regions(self, said: Mapping[str, str], nouns: Mapping[str, str]) -> tuple[Region, ...]:
        """A box for each concept, whose caption says the whole, with this concept's word and the others' nouns."""
        return tuple(
            Region(box_of(place), self.told({**nouns, name: said[name]}))
            for place, name in zip(self.places, self.concepts, strict=True)
        )


def style_of(prompt: str) -> str | None:
    """The seen style that a prompt says; None, where it says none."""
    return next((style for style in SEEN_STYLES if pack().words[style] in prompt.split()), None)


def with_article(said: str) -> str:
    return f"{'an' if said[0] in 'aeiou' else 'a'} {said}"


def box_of(place: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom: the half of the picture that a place's name says, or the quarter."""
    sides = place.split()
    return (
        0.5 if "right" in sides else 0.0,
        0.5 if "bottom" in sides else 0.0,
        0.5 if "left" in sides else 1.0,
        0.5 if "top" in sides else 1.0,
    )


def cropped(picture: Tensor, place: str) -> Tensor:
    """The thing at a place of a scene: a square of half the picture's height."""
    size = picture.shape[-1]
    top, left = (offset * size // 32 for offset in PLACES[place])
    return picture[:, top : top + size // 2, left : left + size // 2]


# --- real pictures ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What is learned: noun and real pictures of each concept, and real pictures of nouns, by the noun."""

    nouns: Mapping[str, str]
    known: Mapping[str, Known]
    known_nouns: Mapping[str, Known]
    size: int

    def real(self, name: str, style: str | None, number: int) -> tuple[Tensor, str]:
        """A concept's picture in that style, where there are any, or the one of that number; and its group."""
        own = self.known[name]
        at = own.groups.index(style) if style in own.groups else number % len(own.groups)
        return own.pictures[at], own.groups[at]


def world_of(plan: SequenceRecipe, method: Continual, image_shape: tuple[int, int, int]) -> World:
    """Of a recipe's concepts. Raises: DataError, ConfigError."""
    known = {
        each.name: of_thing(str(each.data.thing))
        if each.data.source == "thing"
        else of_client(read_concept(each, method, plan, image_shape))
        for each in plan.concepts
    }
    return World({each.name: each.noun for each in plan.concepts}, known, of_nouns(plan.concepts), image_shape[1])


def of_thing(name: str) -> Known:
    """A picture in each style of the pack.

    A model that was taught has seen those in seen styles; so a picture in one of them is compared with those in the
    four others, two of which no model has seen.
    """
    return Known(torch.cat([renderings(style, [name]) for style in STYLES]), STYLES)


def of_client(data: ClientData) -> Known:
    """Held-out pictures, or those that were trained on where there are not two of them; each is a group of its own."""
    own = data.heldout if len(data.heldout) > 1 else data.train
    return Known(own.pixels, tuple(map(str, range(len(own)))))


def of_nouns(concepts: Sequence[Concept]) -> dict[str, Known]:
    """Of things, where the pack has pictures of what their noun says."""
    by_words = {thing.words: name for name, thing in pack().things.items()}
    nouns = [each.noun for each in concepts if each.data.source == "thing" and each.noun in by_words]
    return {noun: of_thing(by_words[noun]) for noun in dict.fromkeys(nouns)}


def composed(world: World, plans: Sequence[Arrangement]) -> tuple[Tensor, list[list[str]]]:
    """Real scenes, made as `drawn_scenes` makes them, and the group of what is at each place."""
    scenes = torch.full((len(plans), 3, world.size, world.size), 255, dtype=torch.uint8)
    groups = []
    for at, (scene, plan) in enumerate(zip(scenes, plans, strict=True)):
        shown = [world.real(name, style_of(plan.prompt), at) for name in plan.concepts]
        for place, (picture, _) in zip(plan.places, shown, strict=True):
            cropped(scene, place).copy_(shrink(picture[None], world.size // 2)[0])
        groups.append([group for _, group in shown])
    return scenes, groups


# --- judging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """For which concept each picture is taken: among concepts, and with the nouns' pictures among the candidates."""

    world: World
    features: Features
    size: int

    def __call__(self, pictures: Tensor, groups: Sequence[str | None]) -> dict[str, list[str]]:
        found, concepts = self.features.extract(pictures), self._references(self.world.known)
        taken = {PLAIN: list(nearest_concepts(found, groups, concepts))}
        if self.world.known_nouns:
            nouns = {f"noun {noun}": own for noun, own in self._references(self.world.known_nouns).items()}
            taken[STRICT] = list(nearest_concepts(found, groups, {**concepts, **nouns}))
        return taken

    def at_places(
        self, pictures: Tensor, plans: Sequence[Arrangement], groups: Sequence[Sequence[str | None]]
    ) -> dict[str, list[list[str]]]:
        """What is at each place, picture by picture, as many for every plan. `groups` are by plan and place."""
        each, count = len(pictures) // len(plans), len(plans[0].concepts)
        crops = [cropped(p, place) for at, p in enumerate(pictures) for place in plans[at // each].places]
        own = [group for places in groups for _ in range(each) for group in places]
        taken = self(torch.stack(crops), own)
        return {how: [names[at : at + count] for at in range(0, len(names), count)] for how, names in taken.items()}

    def _references(self, known: Mapping[str, Known]) -> dict[str, References]:
        return references(self.features, known, self.size)
