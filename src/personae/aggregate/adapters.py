"""From clients' adapters to one: what published methods do, each a short function, and what of them is exact.

Exact means that the result adds sum_k p_k B_k A_k to the weights, the weighted mean of what the clients' adapters add;
p_k are `shares` that sum to 1. Averaging factors is not: it leaves out sum_k p_k (B_k - mean B)(A_k - mean A).

Adapters that are averaged factor by factor need the same rank, and should start from the same A.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from personae.aggregate.low_rank import Adapter, LowRank, alike, gram, inner, recompressed, stacked
from personae.aggregate.robust import by_score, fewest, weiszfeld
from personae.errors import ConfigError, ShapeError, TooFewClients


def shares_of(num_examples: Sequence[int], at_most: float = 2.0) -> list[float]:
    """Each client's part of the whole by its examples. Nobody's count for more than `at_most` times the median.

    The number is a client's own claim.
    """
    cap = at_most * median(num_examples)
    counted = [min(float(number), cap) for number in num_examples]
    return [number / sum(counted) for number in counted]


def factor_mean(adapters: Sequence[Adapter], shares: Sequence[float]) -> dict[str, LowRank]:
    """The mean of A and the mean of B. Not exact.

    Source: Zhang et al. 2023, FedIT, arXiv:2305.05644. Raises: ShapeError, when ranks differ.
    """
    _same_rank(adapters)
    return {
        layer: LowRank(
            _mean([adapter[layer].B for adapter in adapters], shares),
            _mean([adapter[layer].A for adapter in adapters], shares),
        )
        for layer in adapters[0]
    }


def common_A(adapters: Sequence[Adapter], shares: Sequence[float]) -> dict[str, LowRank]:
    """The mean of B beside the one A that all clients have. Exact.

    Source: Sun et al. 2024, FFA-LoRA, arXiv:2403.12313, where A stays as it was drawn; Chen et al. 2025, RoLoRA,
    arXiv:2502.01755, in rounds that train B. With an A of orthonormal rows, |B - B'| = |B A - B' A|.
    Raises: ConfigError, when somebody has another A.
    """
    return _with_common(adapters, shares, "A")


def common_B(adapters: Sequence[Adapter], shares: Sequence[float]) -> dict[str, LowRank]:
    """The mean of A beside the one B that all clients have. Exact.

    Source: RoLoRA, in rounds that train A. Raises: ConfigError, when somebody has another B.
    """
    return _with_common(adapters, shares, "B")


def zero_padded(adapters: Sequence[Adapter]) -> dict[str, LowRank]:
    """Factors of different ranks, filled up with zeros to the largest and averaged by the norms of B A. Not exact.

    A client takes from it as many ranks as it has, the first ones.
    Source: Cho et al. 2024, HetLoRA, arXiv:2401.06432. That a client weighs |B_k A_k| / sum_j |B_j A_j| is our reading;
    its pruning of ranks in training is not part of this.
    """
    alike(adapters)
    result = {}
    for layer in adapters[0]:
        changes = [adapter[layer] for adapter in adapters]
        norms = [max(0.0, inner(change, change)) ** 0.5 for change in changes]
        whole = sum(norms)
        weights = [norm / whole for norm in norms] if whole else [1 / len(norms)] * len(norms)
        most = max(change.rank for change in changes)
        padded = [
            LowRank(
                torch.nn.functional.pad(change.B, (0, most - change.rank)),
                torch.nn.functional.pad(change.A, (0, 0, 0, most - change.rank)),
            )
            for change in changes
        ]
        result[layer] = LowRank(_mean([c.B for c in padded], weights), _mean([c.A for c in padded], weights))
    return result


def first_ranks(adapter: Adapter, rank: int) -> dict[str, LowRank]:
    """What a client of a smaller rank takes of a padded adapter."""
    return {layer: LowRank(change.B[:, :rank], change.A[:rank]) for layer, change in adapter.items()}


def mean_and_rest(
    adapters: Sequence[Adapter], shares: Sequence[float]
) -> tuple[dict[str, LowRank], dict[str, LowRank]]:
    """The means of the factors, and what these leave out, which goes into the weights. Together exact.

    Source: Singhal et al. 2024, FedEx-LoRA, arXiv:2410.09432. The rest has rank K R + R as it stands here.
    """
    averaged = factor_mean(adapters, shares)
    return averaged, stacked([*adapters, averaged], [*shares, -1.0])


def corrected_mean(adapters: Sequence[Adapter], shares: Sequence[float], ridge: float = 1e-6) -> dict[str, LowRank]:
    """The mean of A, and beside it the B that brings the product closest to the exact one. Not exact: it stays within
    the rows of the mean of A.

    The solution in closed form of min |D - (mean B + X) mean A|^2 + lambda |X|^2, lambda being `ridge` times the mean
    squared length of A's rows; the paper takes gradient steps on a similarity.
    Source: Bian et al. 2024, LoRA-FAIR, arXiv:2411.14961.
    """
    averaged = factor_mean(adapters, shares)
    _, rest = mean_and_rest(adapters, shares)
    result = {}
    for layer, change in averaged.items():
        rows = change.A.double()
        square = rows @ rows.T
        weight = ridge * float(square.diagonal().mean()) or 1.0
        towards = rest[layer].B.double() @ (rest[layer].A.double() @ rows.T)
        step = torch.linalg.solve(square + weight * torch.eye(len(square), dtype=square.dtype), towards.T).T
        result[layer] = LowRank((change.B.double() + step).to(change.B), change.A)
    return result


def nearest(adapters: Sequence[Adapter], weights: Sequence[float], rank: int) -> dict[str, LowRank]:
    """The change of this rank that is nearest to the weighted sum of the clients'. Exact, when that has no larger rank.

    Source: Bai et al. 2024, FlexLoRA, arXiv:2402.11505; here without forming the sum.
    """
    return {layer: recompressed(change, rank) for layer, change in stacked(adapters, weights).items()}


def nearest_with_rest(
    adapters: Sequence[Adapter], weights: Sequence[float], rank: int, carried: Adapter | None, rest_rank: int
) -> tuple[dict[str, LowRank], dict[str, LowRank]]:
    """`nearest` to the sum and what earlier rounds left out, and what is left out now, to be carried on.

    Our own. Over all rounds what was applied and the last rest add up to the sum of the exact ones, as far as
    `rest_rank` has room for it.
    """
    whole = stacked(adapters, weights)
    if carried is not None:
        whole = stacked([whole, carried], [1.0, 1.0])
    kept = {layer: recompressed(change, rank) for layer, change in whole.items()}
    rest = stacked([whole, kept], [1.0, -1.0])
    return kept, {layer: recompressed(change, rest_rank) for layer, change in rest.items()}


# --- weights that withstand attackers, from inner products alone ---------------------------------------------------


def geometric_median_weights(adapters: Sequence[Adapter]) -> list[float]:
    """Weights of the adapter with the smallest sum of distances to the clients': `stacked` with them gives it.

    Source: Pillutla et al. 2019, RFA, arXiv:1912.13445, Algorithm 2, on products, by their inner products alone.
    """
    products = gram(adapters)
    # Relative to the adapter that is nearest to most others: an attacker may be as far away as it likes.
    middle = int(squared_distances(adapters).median(dim=1).values.argmin())
    row = products[middle]
    weights: list[float] = weiszfeld(products - row - row[:, None] + row[middle]).tolist()
    return weights


def factor_geometric_median_weights(adapters: Sequence[Adapter]) -> list[float]:
    """Weights of the geometric median of the factors' entries: `factor_mean` with them gives it.

    What it takes for near depends on which of the factors of one change clients send.
    Source: as above, on factors. Raises: ShapeError, when ranks differ.
    """
    _same_rank(adapters)
    rows = torch.stack(
        [torch.cat([part.flatten() for of in each.values() for part in (of.B, of.A)]).double() for each in adapters]
    )
    middle = int(torch.cdist(rows, rows).median(dim=1).values.argmin())
    rows = rows - rows[middle]
    weights: list[float] = weiszfeld(rows @ rows.T).tolist()
    return weights


def multi_krum_weights(adapters: Sequence[Adapter], attackers: int) -> list[float]:
    """Alike for the n - f adapters with the smallest sums of squared distances to their n - f - 2 nearest, else 0.

    Source: Blanchard et al. 2017, arXiv:1703.02757, on products. Raises: TooFewClients, below 2 f + 3.
    """
    if len(adapters) < fewest("multi_krum", attackers):
        raise TooFewClients(
            f"multi-Krum has {len(adapters)} adapters; against {attackers} attackers it needs at least "
            f"{fewest('multi_krum', attackers)}"
        )
    best = set(by_score(squared_distances(adapters), attackers)[: len(adapters) - attackers])
    return [1 / len(best) if k in best else 0.0 for k in range(len(adapters))]


def clipped_weights(adapters: Sequence[Adapter], shares: Sequence[float]) -> list[float]:
    """Shares of which those of adapters longer than the median are shortened to it."""
    lengths = gram(adapters).diagonal().clamp(min=0).sqrt()
    limit = float(lengths.median())
    short = [min(1.0, limit / length) if length else 1.0 for length in lengths.tolist()]
    return [share * part for share, part in zip(shares, short, strict=True)]


def trusted_weights(adapters: Sequence[Adapter], root: Adapter) -> list[float]:
    """Adapters count by the cosine of their angle to a trusted one, none below zero, and are made as long as that.

    Source: Cao et al. 2021, FLTrust, arXiv:2012.13995, on products. All 0, when nobody is trusted.
    """
    products = gram([*adapters, root])
    *lengths, own = products.diagonal().clamp(min=0).sqrt().tolist()
    along = products[-1, :-1].tolist()
    trust = [max(0.0, p / (own * n)) if own and n else 0.0 for p, n in zip(along, lengths, strict=True)]
    whole = sum(trust)
    return [t / whole * own / n if t else 0.0 for t, n in zip(trust, lengths, strict=True)]


def squared_distances(adapters: Sequence[Adapter]) -> Tensor:
    """Shapes: float64 [K, K], of products."""
    products = gram(adapters)
    squares = products.diagonal()
    return (squares[:, None] + squares - 2 * products).clamp(min=0)


# --- pieces --------------------------------------------------------------------------------------------------------


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """As a change of the first, so that equal ones average to exactly themselves."""
    first = values[0]
    return first + sum((w * (value - first) for w, value in zip(weights, values, strict=True)), torch.zeros_like(first))


def _same_rank(adapters: Sequence[Adapter]) -> None:
    alike(adapters)
    for layer in adapters[0]:
        if len(ranks := {adapter[layer].rank for adapter in adapters}) > 1:
            raise ShapeError(
                f"the adapters of {layer} have ranks {', '.join(map(str, sorted(ranks)))}; factors of different ranks "
                "have no mean. Stack them, pad them with zeros, or take the nearest of one rank"
            )


def _with_common(adapters: Sequence[Adapter], shares: Sequence[float], factor: str) -> dict[str, LowRank]:
    _same_rank(adapters)
    for layer in adapters[0]:
        first = getattr(adapters[0][layer], factor)
        others = [k for k, adapter in enumerate(adapters) if not torch.equal(getattr(adapter[layer], factor), first)]
        if others:
            raise ConfigError(
                f"adapter {others[0]} has another {factor} than the first at {layer}; this rule needs one for all"
            )
    return factor_mean(adapters, shares)
