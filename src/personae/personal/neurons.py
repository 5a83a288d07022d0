"""Chosen weights of a frozen base that train one by one: a layer computes with W, to some of whose numbers others are
added, and nobody writes to W.

Letters in shapes: `N` chosen weights of a layer, `*W` a weight, `Y` bytes.

Of `x.weight`, "neurons.x.weight" [N] are the numbers that are added, in float32, and "neurons_at.x.weight" [N] says to
which: places in the flattened weight, ascending. Which weights are chosen is data, and is loaded, copied and written by
name as the numbers are; N may be another with every load, as the rank of an adapter may. A place never trains. What is
not chosen has no number, so neither a gradient nor weight decay can reach it.

Source: Liao et al. 2025, arXiv:2510.02296, fine-tune chosen weights of keys and values. That a neuron is one weight is
ours, and so are the lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn.utils import parametrize

from personae.core import Arrays
from personae.errors import ConfigError, ShapeError
from personae.personal.delta import DELTA, PATTERNS, Targets, target_layers

NEURONS, AT = "neurons.", "neurons_at."
"""Before a weight's name: what is added, and where."""


@dataclass(frozen=True)
class Neurons:
    """Of which weights some numbers may be chosen. None is, at first."""

    targets: Targets = "cross_kv"

    def __post_init__(self) -> None:
        if self.targets not in PATTERNS:
            raise ConfigError(f"neurons: targets is {self.targets!r}; expected one of {', '.join(PATTERNS)}")


def is_neuron(name: str) -> bool:
    """True for what is added, and not for where."""
    return name.startswith(NEURONS)


def placed(chosen: Arrays) -> dict[str, Tensor]:
    """The parameters of these neurons, which add nothing yet. Shapes: chosen[n] bool, like weight n, by its name."""
    found: dict[str, Tensor] = {}
    for name, mask in chosen.items():
        found[AT + name] = at = mask.flatten().nonzero()[:, 0]
        found[NEURONS + name] = torch.zeros(len(at))
    return found


def settled(params: Arrays) -> dict[str, Tensor]:
    """The same model without its neurons: what they add goes into the changes of weights, of which each has one."""
    rest = {name: value for name, value in params.items() if not name.startswith((NEURONS, AT))}
    for name in filter(is_neuron, params):
        bare = name.removeprefix(NEURONS)
        change = rest[DELTA + bare]
        rest[DELTA + bare] = change.flatten().index_add(0, params[AT + bare], params[name]).view_as(change)
    return rest


def packed(mask: Bool[Tensor, " *W"]) -> UInt8[Tensor, " Y"]:
    """Eight to a byte, the first one highest; zeros at the end."""
    return torch.from_numpy(np.packbits(mask.flatten().numpy()))


def unpacked(bits: UInt8[Tensor, " Y"], shape: torch.Size) -> Bool[Tensor, " *W"]:
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel())).bool().view(shape)


class _AddedAt(nn.Module):
    """W in float32 with some numbers added, in W's own type."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape = weight.shape
        self.make_room(0, weight.device)

    def make_room(self, count: int, device: torch.device) -> None:
        self.values = nn.Parameter(torch.zeros(count, device=device))
        self.at = nn.Parameter(torch.arange(count, device=device), requires_grad=False)

    def forward(self, weight: Float[Tensor, " *W"]) -> Float[Tensor, " *W"]:
        return weight.float().flatten().index_add(0, self.at, self.values).view_as(weight).to(weight.dtype)


class NeuronLists:
    """The chosen weights of some networks, which are named by their prefix, such as "unet.".

    Raises: ConfigError, when no layer has the names of the targets.
    """

    def __init__(self, networks: Mapping[str, nn.Module], options: Neurons) -> None:
        self._lists: dict[str, _AddedAt] = {}
        for name, layer in target_layers(networks, options.targets, "neurons").items():
            self._lists[name] = _AddedAt(layer.weight)
            parametrize.register_parametrization(layer, "weight", self._lists[name])

    def live(self) -> dict[str, nn.Parameter]:
        values = {NEURONS + name: each.values for name, each in self._lists.items()}
        return values | {AT + name: each.at for name, each in self._lists.items()}

    def initial(self) -> dict[str, Tensor]:
        """Nothing is chosen."""
        return placed({name: torch.zeros(each.shape, dtype=torch.bool) for name, each in self._lists.items()})

    def changes(self) -> dict[str, Tensor]:
        """By the name of the weight that each is added to."""
        return {
            name: each(torch.zeros(each.shape, device=each.at.device)).detach() for name, each in self._lists.items()
        }

    def differ(self, params: Arrays) -> bool:
        """True, when these parameters choose other numbers of weights. Raises: ShapeError, when one chooses
        what is no weight."""
        wrong = [
            f"{AT}{name} is {params[AT + name].dtype} {list(params[AT + name].shape)}, {NEURONS}{name} "
            f"{list(params[NEURONS + name].shape)}"
            for name, each in self._lists.items()
            if not _are_places(params[AT + name], params[NEURONS + name], each.shape)
        ]
        if wrong:
            raise ShapeError(
                f"{len(wrong)} lists of neurons name no weights: {'; '.join(wrong[:3])}; expected int64 [N], ascending "
                "places in the flattened weight, and as many numbers"
            )
        return any(len(params[AT + name]) != len(each.at) for name, each in self._lists.items())

    def make_room(self, params: Arrays) -> None:
        """Take the numbers of weights that these parameters choose. `live` has new parameters afterwards."""
        for name, each in self._lists.items():
            each.make_room(len(params[AT + name]), each.at.device)


def _are_places(at: Tensor, values: Tensor, shape: torch.Size) -> bool:
    if at.dim() != 1 or values.shape != at.shape:
        return False
    ascend = at.dtype == torch.int64 and bool((at.diff() > 0).all())
    return not len(at) or (ascend and int(at[0]) >= 0 and int(at[-1]) < shape.numel())
