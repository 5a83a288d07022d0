"""A bound on how far one client can move the model in one round."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from personae.core import Arrays, Update
from personae.errors import ConfigError, MismatchedNames, RefusedUpdate


def clipped(update: Update, start: Arrays, max_norm: float) -> Update:
    """The update with its change of `start` shortened to L2 norm `max_norm`, where it was longer.

    x <- start + (x - start) min(1, max_norm / ||x - start||), the norm over all `params` together, summed in float64.
    An update that is short enough, a zero change among them, is returned with its bits. `extras` are left alone.
    A bound on the length is none on the direction: clipping alone lets a client pull back as hard as others push on.

    Raises: ConfigError, unless `max_norm` is above 0; MismatchedNames, when `start` lacks a name; RefusedUpdate, when
    the norm is not finite.
    Source: Sun et al. 2019, arXiv:1911.07963, norm thresholding.
    """
    if not 0 < max_norm < math.inf:
        raise ConfigError(f"max_norm is {max_norm}, expected a finite number above 0")
    params = update.sent.params
    if unknown := sorted(params.keys() - start.keys()):
        raise MismatchedNames(f"client {update.client!r} sent names without a start: {', '.join(unknown[:3])}")
    norm = math.sqrt(math.fsum((_wide(value) - _wide(start[n])).double().square().sum() for n, value in params.items()))
    if not math.isfinite(norm):
        raise RefusedUpdate(
            f"client {update.client!r} sent a change whose norm is {norm}; values must be finite: "
            "its training diverged, or it means harm"
        )
    if norm <= max_norm:
        return update
    share = max_norm / norm
    short = {n: _wide(start[n]).lerp(_wide(value), share).to(value.dtype) for n, value in params.items()}
    return replace(update, sent=replace(update.sent, params=short))


def _wide(value: Tensor) -> Tensor:
    """Half precision as float32."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
