"""What attention layers read: the words of captions, and pictures while they are drawn.

The one place in this room that looks inside a text-to-image model.

Letters in shapes: `B` captions, `L` tokens, `N` those of all captions, `D` width of what a layer reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from personae.core import Batch, Denoiser, device_of
from personae.infer.sample import draw
from personae.personal.lora import UNET

CAPTION = "caption"
"""What keys and values of all cross-attention read."""


def by_source(weights: Iterable[str]) -> dict[str, list[str]]:
    """Names of weights, sorted, by what their layers read: those together that read the same."""
    found: dict[str, list[str]] = {}
    for weight in sorted(weights):
        found.setdefault(_source(weight.removesuffix(".weight")), []).append(weight)
    return found


def _source(layer: str) -> str:
    """The caption; or a layer's own name, which query, key and value of one self-attention share."""
    if re.fullmatch(r".*\.attn2\.to_[kv]", layer):
        return CAPTION
    return re.sub(r"\.attn1\.to_[qkv]$", ".attn1", layer)


@torch.no_grad()
def text_vectors(model: Denoiser, captions: Sequence[str]) -> Float[Tensor, "B L D"]:
    """All that the U-Net attends to, the padding behind the end mark as well. On the CPU."""
    blank = torch.zeros(len(captions), device=device_of(model))
    text: Tensor = model.condition(Batch(blank, blank.bool(), tuple(captions))).text
    return text.cpu()


def text_features(model: Denoiser, captions: Sequence[str]) -> Float[Tensor, "N D"]:
    """The vectors of these captions' tokens up to the end mark, from the first new word on where a caption says one:
    what stands before it reads the same whatever the word is."""
    reader = cast("Any", model).captions.readers[0]
    numbers = reader.tokens(captions)
    begins = (numbers >= reader.words.first).int().argmax(1).tolist()
    ends = (numbers == reader.tokenizer.eos_token_id).int().argmax(1).tolist()
    text = text_vectors(model, captions)
    return torch.cat([row[begin : end + 1] for row, begin, end in zip(text, begins, ends, strict=True)])


def picture_grams(
    model: Denoiser, readers: Mapping[str, str], captions: Sequence[str], rng: torch.Generator, steps: int
) -> dict[str, Float64[Tensor, "D D"]]:
    """The mean of x x^T over all that layers read while these captions are drawn, with guidance, by so many steps.

    `readers`: the name of a layer's weight, by the name that what it reads is to have. On the CPU.
    """
    sums = dict.fromkeys(readers, torch.zeros((), dtype=torch.float64))
    counts = dict.fromkeys(readers, 0)

    def adds(source: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            read = inputs[0].float().flatten(0, -2)
            sums[source] = sums[source] + (read.T @ read).cpu().double()
            counts[source] += len(read)

        return add

    hooks = [_layer(model, weight).register_forward_pre_hook(adds(source)) for source, weight in readers.items()]
    try:
        draw(model, captions, rng, steps=steps)
    finally:
        for hook in hooks:
            hook.remove()
    return {source: total / counts[source] for source, total in sums.items()}


def _layer(model: Denoiser, weight: str) -> nn.Module:
    """The U-Net's module of this name: the bare layer, or the adapter's around it."""
    unet = cast("nn.Module", cast("Any", model).unet)
    return unet.get_submodule(weight.removeprefix(UNET).removesuffix(".weight"))
