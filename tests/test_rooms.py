"""A room imports only from rooms to its left, and every foreign library has one door.

The imports are read from the source, those inside functions included; nothing is executed.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "personae"

# From left to right. Rooms on one line stand beside each other and do not see each other.
LEVELS = (
    ("errors",),
    ("core",),
    ("data",),
    ("personal",),
    ("backbone",),
    ("artefact",),
    ("objective", "theory"),
    ("local",),
    ("infer",),
    ("aggregate",),
    ("privacy",),
    ("methods", "continual"),
    ("engine",),
    ("evaluate", "attack"),
    ("testing",),
    ("recipe",),
    ("sequence",),
    ("study",),
    ("serve",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# Which files of the package may import a library, as paths or folders. What is not listed may be used anywhere.
DOORS = {
    "diffusers": ("backbone/", "infer/"),
    "transformers": (
        "backbone/captions.py",
        "backbone/pipeline.py",
        "backbone/text2image.py",
        "backbone/vocabulary.py",
    ),
    "safetensors": ("artefact/",),
    "peft": ("personal/",),
    "opacus": ("privacy/",),
    "dp_accounting": ("privacy/",),
    "flwr": ("engine/flower/", "testing/loopback.py"),
    "torchmetrics": ("evaluate/",),
    "sklearn.metrics": ("evaluate/", "aggregate/cluster.py"),
    "fastapi": ("serve/",),
    "uvicorn": ("serve/",),
    "cryptography": ("serve/",),
    "typer": ("cli/",),
    "click": ("cli/",),
}


def violations(source: str, path: str) -> list[str]:
    """What the file at `path`, relative to the package, imports and must not."""
    room = room_of(path)
    if room not in LEVEL:
        return [f"{path}: {room!r} is no known room; give it a place in LEVELS"]
    found = []
    for line, name in imported(source, path):
        if name == "personae" or name.startswith("personae."):
            other = name.removeprefix("personae").removeprefix(".").split(".")[0]
            if other == "__version__" or other == room:
                continue
            if other not in LEVEL:
                found.append(f"{path}:{line}: imports {name}, which is no room; import from where it lives")
            elif LEVEL[other] >= LEVEL[room]:
                found.append(f"{path}:{line}: {room} imports {name}, but {other} is not to the left of {room}")
        for library, doors in DOORS.items():
            if (name == library or name.startswith(f"{library}.")) and not path.startswith(doors):
                found.append(f"{path}:{line}: imports {name}; the door of {library} is {' and '.join(doors)}")
    return found


def room_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def imported(source: str, path: str) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of everything imported: `from a import b` gives "a.b"."""
    package = ["personae", *path.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))


# --- the package as it stands --------------------------------------------------------------------------------------

# The front door, personae/__init__.py, hands out names of all rooms and belongs to none.
FILES = sorted(f.relative_to(PACKAGE).as_posix() for f in PACKAGE.rglob("*.py") if f != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES)
def test_keeps_to_its_rooms_and_doors(path):
    assert violations((PACKAGE / path).read_text("utf-8"), path) == []


def test_the_package_was_found():
    assert {"core.py", "errors.py"} <= set(FILES)


# --- planted violations: the check catches what it is for ----------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("from personae.engine import ENGINES", "methods/spire.py"),
        ("import personae.engine.in_process", "methods/spire.py"),
        ("from personae import engine", "methods/spire.py"),
        ("from ..engine import ENGINES", "methods/spire.py"),
        ("from .. import engine", "methods/spire.py"),
        ("def late():\n    from personae.cli.app import app", "recipe/config.py"),
        ("from importlib import import_module\nimport_module('personae.cli.app')", "recipe/config.py"),
        ("from personae.core import Arrays", "errors.py"),
        ("from personae.methods.spire import Spire", "continual/over_tasks.py"),
        ("from personae.evaluate.fidelity import kid", "attack/membership.py"),
        ("from personae.cli.app import app", "serve/app.py"),
        ("from personae import run", "cli/app.py"),
        ("import os", "attic/old.py"),
    ],
)
def test_a_room_to_the_right_is_caught(source, path):
    assert len(violations(source, path)) == 1


WRONG_DOORS = [
    ("diffusers", "methods/spire.py"),
    ("diffusers.models", "evaluate/measure.py"),
    ("transformers", "backbone/unet.py"),
    ("safetensors.torch", "evaluate/features.py"),
    ("peft", "backbone/unet.py"),
    ("opacus", "local/fit.py"),
    ("dp_accounting", "engine/in_process.py"),
    ("flwr.app", "engine/in_process.py"),
    ("torchmetrics.image.fid", "recipe/workflow.py"),
    ("sklearn.metrics", "data/partition.py"),
    ("fastapi", "cli/app.py"),
    ("uvicorn", "cli/app.py"),
    ("cryptography.hazmat", "infer/split.py"),
    ("typer", "recipe/workflow.py"),
    ("click", "recipe/workflow.py"),
]


@pytest.mark.parametrize(("library", "path"), WRONG_DOORS)
def test_a_library_through_the_wrong_door_is_caught(library, path):
    assert len(violations(f"import {library}", path)) == 1
    assert len(violations(f"def late():\n    from {library} import something", path)) == 1


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("from personae.core import Arrays\nfrom personae.local.fit import fit", "methods/spire.py"),
        ("from personae.methods.spire import Spire\nfrom . import spire", "methods/proximal.py"),
        ("from personae import __version__", "artefact/save.py"),
        ("from diffusers import UNet2DModel", "backbone/unet.py"),
        ("from flwr.app import Message", "engine/flower/wire.py"),
        ("from sklearn.datasets import load_digits", "data/sources.py"),
        ("import torch, numpy, diffusion_helpers", "local/fit.py"),
    ],
)
def test_what_is_allowed_passes(source, path):
    assert violations(source, path) == []


def test_every_door_has_a_planted_violation():
    planted = {library for library in DOORS for name, _ in WRONG_DOORS if f"{name}.".startswith(f"{library}.")}
    assert planted == set(DOORS)
