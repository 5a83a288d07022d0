"""The quickstart as a newcomer meets it, and a run that is killed at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from personae.artefact.save import load_state

ROOT = Path(__file__).resolve().parents[2]
MAIN = "from personae.cli.app import main; main()"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def start(*arguments):
    """The console script in a process of its own."""
    code = f"import sys; sys.argv = ['personae', *{list(map(str, arguments))!r}]\n{MAIN}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def done(process):
    out, error = process.communicate(timeout=1700)
    assert process.returncode == 0, error
    return out


def test_the_quickstart_keeps_its_promise(tmp_path):
    """All of it, on one thread: new clients end at most half as far from their own digits as they began."""
    folder = tmp_path / "run"
    out = done(start("run", "quickstart", "--out", folder, "--set", "machine.threads=1"))
    assert out.endswith(f"report: {folder}/report.html\n")
    assert "src=" in (folder / "report.html").read_text("utf-8")

    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    new = {name: client for name, client in summary["clients"].items() if client["role"] == "new"}
    assert len(summary["clients"]) == 25
    assert len(new) == 5
    before = sum(client["histogram_distance_before"] for client in new.values()) / 5
    after = sum(client["histogram_distance"] for client in new.values()) / 5
    print(f"\nhistogram distance of new clients: {before:.3f} -> {after:.3f}")
    assert after <= before / 2
    # On the whole: a client whose classes are mixed like everybody's has little to gain.
    losses = [(client["heldout_loss_before"], client["heldout_loss"]) for client in new.values()]
    assert sum(own for _, own in losses) < sum(everybody for everybody, _ in losses)
    for name, client in new.items():
        path = folder / "clients" / f"{name}.safetensors"
        assert client["bytes_up"] == 0
        assert client["personal_file_bytes"] == path.stat().st_size <= 8192
        assert client["trained_parameters"] == load_state(path).num_values() <= 1024


RESULTS = ("server.safetensors", *(f"clients/c{i}.safetensors" for i in range(5)))


def test_a_kill_at_any_moment_changes_no_bit(tmp_path, tiny):
    """SIGKILL while it starts, trains, personalizes and measures; then `personae resume` until it is done."""
    settings = [part for override in (*tiny, "rounds=10") for part in ("--set", override)]
    whole = tmp_path / "whole"
    done(start("run", "quickstart", "--out", whole, *settings))
    moments = {
        "at the start": lambda folder: (folder / "config.toml").is_file(),
        "in round 2": lambda folder: lines(folder) >= 1,
        "in round 6": lambda folder: lines(folder) >= 5,
        "in the last round": lambda folder: lines(folder) >= 9,
        "while personalizing": lambda folder: (folder / "server.safetensors").is_file(),
        "while measuring": lambda folder: (folder / "samples").is_dir(),
    }
    folder = tmp_path / "killed"
    for when, reached in moments.items():
        again = (folder / "config.toml").is_file()
        arguments = ["resume", folder] if again else ["run", "quickstart", "--out", folder, *settings]
        with start(*arguments) as process:
            wait(process, lambda reached=reached: reached(folder), when)
            time.sleep(random.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert process.returncode == -signal.SIGKILL, when
    done(start("resume", folder))
    differing = [name for name in RESULTS if (folder / name).read_bytes() != (whole / name).read_bytes()]
    assert differing == []
    summaries = [json.loads((f / "summary.json").read_text("utf-8")) for f in (folder, whole)]
    assert summaries[0]["clients"] == summaries[1]["clients"]
    assert [s["bytes_up"] for s in summaries[:1]] == [s["bytes_up"] for s in summaries[1:]]
    assert not list(folder.rglob("*.partial"))


def lines(folder):
    path = folder / "rounds.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait(process, reached, when):
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if reached():
            return
        time.sleep(0.002)
    raise AssertionError(f"{when}: not reached; exit code {process.poll()}")
