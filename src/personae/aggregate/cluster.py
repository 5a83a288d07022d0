"""Which clients belong together, and how much each group counts in what is shared by all.

Letters in shapes: `K` clients, `C` clusters, `D` numbers of a descriptor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal, get_args

import torch
from jaxtyping import Float
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import silhouette_score
from torch import Tensor

from personae.aggregate.low_rank import Adapter, overlap, singular_values
from personae.errors import ConfigError

Sign = Literal["distinct", "conservative"]
Trace = Literal["a", "b", "c"]


def similarities(
    descriptors: Float[Tensor, "K D"], adapters: Sequence[Adapter] | None = None, descriptor_share: float = 0.5
) -> Float[Tensor, "K K"]:
    """Cosines of descriptors; with adapters, `descriptor_share` of these and the rest from the overlap of B's spaces.

    Raises: ConfigError, when a descriptor is zero or not finite.
    """
    lengths = descriptors.double().norm(dim=1)
    if odd := [k for k, length in enumerate(lengths.tolist()) if not 0 < length < float("inf")]:
        raise ConfigError(f"the descriptor of client number {odd[0]} is zero or not finite: it says nothing")
    units = descriptors.double() / lengths[:, None]
    cosines: Tensor = units @ units.T
    if adapters is None:
        return cosines
    common = torch.tensor([[_common(one, other) for other in adapters] for one in adapters])
    both: Tensor = descriptor_share * cosines + (1 - descriptor_share) * common.double()
    return both


def clustered(
    similar: Float[Tensor, "K K"], *, most: int = 8, smallest: int = 3, least: float = 0.25, slack: float = 0.15
) -> list[int]:
    """The cluster of each client, numbered from 0 in order of first appearance.

    Average linkage on 1 - similarity, cut into 2 to `most` clusters, of which those of fewer than `smallest` join the
    ones that are nearest on average. Of all cuts whose mean silhouette is within `slack` of the best it is the one with
    the most clusters: kinds of kinds have the better silhouette. Not cut at all when the best is below `least`.

    Our choice: the paper that clusters clients by the likeness of their descriptors does not say how.
    Raises: ConfigError, for a matrix that is not square and symmetric.
    """
    if similar.dim() != 2 or similar.shape[0] != similar.shape[1] or not torch.allclose(similar, similar.T):
        raise ConfigError(f"similarities are {list(similar.shape)}, expected a symmetric matrix")
    count = len(similar)
    apart = (1 - similar.double()).clamp(min=0)
    apart.fill_diagonal_(0)
    if count < 3:  # a silhouette needs more
        return [0] * count
    far = apart.numpy()
    tree = linkage(squareform(far, checks=False), "average")
    cuts: list[tuple[float, int, list[int]]] = []
    for number in range(2, min(most, count - 1) + 1):
        cut = _joined(fcluster(tree, number, "maxclust").tolist(), apart, smallest)
        if (groups := len(set(cut))) > 1:
            cuts.append((float(silhouette_score(far, cut, metric="precomputed")), groups, cut))
    best = max((score for score, _, _ in cuts), default=-1.0)
    if best <= least:
        return [0] * count
    good = [cut for cut in cuts if cut[0] >= best - slack]
    return _numbered(max(good, key=lambda cut: (cut[1], cut[0]))[2])


def _joined(labels: list[int], apart: Tensor, smallest: int) -> list[int]:
    """Clusters that are too small, the smallest first, go to the nearest one."""
    while len(names := sorted(set(labels))) > 1:
        members = {name: [k for k, label in enumerate(labels) if label == name] for name in names}
        little = min(names, key=lambda name: (len(members[name]), members[name][0]))
        if len(members[little]) >= smallest:
            break
        others = [name for name in names if name != little]
        nearest = min(others, key=lambda name: (float(apart[members[little]][:, members[name]].mean()), name))
        labels = [nearest if label == little else label for label in labels]
    return labels


def _numbered(labels: Sequence[int]) -> list[int]:
    order = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return [order[label] for label in labels]


# --- groups that have been there for a while -----------------------------------------------------------------------


def kept_up(
    descriptors: Float[Tensor, "K D"],
    groups: Sequence[int],
    adapters: Sequence[Adapter],
    won: Sequence[int],
    threshold: float,
    *,
    most: int = 8,
    smallest: int = 3,
) -> tuple[list[int], list[int]]:
    """The groups a round later, and how often running another was likelier for each: one group is split or two are
    merged, as in `restructured`; in a round without that, single members move, as in `moved`."""
    after = restructured(descriptors, groups, adapters, threshold, most=most, smallest=smallest)
    return (after, [0] * len(after)) if after != list(groups) else moved(descriptors, groups, won, threshold)


def restructured(
    descriptors: Float[Tensor, "K D"],
    groups: Sequence[int],
    adapters: Sequence[Adapter],
    threshold: float,
    *,
    most: int = 8,
    smallest: int = 3,
    least: float = 0.35,
    common: float = 0.6,
) -> list[int]:
    """The groups after at most one change: one is split in two, or else two are merged, or all stay.

    Split is the group whose halves by 2-means have the highest mean silhouette, above `least`, with `smallest` members
    or more in each, unless there are `most` groups already. Merged are the two whose centres have the highest cosine,
    above 1 - (1 - threshold) / 2, and whose `adapters`, one for each group, have more than `common` of their B's spaces
    in common. Two that would be split again as one stay apart. `threshold` is that of `aggregate.newcomers.familiar`.
    The second half of a split group is a new one, with the highest number; of two merged groups the lower number stays,
    and numbers above the other move down.

    Our choice. Members' order matters only where two are equally far from two centres.
    Raises: ConfigError, when groups are not numbered from 0, or adapters are not one for each.
    """
    count = max(groups, default=-1) + 1
    if len(groups) != len(descriptors) or set(groups) != set(range(count)) or len(adapters) != count:
        raise ConfigError(
            f"{len(descriptors)} descriptors are of groups {sorted(set(groups))}, with {len(adapters)} adapters; "
            "expected a number from 0 for each descriptor, and one adapter for each group"
        )
    units = torch.nn.functional.normalize(descriptors.double(), dim=1)
    members = [[k for k, group in enumerate(groups) if group == number] for number in range(count)]
    halves = {number: half for number, own in enumerate(members) if (half := _halves(units[own], smallest, least))}
    if halves and count < most:
        split = max(halves, key=lambda number: halves[number][0])
        away = {members[split][k] for k in halves[split][1]}
        return [count if k in away else group for k, group in enumerate(groups)]
    centres = torch.stack([units[own].mean(0) for own in members])
    for stays, goes in _nearest_pairs(centres, 1 - (1 - threshold) / 2):
        both = units[sorted(members[stays] + members[goes])]
        if _common(adapters[stays], adapters[goes]) > common and not _halves(both, smallest, least):
            return [stays if group == goes else group - (group > goes) for group in groups]
    return list(groups)


def moved(
    descriptors: Float[Tensor, "K D"], groups: Sequence[int], won: Sequence[int], threshold: float, patience: int = 3
) -> tuple[list[int], list[int]]:
    """The groups after those have moved to a likelier one for whom it was likelier `patience` times running.

    Likelier is the nearest centre of another group when it is nearer than that of the own group without the member; a
    member that is alone moves to a centre whose cosine is at least `threshold`. `won` says how often that was so for
    each so far, and is returned as it is now. A group that all have left goes, and the numbers above it move down.

    Our choice.
    """
    units = torch.nn.functional.normalize(descriptors.double(), dim=1)
    count, own = max(groups, default=-1) + 1, torch.tensor(groups)
    sums = torch.stack([units[own == number].sum(0) for number in range(count)])
    alike = units @ torch.nn.functional.normalize(sums, dim=1).T
    rows = torch.arange(len(units))
    without = torch.nn.functional.cosine_similarity(units, sums[own] - units, dim=1)
    without[own.bincount()[own] == 1] = threshold
    alike[rows, own] = -torch.inf
    best = alike.max(1)
    wins = [n + 1 if better else 0 for n, better in zip(won, (best.values > without).tolist(), strict=True)]
    chosen = [to if n >= patience else at for n, to, at in zip(wins, best.indices.tolist(), groups, strict=True)]
    there = sorted(set(chosen))
    return [there.index(group) for group in chosen], [n if n < patience else 0 for n in wins]


def _nearest_pairs(centres: Tensor, above: float) -> list[tuple[int, int]]:
    """The pairs whose cosine is above this, the most alike first."""
    units = torch.nn.functional.normalize(centres, dim=1)
    alike = {(a, b): float(units[a] @ units[b]) for a, b in combinations(range(len(units)), 2)}
    return sorted((pair for pair in alike if alike[pair] > above), key=lambda pair: (-alike[pair], pair))


def _halves(units: Tensor, smallest: int, least: float) -> tuple[float, list[int]] | None:
    """The silhouette of a group's halves, and who is not in the first's; None where it is not to be split."""
    if len(units) < max(3, 2 * smallest):
        return None
    half = _two_means(units)
    if min(half.sum(), (1 - half).sum()) < max(1, smallest):
        return None
    apart = (1 - units @ units.T).clamp(min=0).fill_diagonal_(0)
    score = float(silhouette_score(apart.numpy(), half.numpy(), metric="precomputed"))
    return (score, (half != half[0]).nonzero()[:, 0].tolist()) if score > least else None


def _two_means(units: Tensor) -> Tensor:
    """0 or 1 for each, by 2-means on the sphere, which starts from the two that are least alike."""
    centres = units[list(divmod(int((units @ units.T).argmin()), len(units)))]
    half = (units @ centres.T).argmax(1)
    for _ in range(100):
        sums = [units[half == h].sum(0) if (half == h).any() else centres[h] for h in (0, 1)]
        centres = torch.nn.functional.normalize(torch.stack(sums), dim=1)
        half, before = (units @ centres.T).argmax(1), half
        if torch.equal(half, before):
            break
    return half


def _common(one: Adapter, other: Adapter) -> float:
    """The mean over layers of what B's spaces have in common, 0 to 1."""
    return sum(overlap(one[layer], other[layer]) for layer in one) / len(one)


