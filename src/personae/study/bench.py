"""One trained model and those who adapt it: what the studies of new clients stand on."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personae.artefact.save import load_state
from personae.core import ClientData, Images, Job, Method, State, Training, stream
from personae.data.partition import KINDS, whole_counts
from personae.engine.in_process import personalize_one
from personae.errors import ConfigError, DataError
from personae.evaluate.copying import copy_ratio
from personae.evaluate.distances import kid
from personae.evaluate.features import Features, features_by_name
from personae.evaluate.histogram import class_histogram, histogram_distance
from personae.evaluate.loss import denoising_loss
from personae.recipe import measuring
from personae.recipe.build import Clients, build_clients, build_job
from personae.recipe.config import load_recipe
from personae.recipe.models import Model, build_denoiser
from personae.recipe.saved import SavedRun
from personae.recipe.schema import Recipe, Sampling
from personae.recipe.workflow import open_run, resume, run

POPULATION_IMAGES = 32
"""Held-out images of training clients on which forgetting is measured."""


def trained(
    folder: Path, recipe: str, changes: Sequence[str], seed: int, kept: Mapping[str, State] | None = None
) -> SavedRun:
    """A recipe's run in a study's folder, with the study's threads: begun, taken up where it stopped, or as it is."""
    if (folder / "config.toml").is_file():
        return resume(folder)
    if folder.exists():
        shutil.rmtree(folder)  # stopped before its recipe was written
    own = [f"seed={seed}", f"machine.threads={torch.get_num_threads()}"]
    return run(load_recipe(recipe, [*changes, *own]), folder, kept=kept)


@lru_cache(maxsize=1)
def open_bench(folder: Path, sampling: Sampling | None = None) -> Bench:
    """A finished run, whose clients are drawn as `sampling` says; None: as its recipe does.

    Raises: ArtefactError; ConfigError, when its data set has no classifier.
    """
    recipe = open_run(folder).recipe
    recipe = dataclasses.replace(recipe, sampling=sampling or recipe.sampling)
    clients = build_clients(recipe)
    model = build_denoiser(recipe, clients.sample_shape)
    features = features_by_name(recipe.evaluation.features or recipe.data.source)
    if features is None or features.classify is None:
        raise ConfigError(f"{folder}: data set {recipe.data.source!r} has no classifier; set evaluation.features")
    return Bench(recipe, clients, model, load_state(folder / "server.safetensors"), features)


