"""The robust rules written out number by number, in plain Python floats: no tensors, no sharing of work.

`rows` holds one list of numbers per client, `f` is the number of attackers; every function returns one list.
"""

from statistics import fmean
from statistics import median as middle_of


def median(rows, f):
    return [middle_of(column) for column in zip(*rows, strict=True)]


def trimmed_mean(rows, f):
    return [fmean(sorted(column)[f : len(rows) - f]) for column in zip(*rows, strict=True)]


def distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5


def scores(rows, f):
    """Of each row, the squared distances to the n - f - 2 nearest others (one at least), added up."""
    nearest = max(1, len(rows) - f - 2)
    return [
        sum(sorted(distance(row, other) ** 2 for k, other in enumerate(rows) if k != i)[:nearest])
        for i, row in enumerate(rows)
    ]


def krum(rows, f):
    found = scores(rows, f)
    return rows[found.index(min(found))]


def multi_krum(rows, f):
    found = scores(rows, f)
    best = sorted(range(len(rows)), key=lambda i: found[i])[: len(rows) - f]
    return [fmean(column) for column in zip(*(rows[i] for i in best), strict=True)]


def bulyan(rows, f):
    left, chosen = list(rows), []
    while len(chosen) < len(rows) - 2 * f:
        chosen.append(krum(left, f))
        left.remove(chosen[-1])
    result = []
    for column in zip(*chosen, strict=True):
        middle = middle_of(column)
        result.append(fmean(sorted(column, key=lambda x: abs(x - middle))[: len(chosen) - 2 * f]))
    return result


def geometric_median(rows, f, steps=5000):
    """Weiszfeld from the mean, step by step in the space of the models themselves."""
    point = [fmean(column) for column in zip(*rows, strict=True)]
    for _ in range(steps):
        weights = [1 / max(1e-12, distance(row, point)) for row in rows]
        point = [
            sum(w * x for w, x in zip(weights, column, strict=True)) / sum(weights)
            for column in zip(*rows, strict=True)
        ]
    return point
