"""How long a server takes to say where a newcomer belongs and how much of its first update is new.

    python benchmarks/newcomers.py

Adapters of rank 8 on every attention layer of Stable Diffusion 1.5, drawn at random, for 8 and 32 groups: what the
server finds out once a round, and what each newcomer then costs, beside inner products of all adapters again for each
one; these two are timed three times only, between the first newcomers. Medians and the 95 % quantile are written with
the versions, as JSON and as a table. About 2 CPU-minutes and 2 GB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from personae.aggregate.low_rank import Adapter, LowRank, gram
from personae.aggregate.newcomers import Mixtures, familiar
from personae.core import stream
from personae.personal.delta import target_layers
from personae.recipe.environment import versions

GROUPS, RANK, WIDTH, MEMBERS = (8, 32), 8, 64, 4
REACH = 0.05
"""Seconds of a newcomer, 95 % quantile, with 32 groups or fewer."""


def shapes() -> dict[str, tuple[int, int]]:
    """Of attention's weights in Stable Diffusion 1.5."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )
    layers = target_layers({"unet.": unet}, "self+cross", "this benchmark")
    return {name: tuple(layer.weight.shape) for name, layer in layers.items()}


def drawn(layers: dict[str, tuple[int, int]], name: str) -> Adapter:
    rng = stream(0, name)
    return {
        layer: LowRank(torch.randn(m, RANK, generator=rng), torch.randn(RANK, n, generator=rng))
        for layer, (m, n) in layers.items()
    }


def described(groups: int) -> tuple[torch.Tensor, list[int]]:
    """Members' descriptions and groups."""
    rows = torch.randn(groups, WIDTH, generator=stream(0, "centres")).repeat_interleave(MEMBERS, 0)
    rows = rows + 0.1 * torch.randn(rows.shape, generator=stream(0, "members"))
    return rows, [k // MEMBERS for k in range(len(rows))]


def measured(repeats: int, threads: int) -> dict[str, Any]:
    layers = shapes()
    found: dict[str, Any] = {"versions": versions(), "threads": threads, "repeats": repeats, "layers": len(layers)}
    change, came = drawn(layers, "newcomer"), torch.randn(WIDTH, generator=stream(0, "came"))
    for groups in GROUPS:
        adapters, members = [drawn(layers, f"group {k}") for k in range(groups)], described(groups)
        mixtures = Mixtures(adapters)
        ways: dict[str, tuple[int, Callable[[], Any]]] = {
            "a newcomer": (repeats, lambda of=members, m=mixtures: (familiar(*of).group(came), m.nearest(change))),
            "once a round": (3, lambda of=adapters: Mixtures(of)),
            "all again": (3, lambda of=adapters: gram([*of, change])),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(repeats + 1):
            for way, (count, call) in ways.items():
                if repeat <= count:
                    began = time.perf_counter()
                    call()
                    seconds[way].append(time.perf_counter() - began)
        found[str(groups)] = {way: values[1:] for way, values in seconds.items()}
    return found


def table(found: dict[str, Any]) -> str:
    lines = [
        "| groups | a newcomer, ms | its 95 % quantile | to reach | all adapters again, beside it | once a round, s |",
        "|---|---|---|---|---|---|",
    ]
    for groups in map(str, GROUPS):
        own, again, once = (found[groups][way] for way in ("a newcomer", "all again", "once a round"))
        high, middle = statistics.quantiles(own, n=20)[-1], statistics.median(own)
        lines.append(
            f"| {groups} | {1000 * middle:.0f} ({1000 * min(own):.0f} to {1000 * max(own):.0f}) | {1000 * high:.0f} | "
            f"{1000 * REACH:.0f} | {statistics.median(again) / middle:.0f} x | {statistics.median(once):.2f} |"
        )
    names = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    return "\n".join(
        [
            *lines,
            "",
            f"Medians of {found['repeats']} repeats, the others of 3. Adapters of rank {RANK} on {found['layers']} "
            f"layers of Stable Diffusion 1.5. {threads}; {names}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = measured(arguments.repeats, arguments.threads)
    path = arguments.out / "newcomers.json"
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    path.with_suffix(".md").write_text(table(found), "utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
