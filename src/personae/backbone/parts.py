"""Names in, tensors out: what every denoiser does to copy its parameters and to load others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from personae.core import Arrays
from personae.errors import ArtefactError, MismatchedNames, ShapeError
from personae.personal.embedding import ClientEmbedding, clients_in, is_per_client


def copies(live: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Detached copies on the CPU, in the live tensors' own types."""
    return {name: value.detach().to("cpu", copy=True) for name, value in live.items()}


@torch.no_grad()
def load_into(
    live: MutableMapping[str, nn.Parameter], part: ClientEmbedding | None, params: Arrays, num_clients: int
) -> None:
    """Overwrite every live tensor, or none at all. The clients' part among them has `num_clients` rows afterwards.

    Raises: MismatchedNames, ShapeError.
    """
    if params.keys() != live.keys():
        missing, unknown = sorted(live.keys() - params.keys()), sorted(params.keys() - live.keys())
        found = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise MismatchedNames(
            f"the parameters do not belong to this model: {'; '.join(found)}, of {len(live)} expected. "
            "Were they made with another backbone or embedding?"
        )
    shapes = {n: (num_clients, *value.shape[1:]) if is_per_client(n) else value.shape for n, value in live.items()}
    wrong = [
        f"{name} is {list(params[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if params[name].shape != shape
    ]
    if wrong:
        raise ShapeError(
            f"{len(wrong)} parameters have another shape: {'; '.join(wrong[:3])}. "
            "Were they made with another backbone size or embedding width?"
        )
    if part is not None and clients_in(live) != num_clients:
        part.make_room(num_clients)
        live.update(part.named_parameters())
    for name, value in live.items():
        value.copy_(params[name])


def refuse_partial(folder: Path, found: Mapping[str, Any]) -> None:
    """`found` is the loading info of `from_pretrained`, which draws what is missing at random and says no more than a
    log line.

    Raises: ArtefactError, when weights are missing or unknown.
    """
    for what, names in (("lack", found["missing_keys"]), ("have unknown", found["unexpected_keys"])):
        if names:
            raise ArtefactError(f"the weights in {folder} {what} {', '.join(sorted(names)[:3])}; save the model again")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the wanted name when all of it is there, and is gone otherwise.

    Raises: ArtefactError, when `folder` exists and is not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtefactError(f"{folder} exists; nothing was overwritten. Choose another folder")
    folder = folder.absolute()  # "." has no name
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        yield partial
        partial.replace(folder)
    except OSError as error:
        raise ArtefactError(f"writing {folder} failed: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
