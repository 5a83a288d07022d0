"""A State as one safetensors file, written so that a reader sees the old file or the new one and never a half.

Tensors are prefixed "params/" and "extras/"; facts and the format's version stand in the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from personae.core import Arrays, State
from personae.errors import ArtefactError

FORMAT_VERSION = 1
PARTIAL = ".partial"
"""Suffix of a file that is being written; whatever a kill leaves behind is ignored and overwritten."""


@contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Turn what the operating system refuses into an ArtefactError that names the file."""
    try:
        yield
    except OSError as error:
        raise ArtefactError(
            f"{doing} {path} failed: {error.strerror or error}. "
            "What was saved before is intact; free some space or choose another folder, then resume."
        ) from error


def write_bytes(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write atomically: temporary file, fsync, rename, fsync of the folder.

    Without `sync` a power cut may lose the file, though a kill does not; `sync_file` makes up for it.
    Raises: ArtefactError, when the disk is full or read-only; the old file is then untouched.
    """
    partial = path.with_name(path.name + PARTIAL)
    with explained(path, "writing"):
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            with suppress(OSError):
                partial.unlink()
            raise
        if sync:
            _fsync(path.parent)


def sync_file(path: Path) -> None:
    """Make a file that was written without `sync` outlast a power cut; its folder needs the same."""
    with explained(path, "writing"):
        _fsync(path)


def _fsync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line; none where there is no file. A line that was cut short by a kill is left out.

    Raises: ArtefactError, when a line holds anything else.
    """
    found = []
    if path.is_file():
        with explained(path, "reading"):
            lines = path.read_text("utf-8", "replace").split("\n")  # and not at U+2028, which JSON may hold
        for number, line in enumerate(lines, 1):
            with suppress(ValueError):
                found.append(json.loads(line))
                if not isinstance(found[-1], dict):
                    raise ArtefactError(
                        f"{path} line {number} is {line[:40]!r}, expected an object; it was damaged or edited by hand. "
                        "Put it back as it was"
                    )
    return found


def write_json(path: Path, value: Any) -> None:
    """Write `json_text` atomically. Raises: ArtefactError."""
    write_bytes(path, (json_text(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Raises: ArtefactError, when the file is missing or not JSON."""
    with explained(path, "reading"):
        data = path.read_bytes()
    try:
        return json.loads(data)
    except ValueError as error:
        raise ArtefactError(f"{path} is not readable JSON ({error}); it was damaged or edited by hand") from error


def read_toml(path: Path) -> dict[str, Any]:
    """Raises: ArtefactError, when the file is missing or not TOML."""
    with explained(path, "reading"):
        data = path.read_bytes()
    try:
        return tomllib.loads(data.decode())
    except ValueError as error:
        raise ArtefactError(
            f"{path} cannot be read: {error}; it was damaged or edited by hand. Put it back as it was"
        ) from error


def state_bytes(state: State, **about: str) -> bytes:
    metadata = {
        "format": "personae.state",
        "format_version": str(FORMAT_VERSION),
        "facts": json.dumps(dict(state.facts)),
    }
    return _ordered(save(_separate({"params/": state.params, "extras/": state.extras}), metadata={**about, **metadata}))


def _ordered(data: bytes) -> bytes:
    """The same file with its metadata sorted, whose order safetensors leaves to chance: equal states, equal bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(data)[end:]])


def _separate(parts: Mapping[str, Arrays]) -> dict[str, Tensor]:
    """One contiguous tensor per prefixed name: a State may hold the same tensor twice, a file may not."""
    tensors, seen = dict[str, Tensor](), set[int]()
    for prefix, arrays in parts.items():
        for name, value in arrays.items():
            storage = value.untyped_storage()
            shared = storage.data_ptr() in seen or storage.nbytes() != value.nbytes
            seen.add(storage.data_ptr())
            tensors[prefix + name] = (
                value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous()
            )
    return tensors


def save_state(path: Path, state: State, *, sync: bool = True, **about: str) -> int:
    """Write a State; `about` are further lines of metadata. Returns the size in bytes."""
    data = state_bytes(state, **about)
    write_bytes(path, data, sync=sync)
    return len(data)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises: ArtefactError, when it is not one or was cut short."""
    return _read(path, tensors=False)[1]


def load_state(path: Path) -> State:
    """Raises: ArtefactError, when the file is missing, cut short, not a State, or of another format version."""
    return _state(*_read(path, tensors=True), str(path))


def state_from_bytes(data: bytes, what: str) -> State:
    """What `state_bytes` wrote, from a peer that may lie: nothing is run, and no more is allocated than `data` is long.

    Raises: ArtefactError, which calls the bytes `what`.
    """
    try:
        tensors = load(data)  # checks that every tensor lies inside the data, before any is made
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return _state(tensors, header.get("__metadata__", {}), what)
    except (
        SafetensorError,
        ValueError,
        LookupError,
        TypeError,
        ArithmeticError,
        RuntimeError,
        AttributeError,
    ) as error:
        raise ArtefactError(f"{what} is no State of personae ({error})") from error


def _state(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], what: str) -> State:
    """Raises: ArtefactError."""
    if metadata.get("format") != "personae.state":
        raise ArtefactError(f"{what} is a safetensors file, but not one that holds a State of personae")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ArtefactError(
            f"{what} has format version {metadata.get('format_version')}, this version of personae reads "
            f"{FORMAT_VERSION}; install the version that wrote it"
        )
    parts: dict[str, dict[str, Tensor]] = {"params": {}, "extras": {}}
    try:
        for key, value in tensors.items():
            part, name = key.split("/", 1)
            parts[part][name] = value
        facts = json.loads(metadata["facts"])
        if not isinstance(facts, dict) or not all(isinstance(v, int | float | str) for v in facts.values()):
            raise ValueError("facts that are not flat scalars")
        return State(parts["params"], parts["extras"], facts)
    except (KeyError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{what} is damaged ({error!r} in its header); restore it from a copy") from error


def load_arrays(path: Path) -> dict[str, Tensor]:
    """The tensors of any safetensors file. Raises: ArtefactError."""
    return _read(path, tensors=True)[0]


def _read(path: Path, *, tensors: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise ArtefactError(f"{path} does not exist")
    with explained(path, "reading"):
        try:
            with safe_open(path, framework="pt") as file:
                read = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118
                return read, dict(file.metadata() or {})
        except SafetensorError as error:
            raise ArtefactError(f"{path} is damaged or cut short ({error}); restore it from a copy") from error


def digest(arrays: Arrays) -> str:
    """16 hex digits that change with any name, shape, type or bit."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        value = arrays[name].detach().contiguous().cpu()
        sha.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]
