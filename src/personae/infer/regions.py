"""Several concepts in one picture, each at its place: the boxes of a picture that have captions of their own.

Letters in shapes: `B` batch, `L` tokens, `D` width of a token's vector, `S` positions of a layer, `N` those of a box,
`C` width of a layer; `c h w` a latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from personae.backbone.text2image import TextToImage, Told
from personae.core import Arrays, Batch, NoiseSchedule, Select, everything
from personae.errors import ConfigError

FORM = '"left,top,right,bottom: caption", such as "0,0,0.5,1: a dog" for the left half'


@dataclass(frozen=True)
class Region:
    """A box, by its left, top, right and bottom as shares of the picture from its upper left corner, and what it shows.

    Raises: ConfigError, for a box that is empty or not inside the picture, and for a caption that says nothing.
    """

    box: tuple[float, float, float, float]
    caption: str

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        found = f"the box {','.join(f'{share:g}' for share in self.box)} of the caption {self.caption!r}"
        if not all(0 <= share <= 1 for share in self.box):
            raise ConfigError(f"{found} is outside the picture; expected shares of it, from 0 to 1")
        if not (left < right and top < bottom):
            raise ConfigError(f"{found} is empty; expected left below right, and top below bottom")
        if not self.caption.strip():
            raise ConfigError(f"{found} says nothing; write what is to be there: {FORM}")


def parsed(text: str) -> Region:
    """From a command line, as FORM says. Raises: ConfigError."""
    box, colon, caption = text.partition(":")
    if not colon:
        raise ConfigError(f"the region {text!r} has no caption; expected {FORM}")
    try:
        left, top, right, bottom = map(float, box.split(","))
    except ValueError:
        raise ConfigError(f"the region {text!r} begins with {box!r}, expected four numbers: {FORM}") from None
    return Region((left, top, right, bottom), caption.strip())


@dataclass(frozen=True)
class ToldInRegions:
    """What the U-Net is told, and what its cross-attention reads inside of each region instead."""

    everywhere: Told
    texts: tuple[Float[Tensor, "B L D"], ...]


@dataclass(frozen=True)
class InRegions:
    """A text-to-image model that draws each region by its own caption, and the rest by the captions that it is given.

    Every cross-attention runs with the caption for all positions; for each region it runs again, with that region's
    caption, and these positions are overwritten. Of overlapping regions the last one wins. What is unconditional has no
    regions. Without any regions nothing is changed. With two text encoders, what stands for the text as a whole stays
    that of the caption.

    Source: region-aware cross-attention of Mix-of-Show, Gu et al. 2023, arXiv:2305.18292. Departures: there is no
    condition on a sketch or pose; a box too small for a layer's grid takes its nearest row or column (ours).
    """

    model: TextToImage
    regions: Sequence[Region]

    def condition(self, batch: Batch) -> ToldInRegions:
        """Raises: ConfigError, when a caption is too long."""
        alone = bool(batch.unconditional.all())
        captions = [] if alone else [(region.caption,) * len(batch) for region in self.regions]
        texts = tuple(self.model.condition(replace(batch, captions=said)).text for said in captions)
        return ToldInRegions(self.model.condition(batch), texts)

    def forward(
        self, x_t: Float[Tensor, "B c h w"], t: Int64[Tensor, " B"], cond: ToldInRegions
    ) -> Float[Tensor, "B c h w"]:
        size = (x_t.shape[-2], x_t.shape[-1])
        attend = partial(_attend_in_regions, size, [region.box for region in self.regions], cond.texts)
        layers = [layer for name, layer in self.model.unet.named_modules() if name.endswith(".attn2")]
        hooks = [layer.register_forward_hook(attend, with_kwargs=True) for layer in layers if cond.texts]
        try:
            return self.model.forward(x_t, t, cond.everywhere)
        finally:
            for hook in hooks:
                hook.remove()

    # --- all else is the model's ------------------------------------------------------------------------------------

    @property
    def schedule(self) -> NoiseSchedule:
        return self.model.schedule

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.model.sample_shape

    def encode(self, images: Float[Tensor, "B ..."]) -> Float[Tensor, "B c h w"]:
        return self.model.encode(images)

    def decode(self, x_0: Float[Tensor, "B c h w"]) -> Float[Tensor, "B ..."]:
        return self.model.decode(x_0)

    def initial(self, rng: torch.Generator, only: Select = everything) -> Arrays:
        return self.model.initial(rng, only)

    def params(self) -> Arrays:
        return self.model.params()

    def live(self) -> Mapping[str, nn.Parameter]:
        return self.model.live()

    def base(self) -> Arrays:
        return self.model.base()

    def load(self, params: Arrays, num_clients: int = 1) -> None:
        self.model.load(params, num_clients)

    def train(self, mode: bool = True) -> Any:
        return self.model.train(mode)


def positions(box: Sequence[float], height: int, width: int) -> Int64[Tensor, " N"]:
    """Of a grid, row by row, those whose middle is in the box. Along a side where there is none, the nearest one is."""
    left, top, right, bottom = box
    rows, columns = _covered(top, bottom, height), _covered(left, right, width)
    return (rows[:, None] * width + columns).flatten()


def _covered(begin: float, end: float, count: int) -> Int64[Tensor, " N"]:
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    inside = ((begin <= middles) & (middles < end)).nonzero().flatten()
    return inside if len(inside) else (middles - (begin + end) / 2).abs().argmin()[None]


def _attend_in_regions(
    size: tuple[int, int],
    boxes: Sequence[Sequence[float]],
    texts: Sequence[Float[Tensor, "B L D"]],
    layer: nn.Module,
    inputs: tuple[Float[Tensor, "B S C"], ...],
    options: Mapping[str, Any],
    output: Float[Tensor, "B S C"],
) -> Float[Tensor, "B S C"]:
    """A layer's output with these boxes attended to again. `size` is the latent's height and width."""
    (x, *others), read = inputs, options["encoder_hidden_states"]
    height, width = _grid(x.shape[1], *size)
    for box, text in zip(boxes, texts, strict=True):
        inside = positions(box, height, width).to(x.device)
        own = torch.cat([text.to(read.dtype), read[:, text.shape[1] :]], dim=1)  # a client's vector stands behind it
        again = layer.forward(x[:, inside], *others, **{**options, "encoder_hidden_states": own})
        output = output.index_copy(1, inside, again)
    return output


def _grid(count: int, height: int, width: int) -> tuple[int, int]:
    """Of a layer with so many positions: the latent's sides, halved as often as it takes."""
    while height * width > count:
        height, width = (height + 1) // 2, (width + 1) // 2
    assert height * width == count, "every level of the U-Net halves the sides"
    return height, width
