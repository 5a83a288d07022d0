"""The files that say which versions, and what a wheel holds, agree with each other."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DECLARED = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]


def pins(file: str) -> dict[str, str]:
    """Version by canonical name, of a file of `name==version` lines."""
    lines = [line for line in (ROOT / file).read_text("utf-8").splitlines() if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in lines), f"{file} holds more than pins"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_every_requirement_has_one_lower_bound():
    for line in DECLARED:
        assert [s.operator for s in Requirement(line).specifier] == [">="], line


def test_the_lowest_versions_are_those_declared():
    """Without flwr, whose own bounds are higher than ours: the library is also used without it."""
    ours = [
        r for r in map(Requirement, DECLARED) if r not in map(Requirement, PROJECT["optional-dependencies"]["flower"])
    ]
    declared = {canonicalize_name(r.name): next(iter(r.specifier)).version for r in ours}
    assert pins("requirements-lowest.txt") == declared


def test_the_lock_fits_what_is_declared():
    locked = pins("requirements.lock")
    for requirement in map(Requirement, DECLARED):
        name = canonicalize_name(requirement.name)
        if name != "torch":  # the Makefile installs it first
            assert name in locked, f"requirements.lock lacks {name}; run `make lock`"
            assert locked[name] in requirement.specifier, (
                f"requirements.lock has {name} {locked[name]}; run `make lock`"
            )


def test_the_lock_serves_machines_with_and_without_cuda():
    assert not [name for name in pins("requirements.lock") if name.startswith(("torch-", "nvidia-", "triton", "cuda-"))]
    assert "torch" not in pins("requirements.lock")


def test_the_wheel_carries_everything_a_run_needs(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT, check=True
    )
    (wheel,) = tmp_path.glob("personae-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    for folder, place in (("src/personae", "personae"), ("recipes", "personae/recipes")):
        files = [f for f in (ROOT / folder).rglob("*") if f.is_file() and "__pycache__" not in f.parts]
        assert files, f"{folder} is empty"
        missing = {f"{place}/{f.relative_to(ROOT / folder).as_posix()}" for f in files} - held
        assert not missing, f"not in the wheel: {sorted(missing)}"
