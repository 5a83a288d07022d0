"""Models that come with the library, by their names."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def shipped() -> tuple[str, ...]:
    """Names of the models that come with the library."""
    return tuple(sorted(path.parent.name for path in WEIGHTS.glob("*/model_index.json")))


def is_shipped(name: str | Path) -> bool:
    """True for the name of such a model. A folder that is called the same is reached by its whole path."""
    return str(name) in shipped()


def model_folder(name: str | Path) -> Path:
    """Where the model lies that a recipe or a command names: by its folder, or by the name of one that is shipped."""
    return WEIGHTS / str(name) if is_shipped(name) else Path(name)
