"""A run's folder: what it holds, how it is checkpointed, and how it is taken up again.

    config.toml                 the recipe with every value filled in
    environment.json            versions, platform, threads, commit
    rounds.jsonl                one line per round
    cost.json                   seconds and traffic; its presence says that training is complete
    server.safetensors          what the server released at the end
    clients/<name>.safetensors  each client's personal part
    summary.json, report.html, samples/
    checkpoint/                 the server's and every client's state after the last committed round

A checkpoint is committed by the rename of one small file, `checkpoint/checkpoint.json`, which names the files that
belong together. Files of a round that was never committed are ignored and later removed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from personae.artefact.folder import begun, held
from personae.artefact.save import (
    FORMAT_VERSION,
    explained,
    json_text,
    load_state,
    read_json,
    read_lines,
    read_metadata,
    save_state,
    sync_file,
    write_bytes,
    write_json,
)
from personae.core import State
from personae.errors import ArtefactError


class RunFolder:
    """The one writer of a run's folder while it trains; two processes cannot both hold it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index: dict[str, str] = {}
        self._server: str | None = None
        self._replaced: list[str] = []
        self._staged: dict[str, str] = {}

    # --- opening ---------------------------------------------------------------------------------------------

    def begun(self) -> AbstractContextManager[None]:
        """A new run's folder, held. Raises: ArtefactError, as `artefact.folder.begun`."""
        return begun(self.path, "clients", "checkpoint/clients")

    def held(self) -> AbstractContextManager[None]:
        """Raises: ArtefactError, when another process holds the run."""
        return held(self.path)

    # --- rounds ----------------------------------------------------------------------------------------------

    def append_round(self, record: Mapping[str, Any]) -> None:
        with explained(self.path / "rounds.jsonl", "writing"), open(self.path / "rounds.jsonl", "a") as file:
            file.write(json_text(record) + "\n")

    def rounds(self, upto: int) -> list[dict[str, Any]]:
        """The records of rounds 1..upto. A line cut short by a kill belongs to a later round and is left out."""
        path = self.path / "rounds.jsonl"
        kept = [record for record in read_lines(path) if record["round"] <= upto]
        if [record["round"] for record in kept] != list(range(1, upto + 1)):
            raise ArtefactError(f"{path} does not hold rounds 1 to {upto} in order; it was edited or damaged")
        return kept

    # --- checkpoints -----------------------------------------------------------------------------------------

    def stage(self, client: str, round: int, kept: State) -> None:
        """Write what a client keeps after a round; it counts only once the round is committed."""
        name = f"clients/{client}.{round:06d}.safetensors"
        save_state(self.path / "checkpoint" / name, kept, sync=False)
        self._staged[client] = name
        if client in self._index:
            self._replaced.append(self._index[client])
        self._index[client] = name

    def kept(self, client: str) -> State:
        name = self._index.get(client)
        return State() if name is None else load_state(self.path / "checkpoint" / name)

    def commit(self, round: int, server: State) -> None:
        """Make the state after `round` the one that a resume starts from, then remove what it replaces."""
        folder = self.path / "checkpoint"
        # A finished run that is given more rounds: what was counted and measured at its earlier end is no longer true.
        # So are the personal files of those who trained on; any other names the backbone that it belongs to.
        trained_on = [self.personal_path(client) for client in self._staged]
        for stale in (self.path / "cost.json", self.path / "summary.json", *trained_on):
            with explained(stale, "removing"):
                stale.unlink(missing_ok=True)
        if (self.path / "rounds.jsonl").is_file():
            sync_file(self.path / "rounds.jsonl")
        for staged in self._staged.values():
            sync_file(folder / staged)
        if self._staged:
            sync_file(folder / "clients")
        name = f"server.{round:06d}.safetensors"
        save_state(folder / name, server)
        manifest = {"format_version": FORMAT_VERSION, "round": round, "server": name, "clients": self._index}
        write_json(folder / "checkpoint.json", manifest)
        for old in [*self._replaced, *([self._server] if self._server else [])]:
            with suppress(OSError):
                (folder / old).unlink()
        self._server, self._replaced, self._staged = name, [], {}

    def begin_with(self, server: State, kept: Mapping[str, State]) -> None:
        """A checkpoint before the first round, from which a resume starts."""
        for client in sorted(kept):
            self.stage(client, 0, kept[client])
        self.commit(0, server)

    def restore(self) -> tuple[int, State, list[dict[str, Any]]] | None:
        """(last committed round, the server's state after it, the rounds' records), and the folder set back to it.

        None, when nothing was committed yet. Raises: ArtefactError, when the checkpoint was cut short or is of another
        version.
        """
        folder = self.path / "checkpoint"
        if not (folder / "checkpoint.json").is_file():
            write_bytes(self.path / "rounds.jsonl", b"")
            return None
        manifest = read_json(folder / "checkpoint.json")
        if manifest.get("format_version") != FORMAT_VERSION:
            raise ArtefactError(
                f"the checkpoint in {self.path} has format version {manifest.get('format_version')}, this version of "
                f"personae reads {FORMAT_VERSION}; install the version that wrote it"
            )
        self._index, self._server = dict(manifest["clients"]), manifest["server"]
        needed = {self._server, *self._index.values(), "checkpoint.json"}
        for path in [*folder.glob("*.*"), *folder.glob("clients/*")]:
            if str(path.relative_to(folder)) not in needed:
                path.unlink()
        records = self.rounds(manifest["round"])
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_bytes(self.path / "rounds.jsonl", lines.encode())
        return manifest["round"], load_state(folder / manifest["server"]), records

    def server(self) -> State | None:
        """The server's state after the last committed round; None, when nothing was committed yet."""
        manifest = self.path / "checkpoint" / "checkpoint.json"
        return load_state(manifest.parent / read_json(manifest)["server"]) if manifest.is_file() else None

    def last_kept(self, client: str) -> State:
        """What a client keeps after the last committed round; an empty State, when it took part in none."""
        folder = self.path / "checkpoint"
        there = read_json(folder / "checkpoint.json")["clients"] if (folder / "checkpoint.json").is_file() else {}
        return load_state(folder / there[client]) if client in there else State()

    # --- results ---------------------------------------------------------------------------------------------

    def save_released(self, released: State, backbone: str) -> None:
        """`backbone` is the digest of its parameters, by which a personal file knows where it belongs."""
        save_state(self.path / "server.safetensors", released, kind="server", backbone=backbone)

    def save_personal(self, client: str, personal: State, backbone: str) -> None:
        save_state(self.personal_path(client), personal, kind="personal", client=client, backbone=backbone)

    def has_personal(self, client: str, backbone: str) -> bool:
        path = self.personal_path(client)
        return path.is_file() and read_metadata(path).get("backbone") == backbone

    def personal(self, client: str) -> State:
        return load_state(self.personal_path(client))

    def personal_path(self, client: str) -> Path:
        return self.path / "clients" / f"{client}.safetensors"

    def complete(self, cost: Mapping[str, Any]) -> None:
        """Training and personalization are done and written; `cost` is what they took."""
        write_json(self.path / "cost.json", dict(cost))

    def is_complete(self, rounds: int) -> bool:
        """Whether so many rounds were trained, and everybody personalized; a complete run may lack its checkpoint."""
        manifest = self.path / "checkpoint" / "checkpoint.json"
        trained = read_json(manifest)["round"] if manifest.is_file() else rounds
        return (self.path / "cost.json").is_file() and trained >= rounds
