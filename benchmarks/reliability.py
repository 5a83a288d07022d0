"""What a deployment survives: faults made on purpose, with real processes; the table of docs/reliability.md.

    python benchmarks/reliability.py --out runs/reliability [--docs docs] [--only NAME ...]

Every row starts a SuperLink and SuperNodes by the scripts that `personae deploy` writes, on this machine, does
something to them, and looks at what became of the run. A row that stands in OUT/rows.json is not run again, so that a
stopped benchmark goes on where it was; --only runs the named rows anew. A minute to four each, on two processors. With
--docs, the table and the rows are written there. Needs `personae[flower]`, openssl and ssh-keygen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BIN = sysconfig.get_path("scripts")
NAMES = ("anna", "ben")
RECIPE = "digits/deployed"
MARK = "PERSONAE_RELIABILITY"
"""In the environment of every process of a row, with the name of its part: so they are found, whoever started them."""

LITTLE = (
    "rounds=3",
    "method.training.steps=10",
    "method.adapt.steps=10",
    "evaluation.num_images=8",
    "evaluation.loss_grid=2",
    "evaluation.loss_draws=1",
    "evaluation.kid_subsets=2",
    "sampling.steps=2",
    "federation.wait_seconds=90",
)
EVERYONE = ("federation.minimum=2", "federation.deadline_seconds=150")
"""Every round needs both clients."""
ANYONE = ("federation.minimum=1", "federation.deadline_seconds=60")
"""Who does not answer in three times the others' time, but at least ten seconds, is left out."""


# --- a deployment ------------------------------------------------------------------------------------------------


