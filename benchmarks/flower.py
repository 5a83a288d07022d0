"""What a round costs beside Flower and pfl: overhead per client-round, time to the first round, aggregation.

    python benchmarks/flower.py [overhead] [aggregation] [--pfl FOLDER] [--out benchmarks/results]

Rivals run interleaved in one process; medians over repeats are written with the versions, as JSON and as a table.
FOLDER is where `pip install --target FOLDER pfl` put pfl; what is installed already is taken from where it is.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from flwr.app import ArrayRecord, Context, Message, Metadata, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from engine import NoOp, population
from personae.aggregate import mean
from personae.backbone.unet import PRESETS
from personae.core import Arrays, Job, Round, State, Update, ignore, stream
from personae.engine.flower import Flower, pack, unpack
from personae.engine.in_process import InProcess
from personae.engine.population import Population
from personae.engine.rounds import Answer, Since, play
from personae.recipe.environment import versions

ROUNDS, CLIENTS = 20, 20
REPLIES, WIDTH = 300, 64
"""A tiny U-Net of this width has 1.06 M parameters, 4 MB."""

EXTRA_MODELS, EXTRA_MB = 3, 32


# --- overhead per client-round, and time to the first round -------------------------------------------------------

Times = list[float]
"""Seconds from the call of `run` to the end of each round."""


def in_process(members: Population) -> Times:
    return _watched(InProcess(), Job(NoOp(), members, members, ROUNDS, 0, mean))


def flower_engine(members: Population) -> Times:
    with tempfile.TemporaryDirectory() as folder:
        return _watched(Flower(), Job(NoOp(), members, members, ROUNDS, 0, mean, folder=Path(folder) / "run"))


def _watched(engine: InProcess | Flower, job: Job) -> Times:
    ends: Times = []

    def watch(round: Round) -> None:
        if round.done and round.stage == "train":
            ends.append(time.perf_counter() - started)

    started = time.perf_counter()
    engine.run(job, watch=watch)
    return ends


def flower_itself(members: Population) -> Times:
    """Flower's simulation with its own FedAvg and a client that returns the arrays as they came, undecoded."""
    client, server, ends = ClientApp(), ServerApp(), Times()
    arrays = ArrayRecord(dict(_shared(members)))

    @client.train()
    def train(message: Message, context: Context) -> Message:
        sent = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 40})}
        return Message(RecordDict(sent), reply_to=message)

    def tick(number: int, arrays: ArrayRecord) -> None:
        if number:
            ends.append(time.perf_counter() - started)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        FedAvg(fraction_evaluate=0.0).start(grid, arrays, ROUNDS, evaluate_fn=tick)

    started = time.perf_counter()
    run_simulation(server, client, CLIENTS, backend_config={"client_resources": {"num_cpus": 1.0, "num_gpus": 0.0}})
    return ends


