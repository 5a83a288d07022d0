"""A small residual network over flat vectors, for toy data and fast tests.

Letters in shapes: `B` batch, `*X` one x_0, an image or a vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from personae.backbone.parts import copies, load_into
from personae.backbone.schedule import Schedule
from personae.core import Arrays, Batch, Cond, Select, everything, pick
from personae.errors import ConfigError
from personae.personal.embedding import ClientEmbedding


class MLPDenoiser(nn.Module):
    """Residual blocks of width `width`, each modulated by time and by the client's vector. x_t is flattened inside."""

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        schedule: Schedule,
        *,
        width: int = 128,
        num_blocks: int = 3,
        embedding_width: int | None = None,
        start: Literal["noise", "zero"] = "noise",
    ) -> None:
        super().__init__()
        if width % 2:
            raise ConfigError(
                f"the MLP's width is {width}, expected an even number: half sines, half cosines of the time"
            )
        self.schedule, self._shape, self._width = schedule, tuple(sample_shape), width
        size = math.prod(sample_shape)
        self.inner = nn.ModuleDict({"input": nn.Linear(size, width), "time": nn.Linear(width, width)})
        for i in range(num_blocks):
            self.inner[f"norm{i}"] = nn.LayerNorm(width)
            self.inner[f"modulate{i}"] = nn.Linear(width, 2 * width)
            self.inner[f"widen{i}"] = nn.Linear(width, 2 * width)
            self.inner[f"narrow{i}"] = nn.Linear(2 * width, width)
        self.inner["output"] = nn.Linear(width, size)
        self._num_blocks = num_blocks
        self.part = None if embedding_width is None else ClientEmbedding(embedding_width, width, start)
        self._live = dict(self.inner.named_parameters())
        if self.part is not None:
            self._live |= dict(self.part.named_parameters())

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self._shape

    def encode(self, images: Float[Tensor, " B *X"]) -> Float[Tensor, " B *X"]:
        return images

    def decode(self, x_0: Float[Tensor, " B *X"]) -> Float[Tensor, " B *X"]:
        return x_0

    def condition(self, batch: Batch) -> Cond:
        return None if self.part is None else self.part(batch.unconditional, batch.clients)

    def forward(self, x_t: Float[Tensor, " B *X"], t: Int64[Tensor, " B"], cond: Cond) -> Float[Tensor, " B *X"]:
        inner, silu = self.inner, nn.functional.silu
        moment = inner["time"](_sinusoids(t, self._width))
        moment = silu(moment if cond is None else moment + cond)
        h = inner["input"](x_t.flatten(1))
        for i in range(self._num_blocks):
            scale, shift = inner[f"modulate{i}"](moment).chunk(2, dim=1)
            h = h + inner[f"narrow{i}"](silu(inner[f"widen{i}"](inner[f"norm{i}"](h) * (1 + scale) + shift)))
        return inner["output"](h).view_as(x_t)

    def initial(self, rng: torch.Generator, only: Select = everything) -> Arrays:
        values: dict[str, Tensor] = {}
        for name, value in self.inner.named_parameters():
            if name.startswith("norm"):
                values[name] = torch.ones_like(value) if name.endswith("weight") else torch.zeros_like(value)
            elif name.endswith("weight"):
                values[name] = torch.randn(value.shape, generator=rng) / value.shape[1] ** 0.5
            else:
                values[name] = torch.zeros(value.shape)
        return pick(values if self.part is None else {**values, **self.part.initial(rng)}, only)

    def params(self) -> Arrays:
        return copies(self._live)

    def live(self) -> Mapping[str, nn.Parameter]:
        return self._live

    def base(self) -> Arrays:
        return {}

    def load(self, params: Arrays, num_clients: int = 1) -> None:
        load_into(self._live, self.part, params, num_clients)


def _sinusoids(t: Int64[Tensor, " B"], width: int) -> Float[Tensor, "B {width}"]:
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)
