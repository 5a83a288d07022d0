"""What studies of clients with a style each read from a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from personae.artefact.run_folder import RunFolder
from personae.artefact.save import read_json
from personae.core import Images, State, stream
from personae.data.emoji import STYLES, pack
from personae.data.partition import whole_counts
from personae.data.style_mixtures import shares_of
from personae.errors import ArtefactError, DataError
from personae.evaluate.text2image_features import renderings
from personae.methods.cluster_lora import CLUSTER
from personae.recipe.build import Clients


def styles_of(clients: Clients, named: Sequence[str] | None = None) -> dict[str, str]:
    """Each training client's style, out of those that a recipe names. Raises: DataError."""
    return {name: style_of(name, clients.data[name].train, named) for name in clients.train}


def style_of(client: str, images: Images, named: Sequence[str] | None = None) -> str:
    """Whose renderings a client's pictures are: of one style, or of the `named` mixture with the nearest shares.

    Raises: DataError, when they are of none.
    """
    known = images.labels is not None and images.pixels.shape[1:] == pack().pixels[STYLES[0]].shape[1:]
    counts = {style: _of_style(images, style) for style in STYLES} if known else {}
    found = {style: count / len(images) for style, count in counts.items() if count}
    fit = [name for name in named or STYLES if shares_of(name).keys() == found.keys()]
    if not fit or sum(counts.values()) < len(images):
        raise DataError(
            f"the pictures of client {client!r} are not of one style, or not of a mixture that the recipe names; set "
            "data.partition.kind to by_attribute"
        )
    return min(fit, key=lambda name: max(abs(share - found[style]) for style, share in shares_of(name).items()))


def _of_style(images: Images, style: str) -> int:
    """How many of the pictures are the pack's own in this style."""
    return int((pack().pixels[style][images.labels] == images.pixels).flatten(1).all(1).sum())


def real_pictures(style: str, names: Sequence[str]) -> Tensor:
    """Renderings of the names in a style; of a mixture each in one of its styles, drawn by lot in its shares.

    Shapes: uint8 [len(names), 3, 32, 32].
    """
    shares = shares_of(style)
    counts = whole_counts(torch.tensor(list(shares.values())), len(names)).tolist()
    lots = [own for own, count in zip(shares, counts, strict=True) for _ in range(count)]
    order = torch.randperm(len(names), generator=stream(0, "real pictures", style)).tolist()
    return torch.cat([renderings(lots[at], [name]) for at, name in zip(order, names, strict=True)])


def server_of(folder: Path) -> State:
    """A run's server after its last round. Raises: ArtefactError, when there was none."""
    server = RunFolder(folder).server()
    if server is None:
        raise ArtefactError(f"{folder} holds no round of a server")
    return server


def held_names(clients: Clients, name: str) -> set[str]:
    """The names of a client's pictures. It is judged by others: it could draw its own from memory."""
    every, data = list(pack().things), clients.data[name]
    labels = [images.labels for images in (data.train, data.heldout) if images.labels is not None]
    return {every[label] for each in labels for label in each.tolist()}


WORDS_ONLY = ("rounds=1", "method.training.steps=0", "method.adapt.steps=0")
"""Changes of a `cluster_lora` recipe with which clients describe themselves and learn their words, and no more.

Neither depends on how adapters are trained or aggregated, so a seed's other runs begin with what is kept of this one.
"""


def kept_in(folder: Path) -> dict[str, State]:
    """What every client kept in a finished run."""
    return {name: RunFolder(folder).last_kept(name) for name in read_json(folder / "summary.json")["clients"]}


def of_cluster(server: State, number: int) -> dict[str, Tensor]:
    """A group's adapter, as it is sent to its members."""
    front = f"{CLUSTER}.{number}."
    return {name.removeprefix(front): value for name, value in server.extras.items() if name.startswith(front)}
