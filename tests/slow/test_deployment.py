"""A deployment with real processes: the bits of one process, and what is on the wire between them."""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("flwr")

import personae
from personae.artefact.save import load_state
from personae.personal.embedding import EMBEDDING
from personae.recipe.deploy import deploy

ROOT = Path(__file__).resolve().parents[2]
BIN = sysconfig.get_path("scripts")
LITTLE = (
    "rounds=2",
    "method.training.steps=10",
    "method.adapt.steps=10",
    "evaluation.num_images=8",
    "evaluation.loss_grid=2",
    "evaluation.loss_draws=1",
    "evaluation.kid_subsets=2",
    "sampling.steps=2",
)
MARK = "PERSONAE_TEST"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


def environment(folder, **more):
    """Of everything that belongs to one test, so that whatever of it is left can be found."""
    own = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src"), MARK: str(folder)}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", **more}


def left(folder):
    """Process numbers and command lines of what still runs."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{MARK}={folder}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def wait(reached, seconds, what):
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def end(folder):
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in left(folder):
            with suppress(ProcessLookupError):
                os.kill(process, number)
        with suppress(AssertionError):
            wait(lambda: not left(folder), 15, "everything has ended")


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    end(tmp_path)


def free_ports(count):
    """The first of so many ports in a row, below those that the system gives away by itself."""
    for first in range(20000 + os.getpid() % 10000, 32000):
        with suppress(OSError):
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
            return first
    raise AssertionError("no free ports")


def test_the_example_ends_in_the_bits_of_one_process(folder):
    work = folder / "work"
    settings = [part for setting in LITTLE for part in ("--set", setting)]
    done = subprocess.run(
        [ROOT / "examples/deploy_local.sh", work, *settings],
        env=environment(folder, BIN=BIN, SUPERLINK_PORT=str(free_ports(4))),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=450,
    )
    assert done.returncode == 0, done.stdout
    wait(lambda: not left(folder), 15, f"no process is left, but {left(folder)}")

    here = personae.run(
        ROOT / "recipes/digits/deployed.toml",
        folder / "here",
        overrides=[*LITTLE, "engine=in_process", f"data.path={work}/photos"],
    ).folder
    assert (work / "run/server.safetensors").read_bytes() == (here / "server.safetensors").read_bytes()
    for name in ("anna", "ben", "cem"):
        (own,) = (work / "state" / name).glob(f"*/clients/{name}.safetensors")
        assert own.read_bytes() == (here / "clients" / own.name).read_bytes(), name
    assert "src=" in (here / "report.html").read_text("utf-8")
    assert "<html" in (work / "run/report.html").read_text("utf-8")
    assert not list((work / "run").rglob("*.png")) and not list((work / "run/clients").glob("*"))
    (dora,) = (work / "state/anna").glob("*/clients/dora.safetensors")
    assert load_state(dora).params[EMBEDDING].numel() == 128
    assert len(list((work / "dora").rglob("*.png"))) >= 1


class Recorder:
    """Forwards one TCP port to another, and keeps every byte of every connection, in both directions."""

    def __init__(self, to):
        self.to, self.streams = to, []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with suppress(OSError):
            while True:
                near, _ = self.listening.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.to))
                except OSError:  # the SuperLink has ended first
                    near.close()
                    continue
                for source, target in ((near, far), (far, near)):
                    self.streams.append(bytearray())
                    threading.Thread(target=self.forward, args=(source, target, self.streams[-1]), daemon=True).start()

    def forward(self, source, target, stream):
        with suppress(OSError):
            while data := source.recv(65536):
                stream += data
                target.sendall(data)
        for ended in (source, target):
            with suppress(OSError):
                ended.shutdown(socket.SHUT_RDWR)
        source.close()  # the other direction closes the other one

    def close(self):
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()


def pieces(value, size=16):
    """Of a tensor's bytes, wherever an encoding may have cut them; pieces that say nothing are left out."""
    data = value.numpy().tobytes()
    cut = [data[at : at + size] for at in range(0, len(data) - size + 1, size)]
    return [piece for piece in cut if len(set(piece)) > 4]


def test_nothing_personal_is_on_the_wire(folder):
    """Every byte between two SuperNodes and the SuperLink, without TLS, in a run from start to report."""
    names = ("anna", "ben")
    subprocess.run(
        [sys.executable, ROOT / "examples/digit_folders.py", folder / "photos", *names], check=True, capture_output=True
    )
    # No checkpoint before the last round, so that all versions of what a client keeps are there afterwards.
    changed = ("federation.minimum=2", "machine.checkpoint_every=100", "federation.wait_seconds=200")
    app = deploy(ROOT / "recipes/digits/deployed.toml", folder / "app", [*LITTLE, *changed])
    port = free_ports(1 + len(names))

    def start(name, *command):
        home = folder / "flower" / name
        home.mkdir(parents=True)
        config = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        (home / "config.toml").write_text(config)
        with open(folder / f"{name}.log", "wb") as log:
            return subprocess.Popen(
                list(map(str, command)),
                env=environment(folder, FLWR_HOME=str(home)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def listens():
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", port)) == 0

    run = folder / "run"
    alone = "--disable-runtime-dependency-installation"
    started = [start("server", "flower-superlink", "--host", "127.0.0.1", "--port", port, "--insecure", alone)]
    wait(listens, 60, "the SuperLink listens")
    wire = Recorder(port)
    started += [
        start(
            name,
            *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{wire.port}", "--port", own),
            "--node-config",
            f'name="{name}" data="{folder}/photos/{name}" state="{folder}/state/{name}"',
        )
        for own, name in enumerate(names, start=port + 1)
    ]
    out = f'out="{run}"'
    started.append(start("run", "flwr", "run", app, "here", "--run-config", out, "--stream"))
    try:
        started[-1].wait(400)
    finally:
        end(folder)
        for process in started:
            process.wait(15)
        wire.close()
    assert (run / "report.html").is_file(), (folder / "run.log").read_text()

    everything = b"\n".join(map(bytes, wire.streams))
    backbone = load_state(run / "server.safetensors").params
    sampled = {name: pieces(value)[:: max(1, value.numel() // 40)] for name, value in backbone.items()}
    found = {name: sum(p in everything for p in parts) / len(parts) for name, parts in sampled.items() if parts}
    print(f"\n{len(wire.streams)} streams of {len(everything)} bytes, {len(backbone)} tensors")
    # What is shared is there, piece by piece, under its name: no compression hides anything.
    assert len(found) > len(backbone) / 2 and min(found.values()) == 1.0, found
    assert b'"params/null_embedding.weight"' in everything

    secret = {}
    for name in names:
        (own,) = (folder / "state" / name).glob("*/clients/*.safetensors")
        versions = sorted((own.parent.parent / "kept").glob("*.safetensors"))
        assert len(versions) == 2
        for path in (own, *versions):
            state = load_state(path)
            secret |= {(name, path.name, key): value for key, value in {**state.params, **state.extras}.items()}
    assert sum(key[2] == EMBEDDING for key in secret) == 6
    searched = {key: pieces(value) for key, value in secret.items()}
    assert sum(map(len, searched.values())) >= 6 * 20
    assert not [key for key, parts in searched.items() if any(part in everything for part in parts)]
    personal = {key[2] for key in secret} - backbone.keys()
    assert EMBEDDING in personal
    for name in personal:
        for prefix in (b"params/", b"extras/", b'"'):
            assert prefix + name.encode() + b'"' not in everything, name
    assert b"\x89PNG" not in everything
    assert str(folder).encode() not in everything.replace(str(run).encode(), b"")  # the server's own, for all to see