# --- how much each cluster counts ----------------------------------------------------------------------------------


def domain_distances(centres: Float[Tensor, "C D"]) -> list[float]:
    """Each cluster's mean of 1 - cosine to the others' centres, 0 to 2; 1 when it is alone.

    The name, domain embedding distance, is that of Li et al. 2025, arXiv:2508.04745; the formula is our reconstruction.
    """
    count = len(centres)
    if count == 1:
        return [1.0]
    units = torch.nn.functional.normalize(centres.double(), dim=1)
    apart = 1 - units @ units.T
    return [float((apart[c].sum() - apart[c, c]) / (count - 1)) for c in range(count)]


def normalized_traces(adapters: Sequence[Adapter], kind: Trace = "a") -> list[float]:
    """Of each cluster's singular values s_1 to s_R, the mean over layers of

    "a": sum s / (sqrt(R) sqrt(sum s^2)): 1 when they are alike, 1 / sqrt(R) when there is one; scale does not matter;
    "b": the cluster's part of all clusters' sum s, which grows with scale;
    "c": sum s / (R s_1).

    Raises: ConfigError, for another kind.
    Source: the name, SVD normalized trace, is that of Li et al. 2025, arXiv:2508.04745; the formulas are our
    reconstructions.
    """
    if kind not in get_args(Trace):
        raise ConfigError(f"trace is {kind!r}; expected one of {', '.join(get_args(Trace))}")
    layers = list(adapters[0])
    values = [[singular_values(adapter[layer]) for layer in layers] for adapter in adapters]
    sums = [[float(s.sum()) for s in row] for row in values]
    if kind == "b":
        totals = [sum(column) for column in zip(*sums, strict=True)]
        parts = [[s / total if total else 1 / len(sums) for s, total in zip(row, totals, strict=True)] for row in sums]
        return [sum(row) / len(row) for row in parts]
    found = []
    for row, traces in zip(values, sums, strict=True):
        against = [len(s) ** 0.5 * float(s.norm()) if kind == "a" else len(s) * float(s.max()) for s in row]
        found.append(sum(t / a if a else 0.0 for t, a in zip(traces, against, strict=True)) / len(row))
    return found


