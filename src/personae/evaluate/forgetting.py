"""What a sequence of concepts taught and took away, from the scores on every concept after every other.

Letters in shapes: `B` pictures, `K` captions, `*X` predictions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from personae.errors import ConfigError, DataError, ShapeError

Scores = Sequence[Sequence[float | None]]
"""R[i][j]: the score on concept j after concept i was learned, larger being better; None above the diagonal."""


@dataclass(frozen=True)
class Forgetting:
    """With N concepts, counted from 1:

        averages           A_i = 1 / i * sum_{j <= i} R[i][j], for every i
        learning           1 / N * sum_j R[j][j]
        intransigence      1 / N * sum_j (oracle_j - R[j][j])
        forgetting         1 / (N - 1) * sum_{j < N} (max_{j <= i < N} R[i][j] - R[N][j])
        backward_transfer  1 / (N - 1) * sum_{j < N} (R[N][j] - R[j][j])

    An oracle's score is that of a model that learned the concept alone. Without oracles there is no intransigence; with
    one concept there is neither forgetting nor backward transfer.

    In this variant of forgetting the last model is not in the maximum and the last concept is not in the mean, so that
    it is negative where concepts only gained.

    Source: Chaudhry et al. 2018, arXiv:1801.10112, for forgetting and intransigence, which is averaged over concepts
    here; Lopez-Paz, Ranzato 2017, arXiv:1706.08840, for backward transfer.
    """

    averages: tuple[float, ...]
    learning: float
    intransigence: float | None
    forgetting: float | None
    backward_transfer: float | None

    @property
    def average(self) -> float:
        """A_N, over all concepts after the last one."""
        return self.averages[-1]


def forgetting(scores: Scores, oracles: Sequence[float] | None = None) -> Forgetting:
    """The summaries of one matrix. Where smaller is better, give scores and oracles with their sign changed.

    Raises: ConfigError, which names the entry, when the scores are not a lower triangle of finite numbers, or the
    oracles not one for each concept.
    """
    known = _lower(scores)
    count, last = len(known), known[-1]
    if oracles is not None and (len(oracles) != count or not all(map(math.isfinite, oracles))):
        raise ConfigError(f"oracles are {list(oracles)}, expected {count} finite numbers, one for each concept")
    at_once = [row[-1] for row in known]
    best = [max(known[i][j] for i in range(j, count - 1)) for j in range(count - 1)]
    return Forgetting(
        averages=tuple(fmean(row) for row in known),
        learning=fmean(at_once),
        intransigence=None if oracles is None else fmean(a - b for a, b in zip(oracles, at_once, strict=True)),
        forgetting=fmean(best[j] - last[j] for j in range(count - 1)) if count > 1 else None,
        backward_transfer=fmean(last[j] - at_once[j] for j in range(count - 1)) if count > 1 else None,
    )


def _lower(scores: Scores) -> list[list[float]]:
    """The rows up to the diagonal."""
    if not scores:
        raise ConfigError("scores have no row, expected one for each concept")
    for i, row in enumerate(scores):
        if len(row) != len(scores):
            raise ConfigError(f"scores[{i}] has {len(row)} entries, expected {len(scores)}, one for each concept")
        for j, value in enumerate(row):
            if j > i and value is not None:
                raise ConfigError(f"scores[{i}][{j}] is {value}, expected None: concept {j} is not learned by then")
            if j <= i and (value is None or not math.isfinite(value)):
                raise ConfigError(f"scores[{i}][{j}] is {value}, expected a finite number")
    return [[float(value) for value in row[: i + 1] if value is not None] for i, row in enumerate(scores)]


def confusion(
    probabilities: Float[Tensor, "B K"], true: Int64[Tensor, " B"], count: int
) -> Float64[Tensor, "{count} K"]:
    """Row j: the shares in which pictures of concept j are taken for what each column stands for.

    The first `count` columns stand for the concepts; more may stand for other captions, such as the plain noun. Any
    scores will do, of which the largest says what a picture is taken for, the first one of equals.

    Raises: ShapeError, for fewer columns than concepts; DataError, when `true` names no concept, or one has no picture.
    """
    if probabilities.shape[1] < count:
        raise ShapeError(f"scores have {probabilities.shape[1]} columns, expected at least {count}, one for a concept")
    if odd := sorted(set(true.tolist()) ^ set(range(count))):
        raise DataError(
            f"concept {odd[0]} is no concept or has no picture; expected pictures of each of 0 to {count - 1}"
        )
    table = torch.zeros(count, probabilities.shape[1], dtype=torch.float64)
    taken = probabilities.argmax(1).cpu()
    table.index_put_((true.cpu(), taken), torch.ones(len(taken), dtype=torch.float64), accumulate=True)
    return table / table.sum(1, keepdim=True)


def drift_of_predictions(before: Float[Tensor, " *X"], after: Float[Tensor, " *X"]) -> float:
    """Mean squared difference of what a model said of the same noised images before and after.

    Under captions without a new word it measures, without a picture drawn, what teaching did to all else.
    """
    return float((after.double() - before.double()).square().mean())
