"""Mixtures of drawing styles: how a recipe writes one, and which pictures it consists of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from personae.core import stream
from personae.data.partition import whole_counts
from personae.errors import ConfigError


def shares_of(style: str) -> dict[str, float]:
    """Shares by style, summing to 1: of "70 noto + 30 emojione" 0.7 and 0.3, of "noto" all.

    Raises: ConfigError, when it can be read as neither.
    """
    parts = [part.split() for part in style.split("+")]
    if len(parts) == 1 and len(parts[0]) == 1:
        return {parts[0][0]: 1.0}
    try:
        shares = {name: float(share) for share, name in parts}
    except ValueError:
        shares = {}
    if len(shares) < max(2, len(parts)) or not all(0 < share < math.inf for share in shares.values()):
        raise ConfigError(
            f"the style {style!r} is neither one style nor a mixture of several; write a mixture as "
            "'70 noto + 30 emojione': numbers above 0, each before another style"
        )
    return {name: share / sum(shares.values()) for name, share in shares.items()}


def dealt(mixtures: Sequence[Mapping[str, float]], num_names: int) -> list[list[tuple[str, int]]]:
    """For each mixture of styles, the style and the name's number of its pictures, in the order of names.

    No picture, a name in a style, is in two mixtures. All have equally many, as many as there can be; a mixture of one
    style only, beside others that lack it, has every name. Within a mixture a name comes twice, in two styles, only
    where no other is left.
    """
    counts = _counts(mixtures, num_names)
    orders = dict.fromkeys(style for mixture in mixtures for style in mixture)
    left = {s: torch.randperm(num_names, generator=stream(0, "style mixtures", s)).tolist() for s in orders}
    found = []
    for mixture, wanted in zip(mixtures, counts, strict=True):
        own: list[tuple[str, int]] = []
        for style, count in zip(mixture, wanted, strict=True):
            had = {name for _, name in own}
            first = sorted(left[style], key=had.__contains__)
            own += [(style, name) for name in first[:count]]
            left[style] = first[count:]
        found.append(sorted(own, key=lambda picture: picture[1]))
    return found


def _counts(mixtures: Sequence[Mapping[str, float]], num_names: int) -> list[list[int]]:
    """How many pictures of each of its styles a mixture has: as many in all as leave enough of every style."""
    for size in range(num_names, 0, -1):
        counts = [whole_counts(torch.tensor(list(mixture.values())), size).tolist() for mixture in mixtures]
        asked = dict[str, int]()
        for mixture, own in zip(mixtures, counts, strict=True):
            for style, count in zip(mixture, own, strict=True):
                asked[style] = asked.get(style, 0) + count
        if max(asked.values()) <= num_names:
            return counts
    raise ConfigError(f"{len(mixtures)} styles share {num_names} pictures of one style; name fewer of them")
