"""One client's own pictures and a pipeline: the recipe of an ordinary run that personalizes one to the other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from personae.artefact.save import explained
from personae.errors import ArtefactError, ConfigError
from personae.recipe.config import change, parse
from personae.recipe.schema import Recipe

Part = Literal["lora", "tokens", "lora+tokens", "embedding"]

RATES: dict[Part, float] = {"lora": 1e-3, "tokens": 1e-2, "lora+tokens": 1e-3, "embedding": 1e-2}
"""Learning rates when none is given: our choice."""

ROUNDS = 10
"""Stretches of training, after each of which a run can be taken up again and shows a preview."""


def personal_recipe(
    model: Path,
    data: Path,
    method: Part,
    noun: str,
    *,
    name: str = "own",
    overrides: Sequence[str] = (),
) -> Recipe:
    """Trains one part on the images in `data` and nothing else; the model's own weights stay as they are.

    "lora": adapters of rank 4 on attention. "tokens": a new word <name>, which starts as `noun` and takes its place.
    "lora+tokens": both. "embedding": one vector beside the time embedding. Images that come without captions are
    called "a <noun>", or "a <name>" where there is a new word. `overrides` change values of the recipe, "key=value".

    Raises: ConfigError, ArtefactError.
    """
    if method not in get_args(Part):
        raise ConfigError(f"method is {method!r}; expected one of {', '.join(get_args(Part))}")
    config, autoencoder = _config(model / "unet"), _config(model / "vae")
    size = int(config["sample_size"]) * 2 ** (len(autoencoder["block_out_channels"]) - 1)
    word = f"<{name.lower()}>"
    backbone: dict[str, Any] = {"folder": str(model), "frozen": True}
    if "lora" in method:
        backbone["lora"] = {"rank": 4}
    if "tokens" in method:
        backbone["words"] = {"words": [word], "start": noun}
    if method == "embedding":
        width = config.get("time_embedding_dim") or 4 * config["block_out_channels"][0]  # as diffusers has it
        backbone["embedding"] = {"width": width, "start": "zero"}
    training: dict[str, Any] = {
        "steps": 40,
        "lr": RATES[method],
        "batch_size": 4,
        "optimizer": "adamw",
        "condition_dropout": 0.0,
    }
    table: dict[str, Any] = {
        "name": f"{name}-{method.replace('+', '-')}",
        "rounds": ROUNDS,
        "data": {
            "source": "folder",
            "path": str(data),
            "size": size,
            "channels": autoencoder["in_channels"],
            "name": name,
            "caption": _said(word if "tokens" in method else noun),
        },
        "backbone": backbone,
        "method": {
            "name": "local_only",
            "training": training,
            "adapt": {**training, "steps": ROUNDS * training["steps"]},
            "vector_rate": 10.0 if method == "lora+tokens" else 1.0,
        },
        "sampling": {"sampler": "dpmsolver++", "steps": 25, "guidance": 3.0},
        "evaluation": {"num_images": 32, "features": "none", "preview_rounds": 1},
    }
    for override in overrides:
        change(table, override)
    return parse(table, f"the personalization of {model}")


def _said(what: str) -> str:
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ArtefactError(f"{folder.parent} is not a text-to-image pipeline: it has no {folder.name}/config.json")
    with explained(path, "reading"):
        return dict(json.loads(path.read_text("utf-8")))
