"""Whether a long run grows: resident memory and open files, every 10 rounds, on both engines.

    python benchmarks/soak.py [in_process] [flower] [--out benchmarks/results]

300 rounds of the in-process engine and on Flower's simulation, each in a process of its own, with the tiny model, SPIRE
and a checkpoint after every round. About two CPU-minutes. Reads /proc, so it needs Linux.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from personae.core import Round, Training
from personae.engine.flower import Flower
from personae.engine.in_process import InProcess
from personae.methods import Spire
from personae.recipe.environment import versions
from personae.testing.tiny import tiny_job

ROUNDS = {"in_process": 300, "flower": 300}
EVERY, SETTLED = 10, 50
"""Rounds between two looks, and after how many of them growth counts."""

LIMIT_MB = 1.0
"""Growth per 100 rounds."""

WHAT_GROWS = (
    "What grows in the process of Flower's server, from round 50 to 150, as measured once with tracemalloc, gc and "
    "MALLOC_ARENA_MAX: 0.14 MB of live Python objects, 0.06 of them our records of rounds, and no table of Flower's; "
    "0.2 to 0.5 MB of classes that torch makes whenever Ray pickles the client app for a message, and that wait for "
    "the garbage collector; 0.4 MB in glibc's heaps, of which it has one per thread, and 30 threads; the rest is the "
    "allocators' own fragmentation."
)

Look = Mapping[str, float]
"""Resident MB and open files of this process, and of Flower's workers where there are any, after a round."""


def look(round: int) -> Look:
    own, workers = os.getpid(), _workers()
    return {
        "round": round,
        "mb": _resident_mb(own),
        "files": _open_files(own),
        "workers_mb": sum(map(_resident_mb, workers)),
        "workers_files": sum(map(_open_files, workers)),
    }


def _resident_mb(process: int) -> float:
    pages = int(Path(f"/proc/{process}/statm").read_text("utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _open_files(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def _workers() -> list[int]:
    """Processes that run clients for this one: Ray names them after what they hold, "ray::ClientAppActor"."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text("utf-8")
            names[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    return [pid for pid, name in names.items() if name.startswith(b"ray::ClientApp") and _comes_from(pid, parents)]


def _comes_from(process: int, parents: Mapping[int, int]) -> bool:
    while process in parents and process != os.getpid():
        process = parents[process]
    return process == os.getpid()


def soak(engine: str) -> list[Look]:
    looks: list[Look] = []

    def watch(round: Round) -> None:
        if round.done and round.stage == "train" and round.round % EVERY == 0:
            looks.append(look(round.round))

    how = Training(2, 1e-3, 8)
    with tempfile.TemporaryDirectory() as folder:
        job = tiny_job(Spire(how, how), rounds=ROUNDS[engine], folder=Path(folder) / "run")
        {"in_process": InProcess(), "flower": Flower()}[engine].run(job, watch=watch)
    return looks


def growth(looks: Sequence[Look], key: str) -> float:
    """Per 100 rounds: the slope of the straight line that fits best what was seen after the first 50."""
    rounds, values = zip(*((x["round"], x[key]) for x in looks if x["round"] >= SETTLED), strict=True)
    middle, mean = sum(rounds) / len(rounds), sum(values) / len(values)
    rise = sum((r - middle) * (v - mean) for r, v in zip(rounds, values, strict=True))
    return 100 * rise / sum((r - middle) ** 2 for r in rounds)


def table(found: Mapping[str, Any]) -> str:
    lines = [
        "| engine | rounds | resident MB, first and last | MB per 100 rounds after 50 | open files, least and most |"
    ]
    lines.append("|---|---|---|---|---|")
    titles = {"in_process": "in-process", "flower": "Flower's simulation, the server"}
    for engine, looks in found["engines"].items():
        rows = [(titles[engine], "mb", "files")]
        if engine == "flower":
            rows.append(("Flower's simulation, its workers together", "workers_mb", "workers_files"))
        for title, mb, files in rows:
            lines.append(
                f"| {title} | {looks[-1]['round']:.0f} | {looks[0][mb]:.1f} to {looks[-1][mb]:.1f} | "
                f"{growth(looks, mb):+.2f} | {min(x[files] for x in looks)} to {max(x[files] for x in looks)} |"
            )
    named = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    goal = (
        f"Figure to reach, in-process: at most {LIMIT_MB:.0f} MB per 100 rounds after the first {SETTLED}, files flat."
    )
    return "\n".join([*lines, "", goal, "", *_what_grows(found), f"Versions: {named}; 1 thread.", ""])


def _what_grows(found: Mapping[str, Any]) -> list[str]:
    looks = found["engines"].get("flower", [])
    if not looks:
        return []
    first, then = (growth([x for x in looks if (x["round"] >= 150) == later], "mb") for later in (False, True))
    return [f"{WHAT_GROWS} In the run above it was {first:+.1f} MB per 100 rounds until 150, {then:+.1f} after.", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(ROUNDS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--alone", choices=ROUNDS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.alone is not None:
        logging.getLogger("flwr").setLevel(logging.ERROR)
        print(json.dumps(soak(arguments.alone)))
        return
    found: dict[str, Any] = {"versions": versions(), "engines": {}}
    found["versions"] |= {library: metadata.version(library) for library in ("flwr", "ray")}
    for engine in arguments.what:
        command = [sys.executable, __file__, f"--alone={engine}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found["engines"][engine] = json.loads(done.stdout.splitlines()[-1])
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "soak.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (arguments.out / "soak.md").write_text(table(found), "utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
