"""A folder that one process writes at a time, and that is never begun twice."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from personae.artefact.save import PARTIAL, explained
from personae.errors import ArtefactError

LOCK = ".lock"


def refuse_existing(folder: Path) -> None:
    """Raises: ArtefactError, when the folder exists and holds a file."""
    with explained(folder, "reading"):
        if folder.exists() and (not folder.is_dir() or _holds_files(folder)):
            begun = (folder / "config.toml").is_file()
            raise ArtefactError(
                f"{folder} exists; nothing was overwritten. Choose another folder"
                + (f", or continue it with: personae resume {folder}" if begun else "; this one holds no run")
            )


@contextmanager
def begun(folder: Path, *inner: str) -> Iterator[None]:
    """A new folder with these in it, held for as long as its first files are written.

    Raises: ArtefactError, when the folder exists and holds a file, cannot be made, or is in use.
    """
    refuse_existing(folder)
    with explained(folder, "creating"):
        for path in (folder, *(folder / name for name in inner)):
            path.mkdir(parents=True, exist_ok=True)
    with held(folder):
        refuse_existing(folder)  # somebody else may have begun it in the meantime
        yield


@contextmanager
def held(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Nobody else holds the folder meanwhile. The system lets go of what a killed process held.

    Raises: ArtefactError, when another process holds it, and still does after `patience` seconds.
    """
    with explained(folder, "locking"):
        lock = open(folder / LOCK, "w")  # noqa: SIM115 - closed below, and what is done meanwhile is not "locking"
    with lock:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= until:
                    raise ArtefactError(f"{folder} is in use by another process; wait for it or stop it") from error
            time.sleep(0.05)
        yield


def _holds_files(folder: Path) -> bool:
    """Whether anything would be lost. What a start that failed at once leaves behind does not count."""
    return any(not path.is_dir() and path.name != LOCK and path.suffix != PARTIAL for path in folder.rglob("*"))
