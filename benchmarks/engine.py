"""What the in-process engine costs: steps a second beside a plain loop, overhead per client-round, peak memory.

    python benchmarks/engine.py [throughput] [overhead] [memory]

Rivals run interleaved in one process; medians over repeats are printed with the versions. About 3 CPU-minutes.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from personae.aggregate import mean
from personae.backbone.schedule import schedule
from personae.backbone.unet import preset
from personae.core import (
    Arrays,
    Client,
    ClientData,
    Images,
    Job,
    Select,
    State,
    Training,
    Update,
    Updates,
    divide,
    stream,
    under,
)
from personae.engine.in_process import InProcess
from personae.engine.population import Population
from personae.methods import FedAvgFT
from personae.recipe.environment import versions

STEPS, CLIENTS, BATCH = 20, 4, 32


def population(num_clients: int, cohort: int | None = None) -> Population:
    """The digits backbone, and clients with 40 random images each."""
    model = preset("tiny", schedule(), size=8, channels=1, embedding_width=128)
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=stream(0, "pixels"))
    data = {f"c{i:04d}": ClientData(Images(pixels.clone()), Images(pixels[:4].clone())) for i in range(num_clients)}
    return Population(model, data, tuple(data), (), cohort)


@dataclass(frozen=True)
class NoOp:
    """Sends what it got, keeps its embedding: everything that a round does except training."""

    @property
    def personal(self) -> Select:
        return under("embedding.")

    def init(self, initial: Arrays) -> State:
        return State(divide(initial, self.personal)[0])

    def broadcast(self, server: State, client: str) -> State:
        return server

    def local(self, client: Client, got: State, kept: State) -> tuple[Update, State]:
        shared, own = divide(client.model.params(), self.personal)
        return client.update(State(shared), loss=0.0), State(own)

    def aggregate(self, server: State, updates: Updates) -> State:
        return State(updates.combined())

    def release(self, server: State) -> State:
        return server

    def personalize(self, client: Client, got: State, kept: State) -> State:
        return kept


def plain_loop(members: Population, rounds: int) -> None:
    """The same steps as a person would write them without a library: one model, one optimizer, no federation."""
    model, unet = members.model, members.model.unet
    noise = members.model.schedule
    images = next(iter(members.data.values())).train.floats()
    condition = torch.zeros(BATCH, 128)
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-3, fused=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    unet.train()
    for _ in range(rounds * CLIENTS * STEPS):
        x_0 = images[torch.randint(len(images), (BATCH,))]
        t, z = torch.randint(1000, (BATCH,)), torch.randn(BATCH, 1, 8, 8)
        loss = (unet(noise.add_noise(x_0, z, t), t, class_labels=condition).sample - z).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()


def throughput(repeats: int = 7) -> None:
    """FedAvg of 4 clients x 20 steps a round against the plain loop doing 80 steps."""
    members = population(CLIENTS)
    method = FedAvgFT(Training(STEPS, 1e-3, BATCH), Training(0, 1e-3, BATCH))
    job = Job(method, members, members, 1, 0, mean)
    InProcess().run(job)
    plain_loop(members, 1)
    ratios, ours = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        plain_loop(members, 1)
        middle = time.perf_counter()
        run = InProcess().run(job)
        ours.append(sum(record["seconds"] for record in run.rounds))
        ratios.append((middle - started) / ours[-1])
    steps = STEPS * CLIENTS / statistics.median(ours)
    print(
        f"throughput: {steps:.1f} steps/s, {statistics.median(ratios):.3f} x the plain loop "
        f"(median of {repeats}; {min(ratios):.3f} to {max(ratios):.3f}); figure to reach: 0.95"
    )


def overhead(rounds: int = 30, clients: int = 20) -> None:
    """Milliseconds per client-round with a client that does nothing, model of about 1 MB, checkpoint off and on."""
    for title, every in (("checkpoint off", None), ("a checkpoint every round", 1)):
        members = population(clients)
        with tempfile.TemporaryDirectory() as folder:
            path = None if every is None else Path(folder) / "run"
            run = InProcess().run(Job(NoOp(), members, members, rounds, 0, mean, folder=path))
        each = [record["seconds"] / clients * 1e3 for record in run.rounds]
        size = sum(p.numel() * 4 for n, p in members.model.live().items() if not n.startswith("embedding.")) / 1e6
        print(
            f"overhead, {title}: {statistics.median(each):.2f} ms per client-round of {size:.2f} MB "
            f"(median of {rounds} rounds; {min(each):.2f} to {max(each):.2f}); figure to reach, off: 2.5"
        )


def memory() -> None:
    """Peak resident memory of a process with 1,000 clients, 20 a round, against one with 20."""
    peaks = {}
    for clients in (20, 1000):
        done = subprocess.run(
            [sys.executable, __file__, f"--peak={clients}"], capture_output=True, text=True, check=True
        )
        peaks[clients] = int(done.stdout.strip())
    print(
        f"peak memory: {peaks[20] / 1024:.0f} MiB with 20 clients, {peaks[1000] / 1024:.0f} MiB with 1,000, ratio "
        f"{peaks[1000] / peaks[20]:.3f}; figure to reach: 1.1"
    )


def peak(clients: int) -> None:
    members = population(clients, 20)
    with tempfile.TemporaryDirectory() as folder:
        InProcess().run(Job(NoOp(), members, members, 60, 0, mean, folder=Path(folder) / "run"))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["throughput", "overhead", "memory"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak is not None:
        peak(options.peak)
        return
    print(
        "versions:",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
        f"threads {options.threads}",
    )
    for what in options.what:
        {"throughput": throughput, "overhead": overhead, "memory": memory}[what]()


if __name__ == "__main__":
    main()
