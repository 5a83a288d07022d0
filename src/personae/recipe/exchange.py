"""A client's parts for other tools, and parts of other tools for a client."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from personae.artefact.formats import FORMS, Form, Parts
from personae.artefact.formats import export_parts as write_parts
from personae.artefact.formats_names import NETWORKS
from personae.artefact.formats_read import Matched, import_parts
from personae.artefact.save import digest
from personae.core import Arrays, Client, ClientData, Images, State, pick, stream
from personae.engine.rounds import load_parts
from personae.errors import ArtefactError, ConfigError
from personae.personal.lora import B, Lora, is_lora
from personae.personal.tokens import is_word
from personae.recipe.saved import SavedRun


def export_parts(run: SavedRun, client: str, to: str | Path, form: Form) -> list[Path]:
    """Write a client's adapters or its words, whichever the form is for, to a new folder. Returns the files.

    Raises: ConfigError, when the client has none, or the form is unknown; ArtefactError, when the folder exists.
    """
    if form not in FORMS:
        raise ConfigError(f"form is {form!r}; expected one of {', '.join(FORMS)}")
    words = form.startswith("textual_inversion")
    params, backbone = pick(run.personal(client), is_word if words else is_lora), run.recipe.backbone
    if not params:
        raise ConfigError(
            f"client {client!r} in {run.folder} has no {'words' if words else 'adapters'}, which form {form!r} is for"
        )
    alpha = backbone.lora.alpha if backbone.lora is not None else None
    return write_parts(Parts(params, alpha, _base_name(run), _base_digest(run)), Path(to), form)


def import_client(run: SavedRun, name: str, file: str | Path, *, other_base: bool = False) -> Matched:
    """Add a client whose adapters or words another tool has made. What the file lacks is as at the start.

    A file of ours knows the weights it was trained on; those of another base are taken only with `other_base`. Other
    tools write at most a name, which is given back and not judged.

    Raises: ConfigError, when the name is taken or unusable; ArtefactError, when the file is none, damaged, for another
    base, or nothing in it matches; ShapeError, when it is for a model of another width.
    """
    run.refuse_taken([name])
    model, nobody = run.denoiser, Images(torch.empty(0))
    parts, matched = import_parts(Path(file), model.params())
    if parts.base_digest and not other_base and (here := _base_digest(run)) not in ("", parts.base_digest):
        raise ArtefactError(
            f"{file} is for another base: it was trained on {parts.base or 'weights'} ({parts.base_digest}), and "
            f"{run.folder} has {_base_name(run)} ({here}); import it into a run on its own base, or, where one was "
            "made from the other, or is its copy in float16, ask for it with --other-base"
        )
    client = Client(name, ClientData(nobody, nobody), model, stream(run.recipe.seed, name))
    load_parts(client, run.released.params, _scaled(parts, run.recipe.backbone.lora), run.recipe.seed)
    everything = model.params()
    own = {**pick(everything, run.recipe.method.personal), **pick(everything, parts.params.__contains__)}
    personal = State(own)
    run.add({name: personal}, {name: {"file": str(Path(file).resolve())}})
    return matched


def _base_name(run: SavedRun) -> str:
    return Path(str(run.recipe.backbone.folder)).name


def _base_digest(run: SavedRun) -> str:
    """Of the frozen networks' weights, as bfloat16 has them: `backbone.half` is the same base, a folder that was saved
    in float16 is not. Empty where the base trains, or its changes do: what is in the folder is then not what it was.

    One weight after the other, so that a large base is not in memory twice.
    """
    if not run.recipe.backbone.frozen or run.recipe.backbone.delta is not None:
        return ""
    base = run.denoiser.base()
    told = "".join(digest({name: base[name].bfloat16()}) for name in sorted(base) if name.startswith(NETWORKS))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _scaled(parts: Parts, lora: Lora | None) -> Arrays:
    """With what the run's own factor, alpha / rank, would leave out or add put into B."""
    alpha = None if lora is None else lora.alpha
    if parts.alpha == alpha:
        return parts.params
    scaled = dict(parts.params)
    for name in (name for name in scaled if name.endswith(B)):
        rank = scaled[name].shape[1]
        scaled[name] = scaled[name] * ((parts.alpha or rank) / (alpha or rank))
    return scaled
