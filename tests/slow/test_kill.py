"""A run that was killed with SIGKILL and resumed ends in the bits of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from personae.artefact.save import load_state
from personae.testing.contract import differing_states

SCRIPT = Path(__file__).with_name("tiny_run.py")
RESULTS = [
    "clients/c0.safetensors",
    "clients/c1.safetensors",
    "clients/c2.safetensors",
    "clients/n0.safetensors",
    "server.safetensors",
]

# A write is fsync, replace, fsync of the folder. Writes 1 and 2 commit round 0. Five replaces are a round: 3 clients,
# the server, and checkpoint.json, which commits it; after round 12 come the released model (63) and four clients.
# Clients are synced when their round is committed: nine fsyncs are a round: the records, 3 clients, their folder, two
# writes.
SAVES = {
    "before a round is committed": "replace:7:before",
    "after a round is committed": "replace:12:after",
    "in a client's checkpoint": "replace:10:half",
    "in the server's checkpoint": "fsync:37:half",
    "in checkpoint.json": "fsync:39:half",
    "after a client's checkpoint": "replace:25:after",
    "before a folder is on disk": "fsync:63:before",
    "before the released model": "replace:63:before",
    "in a client's personal file": "fsync:115:half",
    "after a client's personal file": "replace:66:after",
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def exit_codes(process):
    """Of every child, once all are done."""
    lines = process.communicate(timeout=200)[0].split()
    assert process.returncode == 0
    return [int(code) for code in lines[1::2]]


def kill_after(process, folder, rounds, wait_seconds):
    """Kill the child that works in `folder` a little after it finished so many rounds. Returns its exit code."""
    child, records = int(process.stdout.readline()), folder / "rounds.jsonl"
    end = time.monotonic() + 60
    while time.monotonic() < end:
        begun = (folder / "checkpoint/checkpoint.json").exists()
        if begun and (rounds == 0 or (records.exists() and records.read_bytes().count(b"\n") >= rounds)):
            break
        time.sleep(0.001)
    time.sleep(wait_seconds)
    os.kill(child, signal.SIGKILL)
    return int(process.stdout.readline())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill") / "whole"
    assert exit_codes(start(folder)) == [0]
    return {name: load_state(folder / name) for name in RESULTS}


def resume_and_compare(folders, whole):
    """How many of the folders end as they would have without the kill."""
    assert exit_codes(start("--resume", *folders)) == [0] * len(folders)
    equal = 0
    for folder in folders:
        files = [*folder.glob("*.safetensors"), *folder.glob("clients/*")]
        found = sorted(str(path.relative_to(folder)) for path in files)
        differing = {name: differing_states(whole[name], load_state(folder / name)) for name in RESULTS}
        equal += found == RESULTS and not any(differing.values())
    return equal


def test_killed_while_training(whole, tmp_path, capsys):
    """Every third round is committed, so that most kills cost a round or two."""
    chance = random.Random()
    moments = {tmp_path / f"run{i}": (chance.randrange(11), chance.uniform(0, 0.05)) for i in range(10)}
    with start("--every", 3, *moments) as process:
        codes = [kill_after(process, folder, *moment) for folder, moment in moments.items()]
    assert codes == [-signal.SIGKILL] * 10
    assert not any((folder / "server.safetensors").exists() for folder in moments), "killed after training was done"
    equal = resume_and_compare(list(moments), whole)
    with capsys.disabled():
        print(f"\nkilled while training: {equal} of {len(moments)} resumed to the same bits")
    assert equal == len(moments), moments


def test_killed_while_saving(whole, tmp_path, capsys):
    folders = {at: tmp_path / at.replace(":", "-") for at in SAVES.values()}
    assert exit_codes(start(*folders.values(), KILL_AT=" ".join(folders))) == [-signal.SIGKILL] * len(folders)
    # A file that had not yet its name is left behind; nothing else is.
    left = {at for at, folder in folders.items() if list(folder.rglob("*.partial"))}
    assert left == {at for at in folders if at.endswith("half") or (at.startswith("replace") and at.endswith("before"))}
    equal = resume_and_compare(list(folders.values()), whole)
    with capsys.disabled():
        print(f"\nkilled while saving: {equal} of {len(folders)} resumed to the same bits")
    assert equal == len(folders), folders