def pfl_itself(members: Population) -> Times:
    """pfl's simulation with its own federated averaging, less the training; it sends differences of the model."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data import FederatedDataset, get_user_sampler
    from pfl.data.dataset import Dataset
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    class Nothing(FederatedAveraging):
        def train_one_user(self, initial_model_state, model, user_dataset, central_context):  # type: ignore[no-untyped-def]
            return model.get_model_difference(initial_model_state), Metrics()

    class Tick(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):  # type: ignore[no-untyped-def]
            ends.append(time.perf_counter() - started)
            return False, Metrics()

    ends: Times = []
    unet = UNet2DModel.from_config(members.model.unet.config).requires_grad_(True)
    unet.loss = unet.metrics = lambda *_: {}
    data = {name: one.train.pixels.numpy() for name, one in members.data.items()}
    started = time.perf_counter()
    model = PyTorchModel(unet, torch.optim.SGD, torch.optim.SGD(unet.parameters(), 1.0))
    users = FederatedDataset(
        lambda name: Dataset((data[name],), user_id=name), get_user_sampler("minimize_reuse", list(data))
    )
    Nothing().run(
        NNAlgorithmParams(ROUNDS, evaluation_frequency=ROUNDS + 1, train_cohort_size=CLIENTS, val_cohort_size=0),
        SimulatedBackend(users, users, [WeightByDatapoints()]),
        model,
        NNTrainHyperParams(local_batch_size=None, local_num_epochs=1, local_learning_rate=1.0),
        callbacks=[Tick()],
        send_metrics_to_platform=False,
    )
    return ends


def overhead(repeats: int = 3) -> dict[str, Any]:
    """Every engine in turn, after a first turn in which each imports what it needs."""
    members = population(CLIENTS)
    engines = {"in_process": in_process, "flower_engine": flower_engine, "flower": flower_itself}
    if find_spec("pfl"):
        engines["pfl"] = pfl_itself
    found: dict[str, dict[str, list[float]]] = {name: {"each_ms": [], "first_seconds": []} for name in engines}
    for repeat in range(repeats + 1):
        for name, run in engines.items():
            ends = run(members)
            assert len(ends) == ROUNDS, f"{name} ended {len(ends)} rounds, expected {ROUNDS}"
            if repeat:
                each = statistics.median(after - before for before, after in pairwise(ends))
                found[name]["each_ms"].append(each / CLIENTS * 1e3)
                found[name]["first_seconds"].append(ends[0])
            print(
                f"overhead, repeat {repeat}, {name}: first round after {ends[0]:.3f} s, last {ends[-1]:.3f} s",
                flush=True,
            )
    return {"model_mb": _num_bytes(_shared(members)) / 1e6, "clients": CLIENTS, "rounds": ROUNDS, **found}


def _shared(members: Population) -> Arrays:
    return NoOp().init(members.initial(0)).params


# --- what a server does with the replies of a round ----------------------------------------------------------------


def model_of_4_mb() -> Arrays:
    layers = {**PRESETS["tiny"], "block_out_channels": (WIDTH, WIDTH)}
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **layers)
    return {name: value.detach() for name, value in unet.named_parameters()}


@dataclass(frozen=True)
class Names:
    """Members of whom a server needs only the names."""

    train: Sequence[str]
    new: Sequence[str] = ()

    def cohort(self, round: int, seed: int, known: Sequence[str]) -> Sequence[str]:
        return known


@dataclass(frozen=True)
class Replying:
    """A carrier that hands over replies as they come, the way the Flower engine opens them."""

    names: Sequence[str]
    replies: Iterator[RecordDict]

    def known(self, number: int) -> Sequence[str]:
        return self.names

    def answers(self, server: State, number: int, cohort: Sequence[str], since: Since) -> Iterator[Answer]:
        for name, reply in zip(cohort, self.replies, strict=True):
            about, sent = unpack(reply, 2 * server.num_bytes() + 2**20)
            yield Answer(name, 0, Update(name, about["num_examples"], sent))
            del reply, sent  # before the next one comes


def ours(model: Arrays, replies: Iterator[RecordDict], number: int = REPLIES) -> Arrays:
    """A server's whole round: every reply decoded, validated, counted and added up."""
    names = [f"c{k:04d}" for k in range(number)]
    job = Job(NoOp(), Names(names), Names(names), 1, 0, mean)
    return play(job, Replying(names, replies), State(model), 1, Since({}, {}), ignore)[0].params


def flowers(replies: Iterator[Message]) -> ArrayRecord:
    """Flower's own: every reply decoded and added up."""
    arrays, _ = FedAvg().aggregate_train(1, replies)
    return arrays


def flower_reply(params: Arrays, num_examples: int) -> Message:
    return _message({"arrays": ArrayRecord(dict(params)), "metrics": MetricRecord({"num-examples": num_examples})})


def _message(content: Mapping[str, Any]) -> Message:
    """A reply outside of a running federation."""
    metadata = Metadata(
        run_id=1,
        message_id="m",
        src_node_id=1,
        dst_node_id=0,
        reply_to_message_id="q",
        group_id="",
        created_at=0.0,
        ttl=1.0,
        message_type="train",
    )
    return Message(metadata=metadata, content=RecordDict(content))


