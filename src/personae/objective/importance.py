"""How much single parameters matter: means over draws of squared gradients, one backward for each draw.

The square of a mean gradient is another, smaller thing: with four draws in a batch and a small common mean, about a
quarter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from personae.core import Arrays
from personae.errors import ConfigError


def squared_gradients(
    parameters: Mapping[str, nn.Parameter], draw: Callable[[], Tensor], draws: int
) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information: E g^2 of the losses that `draw` gives, one example each.

    Shapes: like the parameters; on their device.
    Source: Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3. Raises: ConfigError, below 1 draw.
    """
    return _mean(parameters, draw, draws, lambda parameter, gradient: gradient.square())


def first_order(
    parameters: Mapping[str, nn.Parameter], draw: Callable[[], Tensor], draws: int, base: Arrays | None = None
) -> dict[str, Tensor]:
    """E |w dL/dw|: how much the loss changes, to first order, when a weight is taken away.

    With `base` the parameters are changes that are added to it, under their names, and w is the sum.

    Source: Molchanov et al. 2017, arXiv:1611.06440, for feature maps; here for single weights. Raises: ConfigError.
    """
    slopes = _mean(parameters, draw, draws, lambda parameter, gradient: gradient.abs())
    weights = {name: p.detach() if base is None else base[name] + p.detach() for name, p in parameters.items()}
    return {name: weights[name].abs() * slope for name, slope in slopes.items()}


def _mean(
    parameters: Mapping[str, nn.Parameter],
    draw: Callable[[], Tensor],
    draws: int,
    of: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    if draws < 1:
        raise ConfigError(f"draws is {draws}, expected at least 1")
    wanted = {name: parameter.requires_grad for name, parameter in parameters.items()}
    found = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for _ in range(draws):
            gradients = torch.autograd.grad(draw(), list(parameters.values()), allow_unused=True)
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                if gradient is not None:
                    found[name] += of(parameter, gradient) / draws
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(wanted[name])
    return found
