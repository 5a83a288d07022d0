"""What became of a model that learned a subject: is it the subject, how varied, what else changed, is it a copy?

Letters in shapes: `N` drawn pictures, `M` real ones of the subject, `H W` their size, `F` features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from personae.errors import ConfigError, DataError, ShapeError
from personae.evaluate.copying import copy_ratio, nearest_distance
from personae.evaluate.features import Features
from personae.evaluate.text2image_features import Mean, Share, check_pictures, mean_of, share_of

# --- is it the subject? ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Likeness:
    """Mean cosines of a subject's pictures with references: of itself, of others, and the first less the second.

    The interval of `margin` is over pictures. `nearest` is the share whose nearest reference is one of the subject's.
    """

    own: float
    others: float
    margin: Mean
    nearest: Share


@dataclass(frozen=True)
class SubjectScore:
    """How like its subject what was drawn is, and how like each other its real pictures are, each left out in turn."""

    drawn: Likeness
    real: Likeness
    num_subjects: int
    features: str


def score_subjects(
    drawn: Mapping[str, Tensor],
    references: Mapping[str, Tensor],
    features: Features,
) -> Mapping[str, SubjectScore]:
    """Subject fidelity: drawn pictures compared with references of all subjects, by cosine of features.

    Features are taken less the mean of the subjects' means, so that what all subjects have in common does not count.
    References should be pictures that were not trained on, or a model that repeats its training pictures is the best
    one. Not DINO or CLIP-I: compare only values of one feature map and one set of subjects.

    Shapes: uint8 [N, 3, H, W], N and M by subject; all of one H and W.
    Raises: ConfigError, when a drawn subject has no references; DataError, when there are fewer than two subjects, or
        fewer than two references of one; ShapeError.
    Source: Ruiz et al. 2023 (DreamBooth), section 4.1. Departure: the margin over other subjects, centred features.
    """
    if unknown := sorted(drawn.keys() - references.keys()):
        raise ConfigError(f"there are no references of {', '.join(unknown)}; found those of {', '.join(references)}")
    few = [name for name, pictures in references.items() if len(pictures) < 2]
    if len(references) < 2 or few:
        raise DataError(
            f"{len(references)} subjects have references, {', '.join(few) or 'none'} fewer than two; expected two or "
            "more subjects with two or more pictures each"
        )
    _check_sizes({**{f"references of {n}": p for n, p in references.items()}, **_of("drawn pictures of", drawn)})
    found = {name: features.extract(pictures) for name, pictures in references.items()}
    centre = torch.stack([values.mean(0) for values in found.values()]).mean(0)
    known = {name: normalize(values - centre, dim=1) for name, values in found.items()}

    def score(name: str, pictures: Tensor) -> SubjectScore:
        asked = normalize(features.extract(pictures) - centre, dim=1)
        others = torch.cat([values for other, values in known.items() if other != name])
        own, itself = known[name], known[name] @ known[name].T
        apart = itself[~torch.eye(len(own), dtype=torch.bool)].view(len(own), -1)
        return SubjectScore(
            _likeness(asked @ own.T, asked @ others.T),
            _likeness(apart, own @ others.T),
            len(references),
            features.name,
        )

    return {name: score(name, pictures) for name, pictures in drawn.items()}


def _likeness(own: Float[Tensor, "N M"], others: Float[Tensor, "N L"]) -> Likeness:
    margin = mean_of(own.mean(1) - others.mean(1))
    nearest = share_of((own.amax(1) > others.amax(1)).tolist())
    return Likeness(float(own.mean()), float(others.mean()), margin, nearest)


# --- how varied is it? -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diversity:
    """Mean distance between two drawn pictures, in features and in pixels (root mean square, scale 0 to 1).

    `real_features` and `real_pixels` are those between two real pictures: as varied as these is what one can ask for.
    """

    features: float
    pixels: float
    real_features: float
    real_pixels: float
    feature_map: str


def diversity(drawn: Tensor, real: Tensor, features: Features) -> Diversity:
    """Draw `drawn` with one caption, or with captions like those of `real`: words are part of what varies.

    Shapes: uint8 [N, 3, H, W] and [M, 3, H, W].
    Raises: DataError, when there are fewer than two pictures on a side; ShapeError.
    """
    _check_sizes({"drawn pictures": drawn, "real pictures": real})
    if min(len(drawn), len(real)) < 2:
        raise DataError(f"{len(drawn)} drawn and {len(real)} real pictures, expected two or more of both")
    in_features = [_apart(features.extract(pictures)) for pictures in (drawn, real)]
    in_pixels = [_apart(_flat(pictures)) for pictures in (drawn, real)]
    return Diversity(in_features[0], in_pixels[0], in_features[1], in_pixels[1], features.name)


def _apart(points: Float[Tensor, "N F"]) -> float:
    return float(torch.pdist(points.double()).mean())


# --- what else changed? ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drift:
    """Mean distance between what base and personal model draw from equal noise and captions that are not the subject's.

    `features` and `pixels` are parts of the yardsticks: 0 when nothing changed, about 1 when a picture has no more to
    do with the old one than another caption's. The yardsticks are mean distances between two of the base's pictures,
    `yardstick_pixels` as root mean square on the scale 0 to 1.
    """

    features: Mean
    pixels: Mean
    yardstick_features: float
    yardstick_pixels: float
    feature_map: str


def drift(base: Tensor, personal: Tensor, features: Features) -> Drift:
    """Picture n of both was drawn with the same caption, noise, sampler and guidance; captions differ among pictures.

    Shapes: uint8 [N, 3, H, W] both.
    Raises: ShapeError, when there are not as many of both; DataError, when there are fewer than two, or the base's are
        all the same.
    """
    _check_sizes({"pictures of the base": base, "pictures of the personal model": personal})
    if len(base) != len(personal):
        raise ShapeError(f"{len(base)} pictures of the base and {len(personal)} of the personal model, expected pairs")
    if len(base) < 2:
        raise DataError("one pair of pictures was given, expected two or more")
    old, new = features.extract(base).double(), features.extract(personal).double()
    old_pixels, new_pixels = _flat(base), _flat(personal)
    in_features, in_pixels = _apart(old), _apart(old_pixels)
    if min(in_features, in_pixels) == 0:
        raise DataError("all pictures of the base are the same to the features; draw different captions")
    return Drift(
        mean_of((new - old).norm(dim=1) / in_features),
        mean_of((new_pixels - old_pixels).norm(dim=1) / in_pixels),
        in_features,
        in_pixels,
        features.name,
    )


# --- is it a copy? ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copying:
    """Median distance from drawn pictures to the nearest training picture, and its part of what is usual.

    Units: root mean square of pixels on the scale 0 to 1. `copy_ratio`, the part, is near 1 for new pictures and
    near 0 for copies; None when a held-out picture is usually itself a copy.
    """

    nearest_train_distance: float
    copy_ratio: float | None


def copying(drawn: Tensor, train: Tensor, heldout: Tensor) -> Copying:
    """`heldout` are pictures of the subject that were not trained on.

    Shapes: uint8 [N, 3, H, W] each, N by set.
    Raises: ShapeError, DataError.
    """
    _check_sizes({"drawn pictures": drawn, "training pictures": train, "held-out pictures": heldout})
    return Copying(float(nearest_distance(drawn, train).median()), copy_ratio(drawn, train, heldout))


# --- pieces ----------------------------------------------------------------------------------------------------------


def _flat(pictures: Tensor) -> Tensor:
    """Vectors whose distances are root mean squares of pixels on the scale 0 to 1."""
    flat = pictures.flatten(1).double() / 255
    return flat / flat.shape[1] ** 0.5


def _of(what: str, pictures: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{what} {name}": some for name, some in pictures.items()}


def _check_sizes(sets: Mapping[str, Tensor]) -> None:
    for what, pictures in sets.items():
        check_pictures(pictures, what)
    if len(sizes := {tuple(pictures.shape[2:]) for pictures in sets.values()}) > 1:
        raise ShapeError(f"{', '.join(sets)} have heights and widths {sorted(sizes)}, expected one size")
