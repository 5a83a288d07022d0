"""The exact denoiser of a Gaussian mixture: closed form before images.

Letters in shapes: `B` batch, `K` components, `D` width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from personae.backbone.parts import copies, load_into
from personae.backbone.schedule import Schedule
from personae.core import Arrays, Batch, Cond, Select, everything, pick
from personae.errors import ConfigError, ShapeError
from personae.personal.embedding import EMBEDDING, NULL_EMBEDDING, ClientEmbedding


class MixtureDenoiser(nn.Module):
    """The score of sum_k softmax(e)_k N(mean_k, I), as a prediction of the noise.

    The client's vector e is the K logits, an additive bias on the responsibilities:
    r = softmax_k(e_k + m_k.x_t - |m_k|^2 / 2) with m_k = sqrt(alpha_bar_t) mean_k, and
    noise = sigma_t (x_t - sum_k r_k m_k).
    Every component keeps unit covariance under the variance-preserving noise.

    Shapes: `means` [K, D], shared; `embedding.weight` [1, K], the client's, a row for each where several are loaded.
    Source: the two-component case is the setting of SPIRE's theory (arXiv:2506.12303); K components follow alike.
    """

    def __init__(self, means: Tensor, schedule: Schedule) -> None:
        super().__init__()
        if schedule.prediction_type != "epsilon":
            raise ConfigError("the mixture denoiser predicts the noise; set prediction_type to 'epsilon'")
        if means.dim() != 2:
            raise ShapeError(f"means are {list(means.shape)}, expected [K, D]")
        self.schedule = schedule
        self.means = nn.Parameter(means.clone().float())
        self.part = ClientEmbedding(len(means), len(means), "zero")
        self._start = self.means.detach().clone()
        self._live = {"means": self.means, **dict(self.part.named_parameters())}

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (self.means.shape[1],)

    def encode(self, images: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return images

    def decode(self, x_0: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return x_0

    def condition(self, batch: Batch) -> Cond:
        return self.part(batch.unconditional, batch.clients)

    def forward(self, x_t: Float[Tensor, "B D"], t: Int64[Tensor, " B"], cond: Cond) -> Float[Tensor, "B D"]:
        alpha_bar = self.schedule.alpha_bar.to(x_t.device)[t].to(x_t.dtype)[:, None]
        scaled = alpha_bar.sqrt()[:, :, None] * self.means
        logits = cond + (scaled @ x_t[:, :, None])[:, :, 0] - scaled.square().sum(2) / 2
        expected = (logits.softmax(1)[:, None, :] @ scaled)[:, 0]
        return (1 - alpha_bar).sqrt() * (x_t - expected)

    def initial(self, rng: torch.Generator, only: Select = everything) -> Arrays:
        """The means that the denoiser was made with, and equal weights."""
        zeros = torch.zeros(1, len(self.means))
        return pick({"means": self._start.clone(), EMBEDDING: zeros, NULL_EMBEDDING: zeros.clone()}, only)

    def params(self) -> Arrays:
        return copies(self._live)

    def live(self) -> Mapping[str, nn.Parameter]:
        return self._live

    def base(self) -> Arrays:
        return {}

    def load(self, params: Arrays, num_clients: int = 1) -> None:
        load_into(self._live, self.part, params, num_clients)
