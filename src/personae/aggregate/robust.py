"""Rules that withstand clients who send whatever they like, as long as there are at most `attackers` of them.

Honest clients differ from each other too, so a robust rule costs something where nobody attacks, and most where clients
are few or unlike. What every rule here does:

- It holds a round's updates in memory, one model per client, since none can be judged without the others.
- Clients weigh alike. The number of examples is a client's own claim, and a claim must not buy power.
- A client that sent anything not finite is left out, and is one of the attackers found. The engines refuse such a
  client before a rule sees it: then the rule has one update less, and still needs as many as it says.
- Updates are taken in client-name order, which also decides ties, so the order of arrival changes nothing.
- Values are combined as float32 (float64 stays) and given back in their own type.

Letters in shapes: `K` clients, `S` of them selected, `P` numbers of one tensor; `f` stands for `attackers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from personae.core import Arrays, Update
from personae.errors import ConfigError, EmptyRound, RefusedUpdate, TooFewClients

NEEDED: Mapping[str, tuple[int, int]] = {
    "median": (2, 1),
    "trimmed_mean": (2, 1),
    "krum": (2, 3),
    "multi_krum": (2, 3),
    "bulyan": (4, 3),
    "geometric_median": (2, 1),
}
"""By rule (a, b): against f attackers it needs at least a f + b clients."""

RELATIVE = 1e-9
"""Weiszfeld's steps end when one is this much shorter than the clients' median distance from where they started."""

SMOOTHING = 1e-6
"""RFA's nu, in the same unit."""

MOST_STEPS = 10_000


def fewest(rule: str, attackers: int) -> int:
    """How many clients the rule needs against so many attackers."""
    a, b = NEEDED[rule]
    return a * attackers + b


def median(updates: Iterable[Update], *, attackers: int = 0) -> Arrays:
    """Of every number the median over clients; of an even count, the middle of the two.

    Within the honest clients' range in every number. Needs n >= 2 f + 1, which is all that `attackers` is used for.

    Raises: EmptyRound; TooFewClients; RefusedUpdate, when more than f clients sent values that are not finite.
    Source: Yin et al. 2018, arXiv:1803.01498, Definition 1, on models instead of gradients.
    """
    models, _ = _received("median", updates, attackers)
    return _combined(models, _median)


def trimmed_mean(updates: Iterable[Update], *, attackers: int) -> Arrays:
    """Of every number the mean over clients without the f largest and the f smallest.

    Within the honest clients' range in every number. Needs n >= 2 f + 1; f = 0 is the mean.

    Raises: as `median`.
    Source: Yin et al. 2018, arXiv:1803.01498, Definition 2, on models instead of gradients, with f clients instead of a
    share of them.
    """
    models, f = _received("trimmed_mean", updates, attackers)
    return _combined(models, lambda values: _mean(values.sort(dim=0).values[f : len(values) - f]))


def krum(updates: Iterable[Update], *, attackers: int) -> Arrays:
    """The one update that is closest to its n - f - 2 nearest others, by the sum of squared distances.

    One client's model, not an average of many: where nobody attacks, a round gains what one client learned.
    Needs n >= 2 f + 3.

    Raises: as `median`.
    Source: Blanchard et al. 2017, arXiv:1703.02757, on models instead of gradients.
    """
    models, f = _received("krum", updates, attackers)
    return _combined([models[by_score(_squared_distances(models), f)[0]]], _mean)


def multi_krum(updates: Iterable[Update], *, attackers: int) -> Arrays:
    """The mean of the n - f updates with the best scores of `krum`. Needs n >= 2 f + 3.

    Raises: as `median`.
    Source: Blanchard et al. 2017, arXiv:1703.02757. Departure: n - f are kept, so that no honest client need be lost;
    the paper's proof asks that fewer be.
    """
    models, f = _received("multi_krum", updates, attackers)
    best = by_score(_squared_distances(models), f)[: len(models) - f]
    return _combined([models[k] for k in sorted(best)], _mean)


def bulyan(updates: Iterable[Update], *, attackers: int) -> Arrays:
    """Krum chooses S = n - 2 f updates one after the other; then, of every number, the mean of the S - 2 f nearest to
    the median of the chosen.

    Against one number made large in a model that is close otherwise, which Krum's distances let pass.
    Needs n >= 4 f + 3.

    Raises: as `median`.
    Source: El Mhamdi et al. 2018, arXiv:1802.07927. Departure: when fewer than 2 f + 3 remain to choose from,
    Krum's scores look at n - f - 2 neighbours of those that remain, at one at least.
    """
    models, f = _received("bulyan", updates, attackers)
    distances, remaining, chosen = _squared_distances(models), list(range(len(models))), list[int]()
    while len(chosen) < len(models) - 2 * f:
        best = by_score(distances[remaining][:, remaining], f)[0]
        chosen.append(remaining.pop(best))

    def near_the_median(values: Tensor) -> Tensor:
        """Shapes: values [S, ...]; returns [...]."""
        order = (values - _median(values)).abs().argsort(dim=0, stable=True)[: len(values) - 2 * f]
        return _mean(values.gather(0, order))

    return _combined([models[k] for k in sorted(chosen)], near_the_median)


