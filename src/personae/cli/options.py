"""What several commands ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for another program.")]


def model_or_run(name: Path) -> Path:
    """Where a run or a pipeline lies. Raises: ArtefactError, when it is neither there nor shipped."""
    from personae.backbone.shipped import model_folder, shipped
    from personae.errors import ArtefactError

    folder = model_folder(name)
    if not folder.exists():
        raise ArtefactError(
            f"{name} does not exist; give the folder of a run or of a text-to-image pipeline, or a model that comes "
            f"with personae: {', '.join(shipped())}"
        )
    return folder
