"""Are the things of a scene where its caption says?

Letters in shapes: `N` pictures, `P` places, `K` candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn.functional import pad

from personae.data.emoji import PLACES, Scene, drawn_scenes, named, scene_names
from personae.data.sources import shrink
from personae.errors import ConfigError, DataError
from personae.evaluate.text2image_features import SIZE, Share, check_known, check_pictures, pooled, renderings, share_of

CELL = 16
"""Pixels of a thing in a scene, in height and width."""

SLACK = 2
"""Pixels that a thing may be off its place, down or across."""

AT_ONCE = 32
"""Scenes, of each of which 200 crops are compared."""


@dataclass(frozen=True)
class SceneFound:
    """For how many scenes all things were found: each at its place, or each at any of PLACES.

    A thing is found where its real rendering is the nearest of all candidates', or among the nearest five.
    """

    at_place: Share
    at_place_top_5: Share
    anywhere: Share
    anywhere_top_5: Share


@dataclass(frozen=True)
class SceneScore:
    """What was found in drawn pictures, in real pictures of the same scenes, and by chance.

    `shuffled` looks in the drawn pictures for the things of another of the scenes.
    """

    drawn: SceneFound
    real: SceneFound
    shuffled: SceneFound
    candidates: int


def score_scenes(pictures: Tensor, plans: Sequence[Scene], candidates: Sequence[str] | None = None) -> SceneScore:
    """Are the things of planned scenes where captions say?

    Every place of the picture, also up to SLACK pixels off, is compared with all candidates' real renderings in the
    plan's style at the size that they have in scenes, by correlation. `candidates` are all `scene_names` when left out.
    Nothing is found at a place that is all of one grey, or white. Give plans of two things for the figure of two.

    Shapes: pictures uint8 [N, 3, 32, 32].
    Raises: ConfigError, when there is not one plan for each picture, or a thing is no candidate; ShapeError;
        DataError, without pictures, or when a plan has no other of as many things to be shuffled with.
    """
    candidates = scene_names("all") if candidates is None else tuple(candidates)
    check_known("candidate", candidates, named("all"))
    check_pictures(pictures, "pictures", SIZE)
    if len(plans) != len(pictures):
        raise ConfigError(f"{len(plans)} plans were given for {len(pictures)} pictures, expected one for each")
    check_known("thing", [thing for plan in plans for thing in plan.things], candidates)
    drawn, real = (_found_in(shown, plans, candidates) for shown in (pictures, drawn_scenes(plans)))
    own = [plan.things for plan in plans]
    return SceneScore(
        _scene_found(drawn, plans, own, candidates),
        _scene_found(real, plans, own, candidates),
        _scene_found(drawn, plans, _shuffled(own), candidates),
        len(candidates),
    )


def _found_in(pictures: Tensor, plans: Sequence[Scene], candidates: Sequence[str]) -> Int64[Tensor, "N P K"]:
    """The rank of every candidate at every place, in the order of PLACES; the best within SLACK."""
    features = pooled()
    styles = {plan.style for plan in plans}
    known = {style: features.extract(shrink(renderings(style, candidates), CELL)) for style in styles}
    offsets = [(down, right) for down in range(2 * SLACK + 1) for right in range(2 * SLACK + 1)]
    corners = [(top + down, left + right) for top, left in PLACES.values() for down, right in offsets]
    parts = []
    for start in range(0, len(plans), AT_ONCE):
        wide = pad(pictures[start : start + AT_ONCE], (SLACK,) * 4, value=255)
        crops = torch.stack([wide[..., top : top + CELL, left : left + CELL] for top, left in corners], 1)
        found = features.extract(crops.flatten(0, 1)).unflatten(0, crops.shape[:2])
        for row, plan in zip(found, plans[start : start + AT_ONCE], strict=True):
            alike = (row @ known[plan.style].T).unflatten(0, (len(PLACES), len(offsets))).amax(1)
            parts.append((alike[:, None] >= alike[:, :, None]).sum(2))
    return torch.stack(parts)


def _scene_found(
    ranks: Tensor, plans: Sequence[Scene], things: Sequence[Sequence[str]], candidates: Sequence[str]
) -> SceneFound:
    """`things` are looked for in each picture, at the places of its plan and at all."""
    order, places = {name: k for k, name in enumerate(candidates)}, list(PLACES)
    at, anywhere = [], []
    for rank, plan, wanted in zip(ranks, plans, things, strict=True):
        columns = [order[name] for name in wanted]
        rows = [places.index(place) for place in plan.places()]
        at.append(int(rank[rows, columns].max()))
        anywhere.append(int(rank[:, columns].amin(0).max()))
    return SceneFound(*(share_of([r <= count for r in found]) for found in (at, anywhere) for count in (1, 5)))


def _shuffled(things: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Every scene gets the things of the next one that has as many."""
    given = list(things)
    for count in {len(some) for some in things}:
        same = [place for place, some in enumerate(things) if len(some) == count]
        if len(same) == 1:
            raise DataError(f"only one of the scenes has {count} things, expected two or more to tell chance by")
        for place, other in zip(same, same[1:] + same[:1], strict=True):
            given[place] = things[other]
    return given
