"""Drawings that a server begins and a client finishes: what the client saves, what travels, what the server could tell.

A federation by `cluster_lora` is trained; then its clients draw the same things from the same noise while the server
takes different shares of the model's calls, so that two drawings differ in nothing but the split. The server draws with
the adapter for everybody and the caption that `serve/client.py` would send; the client with its own adapter and words.

"run": the federation, for each seed. "share": everybody's pictures at one share of the server's. "pictures": a sheet.

Letters in shapes: `N` pictures, `F` features, `*X` one latent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from personae.artefact.save import load_state, save_state
from personae.core import Batch, NoiseSchedule, State, device_of, pick, stream
from personae.data.emoji import STYLES, pack, scene_names
from personae.errors import ConfigError, DataError
from personae.evaluate.distances import frechet, kid
from personae.evaluate.grids import save_grid
from personae.evaluate.text2image import StyleProbe, fit_style_probe, nearest_name
from personae.evaluate.text2image_features import pooled, renderings, statistics
from personae.infer.sample import to_bytes
from personae.infer.samplers import Sampler, scheduler_for, times_of
from personae.infer.split import (
    LATENT,
    REQUEST,
    SplitPlan,
    base_digest,
    begin,
    calls_of,
    finish,
    request_digest,
    sealed,
    unsealed,
)
from personae.personal.tokens import Words, is_word, plain
from personae.recipe.build import build_clients
from personae.recipe.config import load_recipe, method_name
from personae.recipe.models import build_denoiser
from personae.recipe.saved import SavedRun
from personae.recipe.workflow import open_run
from personae.study.bench import trained
from personae.study.by_style import held_names, server_of, styles_of
from personae.study.handover_report import handover_answer
from personae.study.study import Answer, Cell, Row, where

FEWEST_NAMES = 4
"""Of a client: kernel distances need two pictures twice, and the probe of hand-offs things for both of its halves."""


@dataclass(frozen=True)
class Handover:
    """`recipe` is that of a `cluster_lora` run on emoji, and `changes` are overrides of it, "key=value".

    Every client that trains draws `num_names` things that it does not hold and that the style probe was not fitted on,
    of those that the base knows best (`scene_names`): what is drawn of others has hardly a style to lose. `shares` are
    the server's, of the model's calls; 0, where all is drawn at home, is what the others are compared with.
    """

    recipe: str = "collaborative/styles"
    changes: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    shares: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0)
    num_names: int = 24
    sampler: Sampler = "dpmsolver++"
    steps: int = 20
    guidance: float = 3.0

    def __post_init__(self) -> None:
        if 0.0 not in self.shares or not all(0 <= share <= 1 for share in self.shares) or not self.seeds:
            raise ConfigError(
                f"shares are {list(self.shares)}, seeds {list(self.seeds)}; expected 0, which all are compared with, "
                "others up to 1, and one or more seeds"
            )
        if self.num_names < FEWEST_NAMES or self.steps < 1:
            raise ConfigError(
                f"num_names is {self.num_names}, steps {self.steps}; expected at least {FEWEST_NAMES} and at least 1"
            )
        recipe = load_recipe(self.recipe, self.changes)
        says = "{thing}" in (recipe.data.caption or "")
        if "cluster_lora" not in method_name(recipe.method) or recipe.data.source != "emoji" or not says:
            raise ConfigError(
                f"recipe {self.recipe!r}: method {method_name(recipe.method)}, source {recipe.data.source!r}, caption "
                f"{recipe.data.caption!r}; expected cluster_lora, 'emoji' and a caption with {{thing}}"
            )

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        cells: list[dict[str, Any]] = [{"stage": "run", "seed": seed} for seed in self.seeds]
        if len(where(found, stage="run")) == len(cells):
            cells += [{"stage": "share", "seed": seed, "share": share} for seed in self.seeds for share in self.shares]
        return [*cells, {"stage": "pictures", "seed": self.seeds[0]}] if self._is_drawn(found) else cells

    def _is_drawn(self, found: Sequence[Row]) -> bool:
        """Whether the sheet's pictures are all there."""
        return len(where(found, stage="share", seed=self.seeds[0])) == len(self.shares)

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        number, own = int(cell["seed"]), folder / "runs" / str(cell["seed"])
        (folder / "pictures").mkdir(exist_ok=True)
        if cell["stage"] == "run":
            run = trained(own, self.recipe, self.changes, seed + number)
            clusters = int(run.released.facts["clusters"])
            return {"seconds": run.summary["wall_seconds"], "clusters": clusters, "bytes": run.released.num_bytes()}
        known = opened(own)
        if cell["stage"] == "pictures":
            return self._sheet(known, number, folder)
        return self._at(known, float(cell["share"]), seed + number, folder / "pictures" / _first(number, cell["share"]))

    def answer(self, found: Sequence[Row]) -> Answer:
        return handover_answer(found, self.shares)

    # --- the pieces of a measurement ---------------------------------------------------------------------------------

    def _at(self, known: Federation, share: float, seed: int, first: Path) -> Mapping[str, Any]:
        """Everybody's figures at one share; the first picture of each goes to the file `first`."""
        calls = round(share * calls_of(known.server, self.sampler, self.steps))
        plan, clients = SplitPlan(self.sampler, self.steps, calls, self.guidance), {}
        pictures, hats, clustered = dict[str, Tensor](), [], []
        names = known.names(self.num_names)
        for name, style in known.styles.items():
            things, noise = names[name], int(torch.randint(2**62, (), generator=stream(seed, "handover", name)))
            captions = [known.caption.format(thing=pack().things[thing].phrase) for thing in things]
            split = drawn_by_two(known.server, known.run.model(name), captions, known.words, plan, noise)
            hats.append(expected_pictures(known.server, split.said, plan, split.packet.extras[LATENT]))
            cluster = known.of_cluster(name)
            clustered.append(begun_picture(cluster, captions, plan, noise))
            alike, other = _alike(hats[-1], split.pictures)
            clients[name] = {
                "style": style,
                "found": fmean(told == style for told in known.probe.tell(split.pictures)),
                "named": nearest_name(split.pictures, things, [style] * len(things)).drawn.top_1.share,
                "alike": alike,
                "alike_other": other,
                **split.figures(),
            }
            pictures[name] = split.pictures
        styles, drawn = list(known.styles.values()), [thing for name in clients for thing in names[name]]
        each = [style for style in styles for _ in range(self.num_names)]
        for key, shown in (("leak", hats), ("leak_cluster", clustered), ("leak_finished", list(pictures.values()))):
            right = told_apart(statistics().extract(torch.cat(shown)), each, drawn)
            for at, client in enumerate(clients.values()):
                client[key] = fmean(right[at * self.num_names : (at + 1) * self.num_names])
        save_state(first, State(extras={name: shown[0] for name, shown in pictures.items()}))
        return {
            "calls": calls,
            "chance": max(map(styles.count, styles)) / len(styles),
            "real": known.probe.real.overall.share,
            "clients": clients,
            "styles": {style: _distances(known, style, names, pictures, seed) for style in sorted(set(styles))},
        }

    def _sheet(self, known: Federation, number: int, folder: Path) -> Mapping[str, Any]:
        """A client a row, a share a column, and the real picture in the last one."""
        columns = [load_state(folder / "pictures" / _first(number, share)).extras for share in self.shares]
        names = known.names(self.num_names)
        rows = [
            torch.cat([*(column[name][None] for column in columns), renderings(style, names[name][:1])])
            for name, style in known.styles.items()
        ]
        save_grid(folder / "pictures" / "shares.png", torch.cat(rows), columns=len(self.shares) + 1)
        return {"picture": "pictures/shares.png"}