def pfls(updates: Iterator[Any]) -> Arrays:
    """pfl's weighting and summing of statistics that are in memory; it has no wire, and does not look for nan."""
    from pfl.aggregate.base import SumAggregator
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.context import UserContext

    weight, rule, total = WeightByDatapoints(), SumAggregator(), None
    for stats, num_examples in updates:
        stats, _ = weight.postprocess_one_user(stats=stats, user_context=UserContext(num_examples, 0))
        total = rule.accumulate(accumulated=total, user_stats=stats)
    assert total is not None, "there are updates"
    total.average()
    return dict(total.items())


def aggregation(repeats: int = 5) -> dict[str, Any]:
    """The same replies through both servers; and tensors in memory through our mean and pfl's."""
    model = model_of_4_mb()
    sent = [
        Update(f"c{k:04d}", 1 + k % 50, State({n: v + torch.randn(v.shape, generator=rng) for n, v in model.items()}))
        for k in range(REPLIES)
        for rng in [stream(0, "reply", k)]
    ]
    packed = [pack({"num_examples": update.num_examples}, update.sent) for update in sent]
    messages = [flower_reply(update.sent.params, update.num_examples) for update in sent]
    found: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        work: dict[str, Callable[[], Any]] = {
            "ours": partial(ours, model, iter(packed)),
            "flower": partial(flowers, iter(messages)),
            "our_mean": partial(mean, iter(sent)),
        }
        if find_spec("pfl"):
            work["pfl"] = partial(pfls, iter(_pfl_statistics(sent)))  # anew, since pfl weights in place
        means = {}
        for name, run in work.items():
            started = time.perf_counter()
            means[name] = run()
            seconds = time.perf_counter() - started
            if repeat:
                found.setdefault(name, []).append(REPLIES * _num_bytes(model) / seconds / 1e6)
            print(f"aggregation, repeat {repeat}, {name}: {REPLIES / seconds:.0f} replies/s", flush=True)
        means["flower"] = means["flower"].to_torch_state_dict()
        for name, values in means.items():
            for key, value in values.items():
                assert torch.allclose(value, means["ours"][key], atol=1e-4), f"{name} has another mean of {key}"
        del work, means
    size = {"model_mb": _num_bytes(model) / 1e6, "tensors": len(model), "replies": REPLIES}
    extra = {name: _in_a_process_of_its_own(name) for name in ("ours", "flower")}
    return {**size, "mb_per_second": found, "extra_mb": extra}


def _pfl_statistics(sent: Sequence[Update]) -> list[tuple[Any, int]]:
    import pfl.model.pytorch  # noqa: F401  chooses torch
    from pfl.stats import MappedVectorStatistics

    return [(MappedVectorStatistics({n: v.clone() for n, v in u.sent.params.items()}), u.num_examples) for u in sent]


def _num_bytes(arrays: Arrays) -> int:
    return State(arrays).num_bytes()


# --- memory --------------------------------------------------------------------------------------------------------


