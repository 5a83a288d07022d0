"""What one client keeps on its own disk while others hold the server.

    <folder>/kept/<round>.safetensors     what it kept after a round, until the server can no longer go back to it
    <folder>/server.safetensors           the released model, once it has personalized
    <folder>/clients/<name>.safetensors   its personal part

A round of a client counts only once the server has taken its update, which the client hears with its next message; so
every round is a file of its own, and the server says which one to start from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from personae.artefact.folder import held
from personae.artefact.save import explained, load_state, read_metadata, save_state
from personae.core import State
from personae.errors import ArtefactError


@dataclass(frozen=True)
class ClientFolder:
    """`personal` is where the personal file is written: in the client's own folder, unless it is a simulated client."""

    path: Path
    name: str
    personal: Path | None = None

    @property
    def personal_path(self) -> Path:
        return (self.personal or self.path / "clients") / f"{self.name}.safetensors"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises: ArtefactError, when another process works for this client."""
        with explained(self.path, "creating"):
            for folder in (self.path / "kept", self.personal_path.parent):
                folder.mkdir(parents=True, exist_ok=True)
        with held(self.path):
            yield

    def kept(self, round: int) -> State:
        """What was kept after `round`; nothing after round 0.

        Raises: ArtefactError, when the file is gone.
        """
        if round == 0:
            return State()
        path = self._kept(round)
        if not path.is_file():
            raise ArtefactError(
                f"{path} is gone: the server counts round {round} of client {self.name!r}, whose state was here. "
                "Restore the folder from a copy, or join again under another name"
            )
        return load_state(path)

    def keep(self, round: int, kept: State, committed: int) -> None:
        """Write what stays after `round`; what lies before `committed`, to which the server may still go back, goes."""
        with explained(self.personal_path, "removing"):
            self.personal_path.unlink(missing_ok=True)  # made of what was kept before
        save_state(self._kept(round), kept)
        for path in (self.path / "kept").glob("*.safetensors"):
            if path.stem.isdigit() and int(path.stem) < committed:  # and not a copy that somebody put there
                with suppress(OSError):
                    path.unlink()

    def save_personal(self, personal: State, backbone: str) -> None:
        save_state(self.personal_path, personal, kind="personal", client=self.name, backbone=backbone)

    def has_personal(self, backbone: str) -> bool:
        path = self.personal_path
        return path.is_file() and read_metadata(path).get("backbone") == backbone

    def save_released(self, released: State, backbone: str) -> None:
        save_state(self.path / "server.safetensors", released, kind="server", backbone=backbone)

    def _kept(self, round: int) -> Path:
        return self.path / "kept" / f"{round:06d}.safetensors"