def geometric_median(updates: Iterable[Update], *, attackers: int = 0) -> Arrays:
    """The model with the smallest sum of distances to the clients', by smoothed Weiszfeld steps to 1e-9 relative.

    Needs n >= 2 f + 1, which is all that `attackers` is used for.

    A step weighs client k with 1 / max(nu, d_k), d_k its distance from the current point, and goes to the weighted
    mean. Since the point is a weighted mean throughout, d_k^2 = G_kk - 2 (G w)_k + w'G w, with G the inner products of
    the models relative to their coordinate-wise median: models are walked over twice, whatever the number of steps.

    Raises: as `median`.
    Source: Pillutla, Kakade, Harchaoui 2019, RFA, arXiv:1912.13445, Algorithm 2. Departures: clients weigh alike, not
    by their examples; nu is relative to the clients' distances; steps start at the coordinate-wise median and go on to
    convergence, where the paper takes few.
    """
    models, _ = _received("geometric_median", updates, attackers)
    products = torch.zeros(len(models), len(models), dtype=torch.float64)
    for name, centre in _combined(models, _median).items():
        rows = torch.stack([(model[name].double() - centre.double()).flatten() for model in models])
        products += rows @ rows.T
    near = products.diagonal().isfinite()  # all, unless somebody's float64 overflow when they are squared
    weights = torch.zeros(len(models), dtype=torch.float64)
    weights[near] = weiszfeld(products[near][:, near])

    def weighted(values: Tensor) -> Tensor:
        """Shapes: values [K, ...]; returns [...]."""
        middle = _median(values)
        change: Tensor = torch.tensordot(weights.to(values.dtype), values - middle, dims=1)
        return middle + change

    return _combined(models, weighted)


# --- what rules are made of ----------------------------------------------------------------------------------------


def _received(rule: str, updates: Iterable[Update], attackers: int) -> tuple[list[Arrays], int]:
    """The finite models in client-name order, and how many attackers may be left among them."""
    if attackers < 0:
        raise ConfigError(f"rule {rule!r}: attackers is {attackers}, expected at least 0")
    arrived = sorted(updates, key=lambda update: update.client)
    if not arrived:
        raise EmptyRound("there are no updates to combine; check the cohort, or which clients were asked for")
    if len(arrived) < fewest(rule, attackers):
        a, b = NEEDED[rule]
        raise TooFewClients(
            f"rule {rule!r} has {len(arrived)} updates in this round; against {attackers} attackers it needs at least "
            f"{a} x {attackers} + {b} = {fewest(rule, attackers)}. Let more clients take part, expect fewer attackers, "
            "or choose a rule that needs fewer clients"
        )
    found = [u.client for u in arrived if not all(v.isfinite().all() for v in u.sent.params.values())]
    if len(found) > attackers:
        raise RefusedUpdate(
            f"rule {rule!r}: {len(found)} clients sent values that are not finite, and only {attackers} attackers are "
            f"expected: {', '.join(found[:5])}. Their training diverged: lower the learning rate"
        )
    return [u.sent.params for u in arrived if u.client not in found], attackers - len(found)


def _combined(models: Sequence[Arrays], combine: Callable[[Tensor], Tensor]) -> Arrays:
    """Tensor by tensor, so that beside the models only one tensor of each is copied. `combine`: [K, ...] to [...]."""
    first = models[0]
    return {
        name: combine(
            torch.stack([model[name].to(torch.promote_types(value.dtype, torch.float32)) for model in models])
        ).to(value.dtype)
        for name, value in first.items()
    }


def _mean(values: Tensor) -> Tensor:
    """Shapes: [K, ...] to [...]. As a change of the first, so that equal models average to exactly themselves."""
    return values[0] + (values - values[0]).mean(0)


def _median(values: Tensor) -> Tensor:
    """Shapes: [K, ...] to [...]."""
    ordered = values.sort(dim=0).values
    return ordered[(len(values) - 1) // 2].lerp(ordered[len(values) // 2], 0.5)


def _squared_distances(models: Sequence[Arrays]) -> Tensor:
    """Shapes: float64 [K, K].

    From differences: models are alike in most of their digits, which products would cancel.
    """
    total = torch.zeros(len(models), len(models), dtype=torch.float64)
    for name, value in models[0].items():
        wide = torch.promote_types(value.dtype, torch.float32)
        rows = torch.stack([model[name].to(wide).flatten() for model in models])
        for k in range(len(models)):
            total[k] += (rows - rows[k]).square().sum(1, dtype=torch.float64)
    return total


def by_score(distances: Tensor, f: int) -> list[int]:
    """Clients from the best score of Krum to the worst; of equal ones the first by name. Shapes: distances [K, K]."""
    neighbours = max(1, len(distances) - f - 2)
    scores = distances.sort(dim=1).values[:, 1 : 1 + neighbours].sum(1).tolist()  # the nearest is the client itself
    return sorted(range(len(scores)), key=scores.__getitem__)


def weiszfeld(products: Tensor) -> Tensor:
    """The weights of the geometric median.

    Shapes: products float64 [K, K], relative to a robust centre; returns [K].
    """
    squares = products.diagonal()
    scale = squares.sqrt().median().item()  # not the mean: an attacker's distance is what it likes
    nu = max(SMOOTHING * scale, 1e-300)  # of models that are mostly equal, the equal ones take all weight
    distances, before = squares.sqrt(), torch.zeros_like(squares)
    for _ in range(MOST_STEPS):
        weights = 1 / distances.clamp(min=nu)
        weights = weights / weights.sum()
        step = weights - before
        if before.any() and math.sqrt(max(0.0, (step @ products @ step).item())) <= RELATIVE * scale:
            break
        before = weights
        distances = (squares - 2 * products @ weights + weights @ products @ weights).clamp(min=0).sqrt()
    return weights
