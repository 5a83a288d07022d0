"""A study measures every cell once, takes up where it was stopped, and ends in the same numbers in any order."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from matplotlib.axes import Axes

from personae import study
from personae.core import stream
from personae.errors import ArtefactError, ConfigError, DataError, PersonaeError
from personae.evaluate.charts import chart
from personae.recipe.config import load_recipe
from personae.study.study import Answer, Chart, Table
from personae.study.workflow import is_study, open_study, resume_study, run_study

RECIPE = """
title = "How far dice fall"
name = "dice"
study = "dice"

[settings]
sides = [6, 20]
throws = 3
"""


@dataclass(frozen=True)
class Dice:
    """Throws of dice, then one more throw of the die that did best."""

    sides: tuple[int, ...]
    throws: int = 2
    fails_at: int | None = None
    dies_at: int | None = None
    pause: float = 0.0

    def __post_init__(self):
        if self.throws < 1:
            raise ConfigError(f"throws is {self.throws}, expected at least 1")

    def cells(self, found):
        cells = [{"sides": sides, "throw": throw} for sides in self.sides for throw in range(self.throws)]
        if len(found) < len(cells):
            return cells
        return [*cells, {"sides": max(found, key=lambda row: row["eyes"])["sides"], "throw": -1}]

    def measure(self, cell, seed, folder):
        time.sleep(self.pause)
        if cell["throw"] == self.fails_at:
            while len((folder / "cells.jsonl").read_text("utf-8").splitlines()) < self.fails_at:
                time.sleep(0.01)  # another process may still be at a throw before this one
            raise DataError("the die fell off the table")
        if cell["throw"] == self.dies_at:
            os._exit(9)
        rng = stream(seed, cell["sides"], cell["throw"])
        return {"eyes": int(torch.randint(cell["sides"], (), generator=rng)) + 1}

    def answer(self, found):
        def draw(axes: Axes) -> None:
            axes.plot([row["eyes"] for row in found])

        best = max((row["eyes"] for row in found), default=None)
        table = Table("Throws", ("sides", "eyes"), [(row["sides"], row["eyes"]) for row in found], "all of <them>")
        drawn = Chart("eyes", chart("eyes", 3, 2, draw, "Eyes"), "in the order of the throws")
        return Answer([f"The best throw has {best} eyes."], {"best": best}, [table], [drawn])


@pytest.fixture(autouse=True)
def dice(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))  # a second process finds `Dice` by its module
    monkeypatch.setattr(study, "STUDIES", {"dice": Dice})
    monkeypatch.setattr("personae.study.config.STUDIES", {"dice": Dice})


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "dice.toml"
    path.write_text(RECIPE, "utf-8")
    return path


def test_a_study_leaves_a_folder_that_explains_itself(recipe, tmp_path):
    told = []
    saved = run_study(recipe, tmp_path / "out", watch=told.append)

    assert [(r["sides"], r["throw"]) for r in saved.rows] == [
        (6, 0),
        (6, 1),
        (6, 2),
        (20, 0),
        (20, 1),
        (20, 2),
        (20, -1),
    ]
    assert saved.summary["measured"] == saved.summary["cells"] == 7
    assert saved.summary["numbers"] == {"best": max(row["eyes"] for row in saved.rows)}
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    for part in ("How far dice fall", saved.summary["findings"][0], "all of &lt;them&gt;", "throws = 3", "<svg"):
        assert part in page
    assert (
        ElementTree.parse(tmp_path / "out" / "charts" / "eyes.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    )
    assert "var(--" not in (tmp_path / "out" / "charts" / "eyes.svg").read_text("utf-8")
    assert [(now.client, now.clients_done, now.clients) for now in told[:2]] == [
        ("sides 6 throw 0", 1, 6),
        ("sides 6 throw 1", 2, 6),
    ]
    assert told[-1].done and told[-1].clients == 7


def test_two_processes_measure_the_same(recipe, tmp_path):
    one = run_study(recipe, tmp_path / "one")
    two = run_study(recipe, tmp_path / "two", overrides=["machine.workers=2"])
    assert one.rows == two.rows


@pytest.mark.parametrize("kept", [0, 1, 4, 6])
def test_a_stopped_study_goes_on(recipe, tmp_path, kept):
    whole = run_study(recipe, tmp_path / "whole")
    folder = run_study(recipe, tmp_path / "stopped").folder
    lines = (folder / "cells.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "cells.jsonl").write_text("".join(lines[:kept]) + lines[kept][:9], "utf-8")  # cut short by a kill
    (folder / "summary.json").unlink()

    told = []
    saved = resume_study(folder, watch=told.append)

    assert saved.rows == whole.rows
    assert len(told) == 7 - kept
    assert len((folder / "cells.jsonl").read_text("utf-8").splitlines()) == 7


@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_measured_before_an_error_is_kept(recipe, tmp_path, workers):
    with pytest.raises(DataError, match="fell off the table"):
        run_study(recipe, tmp_path / "out", overrides=["settings.fails_at=2", f"machine.workers={workers}"])
    kept = [row["throw"] for row in open_study(tmp_path / "out").rows]
    assert kept[:2] == [0, 1] and 2 not in kept
    assert workers == 2 or len(kept) == 2  # two at a time: others may be done too


def test_a_process_that_is_killed_is_explained_and_the_study_goes_on(recipe, tmp_path):
    overrides = ["settings.dies_at=2", "machine.workers=2"]
    with pytest.raises(PersonaeError, match=r"ended from outside.* continue with: personae resume"):
        run_study(recipe, tmp_path / "out", overrides=overrides)
    config = tmp_path / "out" / "config.toml"
    config.write_text(config.read_text("utf-8").replace("dies_at = 2\n", ""), "utf-8")
    assert len(resume_study(tmp_path / "out").rows) == 7


def test_other_versions_are_warned_of_where_there_is_something_left_to_measure(recipe, tmp_path):
    folder = run_study(recipe, tmp_path / "out").folder
    about = json.loads((folder / "environment.json").read_text("utf-8"))
    about["versions"]["torch"] = "1.0"
    (folder / "environment.json").write_text(json.dumps(about), "utf-8")
    with warnings.catch_warnings(action="error"):
        resume_study(folder)
    lines = (folder / "cells.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "cells.jsonl").write_text("".join(lines[:3]), "utf-8")
    with pytest.warns(UserWarning, match="began with torch 1.0, is now"):
        resume_study(folder)
    assert "resumed_with" in json.loads((folder / "environment.json").read_text("utf-8"))


def test_cells_that_a_study_no_longer_asks_for_are_kept_and_not_counted(recipe, tmp_path):
    folder = run_study(recipe, tmp_path / "out").folder
    config = folder / "config.toml"
    written = config.read_text("utf-8")
    assert "    6,\n    20,\n" in written
    config.write_text(written.replace("    6,\n    20,\n", "    20,\n    4,\n"), "utf-8")

    told = []
    saved = resume_study(folder, watch=told.append)

    assert {row["sides"] for row in saved.rows} == {20, 4} and saved.summary["measured"] == saved.summary["cells"] == 7
    assert [(now.clients_done, now.clients) for now in told[:3]] == [(4, 6), (5, 6), (6, 6)]
    assert len((folder / "cells.jsonl").read_text("utf-8").splitlines()) in (10, 11), "those of six sides stay"


def test_a_report_of_an_unfinished_study(recipe, tmp_path):
    folder = run_study(recipe, tmp_path / "out").folder
    (folder / "cells.jsonl").write_text("", "utf-8")
    open_study(folder).report()
    assert open_study(folder).summary["numbers"] == {"best": None}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["study=dise"], "study: 'dise' is unknown; did you mean 'dice'"),
        (["settings.throw=3"], "settings.throw: unknown key; did you mean 'throws'"),
        (["settings.throws=0"], "throws is 0, expected at least 1"),
        (["settings.sides="], "settings.sides: missing"),
        (["machine.workers=0"], "workers 0"),
        (["rounds=3"], "rounds: unknown key"),
    ],
)
def test_a_recipe_with_a_problem_leaves_no_folder(recipe, tmp_path, overrides, told):
    with pytest.raises(ConfigError, match=told):
        run_study(recipe, tmp_path / "out", overrides=overrides)
    assert not (tmp_path / "out").exists()


def test_a_study_is_no_run(recipe, tmp_path):
    with pytest.raises(ConfigError, match="is a study"):
        load_recipe(recipe)
    run_study(recipe, tmp_path / "out")
    assert is_study(tmp_path / "out") and not is_study(tmp_path)
    with pytest.raises(ArtefactError, match="nothing was overwritten"):
        run_study(recipe, tmp_path / "out")
    with pytest.raises(ArtefactError, match="holds no study"):
        open_study(tmp_path)


def test_on_the_command_line(recipe, tmp_path, command):
    code, out, _ = command("run", recipe, "--out", tmp_path / "out")
    assert code == 0 and "The best throw has" in out and "report.html" in out
    code, out, _ = command("resume", tmp_path / "out", "--json")
    assert code == 0 and json.loads(out)["summary"]["measured"] == 7
    code, out, _ = command("inspect", tmp_path / "out", "--json")
    found = json.loads(out)
    assert code == 0 and (found["kind"], found["measured"], found["complete"]) == ("dice", 7, True)
    code, out, _ = command("report", tmp_path / "out")
    assert code == 0 and out == f"wrote {tmp_path / 'out' / 'report.html'}\n"


STOPPED = """
import sys
sys.path.insert(0, {here!r})
import test_workflow
from personae.study import config
config.STUDIES = {{"dice": test_workflow.Dice}}
from personae.cli import app
if __name__ == "__main__":
    slow = ["--set", "settings.pause=0.4", "--set", "machine.workers=2"]
    sys.argv = ["personae", "run", {recipe!r}, "--out", {out!r}, *slow]
    app.main()
"""


def started(recipe, folder):
    """A study of two workers in a process group of its own, after its first measurement."""
    script = folder.parent / "script.py"
    here = str(Path(__file__).parent)
    script.write_text(STOPPED.format(here=here, recipe=str(recipe), out=str(folder)), "utf-8")
    process = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not ((folder / "cells.jsonl").is_file() and (folder / "cells.jsonl").read_bytes()):
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return process


def test_ctrl_c_stops_every_process_and_the_study_goes_on(recipe, tmp_path):
    folder = tmp_path / "out"
    process = started(recipe, folder)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "Continue with: personae resume" in error and "Traceback" not in error
    done = len((folder / "cells.jsonl").read_text("utf-8").splitlines())
    assert 1 <= done < 7
    assert len(resume_study(folder).rows) == 7


def test_a_killed_study_leaves_no_process_behind(recipe, tmp_path):
    process = started(recipe, tmp_path / "out")
    process.kill()
    process.wait(timeout=30)
    deadline = time.monotonic() + 30
    while group_lives(process.pid):
        assert time.monotonic() < deadline, "a worker goes on without its study"
        time.sleep(0.05)
    process.stderr.close()


def group_lives(number):
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True
