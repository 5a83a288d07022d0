import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from personae.artefact import save
from personae.artefact.save import (
    digest,
    json_text,
    load_state,
    read_json,
    read_lines,
    read_metadata,
    save_state,
    write_bytes,
    write_json,
)
from personae.backbone.parts import written_whole
from personae.core import State
from personae.errors import ArtefactError
from personae.testing.contract import differing_states

STATE = State(
    {"w": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.5, -0.0, float("nan")])},
    {
        "moments.step.w": torch.tensor(3.0),
        "index": torch.tensor([1, 2]),
        "mask": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.bfloat16),
    },
    {"round": 3, "rate": 0.1, "phase": "warm", "done": True},
)


def test_a_state_comes_back_with_every_bit_and_type(tmp_path):
    size = save_state(tmp_path / "s", STATE, kind="server")
    assert differing_states(load_state(tmp_path / "s"), STATE) == []
    assert size == (tmp_path / "s").stat().st_size
    assert read_metadata(tmp_path / "s")["kind"] == "server"


def test_an_empty_state_comes_back(tmp_path):
    save_state(tmp_path / "s", State())
    assert load_state(tmp_path / "s") == State()


def test_tensors_that_share_memory_come_back_apart(tmp_path):
    whole = torch.arange(6.0)
    shared = State({"a": whole, "b": whole, "slice": whole[2:4], "turned": whole.view(2, 3).T}, {"a": whole})
    save_state(tmp_path / "s", shared)
    back = load_state(tmp_path / "s")
    assert differing_states(back, shared) == []
    back.params["a"].add_(1)
    assert torch.equal(back.params["b"], whole) and torch.equal(back.extras["a"], whole)


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(call, number, tmp_path, monkeypatch):
    path = tmp_path / "s"
    write_bytes(path, b"old")

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(*((save, "open") if call == "open" else (os, call)), refuse, raising=call != "open")
        with pytest.raises(
            ArtefactError, match=f"writing {path} failed: {os.strerror(number)}. What was saved before is intact"
        ):
            write_bytes(path, b"new")
    assert os.listdir(tmp_path) == ["s"] and path.read_bytes() == b"old"
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_full_device_is_explained(tmp_path, monkeypatch):
    """The write itself fails, in the kernel and not in a stand-in."""
    (tmp_path / "s").write_bytes(b"old")
    monkeypatch.setattr(save, "open", lambda path, mode: open("/dev/full", mode), raising=False)  # noqa: SIM115
    with pytest.raises(ArtefactError, match="No space left on device"):
        write_bytes(tmp_path / "s", b"new")
    assert (tmp_path / "s").read_bytes() == b"old"


def test_the_new_file_is_on_disk_before_it_takes_the_old_ones_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, real=real: (calls.append(name), real(*given)))
    write_bytes(tmp_path / "s", b"new")
    assert calls == ["fsync", "replace", "fsync"]
    assert os.listdir(tmp_path) == ["s"]


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_file_cut_anywhere_is_refused(tmp_path):
    save_state(tmp_path / "whole", STATE)
    data, cut = (tmp_path / "whole").read_bytes(), tmp_path / "cut"
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(ArtefactError, match="damaged or cut short"):
            load_state(cut)


def test_a_damaged_header_is_an_explained_error_or_a_state(tmp_path):
    save_state(tmp_path / "whole", STATE)
    data, refused = (tmp_path / "whole").read_bytes(), 0
    header = 8 + int.from_bytes(data[:8], "little")
    for position in range(header):
        (tmp_path / "flipped").write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        try:
            load_state(tmp_path / "flipped")
        except ArtefactError:
            refused += 1
    assert refused > header / 2


def test_other_files_are_refused_by_name(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "plain")
    with pytest.raises(ArtefactError, match="plain is a safetensors file, but not one that holds a State of personae"):
        load_state(tmp_path / "plain")
    with pytest.raises(ArtefactError, match="nowhere does not exist"):
        load_state(tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match="does not exist"):
        load_state(tmp_path)


def test_another_format_version_is_refused(tmp_path):
    save_state(tmp_path / "s", STATE)
    save_file(load_file(tmp_path / "s"), tmp_path / "s", {**read_metadata(tmp_path / "s"), "format_version": "2"})
    with pytest.raises(
        ArtefactError, match="has format version 2, this version of personae reads 1; install the version"
    ):
        load_state(tmp_path / "s")


@pytest.mark.parametrize("data", [b"", b"{", b'{"a": 1', b"\xff\xfe\x00", b"\x80abc"])
def test_damaged_json_is_refused(data, tmp_path):
    (tmp_path / "j").write_bytes(data)
    with pytest.raises(ArtefactError, match="j is not readable JSON"):
        read_json(tmp_path / "j")


def test_json_comes_back(tmp_path):
    write_json(tmp_path / "j", {"name": "Zoë", "n": [1, 2.5, None]})
    assert (
        read_json(tmp_path / "j")
        == json.loads((tmp_path / "j").read_text("utf-8"))
        == {"name": "Zoë", "n": [1, 2.5, None]}
    )


def test_a_digest_changes_with_name_shape_type_and_bit():
    one = torch.tensor([0.0, 1.0])
    others = [{"w": one}, {"v": one}, {"w": one.view(1, 2)}, {"w": one.double()}, {"w": torch.tensor([-0.0, 1.0])}, {}]
    assert len({digest(other) for other in others}) == len(others)
    assert digest({"a": one, "b": -one}) == digest({"b": -one, "a": one.clone()})


def test_lines_may_hold_any_letter_and_a_cut_one_is_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    told = {"name": "x\u2028y\u0085z", "loss": 0.5}
    path.write_text(json_text(told) + "\n" + json_text({"next": 1}) + '\n{"cut": ', "utf-8")
    assert read_lines(path) == [told, {"next": 1}]
    path.write_text('{"one": 1}\n[1, 2]\n', "utf-8")
    with pytest.raises(ArtefactError, match=r"lines\.jsonl line 2 is '\[1, 2\]', expected an object"):
        read_lines(path)


def test_a_folder_called_here_is_written_whole(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with written_whole(Path(".")) as partial:
        partial.mkdir()
        (partial / "model").write_text("")
    assert (tmp_path / "empty" / "model").is_file()