def domain_weights(
    sizes: Sequence[int],
    distances: Sequence[float],
    traces: Sequence[float],
    *,
    powers: Mapping[Literal["size", "distance", "trace"], float] | None = None,
    sign: Sign = "distinct",
) -> list[float]:
    """Each cluster's share in the stack: size^a g(distance)^b trace^h, summing to 1, none above min(1/2, 3/C).

    So two clusters always share alike, and one has all.

    g(x) is x for "distinct", where clusters that are alike share what is theirs, and 2 - x for "conservative", where
    outliers count less; at least 0.05. `powers` are 1/2, 1 and 1 where none are given; 0 takes an ingredient out. What
    a cluster has above the most goes to the others in proportion.

    Raises: ConfigError, for another sign.
    Source: our reconstruction; of Li et al. 2025, arXiv:2508.04745, only the two ingredients' names are known to us.
    """
    if sign not in get_args(Sign):
        raise ConfigError(f"sign is {sign!r}; expected one of {', '.join(get_args(Sign))}")
    own = {"size": 0.5, "distance": 1.0, "trace": 1.0, **(powers or {})}
    toward = [max(0.05, x if sign == "distinct" else 2 - x) for x in distances]
    raw = [
        size ** own["size"] * g ** own["distance"] * trace ** own["trace"]
        for size, g, trace in zip(sizes, toward, traces, strict=True)
    ]
    whole = sum(raw)
    if not whole:
        return [1 / len(raw)] * len(raw)
    return _capped([value / whole for value in raw], max(1 / len(raw), min(0.5, 3 / len(raw))))


def _capped(shares: Sequence[float], most: float) -> list[float]:
    """The excess of those above goes to those below in proportion, until none is above."""
    held, result = set[int](), list(shares)
    while over := [c for c, share in enumerate(result) if share > most + 1e-12 and c not in held]:
        held |= set(over)
        free = [c for c in range(len(result)) if c not in held]
        left, below = 1 - most * len(held), sum(shares[c] for c in free)
        result = [
            most if c in held else (shares[c] / below * left if below else left / len(free)) for c in range(len(result))
        ]
    return result