def _first(number: int, share: Any) -> str:
    return f"{number}-{float(share):g}.safetensors"


def _distances(
    known: Federation, style: str, names: Mapping[str, Sequence[str]], pictures: Mapping[str, Tensor], seed: int
) -> dict[str, float]:
    """Of what all clients of a style drew to the real pictures of the same things."""
    own = [name for name, its in known.styles.items() if its == style]
    drawn, features = torch.cat([pictures[name] for name in own]), statistics()
    real = features.extract(renderings(style, [thing for name in own for thing in names[name]]))
    made = features.extract(drawn)
    return {"frechet": frechet(made, real), "kid": kid(made, real, features=features.name, seed=seed).mean}


def _alike(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean cosine of pooled pixels with the picture of the same thing, and with that of the client's next thing."""
    a, b = (pooled().extract(pictures) for pictures in (one, other))
    return float((a * b).sum(1).mean()), float((a * b.roll(1, 0)).sum(1).mean())


# --- a finished run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Federation:
    """A finished run: the model that its server draws with, the server's last state, and every client's style."""

    run: SavedRun
    server: Any
    state: State
    styles: Mapping[str, str]
    held: Mapping[str, Collection[str]]
    probe: StyleProbe

    @property
    def words(self) -> Words:
        words = self.run.recipe.backbone.words
        assert words is not None, "cluster_lora does not run without"
        return words

    @property
    def caption(self) -> str:
        return str(self.run.recipe.data.caption)

    def names(self, count: int) -> dict[str, tuple[str, ...]]:
        """What every client draws: nothing that it holds, and others of a style other things, as far as there are any.

        Raises: DataError, when there are too few names.
        """
        others = set(self.probe.other_names)
        known = [name for name in scene_names() if name in others]
        new = {client: [name for name in known if name not in self.held[client]] for client in self.styles}
        if (fewest := min(map(len, new.values()))) < count:
            raise DataError(
                f"every client is to draw {count} things that it does not hold, and one has {fewest}; lower num_names"
            )
        places = {client: list(self.styles.values())[:at].count(self.styles[client]) for at, client in enumerate(new)}
        return {
            client: tuple(names[(places[client] * count + at) % len(names)] for at in range(count))
            for client, names in new.items()
        }

    def of_cluster(self, client: str) -> Any:
        """The model with the adapter of the client's group, as the server has it, and the client's own words."""
        adapter = self.run.recipe.method.broadcast(self.state, client).params
        self.run.denoiser.load({**pick(self.run.personal(client), is_word), **adapter})
        return self.run.denoiser


@lru_cache(maxsize=1)
def opened(folder: Path) -> Federation:
    """Raises: ArtefactError; DataError, when a client's pictures are not of one style, or all of the same."""
    run = open_run(folder)
    clients, recipe = build_clients(run.recipe), run.recipe
    wordless = dataclasses.replace(recipe, backbone=dataclasses.replace(recipe.backbone, words=None))
    server = build_denoiser(wordless, run.sample_shape)
    server.load(run.released.params)
    state, styles = server_of(folder), styles_of(clients)
    if len(known := [style for style in STYLES if style in styles.values()]) < 2:
        raise DataError(f"all clients in {folder} draw {', '.join(known)}; a style can be told among two or more")
    for model in (server, run.denoiser):
        base_digest(model)  # once, and before anybody's seconds are taken
    held = {name: held_names(clients, name) for name in styles}
    return Federation(run, server, state, styles, held, fit_style_probe(known))


# --- a drawing by two -------------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """Passes through the U-Net, of all pictures at once, and seconds of one processor."""

    passes: int = 0
    seconds: float = 0.0


@contextmanager
def counted(model: Any) -> Iterator[Cost]:
    """What the model does inside the block, by a hook on the U-Net itself."""
    cost = Cost()

    def count(*_: Any) -> None:
        cost.passes += 1

    hook, started = model.unet.register_forward_hook(count), time.process_time()
    try:
        yield cost
    finally:
        cost.seconds = time.process_time() - started
        hook.remove()


@dataclass(frozen=True)
class Split:
    """What two machines drew together, uint8 [N, C, H, W], what the server was told, what it sent, and both costs."""

    pictures: Tensor
    said: Sequence[str]
    packet: State
    data: bytes
    server: Cost
    client: Cost

    def figures(self) -> dict[str, int | float]:
        """Seconds, and bytes of latents and history, of one picture; `rest_bytes` is all else in the packet, which
        holds as much for one picture as for several."""
        sizes = {name: value.numel() * value.element_size() for name, value in self.packet.extras.items()}
        latent, whole, num = sizes.pop(LATENT), len(self.data), len(self.pictures)
        travels = whole > 0
        return {
            "server_passes": self.server.passes,
            "client_passes": self.client.passes,
            "server_seconds": self.server.seconds / num,
            "client_seconds": self.client.seconds / num,
            "latent_bytes": travels * latent / num,
            "history_bytes": travels * sum(sizes.values()) / num,
            "rest_bytes": travels * (whole - latent - sum(sizes.values())),
        }


def drawn_by_two(server: Any, own: Any, captions: Sequence[str], words: Words, plan: SplitPlan, seed: int) -> Split:
    """What `serve/app.py` and `serve/client.py` do for one request, without the wire: a packet is sealed to bytes and
    opened again, and where the server has no call nothing is sent.

    Sealed with a digest as long as the server's signature; keys belong to `serve`.
    """
    said, theirs, data = [plain(text, words) for text in captions], Cost(), b""
    if plan.calls:
        server.captions.forget()  # as after every request
        with counted(server) as theirs:
            packet = begin(server, said, plan, stream(seed, "begin"))
            facts = {**packet.facts, REQUEST: request_digest(said, plan, seed)}
            data = sealed(dataclasses.replace(packet, facts=facts), _digest)
    with counted(own) as mine:
        if data:
            packet = unsealed(data, _check)
            facts = {name: value for name, value in packet.facts.items() if name != REQUEST}
            packet = dataclasses.replace(packet, facts=facts)
        else:
            packet = begin(own, said, plan, stream(seed, "begin"))
        pictures = to_bytes(finish(own, captions, plan, packet))
    return Split(pictures, said, packet, data, theirs, mine)


def _digest(content: bytes) -> bytes:
    return hashlib.sha512(content).digest()


def _check(content: bytes, signature: bytes) -> None:
    if _digest(content) != signature:
        raise ValueError("another digest")


# --- what a half-drawn picture says -----------------------------------------------------------------------------------


def begun_picture(model: Any, captions: Sequence[str], plan: SplitPlan, seed: int) -> UInt8[Tensor, "N ..."]:
    """What a server with this model would have taken the picture to be at the hand-off, told these captions."""
    packet = begin(model, captions, plan, stream(seed, "begin"))
    return expected_pictures(model, captions, plan, packet.extras[LATENT])


@torch.no_grad()
def expected_pictures(
    model: Any, captions: Sequence[str], plan: SplitPlan, x_t: Float[Tensor, " N *X"]
) -> UInt8[Tensor, "N ..."]:
    """What the model takes the finished pictures to be at the hand-off: x_0 as its next call predicts it, decoded.

    After the last call that is what was drawn. `x_t` are the packet's latents.
    """
    scheduler = scheduler_for(plan.sampler, model.schedule, plan.steps)
    x_t = x_t.to(device_of(model))
    for at in times_of(scheduler)[plan.calls : plan.calls + 1]:
        x_t = scheduler.scale_model_input(x_t, at)  # where noise was added and not mixed, now it is
        t = torch.full((len(x_t),), int(at), device=x_t.device)
        nulls = [False] if plan.guidance == 1.0 else [True, False]
        alone = [torch.full((len(x_t),), null, device=x_t.device) for null in nulls]
        told = [model.forward(x_t, t, model.condition(Batch(x_t, null, tuple(captions)))) for null in alone]
        x_t = clean(model.schedule, told[0].lerp(told[-1], plan.guidance), x_t, int(at))
    return to_bytes(model.decode(x_t).float().cpu())


def clean(
    schedule: NoiseSchedule, prediction: Float[Tensor, " N *X"], x_t: Float[Tensor, " N *X"], t: int
) -> Float[Tensor, " N *X"]:
    """x_0 from what the network said of x_t. Source: Salimans and Ho 2022, appendix D."""
    signal, sigma = schedule.alpha_bar[t].sqrt(), (1 - schedule.alpha_bar[t]).sqrt()
    if schedule.prediction_type == "sample":
        return prediction
    return (
        (x_t - sigma * prediction) / signal
        if schedule.prediction_type == "epsilon"
        else signal * x_t - sigma * prediction
    )


def told_apart(features: Float[Tensor, "N F"], styles: Sequence[str], things: Sequence[str]) -> list[bool]:
    """Of each picture, whether a linear probe tells its style that was fitted on pictures of the other half of things.

    A probe of finished pictures would fail on these, which are blurred; this one is fitted on what it is asked about.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = list(dict.fromkeys(things))
    half = np.array([order.index(thing) % 2 for thing in things])
    values, right, told = features.double().numpy(), np.array(styles), np.array(styles, dtype=object)
    for which in (0, 1):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=1000))
        told[half == which] = probe.fit(values[half != which], right[half != which]).predict(values[half == which])
    return [bool(a == b) for a, b in zip(told, styles, strict=True)]
