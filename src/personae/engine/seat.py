"""One client's end of the wire: what it does with a message, and what stays on its disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from personae.artefact.client_folder import ClientFolder
from personae.artefact.save import digest
from personae.core import Facts, Method, Site, State, Update
from personae.engine.rounds import load_parts
from personae.engine.validate import check_privacy
from personae.errors import FederationError


@dataclass(frozen=True)
class Seat:
    """Where one client sits: its method, its data behind a Site, and the folder of its state.

    `folder` holds one sub-folder per run. `personal` is where personal files go instead, for simulated clients.
    `measure` gives what the client tells of its personal model, from its folder and whether it took part in training.
    """

    name: str
    method: Method
    site: Site
    seed: int
    folder: Path
    personal: Path | None = None
    measure: Callable[[Path, bool], Facts] | None = None

    def local(self, run: str, round: int, since: int, committed: int, got: State) -> Update:
        """One round, from what was kept after round `since`. What it keeps is on disk before the update is returned.

        Raises: PrivacyError, before anything is sent; ArtefactError; whatever the method raises.
        """
        folder = self._folder(run)
        with folder.held():
            kept = folder.kept(since)
            client = self.site.client(self.name, round, self.seed)
            load_parts(client, got.params, kept.params, self.seed)
            update, kept = self.method.local(client, got, kept)
            check_privacy(update, round=round, personal=self.method.personal)
            folder.keep(round, kept, committed)
        return update

    def personalize(self, run: str, since: int, released: State) -> None:
        """Make and save the personal part; one that is there, of the same model, stays."""
        folder, backbone = self._folder(run), digest(released.params)
        with folder.held():
            if not folder.has_personal(backbone):
                kept = folder.kept(since)
                client = self.site.client(self.name, "personalize", self.seed)
                load_parts(client, released.params, kept.params, self.seed)
                personal = self.method.personalize(client, released, kept)
                if self.personal is None:
                    folder.save_released(released, backbone)
                folder.save_personal(personal, backbone)

    def figures(self, run: str, since: int) -> Facts:
        """What `measure` says of the personal model."""
        return {} if self.measure is None else self.measure(self._folder(run).path, since > 0)

    def _folder(self, run: str) -> ClientFolder:
        if not run.isalnum():  # it becomes a folder's name
            raise FederationError(f"the server names its run {run!r}, expected letters and digits")
        return ClientFolder(self.folder / run, self.name, self.personal)


def introduction(method: Method, model: Mapping[str, Tensor]) -> Facts:
    """What two sides must agree on before they exchange anything: version, method with its numbers, and model."""
    from personae import __version__

    shapes = "; ".join(f"{name} {list(value.shape)}" for name, value in sorted(model.items()))
    return {"version": __version__, "method": repr(method), "num_tensors": len(model), "shapes": shapes}


def disagreement(ours: Facts, theirs: Mapping[str, object]) -> str | None:
    """The first thing that differs, with both sides of it."""
    for key, value in ours.items():
        if theirs.get(key) != value:
            if key == "shapes":
                return "the models differ in names or shapes"
            return f"{key} is {theirs.get(key)!r}, the server's is {value!r}"
    return None
