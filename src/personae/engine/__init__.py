"""Who carries states between the server and its clients."""

from __future__ import annotations

from personae.core import Engine
from personae.engine.in_process import InProcess
from personae.engine.patience import Patience
from personae.errors import ConfigError

ENGINES = ("in_process", "flower")
"""The names that a recipe uses."""


def engine_by_name(name: str, patience: Patience, device: str = "cpu") -> Engine:
    """`device` is where clients train: one on a GPU takes a whole one in a simulation.

    Raises: ConfigError, when the engine is unknown or its library is not installed.
    """
    if name == "in_process":
        return InProcess()
    if name != "flower":
        raise ConfigError(f"no engine is called {name!r}; expected one of {', '.join(ENGINES)}")
    try:
        from personae.engine.flower import Flower
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"engine 'flower' needs the package {error.name}: pip install \"personae[flower]\""
        ) from error
    return Flower(patience, gpus_per_client=0.0 if device == "cpu" else 1.0)
