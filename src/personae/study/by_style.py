"""What studies of clients with a style each read from a finished run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from personae.artefact.run_folder import RunFolder
from personae.core import Images, State
from personae.data.emoji import STYLES, pack
from personae.errors import ArtefactError, DataError
from personae.methods.cluster_lora import CLUSTER
from personae.recipe.build import Clients


def styles_of(clients: Clients) -> dict[str, str]:
    """Each training client's style. Raises: DataError."""
    return {name: style_of(name, clients.data[name].train) for name in clients.train}


def style_of(client: str, images: Images) -> str:
    """Whose renderings a client's pictures are. Raises: DataError, when they are of several styles, or of none."""
    for style in STYLES:
        if images.labels is not None and torch.equal(pack().pixels[style][images.labels], images.pixels):
            return style
    raise DataError(f"the pictures of client {client!r} are not of one style; set data.partition.kind to by_attribute")


def server_of(folder: Path) -> State:
    """A run's server after its last round. Raises: ArtefactError, when there was none."""
    server = RunFolder(folder).server()
    if server is None:
        raise ArtefactError(f"{folder} holds no round of a server")
    return server


def of_cluster(server: State, number: int) -> dict[str, Tensor]:
    """A group's adapter, as it is sent to its members."""
    front = f"{CLUSTER}.{number}."
    return {name.removeprefix(front): value for name, value in server.extras.items() if name.startswith(front)}
