"""What a file is, without loading a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personae.artefact.formats_open import refuse_pickle
from personae.artefact.formats_read import described
from personae.artefact.save import load_arrays, read_json, read_lines, read_metadata, read_toml
from personae.errors import ArtefactError


def inspect_file(path: Path) -> dict[str, Any]:
    """Kind, metadata and tensors of a safetensors file, or the state of a run's folder, of whichever kind.

    Of another tool's LoRA or word also what it is and who reads it; peft's is a folder.

    Raises: ArtefactError, when it is neither; a pickle is named and not opened.
    """
    if path.is_dir():
        if not (path / "config.toml").is_file() and (found := described(path)):
            return {"folder": str(path), **found}
        return _run(path)
    if not path.exists():
        raise ArtefactError(f"{path} does not exist")
    refuse_pickle(path)
    metadata, arrays = read_metadata(path), load_arrays(path)
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        **(described(path) or {"kind": metadata.get("kind", metadata.get("format", "safetensors"))}),
        "metadata": metadata,
        "values": sum(a.numel() for a in arrays.values()),
        "tensors": {
            name: {"shape": list(a.shape), "dtype": str(a.dtype).removeprefix("torch.")} for name, a in arrays.items()
        },
    }


def _run(path: Path) -> dict[str, Any]:
    if not (path / "config.toml").is_file():
        raise ArtefactError(f"{path} is a folder, but neither a run nor a study: it has no config.toml")
    config = read_toml(path / "config.toml")
    if "study" in config:
        return _study(path, config)
    if "continual" in config:
        return _taught(path, config)
    return {
        "run": str(path),
        "rounds_done": len(read_lines(path / "rounds.jsonl")),
        "complete": (path / "cost.json").is_file(),
        "evaluated": (path / "summary.json").is_file(),
        "clients": sorted(p.stem for p in (path / "clients").glob("*.safetensors")),
        "environment": read_json(path / "environment.json") if (path / "environment.json").is_file() else {},
    }


def _taught(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    events, lesson = read_lines(path / "events.jsonl"), path / "lesson.safetensors"
    gone = [event["concept"] for event in events if event["event"] == "forget"]
    return {
        "run": str(path),
        "model": config["model"],
        "method": config["continual"]["name"],
        "concepts": [e["concept"] for e in events if e["event"] == "learn" and e["concept"] not in gone],
        "forgotten": gone,
        "waiting": [name for name in _begun(lesson) if name not in {event["concept"] for event in events}],
        "bytes_kept": events[-1]["bytes"] if events else 0,
        "environment": read_json(path / "environment.json") if (path / "environment.json").is_file() else {},
    }


def _begun(lesson: Path) -> list[str]:
    return [read_metadata(lesson)["concept"]] if lesson.is_file() else []


def _study(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    summary = read_json(path / "summary.json") if (path / "summary.json").is_file() else {}
    measured = len(read_lines(path / "cells.jsonl"))
    return {
        "study": str(path),
        "kind": config["study"],
        "title": config.get("title", ""),
        "measured": measured,
        "complete": bool(summary) and summary["measured"] == summary["cells"] == measured,
        "findings": list(summary.get("findings", ())),
        "runs": sorted(run.name for run in (path / "runs").glob("*") if (run / "config.toml").is_file()),
        "environment": read_json(path / "environment.json") if (path / "environment.json").is_file() else {},
    }
