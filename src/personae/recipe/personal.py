"""One client's own pictures and a pipeline: the recipe of an ordinary run that personalizes one to the other."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from personae.artefact.save import read_json
from personae.backbone.shipped import model_folder
from personae.errors import ArtefactError, ConfigError
from personae.recipe.config import change, parse
from personae.recipe.schema import Recipe

Part = Literal["lora", "tokens", "lora+tokens", "embedding"]

RATES: dict[Part, float] = {"lora": 1e-4, "tokens": 5e-3, "lora+tokens": 1e-4, "embedding": 1e-3}
"""Learning rates when none is given: for adapters that of diffusers' own training script, for words that of Gal et al.
2022 (arXiv:2208.01618), for the vector our choice. Small models want larger ones."""

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
    if not noun.strip():
        raise ConfigError('noun is empty; say what the images show, such as "dog"')
    folder = model_folder(model)
    config, autoencoder = _config(folder / "unet"), _config(folder / "vae")
    size = _picture_size(folder, config, autoencoder)
    word = f"<{name.lower()}>"
    backbone: dict[str, Any] = {"folder": str(model), "frozen": True}
    if "lora" in method:
        backbone["lora"] = {"rank": 4}
    if "tokens" in method:
        backbone["words"] = {"words": [word], "start": noun}
    if method == "embedding":
        backbone["embedding"] = {"start": "zero"}
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
            "vector_rate": 10.0 if method == "lora+tokens" else 1.0,
        },
        "sampling": {"sampler": "dpmsolver++", "steps": 25, "guidance": 3.0},
        "evaluation": {"num_images": 32, "features": "none", "preview_rounds": 1},
    }
    for override in overrides:
        change(table, override)
    where = f"the personalization of {model}"
    _checked(table, where)
    if (table["data"].get("source"), table["data"].get("name")) != ("folder", name) or "partition" in table["data"]:
        raise ConfigError(
            "a personalization is of one client and its folder; leave out data.source, name and partition"
        )
    if "embedding" in backbone:  # as wide as its place, so that nothing stands between the two
        time = config.get("time_embedding_dim") or 4 * config["block_out_channels"][0]  # as diffusers has it
        token = backbone["embedding"].get("place") == "token"
        backbone["embedding"].setdefault("width", config["cross_attention_dim"] if token else time)
    trained = table["method"]["training"]  # who comes later trains as much
    own = {**trained, "steps": table["rounds"] * trained["steps"], **table["method"].get("adapt", {})}
    table["method"]["adapt"] = own
    return parse(table, where)


def _checked(table: Mapping[str, Any], where: str) -> None:
    """Before anything is read of a table that was changed. Raises: ConfigError, naming every problem."""
    filled = copy.deepcopy(dict(table))
    if isinstance(method := filled.get("method"), dict) and isinstance(training := method.get("training"), dict):
        adapt = method.get("adapt", {})
        method["adapt"] = {**training, **adapt} if isinstance(adapt, dict) else adapt
    if isinstance(backbone := filled.get("backbone"), dict) and isinstance(backbone.get("embedding"), dict):
        backbone["embedding"].setdefault("width", 1)
    parse(filled, where)


def _picture_size(model: Path, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """Height and width in pixels. Raises: ArtefactError."""
    latent = unet.get("sample_size")
    sides: list[Any] = latent if isinstance(latent, list) else [latent, latent]
    if not all(isinstance(side, int) for side in sides) or sides[0] != sides[-1]:
        raise ArtefactError(
            f"{model / 'unet' / 'config.json'} says sample_size {latent}, expected one whole number, such as 64 for "
            "pictures of 512 pixels"
        )
    return int(sides[0]) * 2 ** (len(vae["block_out_channels"]) - 1)


def _said(what: str) -> str:
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"


NEEDED = {"unet": ("block_out_channels", "cross_attention_dim"), "vae": ("in_channels", "block_out_channels")}
"""Of a component's config.json, by its folder's name."""


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ArtefactError(f"{folder.parent} is not a text-to-image pipeline: it has no {folder.name}/config.json")
    config = read_json(path)
    lacking = [key for key in NEEDED[folder.name] if key not in config] if isinstance(config, dict) else ["object"]
    if lacking:
        raise ArtefactError(f"{path} has no {', '.join(lacking)}; save the model again, as diffusers does")
    return config
