"""What users bring that cannot be used: one sentence, an exit code, and nothing of theirs lost."""

import builtins
import errno
import json
import os

import numpy as np
import pytest
from PIL import Image

from personae.artefact import folder, run_folder, save
from personae.cli import app
from personae.recipe import saved


def picture(path, seed=0, shape=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def clients(tmp_path):
    """Two clients with four pictures each."""
    root = tmp_path / "clients"
    for client in ("anna", "ben"):
        for number in range(4):
            picture(root / client / f"{number}.png", number)
    return root


@pytest.fixture
def run_own(command, clients, tmp_path, tiny):
    """`personae run own_folder` on these clients: (exit code, stdout, stderr)."""
    overrides = [*(o for o in tiny if "partition" not in o), f"data.path={clients}", "data.size=8", "data.channels=1"]

    def call(*more):
        settings = [part for override in (*overrides, *more) for part in ("--set", override)]
        return command("run", "own_folder", "--out", tmp_path / "run", *settings)

    return call


# --- images --------------------------------------------------------------------------------------------------------


def refused(result, sentence, tmp_path):
    code, out, error = result
    assert (code, out) == (3, "")
    assert error.startswith("DataError: ")
    assert "Traceback" not in error
    assert sentence in error
    assert not (tmp_path / "run").exists()


def test_a_client_without_images(run_own, clients, tmp_path):
    (clients / "cleo").mkdir()
    refused(run_own(), "client 'cleo': has no image that can be read; add some or remove the folder", tmp_path)


def test_a_client_with_one_image(run_own, clients, tmp_path):
    picture(clients / "cleo" / "only.png")
    refused(run_own(), "client 'cleo': a client has 1 images, expected at least 2", tmp_path)


def test_a_picture_cut_short_is_named(run_own, clients, tmp_path):
    path = clients / "ben" / "2.png"
    path.write_bytes(path.read_bytes()[:50])
    refused(run_own(), "ben/2.png: cannot be read", tmp_path)


def test_a_picture_cut_short_can_be_left_out(run_own, clients, tmp_path):
    path = clients / "ben" / "2.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.warns(UserWarning, match=r"left out 1 of 8 images\n- ben/2\.png"):
        code, _, _ = run_own("data.on_unreadable=skip")
    assert code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["clients"]["ben"]["num_images"] + summary["clients"]["ben"]["num_heldout"] == 3


def test_a_folder_without_clients(run_own, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(run_own(f"data.path={tmp_path / 'empty'}"), "no folder; expected one folder of images per client", tmp_path)


def test_a_folder_that_does_not_exist(run_own, tmp_path):
    refused(run_own("data.path=nowhere"), "nowhere is no folder", tmp_path)


def test_pictures_beside_the_clients(run_own, clients, tmp_path):
    picture(clients / "stray.png")
    refused(run_own(), "stray.png: lies beside the client folders; move it into one", tmp_path)


def test_a_client_whose_name_is_no_file_name(run_own, clients, tmp_path):
    (clients / "ben").rename(clients / "ben & co")
    refused(run_own(), "client 'ben & co': rename the folder", tmp_path)


def test_fewer_images_than_clients_need(command, tmp_path):
    code, _, error = command("run", "quickstart", "--out", tmp_path / "run", "--set", "data.partition.min_images=72")
    assert code == 2
    assert "min_images is 72, expected 0 to 71: 25 clients share 1797 images" in error
    assert not (tmp_path / "run").exists()


def test_a_new_client_with_one_image(command, copy_of, tiny_run, tmp_path):
    picture(tmp_path / "one" / "only.png")
    folder = copy_of(tiny_run)
    code, _, error = command("personalize", folder, "--data", tmp_path / "one", "--name", "anna")
    assert code == 3
    assert "DataError: client 'anna': a client has 1 images, expected at least 2" in error
    assert not (folder / "clients" / "anna.safetensors").exists()


# --- damaged checkpoints -------------------------------------------------------------------------------------------


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def stopped(copy_of, tiny_run):
    """A run that was stopped when training was done and one client had its personal part."""
    folder = copy_of(tiny_run, "stopped")
    (folder / "cost.json").unlink()
    for path in [*folder.glob("clients/c[1-4]*"), folder / "summary.json", folder / "report.html"]:
        path.unlink()
    return folder


def test_a_stopped_run_can_be_resumed(command, stopped, tiny_run):
    assert command("resume", stopped)[0] == 0
    for name, data in contents(tiny_run.folder).items():
        if name.endswith(".safetensors"):
            assert (stopped / name).read_bytes() == data, name


@pytest.mark.parametrize("kept", [0, 0.5, -1])
@pytest.mark.parametrize("pattern", ["checkpoint.json", "server.*.safetensors", "clients/*.safetensors"])
def test_a_checkpoint_cut_short_is_said_and_nothing_is_overwritten(command, stopped, pattern, kept):
    paths = list((stopped / "checkpoint").glob(pattern))
    for path in paths:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    if pattern == "checkpoint.json" and kept == -1:
        paths[0].write_bytes(paths[0].read_bytes()[:-2])  # the last byte is a line's end
    before = contents(stopped)
    code, out, error = command("resume", stopped)
    assert (code, out) == (5, "")
    lines = [line for line in error.splitlines() if "Error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("ArtefactError: ")
    assert any(str(path) in lines[0] for path in paths)
    assert "Traceback" not in error
    after = contents(stopped)
    assert {name for name, data in before.items() if after[name] != data} == set()


def test_a_missing_checkpoint_file_is_named(command, stopped):
    (path,) = (stopped / "checkpoint").glob("server.*")
    path.unlink()
    code, _, error = command("resume", stopped)
    assert code == 5
    assert f"ArtefactError: {path} does not exist" in error


def test_a_checkpoint_of_another_version(command, stopped):
    path = stopped / "checkpoint" / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    before = contents(stopped)
    code, _, error = command("resume", stopped)
    assert code == 5
    assert "has format version 99, this version of personae reads 1; install the version that wrote it" in error
    assert contents(stopped) == before


def test_rounds_that_were_edited(command, stopped):
    (stopped / "rounds.jsonl").write_text('{"round": 2, "clients": {}}\n')
    code, _, error = command("resume", stopped)
    assert code == 5
    assert "does not hold rounds 1 to 2 in order; it was edited or damaged" in error


def test_a_run_in_use_is_left_alone(command, stopped):
    with run_folder.RunFolder(stopped).held():
        code, _, error = command("resume", stopped)
    assert code == 5
    assert "is in use by another process" in error


# --- a disk that refuses -------------------------------------------------------------------------------------------


class Disk:
    """Refuses the k-th write of a run and every one after it, until `freed`."""

    def __init__(self, monkeypatch, call, k, error):
        self.left, self.code, self.refused = k, error, False
        self.freed = False
        if call == "replace":
            monkeypatch.setattr(os, "replace", self.guarded(os.replace, lambda *_: True))
        else:
            opened = self.guarded(builtins.open, lambda _, mode="r", *__: mode[0] in "wa")
            for module in (save, run_folder, folder):
                monkeypatch.setattr(module, "open", opened, raising=False)

    def guarded(self, call, counts):
        def guarded(*arguments, **options):
            if not self.freed and counts(*arguments):
                self.left -= 1
                if self.left <= 0:
                    self.refused = True
                    raise OSError(self.code, os.strerror(self.code))
            return call(*arguments, **options)

        return guarded


@pytest.mark.parametrize(
    ("call", "k"),
    [
        ("replace", 1),  # config.toml
        ("replace", 2),  # environment.json
        ("replace", 6),  # the checkpoint of round 0
        ("replace", 9),  # the server's state after round 1
        ("replace", 14),  # the checkpoint of the last round
        ("replace", 15),  # the released model
        ("replace", 17),  # a client's personal part
        ("replace", 21),  # cost.json
        ("open", 1),  # the lock
        ("open", 11),  # rounds.jsonl
        ("open", 20),
    ],
)
def test_a_full_or_read_only_disk_loses_nothing(command, tmp_path, tiny, tiny_run, monkeypatch, call, k):
    """While it trains. What is measured afterwards is left out for time."""
    monkeypatch.setattr(saved.SavedRun, "evaluate", lambda *_, **__: {})
    monkeypatch.setattr(saved.SavedRun, "report", lambda _: None)
    monkeypatch.setattr(app, "print_finished", lambda *_: None)
    folder = tmp_path / "run"
    settings = [part for override in tiny for part in ("--set", override)]
    train = ["run", "quickstart", "--out", folder, *settings]
    code = errno.ENOSPC if call == "replace" else errno.EROFS
    disk = Disk(monkeypatch, call, k, code)
    found, _, error = command(*train)
    assert disk.refused, "the disk was never full"
    assert found == 5
    assert error.startswith("ArtefactError: ") or "\nArtefactError: " in error
    assert os.strerror(code) in error
    assert "What was saved before is intact" in error
    assert "Traceback" not in error
    assert not list(folder.rglob("*.partial"))

    disk.freed = True
    started = (folder / "config.toml").is_file()
    found, _, error = command("resume", folder) if started else command(*train)
    assert found == 0, error
    for name, data in contents(tiny_run.folder).items():
        if name.endswith(".safetensors"):
            assert (folder / name).read_bytes() == data, name
    assert (folder / "environment.json").is_file()


@pytest.mark.parametrize("name", ["summary.json", "report.html", "c2.png"])
def test_a_disk_that_fills_while_measuring(command, copy_of, tiny_run, monkeypatch, name):
    folder = copy_of(tiny_run)
    whole = json.loads((folder / "summary.json").read_text("utf-8"))
    for path in ("summary.json", "report.html"):
        (folder / path).unlink()
    replace = os.replace

    def full(source, target):
        if str(target).endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        code, _, error = command("resume", folder)
    assert code == 5
    assert "No space left on device" in error
    assert command("resume", folder)[0] == 0
    again = json.loads((folder / "summary.json").read_text("utf-8"))
    assert again["clients"] == whole["clients"]
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize("command_line", ["export", "sample", "personalize"])
def test_a_full_disk_in_a_small_command(command, copy_of, tiny_run, photos, monkeypatch, tmp_path, command_line):
    folder = copy_of(tiny_run)
    rest = {
        "export": ["--client", "c4", "--to", tmp_path / "exported"],
        "sample": ["--client", "c4", "--out", tmp_path / "drawn"],
        "personalize": ["--data", photos, "--name", "anna"],
    }

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    code, _, error = command(command_line, folder, *rest[command_line])
    assert code == 5
    assert "No space left on device" in error
    assert "Traceback" not in error
    assert not (tmp_path / "exported").exists()
    assert not list(tmp_path.rglob("*.partial"))
