"""A deployment with real processes: the bits of one process, and what is on the wire between them."""

import json
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
from personae.artefact.run_folder import RunFolder
from personae.artefact.save import load_state
from personae.personal.embedding import EMBEDDING
from personae.personal.tokens import is_word
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


class Link:
    """A SuperLink without TLS, SuperNodes at it, and one run after the other."""

    def __init__(self, folder, num_nodes):
        self.folder, self.processes = folder, []
        self.port, *self.free = range(first := free_ports(1 + num_nodes), first + 1 + num_nodes)
        self.at = ("--host", "127.0.0.1", "--port", self.port)
        self.start("server", "flower-superlink", "--insecure", *self.at, "--disable-runtime-dependency-installation")
        wait(self.listens, 60, "the SuperLink listens")

    def listens(self):
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", self.port)) == 0

    def start(self, name, *command):
        home = self.folder / "flower" / name
        home.mkdir(parents=True)
        config = (
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        (home / "config.toml").write_text(config)
        with open(self.folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                list(map(str, command)),
                env=environment(self.folder, FLWR_HOME=str(home)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def node(self, name, port, photos=True):
        """`port` is where it looks for the SuperLink: perhaps at a recorder before it. Without photos of its own a node
        has its part of the recipe's data set."""
        config = f'name="{name}" state="{self.folder}/state/{name}"'
        config += f' data="{self.folder}/photos/{name}"' if photos else ""
        at = ("--superlink", f"127.0.0.1:{port}", "--port", self.free.pop())
        self.start(name, "flower-supernode", "--insecure", *at, "--node-config", config)

    def run(self, app, out):
        """Waits for its end. Returns what was printed."""
        name = f"run-{out.name}"
        self.start(name, "flwr", "run", app, "here", "--run-config", f'out="{out}"', "--stream").wait(400)
        return (self.folder / f"{name}.log").read_text()

    def end(self):
        end(self.folder)
        for process in self.processes:
            process.wait(15)


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
    link = Link(folder, len(names))
    wire = Recorder(link.port)
    run = folder / "run"
    try:
        for name in names:
            link.node(name, wire.port)
        log = link.run(app, run)
    finally:
        link.end()
        wire.close()
    assert (run / "report.html").is_file(), log

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


# --- every method ----------------------------------------------------------------------------------------------------

METHODS = {
    "fedavg_ft": '[method]\nname = "fedavg_ft"\n{training}\n{adapt}\n',
    "shared_rep": '[method]\nname = "shared_rep"\npersonal_layers = ["conv_norm_out.", "conv_out."]\n'
    "{training}\n{tail}\n{adapt}\n",
    "local_only": '[method]\nname = "local_only"\n{training}\n{adapt}\n',
    "wrapped": '[method]\nname = "spire"\n{training}\n{adapt}\n'
    "[wrap.proximal]\nmu = 0.1\n[wrap.server_adam]\nlr = 0.01\n[wrap.server_ema]\ndecay = 0.9\n",
}
STRETCHES = {
    name: f"[method.{name}]\nsteps = 5\nlr = 0.002\nbatch_size = 16\n" for name in ("training", "adapt", "tail")
}


def test_every_method_has_the_bits_of_one_process(folder):
    """One SuperLink and two SuperNodes serve one run after the other, a method each; SPIRE is in the example above."""
    names = ("anna", "ben")
    subprocess.run(
        [sys.executable, ROOT / "examples/digit_folders.py", folder / "photos", *names], check=True, capture_output=True
    )
    link = Link(folder, len(names))
    base = (ROOT / "recipes/digits/deployed.toml").read_text("utf-8")
    before, after = base[: base.index("[method]")], base[base.index("[federation]") :]
    changed = [o for o in LITTLE if not o.startswith("method.")]
    changed += ["federation.minimum=2", "federation.wait_seconds=200"]
    try:
        for name in names:
            link.node(name, link.port)
        for method, text in METHODS.items():
            recipe, run = folder / f"{method}.toml", folder / "runs" / method
            recipe.write_text(before + text.format(**STRETCHES) + after)
            log = link.run(deploy(recipe, folder / "apps" / method, changed), run)
            assert (run / "report.html").is_file(), f"{method}: {log}"
            overrides = [*changed, "engine=in_process", f"data.path={folder}/photos"]
            here = personae.run(recipe, folder / "here" / method, overrides=overrides).folder
            assert (run / "server.safetensors").read_bytes() == (here / "server.safetensors").read_bytes(), method
            key = json.loads((run / "federation.json").read_text())["run"]
            for name in names:
                own = folder / "state" / name / key / "clients" / f"{name}.safetensors"
                assert own.read_bytes() == (here / "clients" / own.name).read_bytes(), (method, name)
    finally:
        link.end()


# --- adapters by style -----------------------------------------------------------------------------------------------

STYLES = (
    *LITTLE[:1],
    *('data.styles=["noto","twemoji"]', "data.partition.num_clients=2", "data.heldout=0.05"),
    *(
        "method.describing=1",
        "method.words.steps=2",
        "method.training.steps=1",
        "method.adapt.steps=1",
        "method.smallest_cluster=1",
    ),
    *("evaluation.num_images=2", "evaluation.loss_grid=1", "evaluation.loss_draws=1", "sampling.steps=1"),
    *("federation.minimum=2", "federation.wait_seconds=200"),
)


def test_adapters_by_style_have_the_bits_of_one_process(folder):
    """The shipped recipe, with its text-to-image model and its emoji: each node has its own part of them."""
    names = ("c0", "c1")
    app, run = deploy("collaborative/styles", folder / "app", STYLES), folder / "run"
    link = Link(folder, len(names))
    try:
        for name in names:
            link.node(name, link.port, photos=False)
        log = link.run(app, run)
    finally:
        link.end()
    assert (run / "report.html").is_file(), log

    here = personae.run("collaborative/styles", folder / "here", overrides=[*STYLES, "engine=in_process"]).folder
    assert (run / "server.safetensors").read_bytes() == (here / "server.safetensors").read_bytes()
    server = RunFolder(run).server()
    assert server.facts["round"] == 2 and server.facts == RunFolder(here).server().facts
    assert {name: server.facts[f"cluster of {name}"] for name in names}.keys() == set(names)
    assert not any(map(is_word, server.params)) and not list((run / "clients").glob("*"))
    for name in names:
        (own,) = (folder / "state" / name).glob(f"*/clients/{name}.safetensors")
        assert own.read_bytes() == (here / "clients" / own.name).read_bytes(), name
        assert any(map(is_word, load_state(own).params)), "words are at home"