class Bench:
    """What was trained, everybody's images, and the one model in which clients adapt one after the other."""

    def __init__(self, recipe: Recipe, clients: Clients, model: Model, released: State, features: Features) -> None:
        self.recipe, self.clients, self.model, self.released, self.features = recipe, clients, model, released, features
        held = [clients.data[name].heldout for name in clients.train]
        pixels = torch.cat([images.pixels for images in held])
        order = torch.randperm(len(pixels), generator=stream(recipe.seed, "population"))[:POPULATION_IMAGES]
        self._population = Images(pixels[order])
        self.kinds = kinds_of(recipe, clients)
        self.has_null = any(name.startswith("null_embedding.") for name in model.live())
        self.population_before: float | None = None
        if released.params.keys() >= model.initial(stream(0), _not_embedding).keys():
            model.load({**model.initial(stream(recipe.seed, "before")), **released.params})
            self.population_before = self._population_loss(self.has_null)

    def adapted(self, name: str, how: Training, images: int, drawn: int, references: int) -> dict[str, Any]:
        """Everything that is said of one new client after it has adapted with `how` from `images` of its images.

        Of `images` = 0, all; of more than it has, all.
        """
        data = self._fewer(name, images)
        personal = personalize_one(self.job({name: data}, how), self.released, State(), name)
        self.model.load({**self.released.params, **personal.params})
        loss = denoising_loss(self.model, data.heldout, grid=10, draws=1, seed=self.recipe.seed)
        pictures = self.drawn(name, drawn)
        figures = {
            "kind": self.kinds[name],
            "num_images": len(data.train),
            "loss": loss,
            "distance": histogram_distance(
                class_histogram(self.features, pictures), self.label_counts(self.clients.data[name])
            ),
            "copy": copy_ratio(pictures, data.train.pixels, data.heldout.pixels),
            "population": self._population_loss(self.has_null),
            "others": self._population_loss(False),
            "numbers": personal.num_values(),
            "bytes_received": self.released.num_bytes(),
        }
        return figures | (self._kernel_distance(name, data, pictures, references) if references else {})

    def job(self, data: Mapping[str, ClientData], how: Training) -> Job:
        """The run's own method, adapting with `how`, for clients that hold other images than in the run, or are new."""
        clients = dataclasses.replace(self.clients, data={**self.clients.data, **data})
        recipe = dataclasses.replace(self.recipe, method=adapting(self.recipe.method, how), engine="in_process")
        return build_job(recipe, clients, self.model, None)

    def _fewer(self, name: str, images: int) -> ClientData:
        data = self.clients.data[name]
        order = torch.randperm(len(data.train), generator=stream(self.recipe.seed, "fewer", name))
        return ClientData(data.train[order[: images or len(order)].sort().values], data.heldout)

    def label_counts(self, data: ClientData) -> Tensor:
        """How many images of each class a client holds, those held out included."""
        assert data.train.labels is not None and data.heldout.labels is not None, "the source has a classifier"
        both = torch.cat([data.train.labels, data.heldout.labels])
        return torch.bincount(both, minlength=len(self.clients.label_names))

    def drawn(self, name: str, num_images: int) -> Tensor:
        """By the model as it is loaded now, uint8 [num_images, C, H, W]; equal names start from equal noise."""
        return measuring.drawn(self.recipe, self.model, [name], num_images)[0]

    def _population_loss(self, unconditional: bool) -> float:
        """Of training clients' held-out images, with the population's vector or the one that is loaded."""
        return denoising_loss(self.model, self._population, seed=self.recipe.seed, unconditional=unconditional)

    def _kernel_distance(self, name: str, data: ClientData, drawn: Tensor, references: int) -> dict[str, Any]:
        real = self.features.extract(self._references(name, data, references))
        made = self.features.extract(drawn)
        found = kid(
            made, real, features=self.features.name, subset_size=references // 4, subsets=100, seed=self.recipe.seed
        )
        return {"kid": found.mean, "kid_std": found.std, "kid_floor": found.floor, "kid_features": found.features}

    def _references(self, name: str, own: ClientData, num: int) -> Tensor:
        """Real images of the client's mix of classes that nobody trained on, its own and others'.

        A client's own are too few for a kernel distance. Whatever was trained on, by anybody, is left out: a model that
        remembers it would look better than it is.
        Raises: DataError, when a class has too few.
        """
        new = [data for other, data in self.clients.data.items() if other != name and other in self.clients.new]
        train = [self.clients.data[other].heldout for other in self.clients.train]
        parts = [
            own.heldout,
            *train,
            *(part for data in new for part in (data.train, data.heldout)),
            *self.clients.spare,
        ]
        pixels = torch.cat([part.pixels for part in parts])
        labels = torch.cat([part.labels for part in parts if part.labels is not None])
        counts = self.label_counts(self.clients.data[name]).double()
        rng, chosen = stream(self.recipe.seed, "references", name), []
        for label, wanted in enumerate(whole_counts(counts / counts.sum(), num).tolist()):
            index = (labels == label).nonzero()[:, 0]
            if wanted > len(index):
                raise DataError(
                    f"client {name!r}: nobody trained on {len(index)} images of class {label}, {wanted} are needed; "
                    "lower settings.num_references, or give the clients fewer images"
                )
            chosen.append(index[torch.randperm(len(index), generator=rng)[:wanted]])
        return pixels[torch.cat(chosen)]


def _not_embedding(name: str) -> bool:
    return not name.startswith("embedding.")


def adapting(method: Method, how: Training) -> Method:
    """The same method, inside whatever is around it, whose new clients adapt with `how`."""
    inner = getattr(method, "method", None)
    changed = {"adapt": how} if inner is None else {"method": adapting(inner, how)}
    return dataclasses.replace(method, **changed)  # type: ignore[type-var]


def kinds_of(recipe: Recipe, clients: Clients) -> dict[str, str]:
    """Each new client's kind, as the partition dealt them in turn; "new" where a partition knows no kinds."""
    partition = recipe.data.partition
    if partition is None or partition.kind != "unseen":
        return dict.fromkeys(clients.new, "new")
    return {name: KINDS[number % len(KINDS)] for number, name in enumerate(clients.new)}
