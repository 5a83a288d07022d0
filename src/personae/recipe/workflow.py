"""From a recipe to a run: begin one, take one up where it stopped, open one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from personae.artefact.folder import refuse_existing
from personae.artefact.run_folder import RunFolder
from personae.artefact.save import read_toml, write_bytes
from personae.backbone.shipped import is_shipped
from personae.core import State, Watch, ignore
from personae.engine import engine_by_name
from personae.errors import ArtefactError
from personae.recipe.build import build_clients, patience, with_absolute_path
from personae.recipe.config import load_recipe, parse, to_toml
from personae.recipe.environment import keep_environment
from personae.recipe.saved import SavedRun
from personae.recipe.schema import Recipe


def run(
    recipe: str | Path | Recipe,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    kept: Mapping[str, State] | None = None,
    watch: Watch = ignore,
) -> SavedRun:
    """Train, personalize, measure and report one recipe in a folder of its own, `runs/<name>` by default.

    `kept` is what clients kept in an earlier run of the same base, by name: they begin with it, as if they had been in
    a round before the first. With the engine "in_process" only: elsewhere it lies with the clients.
    Raises: ConfigError, DataError, ArtefactError (the folder exists), FederationError.
    """
    plan = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    folder = Path(out) if out is not None else Path("runs") / plan.name
    refuse_existing(folder)
    plan = _absolute(plan)
    saved = SavedRun(folder, plan, build_clients(plan))
    saved.check()
    if kept is not None:
        saved.refuse_unknown(kept)
    opened = RunFolder(folder)
    with opened.begun():
        if kept is not None:
            opened.begin_with(saved.job.method.init(saved.job.members.initial(saved.job.seed)), kept)
        # With it the folder can be resumed, so whatever it begins with is there by now.
        write_bytes(folder / "config.toml", to_toml(plan).encode())
    return _finish(saved, watch)


def resume(folder: str | Path, *, watch: Watch = ignore) -> SavedRun:
    """Take a run up where it was stopped, or a complete one whose config.toml says more rounds now. Any other is only
    measured and reported again where that is missing.

    Warns: UserWarning, when training goes on with other versions or another machine than it began with.
    Raises: ArtefactError, when the folder holds no run.
    """
    return _finish(open_run(folder), watch)


def open_run(folder: str | Path, device: str | None = None) -> SavedRun:
    """On its recipe's device unless another is given. Raises: ArtefactError, when the folder holds no run."""
    path = Path(folder)
    if not (path / "config.toml").is_file():
        raise ArtefactError(
            f"{path} is not a run: it has no config.toml. Start one with: personae run RECIPE --out {path}"
        )
    recipe = parse(read_toml(path / "config.toml"), str(path / "config.toml"))
    if device is not None:
        recipe = dataclasses.replace(recipe, machine=dataclasses.replace(recipe.machine, device=device))
    return SavedRun(path, recipe)


def _finish(saved: SavedRun, watch: Watch) -> SavedRun:
    """Whatever is not done yet, in order. Also where a stopped run is taken up."""
    machine, complete = saved.recipe.machine, RunFolder(saved.folder).is_complete(saved.recipe.rounds)
    if not complete:
        keep_environment(saved.folder, machine.threads, machine.device)
    saved.keep_images()
    if not complete:
        saved.refuse_others()
        engine_by_name(saved.recipe.engine, patience(saved.recipe), saved.recipe.machine.device).run(
            saved.job, resume=True, watch=saved.previewing(watch)
        )
    if not (saved.folder / "summary.json").is_file():
        saved.evaluate(watch=watch)
    saved.report()
    return saved


def _absolute(recipe: Recipe) -> Recipe:
    """Paths as they must stand in a run folder: independent of where the command was called."""
    data, backbone, evaluation = recipe.data, recipe.backbone, recipe.evaluation
    if backbone.folder is not None and not is_shipped(backbone.folder):
        backbone = dataclasses.replace(backbone, folder=str(Path(backbone.folder).resolve()))
    if evaluation.features is not None and Path(evaluation.features).suffix:  # a file; names have none
        evaluation = dataclasses.replace(evaluation, features=str(Path(evaluation.features).resolve()))
    return dataclasses.replace(recipe, data=with_absolute_path(data), backbone=backbone, evaluation=evaluation)