@dataclass
class Deployment:
    """A SuperLink and SuperNodes on this machine, each in a session of its own, TLS and registered keys included."""

    folder: Path
    settings: Sequence[str] = ()
    port: int = 0
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        (self.folder / "log").mkdir()
        self.port = self.port or free_port()
        self.app, self.run = self.folder / "app", self.folder / "run"
        sets = [part for s in (*LITTLE, *self.settings) for part in ("--set", s)]
        self.call("cli", sys.executable, "-m", "personae.cli.app", "deploy", RECIPE, "--to", self.app, *sets)
        photos = self.folder.parent / "photos"
        if not photos.is_dir():
            self.call("digits", sys.executable, ROOT / "examples/digit_folders.py", photos, *NAMES)
        shutil.copytree(photos, self.folder / "photos")
        self.call("keys", self.app / "keys.sh", "server", "127.0.0.1")

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def environment(self, part: str, more: Mapping[str, str] | None = None) -> dict[str, str]:
        own = {"PATH": f"{BIN}:{os.environ['PATH']}", "PORT": str(self.port), "HOST": "127.0.0.1"}
        fixed = {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", MARK: f"{self.folder}:{part}"}
        source = {"PYTHONPATH": str(ROOT / "src")}
        return {**os.environ, **own, **fixed, **source, **(more or {})}

    def call(self, part: str, *command: object) -> str:
        done = subprocess.run(
            list(map(str, command)),
            env=self.environment(part),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def start(self, part: str, *command: object, **more: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "log" / f"{part}.log", "ab") as log:
            process = subprocess.Popen(
                list(map(str, command)),
                env=self.environment(part, more),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def server(self) -> None:
        self.start("server", self.app / "server.sh")
        until(lambda: reaches(self.port), 120, "the SuperLink listens")

    def key(self, name: str, register: bool = True) -> None:
        self.call("keys", self.app / "keys.sh", "node", name)
        if register:
            self.call("keys", self.app / "start.sh", "register", self.app / "keys" / f"{name}.pub")

    def node(self, name: str, *, to: int | None = None, app: Path | None = None, **more: str) -> Callable[..., None]:
        """Start a SuperNode, at first or again. Returns what waits until the SuperLink has let it in."""
        path = self.folder / "log" / f"{name}.log"
        before = self.log(name).count("SuperNode ID") if path.is_file() else 0
        arguments = [name, self.folder / "photos" / name, self.folder / "state" / name, f"127.0.0.1:{to or self.port}"]
        self.start(name, (app or self.app) / "node.sh", *arguments, **{"PORT": str(free_port()), **more})

        def let_in(seconds: float = 120) -> None:
            until(lambda: self.log(name).count("SuperNode ID") > before, seconds, f"{name} is let in")

        return let_in

    def everyone(self, names: Sequence[str] = NAMES, **to: int) -> None:
        self.server()
        for name in names:
            self.key(name)
        for let_in in [self.node(name, to=to.get(name)) for name in names]:
            let_in()

    def wait_asked(self, name: str, number: int) -> None:
        """Until a client was given its n-th round to do."""
        until(lambda: self.log(name).count("Receiving: train.local") >= number, 240, f"{name} is asked again")

    def go(self, out: Path | None = None) -> subprocess.Popen[bytes]:
        return self.start("run", self.app / "start.sh", "run", out or self.run)

    def finish(self, process: subprocess.Popen[bytes], seconds: float = 300) -> int:
        return process.wait(seconds)

    def kill(self, part: str, number: int = signal.SIGKILL, program: str = "") -> list[int]:
        """A signal for every process of a part, whose command line has `program` in it. Returns their numbers."""
        found = [pid for pid, line in processes(f"{self.folder}:{part}") if program in line]
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return found

    def gone(self, part: str) -> bool:
        """Whether nothing of a part is left. What ended is waited for, or its children would think it alive."""
        for process in self.started:
            process.poll()
        return not list(processes(f"{self.folder}:{part}"))

    def stop(self) -> None:
        """As Ctrl-C does it, and then by force."""
        for number, seconds in ((signal.SIGCONT, 0), (signal.SIGTERM, 15), (signal.SIGKILL, 10)):
            for pid, _ in processes(f"{self.folder}:"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            with contextlib.suppress(TimeoutError):
                until(lambda: not list(processes(f"{self.folder}:")), seconds, "everything has ended")
        for process in self.started:
            process.wait()

    # --- what there is to see ---

    def log(self, part: str) -> str:
        return (self.folder / "log" / f"{part}.log").read_text("utf-8", errors="replace")

    def records(self, run: Path | None = None) -> list[dict[str, Any]]:
        path = (run or self.run) / "rounds.jsonl"
        lines = path.read_text("utf-8").split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]

    def wait_rounds(self, number: int, seconds: float = 240, run: Path | None = None) -> None:
        until(lambda: len(self.records(run)) >= number, seconds, f"{number} rounds are done")

    def node_folder(self, name: str, run: Path | None = None) -> Path:
        """Where a client keeps its state of a run."""
        return self.folder / "state" / name / json.loads(((run or self.run) / "federation.json").read_text())["run"]

    def kept(self, name: str, run: Path | None = None) -> dict[str, bytes]:
        folder = self.node_folder(name, run) / "kept"
        return {path.name: path.read_bytes() for path in folder.glob("*") if path.suffix == ".safetensors"}

    def results(self, names: Sequence[str] = NAMES, run: Path | None = None) -> dict[str, bytes]:
        """The released model and everybody's personal file."""
        found = {"server": (run or self.run) / "server.safetensors"}
        found |= {name: self.node_folder(name, run) / "clients" / f"{name}.safetensors" for name in names}
        return {name: path.read_bytes() if path.is_file() else b"" for name, path in found.items()}

    def reference(self, names: Sequence[str] = NAMES) -> dict[str, bytes]:
        """What the same recipe comes to in one process, where nothing goes wrong."""
        out = self.folder.parent / "references" / "-".join(names)
        sets = [part for s in (*LITTLE, *self.settings, f"data.path={self.folder}/photos") for part in ("--set", s)]
        if not (out / "report.html").is_file():
            shutil.rmtree(out, ignore_errors=True)
            command = ("run", RECIPE, "--engine", "in_process", "--out", out)
            self.call("cli", sys.executable, "-m", "personae.cli.app", *command, *sets)
        return {"server": (out / "server.safetensors").read_bytes()} | {
            name: (out / "clients" / f"{name}.safetensors").read_bytes() for name in names
        }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def reaches(port: int) -> bool:
    with socket.socket() as tried:
        tried.settimeout(1)
        return tried.connect_ex(("127.0.0.1", port)) == 0


def until(reached: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.05)


def processes(mark: str) -> Iterator[tuple[int, str]]:
    """Process number and command line of whatever bears the mark, or one that begins with it and ends in ":"."""
    wanted = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            variables = (entry / "environ").read_bytes().split(b"\0")
            if any(v == wanted or (mark.endswith(":") and v.startswith(wanted)) for v in variables):
                yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()


class Proxy:
    """Forwards one TCP port to another. `cut` stops all traffic without a word to either side; `mend` lets it go on."""

    def __init__(self, to: int) -> None:
        self._to, self._open = to, threading.Event()
        self._open.set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._open.clear()

    def mend(self) -> None:
        self._open.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                self._open.wait()
                far = socket.create_connection(("127.0.0.1", self._to))
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=(source, target), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._open.wait()
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


# --- rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a row saw: in words, and how many times out of how many the run came through as it should."""

    happened: str
    survived: int
    times: int = 1


def who(record: Mapping[str, Any]) -> str:
    """A round's clients, and those who were left out with the reason."""
    left = "".join(f"; left out {name}: {reason}" for name, reason in record.get("refused", {}).items())
    return f"round {record['round']}: {', '.join(record['clients'])}{left}"


def rounds(deployment: Deployment) -> str:
    return "<br>".join(who(record) for record in deployment.records())


def took_part(deployment: Deployment) -> list[list[str]]:
    return [list(record["clients"]) for record in deployment.records()]


def is_reported(deployment: Deployment) -> bool:
    return (deployment.run / "report.html").is_file()


def nothing(folder: Path) -> Seen:
    with Deployment(folder, EVERYONE) as d:
        d.everyone()
        code = d.finish(d.go())
        equal = d.results() == d.reference()
        return Seen(f"{rounds(d)}<br>`start.sh run` returned {code}; same bits: {equal}", equal and is_reported(d))


def raises(folder: Path) -> Seen:
    with Deployment(folder, ANYONE) as d:
        d.everyone()
        going = d.go()
        d.wait_rounds(1)
        photos = folder / "photos/ben"
        photos.rename(photos.with_suffix(".gone"))
        d.wait_rounds(2)
        photos.with_suffix(".gone").rename(photos)
        d.finish(going)
        reason = re.findall(r"personae: DataError: .*", d.log("ben"))[:1]
        fine = took_part(d)[0] == ["anna", "ben"] and ["anna"] in took_part(d)[1:] and is_reported(d)
        told = str(reason).replace(f"{d.folder}/", "")  # no path of the machine that it ran on
        return Seen(f"{rounds(d)}<br>ben's own log: {told}", fine)


def killed(folder: Path) -> Seen:
    return gone_for_a_round(folder, signal.SIGKILL)


def restarted(folder: Path) -> Seen:
    return gone_for_a_round(folder, signal.SIGTERM)


def gone_for_a_round(folder: Path, number: int) -> Seen:
    """Ben's SuperNode and what it started get a signal while ben trains for the second time, and are started again."""
    with Deployment(folder, (*ANYONE, "rounds=6")) as d:
        d.everyone()
        going = d.go()
        d.wait_rounds(1)
        d.wait_asked("ben", 2)
        time.sleep(random.uniform(0, 3))
        before = d.kept("ben")["000001.safetensors"]
        num = len(d.kill("ben", number, "" if number == signal.SIGKILL else "flower-supernode"))
        until(lambda: d.gone("ben"), 60, "ben's SuperNode ends")
        intact, gone, tries = d.kept("ben")["000001.safetensors"] == before, time.monotonic(), again(d, "ben")
        back = time.monotonic() - gone
        d.finish(going)
        now, parts = sorted(d.kept("ben")), took_part(d)
        fine = "ben" in parts[0] and ["anna"] in parts and parts[-1] == ["anna", "ben"] and intact and is_reported(d)
        return Seen(
            f"{num} processes; let in again after {back:.0f} s and {tries} starts; {rounds(d)}<br>ben's file of "
            f"round 1 was {'intact' if intact else 'damaged'}; at the end kept/ holds {', '.join(now)}",
            fine and f"{len(parts):06d}.safetensors" in now,
        )


def again(d: Deployment, name: str) -> int:
    """Start a SuperNode until it is let in, as a service manager does it. Returns how many times it took."""
    for number in range(1, 30):
        let_in = d.node(name)
        process = d.started[-1]
        while process.poll() is None:
            with contextlib.suppress(TimeoutError):
                let_in(0.1)
                return number
        time.sleep(5)
    raise TimeoutError(f"{name} was not let in again")


def hangs(folder: Path) -> Seen:
    with Deployment(folder, (*ANYONE, "rounds=6")) as d:
        d.everyone()
        going = d.go()
        d.wait_rounds(1)
        d.wait_asked("ben", 2)
        d.kill("ben", signal.SIGSTOP)
        stopped = time.monotonic()
        d.wait_rounds(2)
        seconds = time.monotonic() - stopped
        d.kill("ben", signal.SIGCONT)
        d.finish(going)
        # Not asked again before it has answered what it owes.
        parts = took_part(d)
        fine = "ben" in parts[0] and parts[1] == ["anna"] and parts[-1] == ["anna", "ben"] and is_reported(d)
        return Seen(f"it stood still for {seconds:.0f} s; {rounds(d)}", fine)


def too_few(folder: Path) -> Seen:
    with Deployment(folder, ("federation.minimum=2", "federation.wait_seconds=45")) as d:
        d.everyone(("anna",))
        code = d.finish(d.go())
        waits = re.findall(r"personae: (round 1 waits .*)", d.log("run"))[:1]
        ended = re.findall(r"round 1: 1 clients can be reached.*? at least 2", d.log("run"))[:1]
        left = server_apps(d, 30)
        listed = subprocess.run(
            ["flwr", "list", "here", "--format", "json"],
            env=d.environment("keys", {"FLWR_HOME": str(d.app / "flower")}),
            capture_output=True,
            text=True,
        ).stdout
        status = re.findall(r'"status": *"(.*?)"', listed)
        return Seen(
            f"log: {waits}, then {ended}; `start.sh run` returned {code}, `flwr list` says {status}; "
            f"flwr-serverapp processes left: {left}",
            bool(waits and ended) and left == 0 and code != 0,
        )


def server_apps(d: Deployment, seconds: float) -> int:
    """How many processes of a server app are still there after so many seconds."""
    found = lambda: [line for _, line in processes(f"{d.folder}:server") if "flwr-serverapp" in line]  # noqa: E731
    with contextlib.suppress(TimeoutError):
        until(lambda: not found(), seconds, "the server app ends")
    return len(found())


def cut(folder: Path) -> Seen:
    with Deployment(folder, EVERYONE) as d:
        proxy = Proxy(d.port)
        d.everyone(ben=proxy.port)
        going = d.go()
        d.wait_rounds(1)
        time.sleep(random.uniform(0, 8))
        proxy.cut()
        time.sleep(30)
        during = len(d.records())
        proxy.mend()
        d.finish(going)
        equal = d.results() == d.reference()
        return Seen(f"cut in round {during + 1}; {rounds(d)}<br>same bits: {equal}", equal and is_reported(d))


def server_app(folder: Path, times: int = 3) -> Seen:
    """One run, killed so many times: in its first round, in its second, and so on."""
    with Deployment(folder, EVERYONE) as d:
        d.everyone()
        going, words = d.go(), []
        for number in range(times):
            until(lambda: (d.run / "federation.json").is_file(), 120, "the run begins")
            d.wait_rounds(number)
            time.sleep(random.uniform(0, 10))
            at, dead = len(d.records()), time.monotonic()
            killed = d.kill("server", program="flwr-serverapp")
            try:
                going.wait(10)
                ended = f"`flwr run` ended {time.monotonic() - dead:.0f} s later"
            except subprocess.TimeoutExpired:
                ended = "`flwr run` still waited 10 s later and was stopped"
                d.kill("run")
            words.append(f"killed {len(killed)} process after {at} rounds, {ended}")
            print(f"  {words[-1]}", flush=True)
            going = d.go()
        code = d.finish(going)
        equal = d.results() == d.reference()
        words.append(f"the last start returned {code}; {len(d.records())} rounds; same bits: {equal}")
        return Seen("<br>".join(words), times * equal, times)


def super_link(folder: Path) -> Seen:
    with Deployment(folder, EVERYONE) as d:
        d.everyone()
        going = d.go()
        d.wait_rounds(1)
        time.sleep(random.uniform(0, 5))
        d.kill("server", program="flower-superlink")
        d.started[0].wait()
        left = server_apps(d, 30)
        at = len(d.records())
        until(lambda: d.gone("server"), 60, "the SuperLink's processes end")
        d.kill("run")
        going.wait(30)
        d.server()
        again = time.monotonic()
        code = d.finish(d.go(), 400)
        equal = d.results() == d.reference()
        return Seen(
            f"killed after {at} rounds; flwr-serverapp processes left 30 s later: {left}; the nodes came back by "
            f"themselves and the same command went on: returned {code} after {time.monotonic() - again:.0f} s, "
            f"same bits: {equal}",
            equal and is_reported(d),
        )


def mismatch(folder: Path) -> Seen:
    with Deployment(folder, (*ANYONE, "rounds=1")) as d:
        others = {"ben": ("__init__.py", "\n__version__ = '0.0.1'\n"), "cem": ("methods/spire.py", OTHER_SPIRE)}
        d.server()
        shutil.copytree(folder / "photos/anna", folder / "photos/cem")
        for name in ("anna", *others):
            d.key(name)
        own = shutil.copytree(d.app, folder / "own")
        text = (own / "recipe.toml").read_text("utf-8").replace("embedding_rate = 3.0", "embedding_rate = 1.0")
        (own / "recipe.toml").write_text(text, "utf-8")
        waiting = [d.node("anna", app=own)]
        for name, (file, added) in others.items():
            copy = shutil.copytree(ROOT / "src", folder / name)
            with open(copy / "personae" / file, "a") as changed:
                changed.write(added)
            waiting.append(d.node(name, PYTHONPATH=str(copy)))
        for let_in in waiting:
            let_in()
        d.finish(d.go())
        away = [text[:110] for text in re.findall(r"a node was turned away: (.*)", d.log("run"))]
        fine = took_part(d) == [["anna"]] and any("'ben': version" in a for a in away)
        return Seen(
            f"{' ...<br>'.join(away)} ...<br>{rounds(d)}, with the server's recipe",
            fine and any("'cem': method is" in a for a in away),
        )


OTHER_SPIRE = """

Spire.__repr__ = lambda self: f"Spire of another day, {self.embedding_rate}"
"""


def later(folder: Path) -> Seen:
    with Deployment(folder, ANYONE) as d:
        d.everyone(("anna",))
        d.key("ben")
        going = d.go()
        d.wait_rounds(1)
        d.node("ben")
        d.finish(going)
        fine = took_part(d)[0] == ["anna"] and took_part(d)[-1] == ["anna", "ben"] and len(d.results()["ben"]) > 0
        return Seen(f"{rounds(d)}<br>ben has a personal file", fine and is_reported(d))


def strangers(folder: Path) -> Seen:
    with Deployment(folder, ANYONE) as d:
        d.server()
        seen = {}
        d.key("eve", register=False)
        seen["a key that was not registered"] = last_words(d, "eve", lambda: d.node("eve"))
        d.key("ben")
        wrong = shutil.copytree(d.app, folder / "wrong")
        (wrong / "keys/ca.key").unlink()  # one that is there stays
        d.call("keys", wrong / "keys.sh", "server", "127.0.0.1")
        seen["another authority's certificate"] = last_words(d, "ben", lambda: d.node("ben", app=wrong))
        plain = ("flower-supernode", "--superlink", f"127.0.0.1:{d.port}", "--insecure", "--port", free_port())
        seen["no TLS"] = last_words(d, "plain", lambda: d.start("plain", *plain, FLWR_HOME=str(folder / "plain")))
        fine = all(word for word in seen.values()) and not any(
            "SuperNode ID" in d.log(name) for name in ("eve", "ben", "plain")
        )
        with socket.create_connection(("127.0.0.1", d.port), 5) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with contextlib.suppress(OSError):
                answer = raw.recv(100)
        seen["plain HTTP"] = f"{answer!r}" if answer else "the connection was closed without a word"
        return Seen("<br>".join(f"{what}: {word}" for what, word in seen.items()), fine)


def last_words(d: Deployment, part: str, start: Callable[[], object]) -> str:
    """What a process said before it gave up, or after half a minute."""
    start()
    process = d.started[-1]
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    code = "still trying" if process.poll() is None else f"exit code {process.returncode}"
    d.kill(part)
    lines = [line for line in d.log(part).splitlines() if re.search(r"\[code|SSL:|WARN", line)]
    text = lines[-1] if lines else d.log(part)[-300:]
    return f"`{re.sub(chr(27) + r'.*?m', '', text).strip()[:300]}` ({code})"


# --- rows without Flower's processes -----------------------------------------------------------------------------


def tiny(folder: Path, every: int = 1) -> Any:
    from personae.core import Training
    from personae.methods import ServerAdam, ServerEma, Spire
    from personae.testing import tiny_job

    spire = Spire(Training(10, 1e-2, 4, condition_dropout=0.2), Training(10, 1e-2, 4))
    method = ServerEma(ServerAdam(spire, 0.01), 0.9)
    return tiny_job(method, rounds=12, folder=folder, checkpoint_every=every)


def in_child(folder: Path, prepare: Callable[[], object] = lambda: None, resume: bool = False, every: int = 1) -> int:
    """Fork a process that does a tiny run over the loopback grid: Flower's messages, server and clients in one."""
    child = os.fork()
    if child == 0:
        try:
            import torch

            from personae.testing.loopback import Loopback

            torch.set_num_threads(1)
            prepare()
            Loopback().run(tiny(folder, every), resume=resume)
            os._exit(0)
        finally:
            os._exit(1)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tiny_results(folder: Path) -> dict[str, bytes]:
    """The released model and all personal files; `.partial` and other leftovers would show, too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in [*folder.glob("server*"), *folder.glob("clients/*")]}


def whole(folder: Path) -> dict[str, bytes]:
    if exit_code(in_child(folder / "whole")) != 0:
        raise RuntimeError("the run that nobody disturbed failed")
    return tiny_results(folder / "whole")


def loopback_killed(folder: Path, times: int = 20) -> Seen:
    import personae.testing.loopback  # noqa: F401  once, for all children

    folder.mkdir(parents=True)
    started = time.monotonic()
    expected = whole(folder)
    lasts, equal, after = time.monotonic() - started, 0, []
    for number in range(times):
        run = folder / f"run{number}"
        child = in_child(run, every=3)
        until(lambda run=run: (run / "checkpoint/checkpoint.json").exists(), 60, "the run begins")  # type: ignore[misc]
        time.sleep(random.uniform(0, 0.8 * lasts))
        os.kill(child, signal.SIGKILL)
        was_killed = exit_code(child) == -signal.SIGKILL
        records = run / "rounds.jsonl"
        after.append(records.read_bytes().count(b"\n") if records.is_file() else 0)
        resumed = exit_code(in_child(run, resume=True, every=3)) == 0
        equal += was_killed and resumed and tiny_results(run) == expected
    return Seen(f"killed after {', '.join(map(str, sorted(after)))} of 12 rounds; the same bits", equal, times)


def saving(folder: Path, times: int = 50) -> Seen:
    """As many kills in the clients' files as in the server's, each at an fsync or a rename: before, after, half-way."""
    import personae.testing.loopback  # noqa: F401

    folder.mkdir(parents=True)
    calls = folder / "calls"
    if exit_code(in_child(folder / "counted", lambda: watch_saves(calls, None, ""))) != 0:
        raise RuntimeError("the run that nobody disturbed failed")
    lines = [line.split("\t") for line in calls.read_text().splitlines()]
    at_client = [n for n, (_, path) in enumerate(lines, 1) if "/nodes/" in path or "/clients/" in path]
    at_server = [n for n in range(1, len(lines) + 1) if n not in set(at_client)]
    expected, equal, partial = whole(folder), 0, 0
    for number in range(times):
        run, where = folder / f"run{number}", at_client if number % 2 else at_server
        at, when = random.choice(where), random.choice(["before", "half", "after"])
        was_killed = exit_code(in_child(run, lambda at=at, when=when: watch_saves(None, at, when))) == -signal.SIGKILL  # type: ignore[misc]
        partial += bool(list(run.rglob("*.partial")))
        resumed = exit_code(in_child(run, resume=True)) == 0
        same = was_killed and resumed and tiny_results(run) == expected
        equal += same
        if not same:
            print("  ", lines[at - 1], when, was_killed, resumed, flush=True)
    return Seen(
        f"{times // 2} in clients' files, {times - times // 2} in the server's; {partial} left a `.partial` behind",
        equal,
        times,
    )


def watch_saves(calls: Path | None, at: int | None, when: str) -> None:
    """Write down every fsync and rename of this process, or end it at the n-th; "half" first cuts the file in two."""
    count = 0
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def watched(target: Any, *rest: Any, real: Any = real, name: str = name) -> None:
            nonlocal count
            count += 1
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
            if calls is not None:
                with open(calls, "a") as lines:
                    lines.write(f"{name}\t{path}\n")
            if count == at and when == "half" and os.path.isfile(path):
                os.truncate(path, os.stat(path).st_size // 2)
            if count != at or when == "after":
                real(target, *rest)
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, name, watched)


# --- the table ---------------------------------------------------------------------------------------------------


ROWS: Mapping[str, tuple[str, str, Callable[[Path], Seen]]] = {
    "nothing": ("none", "two clients, three rounds", nothing),
    "raises": ("a client raises", "its folder of images renamed after round 1, back after round 2", raises),
    "killed": (
        "a client's processes are killed",
        "`kill -9` of its SuperNode and all below it in round 2, started again",
        killed,
    ),
    "hangs": ("a client hangs", "`SIGSTOP` of all its processes in round 2, `SIGCONT` when the round was over", hangs),
    "restarted": ("a SuperNode is restarted", "`SIGTERM` in round 2, started again", restarted),
    "cut": (
        "the network is cut",
        "a proxy between one node and the SuperLink forwards nothing for 30 s; all are needed",
        cut,
    ),
    "too_few": ("fewer clients than the minimum", "one node, `minimum = 2`, `wait_seconds = 45`", too_few),
    "later": ("a client joins later", "its SuperNode is started after round 1", later),
    "server_app": (
        "the server's app is killed",
        "`kill -9` of flwr-serverapp at a random moment of rounds 1, 2 and 3, `start.sh run` again each time",
        server_app,
    ),
    "super_link": (
        "the SuperLink is killed",
        "`kill -9` of flower-superlink in round 2, `server.sh` and `start.sh run` again",
        super_link,
    ),
    "loopback_killed": (
        "server and clients are killed at once",
        "`kill -9` at a random moment (checkpoint every third round), resumed; Flower's messages without its processes",
        loopback_killed,
    ),
    "saving": (
        "killed while a file is saved",
        "`kill -9` before, half-way through or after an fsync or a rename, resumed; also without Flower's processes",
        saving,
    ),
    "mismatch": (
        "a node that does not fit",
        "ben has another version, cem another method, anna another recipe.toml in her folder",
        mismatch,
    ),
    "strangers": (
        "a node that may not come in",
        "an unregistered key; another authority's certificate; no TLS",
        strangers,
    ),
}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| fault | what was done | what happened | survived |", "|---|---|---|---|"]
    for name, (fault, done, _) in ROWS.items():
        row = found.get(name)
        if row is None:
            lines.append(f"| {fault} | {done} | not yet run | |")
        else:
            seen = row["happened"].replace("|", "\\|")
            lines.append(f"| {fault} | {row['done']} | {seen} | {row['survived']}/{row['times']} |")
    return "\n".join(lines)


def write(found: Mapping[str, Any], docs: Path) -> None:
    """The rows as JSON, and the table between the two marks of reliability.md."""
    (docs / "reliability.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    path = docs / "reliability.md"
    before, begin, rest = path.read_text("utf-8").partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of table -->\n")
    path.write_text(f"{before}{begin}{table(found)}\n{end}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=[])
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that whatever a row has started ends with it
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "rows.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for name, (_, _, row) in ROWS.items():
        if name not in arguments.only if arguments.only else name in found:
            continue
        shutil.rmtree(out / name, ignore_errors=True)
        print(f"{name} ...", flush=True)
        started = time.monotonic()
        try:
            seen = row(out / name)
        except Exception as error:  # the row is not shown; the others still are
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        seconds = round(time.monotonic() - started)
        found[name] = {
            "done": ROWS[name][1],
            "happened": seen.happened,
            "survived": int(seen.survived),
            "times": seen.times,
            "seconds": seconds,
        }
        path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        print(f"{name}: {found[name]}", flush=True)
    if arguments.docs is not None:
        write(found, arguments.docs)


if __name__ == "__main__":
    main()
