"""Arithmetic with adapters as what they add to weights: the products B A, never their factors.

For any invertible M, (B M^-1)(M A) = B A: many pairs of factors are one and the same change of a weight. Every function
here gives the same change whatever pairs it is given, and none forms a product of full size.

Letters in shapes: `K` adapters, `M N` a weight, `R` the rank of a change, which may differ from layer to layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from personae.core import Arrays
from personae.errors import MismatchedNames, ShapeError
from personae.personal.lora import A, B


@dataclass(frozen=True)
class LowRank:
    """The change B A of one weight [M, N]."""

    B: Float[Tensor, "M R"]
    A: Float[Tensor, "R N"]

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    def dense(self) -> Float[Tensor, "M N"]:
        return self.B @ self.A


Adapter = Mapping[str, LowRank]
"""The change of every layer, by the layer's name."""


def read(params: Arrays) -> dict[str, LowRank]:
    """The adapter whose factors stand in `params` as "<layer>.lora_A" and "<layer>.lora_B", among whatever else.

    Raises: MismatchedNames, when one of a pair is missing; ShapeError, when the two have different ranks.
    """
    layers = {name.removesuffix(end) for name in params for end in (A, B) if name.endswith(end)}
    if alone := sorted(layer for layer in layers if layer + A not in params or layer + B not in params):
        raise MismatchedNames(f"{len(alone)} adapters have one factor only: {', '.join(alone[:3])}; expected A and B")
    found = {}
    for layer in sorted(layers):
        left, right = params[layer + B], params[layer + A]
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
            raise ShapeError(
                f"the adapter of {layer} has B {list(left.shape)} and A {list(right.shape)}; expected [M, R] and [R, N]"
            )
        found[layer] = LowRank(left, right)
    return found


def written(adapter: Adapter) -> dict[str, Tensor]:
    """The inverse of `read`."""
    return {layer + end: value for layer, change in adapter.items() for end, value in ((A, change.A), (B, change.B))}


def stacked(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, LowRank]:
    """sum_k w_k B_k A_k exactly: factors side by side, of the rank that theirs add up to. Ranks may differ.

    Source: Wang et al. 2024, FLoRA, arXiv:2409.05976.
    Raises: MismatchedNames, when adapters are of different layers.
    """
    alike(adapters)
    return {
        layer: LowRank(
            torch.cat([weight * adapter[layer].B for weight, adapter in zip(weights, adapters, strict=True)], dim=1),
            torch.cat([adapter[layer].A for adapter in adapters]),
        )
        for layer in adapters[0]
    }


def alike(adapters: Sequence[Adapter]) -> None:
    """Raises: MismatchedNames, when there is none, or they are of different layers."""
    if not adapters:
        raise MismatchedNames("there are no adapters to combine")
    for k, adapter in enumerate(adapters):
        if different := adapters[0].keys() ^ adapter.keys():
            raise MismatchedNames(
                f"adapter {k} and the first differ in {len(different)} layers: {', '.join(sorted(different)[:3])}"
            )


def canonical(change: LowRank) -> LowRank:
    """The same change with factors that do not depend on those given, where its singular values are distinct.

    B has orthogonal columns, from the longest to the shortest, whose largest entries are positive; A has orthogonal
    rows, as long as those that adapters begin with (`personal.lora`): what Adam does to B A in one step grows with A,
    and who trains on after an aggregation is to learn at the rate that it was given.
    """
    return recompressed(change, change.rank)


def recompressed(change: LowRank, rank: int) -> LowRank:
    """The nearest change of at most this rank in Frobenius norm, in the form of `canonical`.

    Where there is less to keep than the rank has room for, B has zeros: the room can be trained. There is never more
    room than the factors given have, whatever `rank` says.

    From QR of both factors and SVD of an R x R core, in float64: O((M + N) R^2 + R^3).
    Source: Eckart, Young 1936.
    """
    left, values, right = _svd(change)
    kept = min(rank, len(values))
    length = math.sqrt(change.A.shape[1] / max(kept, 1))
    kept_values = values[:kept].where(values[:kept] > 1e-12 * values[:1], 0.0)
    columns, rows = left[:, :kept] * kept_values / length, right[:kept] * length
    largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(columns)
    return LowRank((columns * signs).to(change.B.dtype), (signs.T * rows).to(change.A.dtype))


def singular_values(change: LowRank) -> Float[Tensor, " R"]:
    """From the largest to the smallest, in float64; as many as the smallest of R, M and N."""
    return _svd(change)[1]


def lost(change: LowRank, rank: int) -> float:
    """How much of a change goes when it is recompressed to this rank, as a part of its Frobenius norm."""
    squares = singular_values(change).square()
    whole = squares.sum().item()
    return math.sqrt(squares[rank:].sum().item() / whole) if whole else 0.0


def inner(one: LowRank, other: LowRank) -> float:
    """The Frobenius inner product of two changes, as tr((B^T B')(A' A^T)), in float64."""
    return float(((one.B.double().T @ other.B.double()) * (one.A.double() @ other.A.double().T)).sum())


def gram(adapters: Sequence[Adapter]) -> Float[Tensor, "K K"]:
    """Inner products of whole adapters, float64. Each layer's are divided by its squared median norm among the
    adapters, so that no layer outweighs the others; where most change nothing, by the largest.

    Raises: MismatchedNames.
    """
    alike(adapters)
    total = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for layer in adapters[0]:
        products = torch.tensor(
            [[inner(one[layer], other[layer]) for other in adapters] for one in adapters], dtype=torch.float64
        )
        squares = products.diagonal().clamp(min=0)
        if scale := squares.median().item() or squares.max().item():
            total += products / scale
    return total


def overlap(one: LowRank, other: LowRank, side: str = "B") -> float:
    """How much the changes' column spaces (of B) or row spaces (of A) have in common: the mean squared cosine of the
    angles between them, 0 to 1. A change of zero rank has nothing in common with any.

    Raises: KeyError, when the side is neither "A" nor "B".
    """
    bases = []
    for change in (one, other):
        left, values, right = _svd(change)
        kept = values > 1e-7 * values.max() if len(values) else values.bool()
        bases.append({"B": left, "A": right.T}[side][:, kept])
    smaller = min(base.shape[1] for base in bases)
    return float((bases[0].T @ bases[1]).square().sum()) / smaller if smaller else 0.0


def _svd(change: LowRank) -> tuple[Float[Tensor, "M S"], Float[Tensor, " S"], Float[Tensor, "S N"]]:
    """U, singular values and V^T of B A, in float64."""
    left, left_core = torch.linalg.qr(change.B.double())
    right, right_core = torch.linalg.qr(change.A.double().T)
    u, values, v = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return left @ u, values, v @ right.T
