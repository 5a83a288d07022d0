"""Which of several concepts does a picture show? Told by the real pictures that it is like.

A concept's real pictures fall into groups, such as drawing styles. A picture of one group is compared with real ones of
all other groups, so that a copy of a real picture scores as that real picture does, no better.

Letters in shapes: `N` pictures, `M` of one concept, `H W` their size, `F` features.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from personae.data.sources import shrink
from personae.errors import DataError
from personae.evaluate.features import Features
from personae.evaluate.text2image_features import check_pictures


@dataclass(frozen=True)
class Known:
    """Real pictures of one concept, uint8 [M, 3, H, W], and the group of each."""

    pictures: Tensor
    groups: tuple[str, ...]


@dataclass(frozen=True)
class References:
    """The same as vectors, [M, F]."""

    vectors: Tensor
    groups: tuple[str, ...]


def references(features: Features, known: Mapping[str, Known], size: int) -> dict[str, References]:
    """By concept, of pictures pooled by area to `size` pixels, as those of a scene are.

    Raises: ShapeError; DataError, when a concept has no pictures.
    """
    found = {}
    for name, own in known.items():
        check_pictures(own.pictures, f"real pictures of {name}")
        found[name] = References(features.extract(shrink(own.pictures, size)), own.groups)
    return found


def nearest_concepts(
    found: Float[Tensor, "N F"], groups: Sequence[str | None], known: Mapping[str, References]
) -> tuple[str, ...]:
    """For each picture the concept with the largest cosine to the mean direction of its references.

    References of the picture's own group are left out; group None leaves nothing out. As in `score_subjects`, vectors
    are taken less the mean of the concepts' means.

    Raises: DataError, when that leaves a concept without references, or there are fewer than two concepts.
    """
    if len(known) < 2:
        raise DataError(f"pictures were to be told apart among {list(known)}, expected two concepts or more")
    centre = torch.stack([own.vectors.mean(0) for own in known.values()]).mean(0)
    asked, names, taken = normalize(found - centre, dim=1), list(known), [""] * len(found)
    for group in dict.fromkeys(groups):
        rows = [row for row, own in enumerate(groups) if own == group]
        kept = {n: r.vectors[[at for at, own in enumerate(r.groups) if own != group]] for n, r in known.items()}
        if empty := [name for name, vectors in kept.items() if len(vectors) == 0]:
            raise DataError(
                f"all pictures of {', '.join(empty)} are of group {group!r}, and one of that group cannot be compared "
                "with them; give pictures of two groups or more for each concept"
            )
        middles = torch.stack([normalize(vectors - centre, dim=1).mean(0) for vectors in kept.values()])
        nearest = (asked[rows] @ normalize(middles, dim=1).T).argmax(1).tolist()
        for row, best in zip(rows, nearest, strict=True):
            taken[row] = names[best]
    return tuple(taken)


def told_apart(
    known: Mapping[str, References], sets: Sequence[Sequence[str]], asked: Collection[str] | None = None
) -> float:
    """Over these sets of concepts, the share of real pictures that are taken for their own: how good a judge is.

    Of the groups that are `asked`, or of all; references are all others of a set.

    Raises: DataError.
    """
    right, num = 0, 0
    for names in sets:
        some = {name: known[name] for name in names}
        for name, own in some.items():
            rows = [row for row, group in enumerate(own.groups) if asked is None or group in asked]
            right += nearest_concepts(own.vectors[rows], [own.groups[row] for row in rows], some).count(name)
            num += len(rows)
    return right / num
