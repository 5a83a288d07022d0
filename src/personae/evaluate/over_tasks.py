"""What a client still knows of its earlier concepts, from its own models and its own held-out pictures."""

from __future__ import annotations

from collections.abc import Sequence

from personae.core import Arrays, Denoiser, Images
from personae.errors import ConfigError
from personae.evaluate.loss import denoising_loss


def scores_over_tasks(
    model: Denoiser,
    after: Sequence[Arrays],
    heldout: Sequence[Images],
    *,
    grid: int = 10,
    draws: int = 4,
    seed: int = 0,
) -> list[list[float | None]]:
    """R[i][j]: minus the denoising loss on concept j's pictures under the parameters that the client had after its
    concept i. `forgetting` summarises it.

    Raises: ConfigError, unless there are as many models as concepts.
    """
    if len(after) != len(heldout):
        raise ConfigError(f"{len(after)} models and pictures of {len(heldout)} concepts; expected one model after each")
    found: list[list[float | None]] = []
    for row, params in enumerate(after):
        model.load(params)
        known = [-denoising_loss(model, each, grid=grid, draws=draws, seed=seed) for each in heldout[: row + 1]]
        found.append([*known, *[None] * (len(heldout) - row - 1)])
    return found
