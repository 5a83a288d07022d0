"""Do groups that were found agree with those that are true?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from personae.errors import DataError


def adjusted_rand(found: Sequence[Hashable], true: Sequence[Hashable]) -> float:
    """The adjusted Rand index of two groupings of the same clients: 1 for equal ones, about 0 for chance.

    Source: Hubert, Arabie 1985, equation 5. Raises: DataError, when they are of different numbers of clients, or none.
    """
    from sklearn.metrics import adjusted_rand_score

    if len(found) != len(true) or not found:
        raise DataError(f"groupings are of {len(found)} and {len(true)} clients, expected as many, and at least one")
    return float(adjusted_rand_score(_numbers(true), _numbers(found)))


def _numbers(groups: Sequence[Hashable]) -> list[int]:
    order = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return [order[group] for group in groups]


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """The chance that a positive's score is above a negative's, ties counting half: 1 tells them apart, 0.5 does not.

    Raises: DataError, when one of the two kinds is missing, or the numbers differ.
    """
    from sklearn.metrics import roc_auc_score

    if len(scores) != len(positive) or len(set(map(bool, positive))) < 2:
        raise DataError(
            f"{len(scores)} scores are of {sum(map(bool, positive))} positives and "
            f"{len(positive) - sum(map(bool, positive))} negatives, expected as many as both, and some of each"
        )
    return float(roc_auc_score([bool(each) for each in positive], list(scores)))