def _in_a_process_of_its_own(name: str) -> float:
    done = subprocess.run([sys.executable, __file__, f"--peak={name}"], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def peak(name: str) -> float:
    """MB of resident memory beyond what stood before the round, while replies are made one at a time.

    The kernel's high-water mark of this process (VmHWM), set back just before; the model and one reply, of which all
    others are copies, stand before.
    """
    model, small = model_of_4_mb(), {"a": torch.zeros(2)}
    run: Callable[[], Any]
    if name == "ours":
        ours(small, iter([pack({"num_examples": 1}, State(small))]), 1)
        content = pack({"num_examples": 1}, State(model))
        run = partial(ours, model, (_copy(content) for _ in range(REPLIES)))
    else:
        flowers(iter([flower_reply(small, 1)]))
        content = flower_reply(model, 1).content
        run = partial(flowers, (_message(_copy(content)) for _ in range(REPLIES)))
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mb("VmRSS")
    assert run(), "there is a mean"
    return _status_mb("VmHWM") - before


def _copy(content: RecordDict) -> RecordDict:
    """The same records with bytes of their own, as they would come from a socket."""
    arrays = {
        key: ArrayRecord({name: replace(array, data=b"".join([memoryview(array.data)])) for name, array in one.items()})
        for key, one in content.array_records.items()
    }
    return RecordDict({**content, **arrays})


def _status_mb(key: str) -> float:
    (line,) = [x for x in Path("/proc/self/status").read_text("utf-8").splitlines() if x.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024 / 1e6


# --- the table -----------------------------------------------------------------------------------------------------


NOTES = """\
Medians over interleaved repeats, with the smallest and the largest. Flower's client returns the arrays undecoded and
keeps nothing; ours loads the model, and on the Flower engine keeps its part on disk. Peak memory is the kernel's
high-water mark of a process of its own, less what was resident before the first reply.

pfl has no wire and no validation, so it stands only where tensors in memory are concerned. Installed as a whole it
takes attrs below 24 and absl-py 1.4 with it; here only what was missing came from a folder of its own."""


def table(found: Mapping[str, Any]) -> str:
    """One line per comparison; a ratio above 1 says that ours is better."""
    lines = ["| what | ours | rival | times better | figure to reach |", "|---|---|---|---|---|"]
    if cost := found.get("overhead"):
        lines += _overhead_lines(cost)
    if summed := found.get("aggregation"):
        lines += _aggregation_lines(summed)
    named = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return "\n".join([*lines, "", NOTES, "", f"Versions: {named}; {found['threads']} thread.", ""])


def _overhead_lines(cost: Mapping[str, Any]) -> list[str]:
    rivals = {"flower": "Flower's simulation with its own FedAvg", "pfl": "pfl's simulated backend"}
    lines = []
    for key, unit, goal in (("each_ms", "ms per client-round", 5), ("first_seconds", "s to the end of round 1", 4)):
        for engine, title in (("in_process", "in-process"), ("flower_engine", "Flower engine")):
            for rival in [r for r in rivals if r in cost and (engine, r) != ("flower_engine", "pfl")]:
                mine, theirs = cost[engine][key], cost[rival][key]
                reach = f"{goal}" if (engine, rival) == ("in_process", "flower") else ""
                lines.append(
                    f"| {unit}, {title} | {_spread(mine)} | {rivals[rival]}: {_spread(theirs)} | "
                    f"{_spread([b / a for a, b in zip(mine, theirs, strict=True)])} | {reach} |"
                )
    return lines


def _aggregation_lines(summed: Mapping[str, Any]) -> list[str]:
    speed, extra, size = summed["mb_per_second"], summed["extra_mb"], summed["model_mb"]
    ratio = [a / b for a, b in zip(speed["ours"], speed["flower"], strict=True)]
    lines = [
        f"| MB/s of replies decoded, validated and averaged | {_spread(speed['ours'])} | "
        f"Flower's `FedAvg.aggregate_train`, which validates no values: {_spread(speed['flower'])} | "
        f"{_spread(ratio)} | 2.5 |",
        f"| MB that a round adds to the peak, its {summed['replies']} replies of {size:.2f} MB coming one by one | "
        f"{extra['ours']:.0f} | the same, which collects them first: {extra['flower']:.0f} | "
        f"{extra['flower'] / extra['ours']:.0f} | at most {EXTRA_MODELS * size + EXTRA_MB:.0f} |",
    ]
    if "pfl" in speed:
        ratio = [a / b for a, b in zip(speed["our_mean"], speed["pfl"], strict=True)]
        lines.append(
            f"| MB/s of tensors in memory averaged, no decoding and no validation | {_spread(speed['our_mean'])} | "
            f"pfl's `SumAggregator`: {_spread(speed['pfl'])} | {_spread(ratio)} | |"
        )
    return lines


def _spread(values: Sequence[float]) -> str:
    """Median, and the smallest and largest."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["overhead", "aggregation"])
    parser.add_argument("--pfl", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", choices=("ours", "flower"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if arguments.peak is not None:
        print(peak(arguments.peak))
        return
    if arguments.pfl is not None:
        sys.path.append(str(arguments.pfl))
    found: dict[str, Any] = {"versions": versions(), "threads": arguments.threads}
    for library in ("flwr", "ray", *(["pfl"] if find_spec("pfl") else [])):
        found["versions"][library] = metadata.version(library)
    for what in arguments.what:
        found[what] = {"overhead": overhead, "aggregation": aggregation}[what]()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "flower.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (arguments.out / "flower.md").write_text(table(found), "utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
