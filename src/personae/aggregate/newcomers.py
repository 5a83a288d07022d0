"""Somebody comes when groups are there: to which it belongs, whether to none, and what the groups already know of it.

Our own answers to a question that Li et al. 2025, arXiv:2508.04745, leave open. Descriptors are taken to lie around
their group's centre as von Mises-Fisher distributions of one concentration do, and what is unlike all groups to come
from a group that nobody has seen.

Letters in shapes: `K` clients, `C` clusters, `E` one more than clusters, `D` numbers of a descriptor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from personae.aggregate.low_rank import Adapter, alike, inner, stacked
from personae.errors import ConfigError


@dataclass(frozen=True)
class Familiar:
    """What descriptors of known groups look like: their centres of length 1, how many clients each has, how closely
    these lie around it, and the cosine below which hardly any of them does."""

    centres: Float[Tensor, "C D"]
    sizes: tuple[int, ...]
    concentration: float
    threshold: float

    def likeness(self, descriptor: Float[Tensor, " D"]) -> Float[Tensor, " C"]:
        """Cosines with the centres."""
        return self.centres @ normalize(descriptor.double(), dim=0)

    def chances(self, descriptor: Float[Tensor, " D"], new: float = 1.0) -> Float[Tensor, " E"]:
        """How likely each group is, and last, that it is none of them: N_c exp(kappa s_c) against
        `new` exp(kappa threshold), made to sum to 1."""
        counts = torch.tensor([*map(float, self.sizes), new], dtype=torch.float64)
        alike = torch.cat([self.likeness(descriptor), torch.tensor([self.threshold], dtype=torch.float64)])
        return torch.softmax(counts.log() + self.concentration * alike, dim=0)

    def group(self, descriptor: Float[Tensor, " D"]) -> int | None:
        """The likeliest group's number, or None for somebody of a kind that is not there yet."""
        best = int(self.chances(descriptor).argmax())
        return best if best < len(self.sizes) else None


def familiar(
    descriptors: Float[Tensor, "K D"], groups: Sequence[int], quantile: float = 0.05, alone: float = 0.5
) -> Familiar:
    """What members tell of their groups, which are numbered from 0.

    The threshold is this quantile of all members' cosines with the centre of their group without them, which are taken
    as `alone` where no group has two members. The concentration is the likeliest one for their mean r,
    kappa = r (D - r^2) / (1 - r^2).

    Source of kappa: Banerjee et al. 2005, JMLR 6, equation 4.4. The rest is our choice.
    Raises: ConfigError, without members, or when a group has none.
    """
    count = max(groups, default=-1) + 1
    if not count or len(groups) != len(descriptors) or set(groups) != set(range(count)):
        raise ConfigError(
            f"{len(descriptors)} descriptors are of groups {sorted(set(groups))}, expected a number from 0 for each, "
            "and somebody in every group"
        )
    units = normalize(descriptors.double(), dim=1)
    members = [torch.tensor([k for k, group in enumerate(groups) if group == number]) for number in range(count)]
    sums = [units[own].sum(0) for own in members]
    centres = torch.stack([normalize(whole, dim=0) for whole in sums])
    without = [
        float(units[k] @ normalize(whole - units[k], dim=0))
        for own, whole in zip(members, sums, strict=True)
        if len(own) > 1
        for k in own.tolist()
    ]
    found = torch.tensor(without or [alone], dtype=torch.float64)
    r = min(max(float(found.mean()), 0.0), 1 - 1e-6)
    concentration = r * (units.shape[1] - r**2) / (1 - r**2)
    return Familiar(centres, tuple(len(own) for own in members), concentration, float(found.quantile(quantile)))


class Mixtures:
    """All mixtures sum_c a_c D_c of some adapters, and which of them comes nearest to a change.

    Layers count alike: each is divided by the mean squared norm of the adapters there, and where none changes anything
    by the change's own. What the adapters say to each other is found once.

    Letters in shapes: `S` the ranks of all adapters together, `M N` a weight.
    Raises: MismatchedNames, when adapters are of different layers.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._layers = stacked(adapters, [1.0] * len(adapters))
        self._whose = {
            layer: torch.tensor([c for c, adapter in enumerate(adapters) for _ in range(adapter[layer].rank)])
            for layer in self._layers
        }
        self._count = len(adapters)
        self._products = torch.zeros(self._count, self._count, dtype=torch.float64)
        self._scales: dict[str, float] = {}
        for layer, each in self._layers.items():
            left, right = each.B.double(), each.A.double()
            by_rank = (left.T @ left) * (right @ right.T)  # [S, S]
            products = self._of_each(layer, self._of_each(layer, by_rank).T)
            self._scales[layer] = products.diagonal().clamp(min=0).mean().item()
            if self._scales[layer]:
                self._products += products / self._scales[layer]

    def nearest(self, change: Adapter, ridge: float = 1e-6) -> tuple[list[float], float]:
        """The mixture that comes nearest to a change U, and how much of U no mixture has, 0 (nothing new) to 1
        (nothing in common).

        With G_cd = <D_c, D_d> and g_c = <D_c, U>: a = (G + lambda I)^-1 g, lambda being `ridge` times the mean of G's
        diagonal, and the second is rho, rho^2 = 1 - g a / |U|^2. From inner products alone, and so the same for any
        factors of the same changes. They are summed in float64, of products in the adapters' own precision: where all
        of U is in them, rho is about 1e-3.

        Raises: MismatchedNames, when the change is of other layers.
        """
        alike([self._layers, change])
        towards, own = torch.zeros(self._count, dtype=torch.float64), 0.0
        for layer, each in self._layers.items():
            square = inner(change[layer], change[layer])
            if scale := self._scales[layer] or square:
                down, up = each.A @ change[layer].A.to(each.A).T, each.B.T @ change[layer].B.to(each.B)  # [S, R]
                towards += self._of_each(layer, (down.double() * up.double()).sum(1, keepdim=True))[:, 0] / scale
                own += square / scale
        if own <= 0:
            return [0.0] * self._count, 0.0
        weight = ridge * float(self._products.diagonal().mean()) or 1.0
        mixture = torch.linalg.solve(self._products + weight * torch.eye(self._count, dtype=torch.float64), towards)
        left = min(1.0, max(0.0, 1 - float(towards @ mixture) / own))
        return [float(value) for value in mixture], left**0.5

    def _of_each(self, layer: str, by_rank: Float[Tensor, "S X"]) -> Float[Tensor, "C X"]:
        """Sums over the ranks of each adapter."""
        empty = torch.zeros(self._count, by_rank.shape[1], dtype=by_rank.dtype)
        return empty.index_add_(0, self._whose[layer], by_rank.cpu())


def trust(rounds: int | None, probation: int) -> float:
    """How much a newcomer counts that took part in so many rounds before: nothing in its first, wholly after
    `probation`. Of None, who was there from the beginning, wholly."""
    return 1.0 if rounds is None or not probation else min(1.0, rounds / probation)
