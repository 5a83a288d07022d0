"""A recipe across machines: the folder of a Flower app, and what its two halves do.

The server never sees an image: it makes the model from the recipe, waits for clients, and writes a run folder. A client
is a SuperNode whose configuration says its name, where its images are, and where its state is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from string import Template
from typing import Any

import torch

from personae.artefact.run_folder import RunFolder
from personae.artefact.save import json_text, write_bytes, write_json
from personae.backbone.parts import written_whole
from personae.backbone.shipped import is_shipped
from personae.core import SAFE_NAME, Client, ClientData, Facts, Job, Watch, stream
from personae.data import image_folder
from personae.engine.population import Roster
from personae.errors import ConfigError
from personae.evaluate.features import features_by_name
from personae.recipe.build import (
    build_clients,
    build_job_of,
    patience,
    relabelled,
    sample_shape,
    split_client,
)
from personae.recipe.config import find_recipe, load_recipe, to_toml
from personae.recipe.environment import keep_environment
from personae.recipe.models import build_denoiser
from personae.recipe.saved import SavedRun
from personae.recipe.schema import Recipe

TEMPLATES = Path(__file__).parent / "deployment"
NEVER_TOLD = ("labels", "sampled_labels", "sampled_labels_before", "bytes_up", "bytes_down")
FEATURE_NAMES = ("kid_features", "frechet_features")
NUMBERS = (
    *("num_images", "num_heldout", "heldout_loss", "heldout_loss_before", "histogram_distance"),
    *("histogram_distance_before", "kid", "kid_std", "kid_floor", "kid_subset_size", "frechet", "precision", "recall"),
    *("nearest_train_distance", "copy_ratio", "trained_parameters", "personal_file_bytes"),
)
"""What summary.json says of each client; whatever a client does not tell is null."""

AT_THE_NODES = "given by each node"


# --- the folder --------------------------------------------------------------------------------------------------


def deploy(recipe: str | Path, to: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Write a Flower app for a recipe: a few small files, no weights, and scripts that start both sides.

    Raises: ConfigError, when the recipe cannot be deployed; ArtefactError, when the folder exists.
    """
    path = find_recipe(recipe)
    plan = load_recipe(path, [*overrides, "engine=flower", *_own_folders(path, overrides)])
    if plan.federation.minimum is None:
        raise ConfigError(
            "federation.minimum is missing: how many updates does a round need? Nobody knows beforehand who will come, "
            "so say it: --set federation.minimum=2"
        )
    local = {
        "backbone.folder": None if is_shipped(plan.backbone.folder or "") else plan.backbone.folder,
        "evaluation.features": plan.evaluation.features if Path(plan.evaluation.features or "").suffix else None,
        "data.path": plan.data.path if plan.data.path != AT_THE_NODES else None,
    }
    if named := [f"{key} = {value!r}" for key, value in local.items() if value is not None]:
        raise ConfigError(
            f"the recipe names files of this machine, which no other has: {', '.join(named)}; leave them out, and use "
            "the data source 'clients'"
        )
    name = "".join(c if c.isalnum() else "-" for c in plan.name).strip("-").lower()
    values = {"name": name, "minimum": str(plan.federation.minimum), "rounds": str(plan.rounds)}
    with written_whole(Path(to)) as folder:
        folder.mkdir(parents=True)
        write_bytes(folder / "recipe.toml", to_toml(plan).encode())
        for template in sorted(TEMPLATES.iterdir()):
            text = Template(template.read_text("utf-8")).safe_substitute(values)
            target = folder / template.name.removesuffix(".txt")
            write_bytes(target, text.encode())
            if target.suffix == ".sh":
                target.chmod(0o755)
    return Path(to)


def _own_folders(path: Path, overrides: Sequence[str]) -> list[str]:
    """A recipe of clients with folders of their own keeps no path: each node has its own."""
    source = load_recipe(path, [*overrides, f"data.path={AT_THE_NODES}"]).data.source
    return [f"data.path={AT_THE_NODES}"] if source == "clients" else []


# --- the client's half -------------------------------------------------------------------------------------------


def client_app(recipe: str | Path) -> Any:
    """The Flower app of a SuperNode, from the recipe that lies beside it."""
    from personae.engine.flower import client_app as answering
    from personae.engine.seat import Seat

    plan = load_recipe(recipe)

    def seat_of(context: Any) -> Seat:
        config = context.node_config
        name, folder = str(config.get("name", "")), config.get("state")
        if not SAFE_NAME.fullmatch(name) or not folder:
            raise ConfigError(
                f"the node's configuration names client {name!r} with state in {folder!r}; expected a name and a "
                'folder: --node-config \'name="anna" data="photos/anna" state="state/anna"\''
            )
        data = config.get("data")
        site = NodeSite(plan, name, None if data is None else str(data))

        def measure(run: Path, trained: bool) -> Facts:
            return figures(run, plan, name, site.data(), trained)

        return Seat(name, plan.method, site, plan.seed, Path(str(folder)), measure=measure)

    return answering(seat_of)


@dataclasses.dataclass(frozen=True)
class NodeSite:
    """One client's own images, from `folder`, or its part of the recipe's data set where that is None."""

    recipe: Recipe
    name: str
    folder: str | None

    def data(self) -> ClientData:
        return _own_data(self.recipe, self.name, self.folder)

    def client(self, name: str, when: int | str, seed: int) -> Client:
        torch.set_num_threads(self.recipe.machine.threads)
        return Client(name, self.data(), _model(self.recipe), stream(seed, name, when))


