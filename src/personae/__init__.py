"""Personalize diffusion models where the data may not leave its owner.

Importing this package loads nothing else: the names below come from their rooms when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from personae.errors import PersonaeError
    from personae.recipe.config import load_recipe
    from personae.recipe.workflow import open_run, run

    __version__: str

__all__ = ["PersonaeError", "__version__", "load_recipe", "open_run", "run"]

_EXPORTS = {
    "PersonaeError": "personae.errors",
    "load_recipe": "personae.recipe.config",
    "open_run": "personae.recipe.workflow",
    "run": "personae.recipe.workflow",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("personae")
    except metadata.PackageNotFoundError:  # the source tree on the path, without an install
        return "not installed"
