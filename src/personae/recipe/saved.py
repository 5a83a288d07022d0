"""A run on disk, and what a user does with it: personalize, sample, evaluate, report, export."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personae.artefact.folder import held
from personae.artefact.run_folder import RunFolder
from personae.artefact.save import digest, load_state, read_json, read_metadata, write_json
from personae.core import NAME_RULE, SAFE_NAME, Arrays, ClientData, Job, Round, State, Watch, ignore
from personae.data import image_folder
from personae.engine.in_process import personalize_one
from personae.engine.together import check_per_client, personalize_many
from personae.errors import ArtefactError, ConfigError
from personae.evaluate.features import Features, features_by_name
from personae.evaluate.grids import save_grid
from personae.evaluate.report import write_report
from personae.recipe.build import (
    Clients,
    build_clients,
    build_job,
    pictures_and_captions,
    relabelled,
    said,
    split_client,
)
from personae.recipe.config import method_name
from personae.recipe.environment import versions
from personae.recipe.measuring import cycled, drawn, measure_client
from personae.recipe.models import Model, build_denoiser, check_captions, write_pipeline
from personae.recipe.schema import Federation, Recipe

SUMMARY_VERSION = 1
PREVIEWED = 8
"""Images in a preview."""
PATIENCE = 30.0
"""Seconds to wait for another process that adds a client to the same run."""


class SavedRun:
    """A run on disk. What is needed of its folder, its data and its model is read when it is first asked for."""

    def __init__(self, folder: Path, recipe: Recipe, clients: Clients | None = None) -> None:
        self.folder, self.recipe, self._given = folder, recipe, clients

    @cached_property
    def _clients(self) -> Clients:
        return self._given or build_clients(self.recipe)

    @cached_property
    def denoiser(self) -> Model:
        """The one model in memory; every client's parts are loaded into it."""
        torch.set_num_threads(self.recipe.machine.threads)
        model = build_denoiser(self.recipe, self.sample_shape)
        began = self._images.get("base")
        if began is not None and began != digest(model.base()):
            raise ArtefactError(
                f"the weights in {self.recipe.backbone.folder} are not those that {self.folder} began with, and its "
                "clients' parts belong to these; put the former pipeline back, or begin a new run"
            )
        return model

    @cached_property
    def _images(self) -> dict[str, Any]:
        """What the training images look like, kept in the folder so that a new client needs none of them."""
        path = self.folder / "images.json"
        if self._given is None and path.is_file():
            return dict(read_json(path))
        return {"sample_shape": self._clients.sample_shape, "label_names": self._clients.label_names}

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of an image: channels, height, width."""
        return tuple(self._images["sample_shape"])

    @property
    def label_names(self) -> list[str]:
        return list(self._images["label_names"])

    def began_with(self) -> dict[str, str]:
        """Digests of everybody's images and captions, and of the frozen weights where there are any."""
        arrays: dict[str, Tensor] = {}
        for name, data in self._clients.data.items():
            arrays |= {f"{name} {part}": value for part, value in pictures_and_captions(data).items()}
        base = self.denoiser.base()
        return {"images": digest(arrays), **({"base": digest(base)} if base else {})}

    def keep_images(self) -> None:
        """Write what the images look like, and what they and the frozen weights are, where that is not written yet."""
        if not (self.folder / "images.json").is_file():
            write_json(self.folder / "images.json", {**self._images, **self.began_with()})

    def refuse_others(self) -> None:
        """Raises: ArtefactError, when the images are not those that the run began with: what was held out might be
        trained on."""
        began = self._images.get("images")
        if began is not None and began != self.began_with()["images"]:
            raise ArtefactError(
                f"the images or captions of {self.recipe.data.path or self.recipe.data.source} are not those that "
                f"{self.folder} began with; put them back, or begin a new run with what there is now"
            )

    def check(self) -> None:
        """Build all that the recipe names, so that what does not go together is refused before there is a folder.

        Raises: ConfigError, ArtefactError.
        """
        self.job.method.init(self.job.members.initial(self.job.seed))
        _ = self.features
        if self.denoiser.reads_captions:
            for name, data in self._clients.data.items():
                check_captions(self.recipe, self.denoiser, name, data)
        alone = len(self._clients.train) == 1 and self.recipe.engine == "in_process" and not self.recipe.data.pooled
        if self.recipe.evaluation.preview_rounds and not alone:
            raise ConfigError(
                "evaluation.preview_rounds: previews are for one client in this process, and "
                f"{len(self._clients.train)} train with engine {self.recipe.engine!r}; set it to 0"
            )

    def refuse_unknown(self, kept: Mapping[str, State]) -> None:
        """Raises: ConfigError, for an engine whose clients keep their own, and for names of nobody here."""
        if self.recipe.engine != "in_process":
            raise ConfigError(
                f"engine is {self.recipe.engine!r}, whose clients keep what is theirs where they are; what they are to "
                "begin with can be given to 'in_process' only"
            )
        if unknown := sorted(kept.keys() - self._clients.data.keys()):
            raise ConfigError(f"something was kept for {', '.join(unknown[:3])}, and no client is called so here")

    @cached_property
    def job(self) -> Job:
        """What an engine needs to carry this run."""
        return build_job(self.recipe, self._clients, self.denoiser, self.folder)

    def job_of(self, data: Mapping[str, ClientData]) -> Job:
        """The same method for these clients alone, without anybody else's images."""
        clients = Clients(data, tuple(data), (), ())
        alone = dataclasses.replace(self.recipe, engine="in_process", cohort=None, federation=Federation())
        return build_job(alone, clients, self.denoiser, self.folder)

    @cached_property
    def released(self) -> State:
        return load_state(self._released_path)

    @property
    def _backbone(self) -> str:
        return read_metadata(self._released_path)["backbone"]

    @property
    def _released_path(self) -> Path:
        path = self.folder / "server.safetensors"
        if not path.is_file():
            raise ArtefactError(
                f"{self.folder} has not finished training; continue it with: personae resume {self.folder}"
            )
        return path

    @cached_property
    def features(self) -> Features | None:
        return features_by_name(self.recipe.evaluation.features or self.recipe.data.source)

    def previewing(self, watch: Watch) -> Watch:
        """The same watcher, before which every so many rounds previews/<round>.png is drawn.

        What is drawn is the model in memory, which after a round is the only client's; it keeps its bits.
        """
        if not (every := self.recipe.evaluation.preview_rounds):
            return watch
        (name,) = self._clients.train
        captions = cycled(self._clients.data[name].train.captions, PREVIEWED) if self.denoiser.reads_captions else ()

        def show(round: Round) -> None:
            if round.stage == "train" and round.done and round.round % every == 0:
                (pictures,) = drawn(self.recipe, self.denoiser, [name], PREVIEWED, captions=captions)
                (self.folder / "previews").mkdir(exist_ok=True)
                save_grid(self.folder / "previews" / f"{round.round:06d}.png", pictures, columns=PREVIEWED)
            watch(round)

        return show

    @property
    def summary(self) -> dict[str, Any]:
        """The figures of summary.json. Raises: ArtefactError, when the run has not been evaluated."""
        return dict(read_json(self.folder / "summary.json"))

    @property
    def clients(self) -> list[str]:
        """Everyone with a personal file."""
        return sorted(path.stem for path in (self.folder / "clients").glob("*.safetensors"))

    def personalize(self, name: str, data: str | Path) -> dict[str, Any]:
        """Add a client that nobody has seen, from a folder of its images. Returns its figures.

        Nothing is uploaded, and the shared model keeps its bits. A client that was added before the run was given more
        rounds may be added again.
        Raises: ConfigError, when the name is taken or unusable; DataError, for the images.
        """
        self.refuse_taken([name])
        own = self._read(name, Path(data))
        personal = personalize_one(self.job_of({name: own}), self.released, State(), name)
        self.add({name: personal}, {name: _lies(data)})
        return self._measure_added(name, own)

    def personalize_many(self, data: Mapping[str, str | Path], *, at_once: int = 16) -> dict[str, dict[str, Any]]:
        """Add several clients that nobody has seen, `at_once` of them in one batch. Returns their figures by name.

        Each has the files and figures that `personalize` would give it, up to rounding; more at once are faster, and
        take more memory. A call that was stopped can be made again: who was added from the same folder stays as it is.
        Raises: ConfigError, when names are taken or unusable, or the method's personal part is not an embedding;
        DataError, for the images; ClientFailed, which names the client.
        """
        if at_once < 1:
            raise ConfigError(f"{at_once} clients at once were asked for, expected at least 1")
        check_per_client(self.recipe.method, self.denoiser)
        added = {n: self._added().get(n, {}) for n in data}
        there = [n for n in data if added[n].get("data") == str(Path(data[n]).resolve()) and self._is_current(n)]
        missing = [name for name in data if name not in there]
        self.refuse_taken(missing)
        own = {n: self._read(n, Path(data[n])) for n in data if n in missing or "figures" not in added[n]}
        for start in range(0, len(missing), at_once):
            group = missing[start : start + at_once]
            job = self.job_of({name: own[name] for name in group})
            self.add(personalize_many(job, self.released, group), {name: _lies(data[name]) for name in group})
        return {n: self._measure_added(n, own[n]) if n in own else added[n]["figures"] for n in data}

    def sample(
        self,
        client: str,
        num_images: int = 16,
        *,
        seed: int | None = None,
        prompt: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """What this client's personal model draws, uint8 [num_images, C, H, W]; a model that reads captions needs a
        prompt. Steps and guidance are the recipe's unless others are given.

        Raises: ConfigError, for an unknown client, or a prompt that is missing or has no reader; ArtefactError, when
        its file belongs to another backbone.
        """
        model = self.model(client)
        if model.reads_captions == (prompt is None):
            raise ConfigError(
                f"the model in {self.folder} draws what a text says; say it with --prompt"
                if prompt is None
                else f"the model in {self.folder} reads no text; leave out --prompt {prompt!r}"
            )
        captions = () if prompt is None else (prompt,) * num_images
        own = self.recipe.sampling
        if steps is not None:
            own = dataclasses.replace(own, steps=steps)
        if guidance is not None:
            own = dataclasses.replace(own, guidance=guidance)
        recipe = dataclasses.replace(self.recipe, sampling=own)
        return drawn(recipe, model, [client], num_images, seed, captions=captions)[0]

    def sample_many(
        self, clients: Sequence[str], num_images: int = 16, *, seed: int | None = None
    ) -> dict[str, Tensor]:
        """What `sample` draws for each of several clients, up to rounding, all in one batch.

        Raises: as `sample`; ConfigError also, when the method's personal part is not an embedding.
        """
        if not clients:
            return {}
        model = self.denoiser
        check_per_client(self.recipe.method, model)
        parts = [self.personal(client) for client in clients]
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        model.load({**self.released.params, **rows}, len(clients))
        return dict(zip(clients, drawn(self.recipe, model, clients, num_images, seed), strict=True))

    def model(self, client: str) -> Model:
        """The denoiser with the released backbone and this client's personal part."""
        personal = self.personal(client)
        self.denoiser.load({**self.released.params, **personal})
        return self.denoiser

    def personal(self, client: str) -> Arrays:
        path = RunFolder(self.folder).personal_path(client)
        if not path.is_file():
            near = ", ".join(self.clients[:12]) or "none yet"
            raise ConfigError(f"there is no client {client!r} in {self.folder}; clients are {near}")
        mine, ours = read_metadata(path).get("backbone"), self._backbone
        if mine != ours:
            raise ArtefactError(
                f"{path} belongs to backbone {mine}, this run's is {ours}; personalize it here: "
                f"personae personalize {self.folder} --data DIR --name NAME"
            )
        return load_state(path).params

    def export(self, client: str, to: str | Path) -> Path:
        """An ordinary diffusers pipeline that draws this client's distribution, with no `personae` installed.

        Parts of a text-to-image model are also exported by themselves: `personae.recipe.exchange`.
        """
        write_pipeline(self.model(client), Path(to))
        return Path(to)

    def evaluate(self, *, watch: Watch = ignore) -> dict[str, Any]:
        """Measure every client, write sample grids and summary.json. Returns the summary.

        An added client whose folder of images is gone keeps the figures that were taken when it was added.
        Raises: ArtefactError, when the run is not finished, or images are not those that it began with.
        """
        if not RunFolder(self.folder).is_complete(self.recipe.rounds):
            raise ArtefactError(f"{self.folder} is not finished; finish it first: personae resume {self.folder}")
        self.refuse_others()
        clients = self._clients
        started = time.perf_counter()
        roles = dict.fromkeys(clients.train, "train") | dict.fromkeys(clients.new, "new")
        data = dict(clients.data)
        figures: dict[str, Any] = {}
        for name, entry in ((n, e) for n, e in self._added().items() if n in self.clients):
            roles[name] = "new"
            if "file" in entry:  # of another tool, and nobody knows the images
                del roles[name]
            elif "figures" in entry and not Path(entry["data"]).is_dir():
                figures[name] = entry["figures"]
            else:
                data[name] = self._read(name, Path(entry["data"]))
        for name, role in roles.items():
            if name not in figures:
                figures[name] = self.measure_client(name, role, data[name])
            seconds, done = time.perf_counter() - started, len(figures) == len(roles)
            nan, rounds = float("nan"), self.recipe.rounds
            watch(Round("evaluate", rounds, rounds, name, len(figures), len(roles), nan, 0, 0, seconds, done))
        self.summarize(figures, time.perf_counter() - started)
        return self.summary

    def summarize(self, figures: Mapping[str, dict[str, Any]], seconds: float | None) -> None:
        """Write summary.json from the clients' figures, which took `seconds`, where known, and the training's cost."""
        cost = read_json(self.folder / "cost.json")
        for name, figure in figures.items():
            traffic = cost["traffic"].get(name, {"up": 0, "down": self.released.num_bytes()})
            figure |= {"bytes_up": traffic["up"], "bytes_down": traffic["down"]}
        stages = cost["stages"] | ({} if seconds is None else {"evaluate_seconds": seconds})
        losses = [f["heldout_loss"] for f in figures.values() if f.get("heldout_loss") is not None]
        summary = {
            "format_version": SUMMARY_VERSION,
            "recipe": self.recipe.name,
            "method": method_name(self.recipe.method),
            "engine": self.recipe.engine,
            "seed": self.recipe.seed,
            "rounds": self.recipe.rounds,
            "wall_seconds": sum(stages.values()),
            "bytes_up": sum(t["up"] for t in cost["traffic"].values()),
            "bytes_down": sum(t["down"] for t in cost["traffic"].values()),
            "heldout_loss": sum(losses) / len(losses) if losses else None,
            "versions": versions(),
            "features": None if self.features is None else {"name": self.features.name},
            "label_names": self.label_names or None,
            "model_parameters": sum(p.numel() for p in self.denoiser.live().values()),
            "stages": stages,
            "clients": dict(figures),
        }
        write_json(self.folder / "summary.json", summary)

    def report(self) -> Path:
        """Write report.html from what the folder holds."""
        return write_report(self.folder)

    # --- pieces ----------------------------------------------------------------------------------------------

    def _added(self) -> dict[str, dict[str, Any]]:
        """Clients that were added after the run, by name: the folder of their images, and their figures."""
        path = self.folder / "added.json"
        return dict(read_json(path)) if path.is_file() else {}

    def _is_current(self, name: str) -> bool:
        """True for a client with a personal file of this run's backbone."""
        return RunFolder(self.folder).has_personal(name, self._backbone)

    def refuse_taken(self, names: Sequence[str]) -> None:
        """A name may be given again to who was added before the run was given more rounds."""
        taken = [n for n in names if n in self.clients and (n not in self._added() or self._is_current(n))]
        problems = [f"client {name!r} exists in {self.folder}; choose another name" for name in taken]
        problems += [
            f"{name!r} cannot be a client's name; use {NAME_RULE}" for name in names if not SAFE_NAME.fullmatch(name)
        ]
        if problems:
            raise ConfigError("; ".join(problems))

    def add(self, personal: Mapping[str, State], entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Write what new clients sample with, and where it comes from.

        Raises: ConfigError, when somebody has taken a name in the meantime.
        """
        folder = RunFolder(self.folder)
        with held(self.folder, PATIENCE):
            self.refuse_taken(list(personal))
            write_json(self.folder / "added.json", self._added() | dict(entries))
            for name, state in personal.items():
                folder.save_personal(name, state, self._backbone)  # what has this file is complete

    def _measure_added(self, name: str, own: ClientData) -> dict[str, Any]:
        figures = self.measure_client(name, "new", own)
        with held(self.folder, PATIENCE):
            added = self._added()
            write_json(self.folder / "added.json", {**added, name: {**added[name], "figures": figures}})
        return figures

    def _read(self, name: str, folder: Path) -> ClientData:
        """A new client's images, in the size and channels that the backbone draws."""
        channels, size, _ = self.denoiser.image_shape
        source = image_folder(folder, size=size, channels=channels, on_unreadable=self.recipe.data.on_unreadable)
        images = said(relabelled(source, self.label_names), self.recipe.data)
        data = split_client(name, images, self.recipe.data.heldout, self.recipe.seed)
        check_captions(self.recipe, self.denoiser, name, data)
        return data

    def measure_client(self, name: str, role: str, data: ClientData) -> dict[str, Any]:
        """Everything that summary.json says of one client, and its grids in samples/."""
        return measure_client(self, name, role, data)


def _lies(data: str | Path) -> dict[str, str]:
    return {"data": str(Path(data).resolve())}
