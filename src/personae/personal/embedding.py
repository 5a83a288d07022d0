"""One small vector per client, and the null vector that stands in for everybody.

Letters in shapes: `B` batch, `K` clients in the model at once, `D` numbers per client.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from personae.core import Arrays
from personae.errors import ShapeError

EMBEDDING = "embedding.weight"
"""The client's own numbers [1, D], or [K, D] of several: personal in SPIRE."""

NULL_EMBEDDING = "null_embedding.weight"
"""The population's vector e_0 [1, D]: shared, trained on a share of every batch; a new client starts from it."""


def is_per_client(name: str) -> bool:
    """True for a parameter with a row for every client in the model. All others are shared by them."""
    return name == EMBEDDING


def clients_in(live: Mapping[str, Tensor]) -> int:
    """How many clients a model holds, by its live parameters."""
    return next((len(value) for name, value in live.items() if is_per_client(name)), 1)


class ClientEmbedding(nn.Module):
    """The client's vector, the null vector, and a shared projection where the model is wider or narrower.

    `embedding` is an `nn.Embedding`, since per-sample gradients need a module with a batched input. It has one row,
    unless several clients were loaded.
    `width` is D, the numbers per client; `out_width` is what the place in the model takes. They are the same object's
    names on every backbone, so a method can claim "embedding." without knowing the backbone.

    Source: SPIRE (arXiv:2506.12303) has one learnable vector per client; the null vector and its name are ours.
    """

    def __init__(self, width: int, out_width: int, start: Literal["noise", "zero"] = "noise") -> None:
        super().__init__()
        self.start = start
        self.embedding = nn.Embedding(1, width)
        self.null_embedding = nn.Embedding(1, width)
        self.embedding_projection = None if width == out_width else nn.Linear(width, out_width, bias=False)

    def forward(
        self, unconditional: Bool[Tensor, " B"], clients: Int64[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B out_width"]:
        """One vector per image; `unconditional` is True where the null vector is used.

        Raises: ShapeError, when several clients are loaded and `clients` does not say whose vector to take.
        """
        zeros = torch.zeros_like(unconditional, dtype=torch.long)
        if clients is None and len(self.embedding.weight) > 1:
            raise ShapeError(
                f"the model holds {len(self.embedding.weight)} clients, and the batch does not say whose vector stands "
                "for each example: set Batch.clients, or load one client"
            )
        own, null = self.embedding(zeros if clients is None else clients), self.null_embedding(zeros)
        vectors = torch.where(unconditional[:, None], null, own)
        return vectors if self.embedding_projection is None else self.embedding_projection(vectors)

    def make_room(self, num_clients: int) -> None:
        """Zeros for so many clients, in a new parameter: a graph that still holds the old one cannot reach it."""
        self.embedding.weight = nn.Parameter(self.embedding.weight.new_zeros(num_clients, self.embedding.embedding_dim))
        self.embedding.num_embeddings = num_clients

    def initial(self, rng: torch.Generator) -> Arrays:
        """N(0, 1) per coordinate ("noise") or zeros for the client's vector; zeros for the null vector.

        Random codes let the backbone tell clients apart from the first round; from zeros it may never learn to.
        """
        width = self.embedding.embedding_dim
        own = torch.randn(1, width, generator=rng) if self.start == "noise" else torch.zeros(1, width)
        values = {EMBEDDING: own, NULL_EMBEDDING: torch.zeros(1, width)}
        if self.embedding_projection is not None:
            out_width = self.embedding_projection.out_features
            values["embedding_projection.weight"] = torch.randn(out_width, width, generator=rng) / width**0.5
        return values
