import json
import subprocess
import sys

import pytest
import torch

from personae.artefact import folder as folder_module
from personae.artefact.run_folder import RunFolder
from personae.artefact.save import digest
from personae.core import State
from personae.errors import ArtefactError
from personae.testing.contract import differing_states


def state(value):
    return State({"w": torch.full((2,), float(value))}, facts={"round": value})


def play(folder, number, clients=("c0", "c1"), commit=True):
    """One round: what each client keeps, its record, and the commit."""
    for client in clients:
        folder.stage(client, number, state(number))
    folder.append_round({"round": number})
    if commit:
        folder.commit(number, state(number))


@pytest.fixture
def folder(tmp_path):
    """After two rounds; c1 took part in the first one only."""
    run = RunFolder(tmp_path / "run")
    with run.begun():
        run.commit(0, state(0))
        play(run, 1)
        play(run, 2, clients=["c0"])
    return run.path


def enter(context):
    with context:
        pass


def reopened(path):
    run = RunFolder(path)
    return run, run.restore()


def checkpoint_files(path):
    return sorted(str(p.relative_to(path / "checkpoint")) for p in (path / "checkpoint").rglob("*") if p.is_file())


COMMITTED = [
    "checkpoint.json",
    "clients/c0.000002.safetensors",
    "clients/c1.000001.safetensors",
    "server.000002.safetensors",
]


def test_the_last_committed_round_comes_back(folder):
    run, (number, server, records) = reopened(folder)
    assert number == 2 and records == [{"round": 1}, {"round": 2}]
    assert differing_states(server, state(2)) == []
    assert [run.kept(name).facts.get("round") for name in ("c0", "c1", "c2")] == [2, 1, None]


def test_a_commit_removes_what_it_replaces(folder):
    assert checkpoint_files(folder) == COMMITTED


def test_files_of_an_uncommitted_round_are_ignored_and_removed(folder):
    run, _ = reopened(folder)
    play(run, 3, commit=False)
    (folder / "checkpoint/server.000003.safetensors").write_bytes(b"half a server")
    (folder / "checkpoint/checkpoint.json.partial").write_bytes(b"{")
    (folder / "checkpoint/clients/c1.000003.safetensors.partial").write_bytes(b"half a client")
    run, (number, _, records) = reopened(folder)
    assert number == 2 and len(records) == 2 and run.kept("c1").facts["round"] == 1
    assert checkpoint_files(folder) == COMMITTED
    assert [json.loads(line)["round"] for line in (folder / "rounds.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("torn", [b'{"round": 3, "sec', b'{"round": 3}', b"\xff\xfe"])
def test_a_torn_last_line_is_left_out_and_removed(torn, folder):
    with open(folder / "rounds.jsonl", "ab") as file:
        file.write(torn)
    run, (_, _, records) = reopened(folder)
    assert records == [{"round": 1}, {"round": 2}]
    play(run, 3)
    assert reopened(folder)[1][2] == [{"round": 1}, {"round": 2}, {"round": 3}]


def test_a_missing_round_in_the_middle_is_refused(folder):
    (folder / "rounds.jsonl").write_text('{"round": 2}\n')
    with pytest.raises(ArtefactError, match=r"rounds\.jsonl does not hold rounds 1 to 2 in order"):
        reopened(folder)


def test_another_format_version_is_refused_before_anything_is_removed(folder):
    path = folder / "checkpoint/checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    (folder / "checkpoint/server.000009.safetensors").write_bytes(b"of a later version")
    with pytest.raises(ArtefactError, match="has format version 99, this version of personae reads 1"):
        reopened(folder)
    assert "server.000009.safetensors" in checkpoint_files(folder)


@pytest.mark.parametrize("damaged", COMMITTED[:1] + COMMITTED[3:])
def test_a_damaged_checkpoint_is_explained(damaged, folder):
    path = folder / "checkpoint" / damaged
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArtefactError, match=damaged):
        reopened(folder)


def test_nothing_committed_means_starting_anew(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.begun():
        run.stage("c0", 1, state(1))
    again, found = reopened(tmp_path / "run")
    assert found is None and again.kept("c0") == State()


def test_a_folder_that_holds_something_is_refused(folder, tmp_path):
    before = checkpoint_files(folder)
    with pytest.raises(ArtefactError, match=r"run exists; nothing was overwritten\. Choose another folder"):
        enter(RunFolder(folder).begun())
    assert checkpoint_files(folder) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtefactError, match="file exists; nothing was overwritten"):
        enter(RunFolder(tmp_path / "file").begun())
    (tmp_path / "empty").mkdir()
    enter(RunFolder(tmp_path / "empty").begun())


def test_of_two_that_begin_one_folder_at_once_one_is_refused(tmp_path, monkeypatch):
    path, wait = tmp_path / "run", folder_module.held

    def meanwhile(there):
        monkeypatch.setattr(folder_module, "held", wait)
        with RunFolder(there).begun():
            (there / "config.toml").write_text("theirs")
        return wait(there)

    monkeypatch.setattr(folder_module, "held", meanwhile)
    with pytest.raises(ArtefactError, match="run exists; nothing was overwritten"):
        enter(RunFolder(path).begun())
    assert (path / "config.toml").read_text() == "theirs"


def test_a_second_holder_is_refused_until_the_first_is_done(folder):
    with RunFolder(folder).held(), pytest.raises(ArtefactError, match="run is in use by another process"):
        enter(RunFolder(folder).held())
    enter(RunFolder(folder).held())


def test_another_process_is_refused_and_a_killed_one_leaves_no_lock(folder):
    lock = str(folder / ".lock")
    script = (
        f"import fcntl, time; f = open({lock!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(9)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ArtefactError, match="in use by another process"):
            enter(RunFolder(folder).held())
        other.kill()
    enter(RunFolder(folder).held())


def test_a_folder_that_is_not_there_is_explained(tmp_path):
    with pytest.raises(ArtefactError, match="nowhere failed: No such file or directory"):
        enter(RunFolder(tmp_path / "nowhere").held())


def test_a_personal_file_knows_the_backbone_it_belongs_to(folder):
    run, _ = reopened(folder)
    here, there = digest(state(2).params), digest(state(1).params)
    run.save_personal("c0", state(2), here)
    assert run.has_personal("c0", here) and not run.has_personal("c0", there) and not run.has_personal("c1", here)
    assert differing_states(run.personal("c0"), state(2)) == []


def test_results_of_an_earlier_end_go_when_training_goes_on(folder):
    run, _ = reopened(folder)
    for name in ("c0", "added"):
        run.save_personal(name, state(2), "same")
    run.complete({})
    (folder / "summary.json").write_text("{}")
    assert run.is_complete(2) and not run.is_complete(3)
    play(run, 3)
    assert not run.is_complete(3) and not (folder / "summary.json").exists()
    assert not run.has_personal("c0", "same")  # it trained on
    assert run.has_personal("added", "same") and not run.has_personal("added", "another")
