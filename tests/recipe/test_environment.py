"""What a run ran on is written down, and what a machine lacks is said."""

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch

from personae.recipe import environment


def test_versions_are_those_installed():
    found = environment.versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == metadata.version("torch")
    assert set(found) == {"python", *environment.LIBRARIES}


def test_a_library_that_is_absent_is_said(monkeypatch):
    monkeypatch.setattr(environment, "LIBRARIES", ("no-such-library",))
    assert environment.versions()["no-such-library"] == "not installed"


def test_the_environment_holds_what_decides_the_bits(tiny_run):
    found = json.loads((tiny_run.folder / "environment.json").read_text("utf-8"))
    assert found.keys() == {"versions", "system", "processor", "threads", "device", "commit"}
    assert (found["threads"], found["device"], found["system"]) == (1, "cpu", platform.system())
    assert found["versions"] == tiny_run.summary["versions"]
    assert found["processor"]


def test_the_commit_is_that_of_the_checkout():
    root = Path(environment.__file__).resolve().parents[3]
    if not (root / ".git").exists():
        assert environment._commit() == ""
        return
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert environment._commit() == head.stdout.strip()


def test_without_git_there_is_no_commit(monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(environment.subprocess, "run", absent)
    assert environment._commit() == ""


def test_a_healthy_machine_is_fine(monkeypatch):
    monkeypatch.setattr(environment, "versions", lambda: dict.fromkeys(environment.LIBRARIES, "1.0"))
    rows = {name: (fine, found) for fine, name, found in environment.doctor()}
    assert rows["torch >= 2.6"] == (True, torch.__version__)
    assert rows["processors"][0]
    assert {f"extra '{extra}'" for extra in environment.EXTRAS} <= rows.keys()
    assert all(fine for fine, _ in rows.values())


@pytest.mark.parametrize(
    ("patch", "row"),
    [
        (("versions", lambda: dict.fromkeys(environment.LIBRARIES, "not installed")), "diffusers"),
        (("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**20})), "free disk here"),
        (("os.access", lambda *_: False), "this folder can be written"),
    ],
)
def test_what_is_wrong_is_found(monkeypatch, patch, row):
    monkeypatch.setattr(f"personae.recipe.environment.{patch[0]}", patch[1])
    rows = {name: fine for fine, name, _ in environment.doctor()}
    assert rows[row] is False


def test_an_extra_that_is_absent_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(environment, "find_spec", lambda _: None)
    rows = {name: (fine, found) for fine, name, found in environment.doctor()}
    assert rows["extra 'mnist'"] == (True, 'absent; pip install "personae[mnist]"'), "an extra is no duty"
