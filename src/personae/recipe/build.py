"""From a recipe to the things that it names: data, population, job. `models.py` makes the denoiser."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personae.aggregate import rule_by_name
from personae.attack import Poisoned
from personae.core import Client, ClientData, Images, Job, Site, stream
from personae.data import (
    SOURCES,
    by_attribute,
    by_label,
    client_folders,
    dirichlet,
    fixed_new,
    iid,
    image_folder,
    split,
    unseen,
)
from personae.data.sources import Source
from personae.engine.patience import Patience
from personae.engine.population import Pooled, Population, Roster
from personae.errors import ConfigError, DataError
from personae.recipe.models import Model, build_denoiser
from personae.recipe.schema import Data, Partition, Recipe


@dataclass(frozen=True)
class Clients:
    """Everyone's data by client name, who trains and who comes later, and what the labels mean."""

    data: Mapping[str, ClientData]
    train: tuple[str, ...]
    new: tuple[str, ...]
    label_names: tuple[str, ...]
    spare: tuple[Images, ...] = ()
    """Images of the source that the partition gave to nobody."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Channels, height and width of every image."""
        return tuple(next(iter(self.data.values())).train.pixels.shape[1:])


def build_clients(recipe: Recipe) -> Clients:
    """Raises: DataError, ConfigError."""
    data, seed = recipe.data, recipe.seed
    if data.source == "clients":
        images = client_folders(
            Path(str(data.path)), size=int(data.size or 0), channels=data.channels, on_unreadable=data.on_unreadable
        )
        if unknown := sorted(set(data.new) - set(images)):
            raise ConfigError(f"data.new names {', '.join(unknown)}, but the folder holds {', '.join(sorted(images))}")
        train, new = tuple(n for n in sorted(images) if n not in data.new), tuple(sorted(data.new))
        label_names: tuple[str, ...] = ()
        spare: tuple[Images, ...] = ()
    else:
        source, partition = source_of(data), data.partition
        if data.new:
            raise ConfigError(
                "data.new names clients of source 'clients'; here data.partition.num_new holds clients out"
            )
        if partition is None:
            dealt, num_train = [torch.arange(len(source.images))], 1
            names: tuple[str, ...] = (data.name,)
        else:
            dealt = _parts(source, partition, seed)
            num_train = len(dealt) - partition.num_new
            # "fixed_new" deals the same new clients whoever trains, and so under the same names.
            newcomers = _numbered("n", partition.num_new) if partition.kind == "fixed_new" else ()
            names = (*_numbered("c", len(dealt))[: len(dealt) - len(newcomers)], *newcomers)
        images = {name: source.images[part] for name, part in zip(names, dealt, strict=True)}
        label_names = source.label_names
        held = torch.zeros(len(source.images), dtype=torch.bool)
        held[torch.cat(dealt)] = True
        spare = () if held.all() else (source.images[(~held).nonzero()[:, 0]],)
        train, new = names[:num_train], names[num_train:]
    _check_attackers(recipe, train)
    shares = dict.fromkeys(train, data.heldout) | dict.fromkeys(new, data.heldout_new or data.heldout)
    parts = {name: split_client(name, said(images[name], data), shares[name], seed) for name in images}
    return Clients(parts, train, new, label_names, spare)


def said(images: Images, data: Data) -> Images:
    """With the recipe's caption for images that have none.

    Raises: DataError, when that caption leaves open what an image shows.
    """
    if images.captions or data.caption is None:
        return images
    if "{thing}" in data.caption:
        raise DataError(
            f"these images have no captions, and the recipe's, {data.caption!r}, leaves open what they show; write one "
            'for each into metadata.jsonl beside them: {"file_name": "1.png", "text": '
            f"{json.dumps(data.caption.replace('{thing}', 'a cat'))}}}"
        )
    return Images(images.pixels, images.labels, (data.caption,) * len(images))


def _numbered(letter: str, num: int) -> tuple[str, ...]:
    return tuple(f"{letter}{i:0{len(str(num - 1))}d}" for i in range(num))


def _check_attackers(recipe: Recipe, train: Sequence[str]) -> None:
    """Of a misspelt attacker nothing would be noticed but a rule that withstands everything."""
    method: Any = recipe.method
    while method is not None:
        if isinstance(method, Poisoned) and (lost := sorted(set(method.clients) - set(train))):
            raise ConfigError(f"wrap.poisoned.clients: {', '.join(lost)} do not train; who does: {', '.join(train)}")
        method = getattr(method, "method", None)


def split_client(name: str, images: Images, heldout: float, seed: int) -> ClientData:
    """Raises: DataError, which names the client."""
    try:
        return split(images, heldout, stream(seed, "split", name))
    except DataError as error:
        raise DataError(f"client {name!r}: {error}") from error


def pictures_and_captions(data: ClientData) -> dict[str, Tensor]:
    """A client's, as tensors: what a digest knows them by."""
    arrays: dict[str, Tensor] = {}
    for part, images in (("train", data.train), ("heldout", data.heldout)):
        said = "\0".join(images.captions).encode()
        arrays[part] = images.pixels
        arrays[f"{part} captions"] = torch.frombuffer(bytearray(said or b"\0"), dtype=torch.uint8)
    return arrays


def with_absolute_path(data: Data) -> Data:
    """As it must stand in a run's folder: independent of where the command was called."""
    return data if data.path is None else replace(data, path=str(Path(data.path).resolve()))


def relabelled(source: Source, label_names: Sequence[str]) -> Images:
    """A client's own images with labels by the run's names; without labels, where it has others or none."""
    images = source.images
    if images.labels is None or not source.label_names or not set(source.label_names) <= set(label_names):
        return Images(images.pixels, captions=images.captions)
    places = torch.tensor([list(label_names).index(name) for name in source.label_names])
    return Images(images.pixels, places[images.labels], images.captions)