@lru_cache(maxsize=1)
def _model(recipe: Recipe) -> Any:
    return build_denoiser(recipe, sample_shape(recipe))


@lru_cache(maxsize=1)
def _own_data(recipe: Recipe, name: str, folder: str | None) -> ClientData:
    """Raises: DataError, ConfigError."""
    if folder is None:
        clients = build_clients(recipe)
        if name not in clients.data:
            raise ConfigError(
                f"the recipe has no client {name!r}, and the node names no folder of images: "
                '--node-config \'name="anna" data="photos/anna" state="state/anna"\''
            )
        return clients.data[name]
    channels, size, _ = sample_shape(recipe)
    source = image_folder(Path(folder), size=size, channels=channels, on_unreadable=recipe.data.on_unreadable)
    return split_client(name, relabelled(source, label_names(recipe)), recipe.data.heldout, recipe.seed)


def label_names(recipe: Recipe) -> tuple[str, ...]:
    """What everybody's labels are called: by the classifier, since nobody knows all clients' folders."""
    features = features_by_name(recipe.evaluation.features or recipe.data.source)
    return () if features is None or features.label_names is None else features.label_names


def figures(folder: Path, recipe: Recipe, name: str, data: ClientData, trained: bool) -> Facts:
    """What a client tells of its personal model: numbers, no image and no count of its classes.

    Its folder becomes a run folder of its own, in which `personae sample` and `personae personalize` work.
    """
    _describe(folder, recipe)
    measured = SavedRun(folder, recipe).measure_client(name, "train" if trained else "new", data)
    return {key: value for key, value in measured.items() if isinstance(value, int | float | str)}


def _describe(folder: Path, recipe: Recipe) -> None:
    """The files by which a folder says what it is; the recipe first, without which nothing can go on there."""
    if not (folder / "config.toml").is_file():
        write_bytes(folder / "config.toml", to_toml(recipe).encode())
    if not (folder / "images.json").is_file():
        write_json(folder / "images.json", {"sample_shape": sample_shape(recipe), "label_names": label_names(recipe)})
    keep_environment(folder, recipe.machine.threads, recipe.machine.device)


# --- the server's half -------------------------------------------------------------------------------------------


Progress = Callable[[Path, str], AbstractContextManager[Watch]]
"""What shows the progress of the run in a folder, and says what to do when it is stopped."""


def server_app(recipe: str | Path, progress: Progress) -> Any:
    """The Flower app of the server, from the recipe that lies beside it."""
    from personae.engine.flower import server_app as with_grid

    plan = load_recipe(recipe)

    def main(grid: Any, config: Mapping[str, Any]) -> None:
        serve(plan, grid, config, progress)

    return with_grid(main)


def serve(recipe: Recipe, grid: Any, config: Mapping[str, Any], progress: Progress, make: Any = None) -> SavedRun:
    """A run over a Grid, into the folder that `config` names as "out"; one that was stopped there goes on.

    `make` makes its messages, where Flower's own cannot.

    Raises: ConfigError, when the folder belongs to another recipe; whatever stops a run.
    """
    from personae.engine.flower import serve_grid

    if not config.get("out"):
        raise ConfigError("the run needs a folder: flwr run . --run-config 'out=\"/where/the/run/goes\"'")
    folder = Path(str(config["out"]))
    torch.set_num_threads(recipe.machine.threads)
    saved = SavedRun(folder, recipe)
    _open(folder, recipe)
    told: dict[str, dict[str, Any]] = {}
    with progress(folder, f"./start.sh run {folder}") as watch:
        serve_grid(
            _job(recipe, folder),
            grid,
            resume=True,
            watch=watch,
            patience=patience(recipe),
            make=make,
            told=lambda name, facts: told.update({name: believable(facts)}),
        )
    saved.summarize(dict(sorted(told.items())), None)
    print(f"personae: report: {saved.report()}", flush=True)
    print(f"personae: {json_text({name: t.get('heldout_loss') for name, t in sorted(told.items())})}", flush=True)
    return saved


def believable(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A client's figures as far as they are of the right kind: anything else is null, whoever sent it."""
    figures: dict[str, Any] = dict.fromkeys(("role", *FEATURE_NAMES, *NUMBERS, *NEVER_TOLD))
    for key in NUMBERS:
        value = facts.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12:
            figures[key] = value
    figures["role"] = "new" if facts.get("role") == "new" else "train"
    for key in FEATURE_NAMES:
        if isinstance(name := facts.get(key), str):
            figures[key] = name[:100]
    return figures


def _job(recipe: Recipe, folder: Path) -> Job:
    model = build_denoiser(recipe, sample_shape(recipe))
    there = recipe.federation
    return build_job_of(recipe, Roster(model, recipe.cohort, recipe.data.new, there.late, there.late_from), folder)


def _open(folder: Path, recipe: Recipe) -> None:
    """Raises: ConfigError, ArtefactError."""
    text = to_toml(recipe)
    if (folder / "config.toml").is_file():
        if (folder / "config.toml").read_text("utf-8") != text:
            raise ConfigError(f"{folder} holds a run of another recipe; choose another folder")
        _describe(folder, recipe)
        return
    with RunFolder(folder).begun():
        _describe(folder, recipe)
