"""What it saves to let the embeddings of many new clients train in one batch, and their images be drawn in one.

    python benchmarks/together.py [--device cuda]

K clients with 4 images a step, one after the other and together, interleaved in one process, whoever begins taking
turns. Medians over repeats are written with the versions, as JSON and as a table, a section per device. About 3
CPU-minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from personae.aggregate import mean
from personae.backbone.schedule import schedule
from personae.backbone.unet import preset
from personae.core import Arrays, ClientData, Images, Job, State, Training, stream
from personae.engine.in_process import personalize_one
from personae.engine.population import Population
from personae.engine.together import personalize_many
from personae.infer.sample import sample, sample_together
from personae.methods import Spire
from personae.personal.embedding import EMBEDDING
from personae.recipe.environment import versions

CLIENTS = (1, 4, 16, 64)
IMAGES, STEPS, SAMPLING_STEPS = 4, 10, 10
REACH = {"cpu": {64: 1.0}, "cuda": {64: 8.0}}
"""How many times faster adapting together has to be, by device and number of clients."""


def prepared(device: str) -> tuple[Job, State]:
    """The digits backbone with 128 numbers per client, clients of 20 random images, and a released model."""
    model = preset("tiny", schedule(), size=8, channels=1, embedding_width=128).to(device)
    data = {}
    for k in range(max(CLIENTS)):
        pixels = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=stream(k, "pixels"))
        data[f"c{k:02d}"] = ClientData(Images(pixels), Images(pixels[:4]))
    members = Population(model, data, tuple(data))
    training = Training(STEPS, 0.05, IMAGES)
    job = Job(Spire(training, training), members, members, rounds=0, seed=0, rule=mean)
    return job, job.method.release(job.method.init(members.initial(0)))


def adapting(job: Job, released: State, names: Sequence[str]) -> dict[str, Callable[[], Any]]:
    return {
        "alone": lambda: [personalize_one(job, released, State(), name) for name in names],
        "together": lambda: personalize_many(job, released, names),
    }


def drawing(job: Job, released: State, names: Sequence[str]) -> dict[str, Callable[[], Any]]:
    model, shared = job.members.model, released.params  # type: ignore[attr-defined]
    vectors: Arrays = {name: torch.randn(1, 128, generator=stream(0, name)) for name in names}

    def alone() -> None:
        for name in names:
            model.load({**shared, EMBEDDING: vectors[name]})
            sample(model, IMAGES, stream(0, name), steps=SAMPLING_STEPS)

    def together() -> None:
        model.load({**shared, EMBEDDING: torch.cat(list(vectors.values()))}, len(names))
        sample_together(model, IMAGES, [stream(0, name) for name in names], steps=SAMPLING_STEPS)

    return {"alone": alone, "together": together}


def timed(ways: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of every repeat, after one that does not count."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way in list(ways)[:: 1 if repeat % 2 else -1]:
            started = time.perf_counter()
            ways[way]()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds[way].append(time.perf_counter() - started)
    return {way: values[1:] for way, values in seconds.items()}


def measured(device: str, repeats: int, threads: int) -> dict[str, Any]:
    job, released = prepared(device)
    names = sorted(job.members.train)
    found: dict[str, Any] = {"versions": versions(), "threads": threads, "repeats": repeats}
    found["device"] = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    for what, ways in (("adapt", adapting), ("draw", drawing)):
        found[what] = {str(k): timed(ways(job, released, names[:k]), repeats, device) for k in CLIENTS}
    return found


def table(found: dict[str, Any]) -> str:
    """A section per device."""
    missing = [
        f"## {device}\n\nNot measured: none was at hand. `--device {device}` measures it; hoped for is "
        f"{_reach(device)}.\n"
        for device in sorted(REACH.keys() - found.keys())
    ]
    return "\n".join([*(line for device in sorted(found) for line in _section(device, found[device])), *missing])


def _reach(device: str) -> str:
    return ", ".join(f"{times:g} x at {clients} clients" for clients, times in REACH[device].items())


def _section(device: str, found: dict[str, Any]) -> list[str]:
    lines = [
        f"## {device}",
        "",
        "| what | clients | seconds one after the other | seconds together | times faster | figure to reach |",
        "|---|---|---|---|---|---|",
    ]
    title = {
        "adapt": f"{STEPS} steps of {IMAGES} images for each client",
        "draw": f"{IMAGES} images for each client, in {SAMPLING_STEPS} steps",
    }
    for what in title:
        for k, seconds in found[what].items():
            ratio = [a / b for a, b in zip(seconds["alone"], seconds["together"], strict=True)]
            reach = REACH[device].get(int(k), "") if what == "adapt" else ""
            lines.append(
                f"| {title[what]} | {k} | {_spread(seconds['alone'])} | {_spread(seconds['together'])} | "
                f"{_spread(ratio)} | {reach} |"
            )
    names = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    device_name = "" if found["device"] == device else f"{found['device']}, "
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    return [
        *lines,
        "",
        f"Medians of {found['repeats']} interleaved repeats, with the smallest and the largest. The backbone is the "
        f'preset "tiny" on 8x8 images. {device_name}{threads}; {names}.',
        "",
    ]


def _spread(values: Sequence[float]) -> str:
    """Median, and the smallest and largest."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "together.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    found[arguments.device] = measured(arguments.device, arguments.repeats, arguments.threads)
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    path.with_suffix(".md").write_text(table(found), "utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