ARGUMENTS = {
    "size": ("size",),
    "num_images": ("n", "shots"),
    "path": ("root",),
    "styles": ("styles",),
    "names": ("names",),
    "told": ("told",),
    "style": ("style",),
    "person": ("person",),
    "thing": ("thing",),
}
"""What the functions of data sets call the keys of [data]."""


def _is_needed(parameter: Parameter | None) -> bool:
    return parameter is not None and parameter.default is Parameter.empty


def source_of(data: Data) -> Source:
    if data.source == "folder":
        return image_folder(
            Path(str(data.path)), size=int(data.size or 0), channels=data.channels, on_unreadable=data.on_unreadable
        )
    load = SOURCES[data.source]
    taken = signature(load).parameters
    given = {name: value for name in ARGUMENTS if (value := getattr(data, name)) is not None}
    arguments = {name: next((a for a in ARGUMENTS[name] if a in taken), "") for name in ARGUMENTS}
    if unfit := [name for name in given if not arguments[name]]:
        raise ConfigError(f"source {data.source!r} does not take data.{' or data.'.join(unfit)}; leave it out")
    needed = [name for name in ARGUMENTS if name not in given and _is_needed(taken.get(arguments[name]))]
    if needed:
        raise ConfigError(f"source {data.source!r} needs data.{' and data.'.join(needed)}")
    options = {arguments[name]: value for name, value in given.items()}
    if data.caption is not None and "wording" in taken:
        options["wording"] = data.caption
    return load(**options)


def _parts(source: Source, partition: Partition, seed: int) -> list[Tensor]:
    rng, count = stream(seed, "partition"), partition.num_clients
    if partition.kind == "iid":
        return iid(len(source.images), count, rng)
    if partition.kind == "by_attribute":
        if source.attributes is None:
            raise ConfigError("data.partition: this source has no attributes; use iid, by_label or dirichlet")
        return by_attribute(source.attributes, count, rng)
    labels = source.images.labels
    if labels is None:
        raise ConfigError(
            f"data.partition: {partition.kind!r} needs labels; put each label's images in a sub-folder, or use iid"
        )
    if partition.kind == "by_label":
        return by_label(labels, count, int(partition.classes_per_client or 0), rng)
    if partition.kind == "unseen":
        return unseen(
            labels,
            count,
            partition.num_new,
            rng,
            images_per_client=int(partition.images_per_client or 0),
            images_per_new=int(partition.images_per_new or 0),
            classes_per_client=partition.classes_per_client,
            alpha=partition.alpha,
        )
    if partition.kind == "fixed_new":
        return fixed_new(
            labels,
            count,
            partition.num_new,
            rng,
            images_per_new=int(partition.images_per_new or 0),
            alpha=float(partition.alpha or 0),
            classes_per_client=int(partition.classes_per_client or 0),
        )
    return dirichlet(labels, count, float(partition.alpha or 0), rng, min_images=partition.min_images)


@dataclass(frozen=True)
class RecipeSite:
    """The clients' half, made from the recipe where it is needed: each process builds it once, and sends only this."""

    recipe: Recipe

    def client(self, name: str, when: int | str, seed: int) -> Client:
        return _population(self.recipe).client(name, when, seed)


@lru_cache(maxsize=1)
def _population(recipe: Recipe) -> Population:
    torch.set_num_threads(recipe.machine.threads)
    clients = build_clients(recipe)
    return Population(build_denoiser(recipe, clients.sample_shape), clients.data, clients.train, clients.new)


def patience(recipe: Recipe) -> Patience:
    """Raises: ConfigError."""
    f = recipe.federation
    return Patience(f.deadline_seconds, f.times_median, f.least_seconds, f.wait_seconds)


def sample_shape(recipe: Recipe) -> tuple[int, int, int]:
    """Channels, height and width of the images, without anybody's own."""
    data = recipe.data
    if data.source in ("clients", "folder"):
        return (data.channels, int(data.size or 0), int(data.size or 0))
    channels, height, width = source_of(data).images.pixels.shape[1:]
    return (channels, height, width)


def build_job(recipe: Recipe, clients: Clients, model: Model, folder: Path | None) -> Job:
    """Everything that an engine needs, with all clients at hand."""
    late, late_from, minimum = recipe.federation.late, recipe.federation.late_from, recipe.federation.minimum or 0
    if minimum > (there := len(clients.train) - len(late)):
        raise ConfigError(
            f"federation.minimum is {minimum}, and before round {late_from} there are {there} clients: {len(late)} of "
            f"{len(clients.train)} are late"
        )
    population = Population(model, clients.data, clients.train, clients.new, recipe.cohort, late, late_from)
    members = Pooled(population) if recipe.data.pooled else population
    return build_job_of(recipe, members, folder, None if recipe.engine == "in_process" else RecipeSite(recipe))


def build_job_of(
    recipe: Recipe, members: Population | Pooled | Roster, folder: Path | None, site: Site | None = None
) -> Job:
    """The same for given members, whose clients work at `site`, or where the members say."""
    return Job(
        method=recipe.method,
        members=members,
        site=site or members,
        rounds=recipe.rounds,
        seed=recipe.seed,
        rule=rule_by_name(recipe.aggregation.rule, recipe.aggregation.attackers),
        max_examples=recipe.aggregation.max_examples,
        minimum=recipe.federation.minimum,
        clip_norm=recipe.aggregation.clip_norm,
        folder=folder,
        checkpoint_every=recipe.machine.checkpoint_every,
    )
