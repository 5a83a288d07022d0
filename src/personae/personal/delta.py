"""Changes of a frozen base's weights, each a part of its own: a layer computes with W + delta, and nobody writes to W.

Letters in shapes: `*W` a weight.

The change of `x.weight` is `delta.x.weight`, of the same shape, in float32, and starts at zero.

Source: what Kumari et al. 2022, Custom Diffusion, arXiv:2212.04488, section 3.1, fine-tune, are keys and values of
cross-attention; kept as a change here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from personae.core import Arrays
from personae.errors import ConfigError
from personae.personal.lora import UNET, is_lora, products, without_lora

DELTA = "delta."

Targets = Literal["cross_kv", "cross", "self+cross"]

PATTERNS: Mapping[Targets, str] = {
    "cross_kv": r".*\.attn2\.(to_k|to_v)",
    "cross": r".*\.attn2\.(to_q|to_k|to_v|to_out\.0)",
    "self+cross": r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
}
"""Which of the U-Net's layers, as full-match patterns: key, value, query and output of attention."""

INSIDE = ".parametrizations.weight."
ORIGINAL = f"{INSIDE}original"
"""How torch calls W inside, and before what else it calls by a number: what is added to W."""


@dataclass(frozen=True)
class Delta:
    """Which weights may change."""

    targets: Targets = "cross_kv"

    def __post_init__(self) -> None:
        if self.targets not in PATTERNS:
            raise ConfigError(f"delta: targets is {self.targets!r}; expected one of {', '.join(PATTERNS)}")


def is_delta(name: str) -> bool:
    return name.startswith(DELTA)


def absorbed(params: Arrays, factor: float = 1.0) -> dict[str, Tensor]:
    """The same model without its adapters: `factor` times each one's product B A goes into its weight's change.

    Raises: ConfigError, when a weight with an adapter has no change.
    """
    added = {DELTA + name: factor * product for name, product in products(params).items()}
    if homeless := sorted(added.keys() - params.keys()):
        raise ConfigError(
            f"{len(homeless)} adapters have no change of weights to go into ({homeless[0].removeprefix(DELTA)}, ...): "
            "let delta name the layers that lora names"
        )
    rest = {name: value for name, value in params.items() if not is_lora(name)}
    return {name: value + added[name] if name in added else value for name, value in rest.items()}


def without_parts(name: str) -> str | None:
    """The bare model's name of a parameter of one that holds parts; None for a part's own."""
    bare = name.replace(ORIGINAL, ".weight")
    return None if INSIDE in bare else without_lora(bare)


def target_layers(networks: Mapping[str, nn.Module], targets: Targets, part: str) -> dict[str, Any]:
    """The layers themselves, by their weights' names. Raises: ConfigError, which names the part, when there is none."""
    layers: dict[str, Any] = {
        UNET + name: layer for name, layer in networks[UNET].named_modules() if re.fullmatch(PATTERNS[targets], name)
    }
    if not layers:
        raise ConfigError(f"{part}: {UNET.rstrip('.')} has no layer that targets {targets!r} names")
    # Inside an adapter is the layer that it is on.
    return {f"{name}.weight": getattr(layer, "base_layer", layer) for name, layer in layers.items()}


class _Added(nn.Module):
    """W + delta in float32, in W's own type."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    def forward(self, weight: Float[Tensor, " *W"]) -> Float[Tensor, " *W"]:
        return (weight.float() + self.delta).to(weight.dtype)


class Deltas:
    """The changes of some networks' weights, which are named by their prefix, such as "unet.".

    Raises: ConfigError, when no layer has the names of the targets.
    """

    def __init__(self, networks: Mapping[str, nn.Module], options: Delta) -> None:
        self._changes: dict[str, _Added] = {}
        for name, layer in target_layers(networks, options.targets, "delta").items():
            self._changes[name] = _Added(layer.weight)
            parametrize.register_parametrization(layer, "weight", self._changes[name])

    def live(self) -> dict[str, nn.Parameter]:
        return {DELTA + name: change.delta for name, change in self._changes.items()}

    def initial(self) -> dict[str, Tensor]:
        """Zero: the model starts as it is without them."""
        return {DELTA + name: torch.zeros_like(change.delta, device="cpu") for name, change in self._changes.items()}

    def changes(self) -> dict[str, Tensor]:
        """By the name of the weight that each is added to."""
        return {name: change.delta.detach() for name, change in self._changes.items()}
