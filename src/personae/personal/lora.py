"""Low-rank adapters on linear layers: W x + scale * B (A x), made by peft and named as the bare model's layers are.

An adapter on `x.weight` is `x.lora_A` [R, in] and `x.lora_B` [out, R].

Source: Hu et al. 2021, LoRA, arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from personae.core import Arrays
from personae.errors import ConfigError, ShapeError

A, B = ".lora_A", ".lora_B"
UNET, TEXT, TEXT_2 = "unet.", "text_encoder.", "text_encoder_2."
"""Before the names of a pipeline's networks' parameters."""

LEVEL = "text_model."
"""Before the names in a published text encoder, whether this version of transformers has it or not."""

SLOT = "own"
"""The one adapter that a layer holds, as peft calls it inside."""

Targets = Literal["cross_kv", "self", "self+cross", "self+cross+text"]

PATTERNS: Mapping[Targets, Mapping[str, str]] = {
    "cross_kv": {UNET: r".*\.attn2\.(to_k|to_v)"},
    "self": {UNET: r".*\.attn1\.(to_q|to_k|to_v|to_out\.0)"},
    "self+cross": {UNET: r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"},
    "self+cross+text": {
        UNET: r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
        TEXT: r".*\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
        TEXT_2: r".*\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    },
}
"""Which layers, as full-match patterns by the network's prefix: query, key, value and output of attention.

Of a network that a model does not have, such as a second text encoder, none."""


@dataclass(frozen=True)
class Lora:
    """Rank, layers, and the factor alpha / rank on what the adapter adds; alpha is the rank where it is left out."""

    rank: int
    targets: Targets = "self+cross"
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.targets not in PATTERNS or (self.alpha is not None and not self.alpha > 0):
            raise ConfigError(
                f"lora: rank is {self.rank}, targets {self.targets!r}, alpha {self.alpha}; expected at least 1, one of "
                f"{', '.join(PATTERNS)}, and above 0"
            )


def is_lora(name: str) -> bool:
    return name.endswith((A, B))


def products(params: Arrays) -> dict[str, Tensor]:
    """B A of every adapter among these parameters, by the name of the weight that it is added to.

    Without the factor alpha / rank, which is 1 unless a recipe says otherwise.
    """
    names = [name.removesuffix(A) for name in params if name.endswith(A)]
    return {f"{name}.weight": params[name + B] @ params[name + A] for name in names}


def without_lora(name: str) -> str | None:
    """The bare model's name of a parameter of one that holds adapters; None for an adapter's own."""
    return None if ".lora_" in name else name.replace(".base_layer.", ".")


class Adapters:
    """The adapters on some networks, which are named by their prefix, such as "unet.".

    Raises: ConfigError, when a network has no layer that the targets name.
    """

    def __init__(self, networks: Mapping[str, nn.Module], options: Lora) -> None:
        from peft import LoraConfig, inject_adapter_in_model  # slow to import, and recipes name options only
        from peft.tuners.lora import LoraLayer

        self.options = options
        self._layers: dict[str, Any] = {}
        patterns = {prefix: each for prefix, each in PATTERNS[options.targets].items() if prefix in networks}
        for prefix, pattern in patterns.items():
            if not any(re.fullmatch(pattern, name) for name, _ in networks[prefix].named_modules()):
                raise ConfigError(f"lora: {prefix.rstrip('.')} has no layer that targets {options.targets!r} names")
        for prefix, pattern in patterns.items():
            config = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=pattern)
            inject_adapter_in_model(config, networks[prefix], adapter_name=SLOT)
            layers = {name: m for name, m in networks[prefix].named_modules() if isinstance(m, LoraLayer)}
            front = LEVEL if prefix != UNET else ""
            self._layers |= {prefix + front + name.removeprefix(front): layer for name, layer in layers.items()}
        self._resize(dict.fromkeys(self._layers, options.rank))

    def live(self) -> dict[str, nn.Parameter]:
        pairs = [
            (name + end, part[SLOT].weight)
            for name, layer in self._layers.items()
            for end, part in ((A, layer.lora_A), (B, layer.lora_B))
        ]
        return dict(pairs)

    def initial(self, rng: torch.Generator) -> dict[str, Tensor]:
        """A from N(0, 1 / R), B zero: the model starts as it is without them. R is the options', whatever is loaded."""
        values: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            out_width, in_width = layer.get_base_layer().weight.shape
            rank = self.options.rank
            values[name + A] = torch.randn(rank, in_width, generator=rng) / rank**0.5
            values[name + B] = torch.zeros(out_width, rank)
        return values

    def changes(self) -> dict[str, Tensor]:
        """scale * B A by the name of the weight that it is added to."""
        return {f"{name}.weight": layer.get_delta_weight(SLOT) for name, layer in self._layers.items()}

    def differ(self, params: Arrays) -> bool:
        """True, when these parameters have other ranks than the adapters."""
        return bool(self._others(params))

    def make_room(self, params: Arrays) -> None:
        """Take the ranks that these parameters have. Where they differ, `live` has new parameters afterwards."""
        self._resize(self._others(params))

    def _others(self, params: Arrays) -> dict[str, int]:
        """Raises: ShapeError, before anything has changed, when an adapter has no rank."""
        found = {name: params[name + A] for name in self._layers if name + A in params}
        if flat := [
            f"{name}{A} is {list(value.shape)}" for name, value in found.items() if 0 in value.shape or value.dim() != 2
        ]:
            raise ShapeError(f"{len(flat)} adapters have no rank: {'; '.join(flat[:3])}; expected [rank, in]")
        return {name: len(value) for name, value in found.items() if len(value) != self._layers[name].r[SLOT]}

    def _resize(self, ranks: Mapping[str, int]) -> None:
        for name, rank in ranks.items():
            layer = self._layers[name]
            weight = layer.get_base_layer().weight
            out_width, in_width = weight.shape
            like = {"bias": False, "device": weight.device, "dtype": torch.float32}
            layer.lora_A[SLOT] = nn.utils.skip_init(nn.Linear, in_width, rank, **like)
            layer.lora_B[SLOT] = nn.utils.skip_init(nn.Linear, rank, out_width, **like)
            nn.init.zeros_(layer.lora_A[SLOT].weight)
            nn.init.zeros_(layer.lora_B[SLOT].weight)
            layer.r[SLOT] = rank
            layer.scaling[SLOT] = 1.0 if self.options.alpha is None else self.options.alpha / rank
