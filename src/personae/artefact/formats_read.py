"""Adapters and words out of the files of other tools, under our names; and what such a file is.

A layer's adapter is taken whole or not at all: one with DoRA's magnitudes, say, is left out and named.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personae.artefact.formats import (
    CLIPS,
    Parts,
    fit,
    folded,
    refuse_infinite,
)
from personae.artefact.formats_names import (
    ALPHA,
    NETWORKS,
    TEXT,
    TEXT_2,
    flat,
    is_sdxl,
    resolved,
    taken_apart,
)
from personae.artefact.formats_open import Found, opened
from personae.core import Arrays
from personae.errors import ArtefactError, ShapeError
from personae.personal.lora import LEVEL, A, B
from personae.personal.tokens import TOKENS, is_word

TOKEN_TABLES = tuple(text + LEVEL + "embeddings.token_embedding.weight" for text in (TEXT, TEXT_2))

READ_BY: Mapping[str, tuple[str, ...]] = {
    "LoRA, diffusers": ("diffusers",),
    "LoRA, diffusers before peft": ("diffusers",),
    "LoRA, peft": ("peft",),
    "LoRA, kohya": ("A1111", "ComfyUI", "kohya", "diffusers"),
    "textual inversion, diffusers": ("diffusers", "A1111", "ComfyUI"),
    "textual inversion, A1111": ("A1111", "ComfyUI", "diffusers, told the word"),
    "textual inversion, SDXL": ("diffusers", "A1111", "ComfyUI"),
}


@dataclass(frozen=True)
class Matched:
    """What was taken from a file.

    `taken` are our names; `unmatched` the file's other keys, each with the reason; `missing` the model's names of the
    same kind for which the file has nothing; `base` is what the file says it was made for, "" when it says nothing.
    """

    kind: str
    taken: tuple[str, ...]
    unmatched: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    base: str = ""


def import_parts(path: Path, model: Arrays | None = None) -> tuple[Parts, Matched]:
    """Read a LoRA or a word of any form that `export_parts` writes, and of diffusers' older ones, in float32.

    `model` has what the parts are for, of which only names and shapes are read: a model's own parts, which are then all
    that may be there, or its bare weights. Without it names are taken as they are, and kohya's cut where such names are
    cut. An alpha that all layers share is kept; where they differ, alpha / rank goes into `lora_B`, and alpha is None.

    Raises: ArtefactError, when this is none of them, is damaged, or nothing in it matches; ShapeError, when an adapter
    or a word has another width than the model.
    """
    found = opened(path)
    if found is None:
        raise ArtefactError(f"{path} holds neither a LoRA nor a textual inversion")
    params, alphas, unmatched = _taken(found, model)
    if not params:
        why = [f"{key}: {reason}" for key, reason in list(unmatched.items())[:3]]
        raise ArtefactError(f"{path} ({found.kind}): none of {len(unmatched)} keys can be used: {'; '.join(why)}")
    refuse_infinite(params, str(path))
    for layer, alpha in alphas.items():
        if not math.isfinite(alpha):
            raise ArtefactError(f"{path}: the alpha of {layer} is {alpha}")
    params, shared = _one_alpha(params, alphas)
    same_kind = {name for name in model or () if (name.endswith((A, B)) if alphas else is_word(name))}
    missing = tuple(sorted(same_kind - params.keys()))
    parts = Parts(params, shared, found.base, found.base_digest)
    return parts, Matched(found.kind, tuple(params), unmatched, missing, found.base)


def described(path: Path) -> dict[str, Any]:
    """What a file or folder of another tool is; empty for any other, and for our own.

    Raises: ArtefactError, when it is damaged; a pickle is named and not opened.
    """
    found = opened(path)
    if found is None:
        return {}
    params, alphas, unmatched = _taken(found, None)
    ranks = {layer: len(params[layer + A]) for layer in alphas}
    sdxl = any(is_sdxl(parts[0]) for key in found.arrays if (parts := taken_apart(key)))
    return {
        "type": found.kind + (" (SDXL)" if sdxl else ""),
        "base_model": found.base or "not told",
        "ranks": sorted(set(ranks.values())),
        "alphas": sorted(set(alphas.values())),
        "alpha_is_rank": bool(ranks) and alphas == ranks,
        "keys": len(found.arrays),
        "networks": [n.removesuffix(".") for n in NETWORKS if any(name.startswith(n) for name in params)],
        "words": [name.removeprefix(TOKENS[0]) for name in params if name.startswith(TOKENS[0])],
        "not_readable": [f"{reason}: {n} keys" for reason, n in Counter(unmatched.values()).items()],
        "read_by": list(READ_BY[found.kind]),
    }


# --- taking apart -----------------------------------------------------------------------------------------------------


def _taken(found: Found, model: Arrays | None) -> tuple[dict[str, Tensor], dict[str, float], dict[str, str]]:
    """(parts by our names, alphas by layer, reasons by what is left of the file's keys). Raises: ShapeError."""
    if found.kind.startswith("textual inversion"):
        return _word(found, model)
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    keys: dict[str, list[str]] = defaultdict(list)
    why, unmatched = dict[str, str](), dict[str, str]()
    for key, value in found.arrays.items():
        told = taken_apart(key)
        if told is None:
            unmatched[key] = "no part of a LoRA that we know"
            continue
        layer, part = told
        keys[layer].append(key)
        if part not in (A, B, ALPHA):
            why[layer] = f"{part}, which we do not read"
        elif part in layers[layer] and not torch.equal(layers[layer][part], value):
            why[layer] = "the file has it twice, with other values"
        layers[layer][part] = value
    shapes = None if model is None else _places(model)
    named = None if shapes is None else _by_flat_name(shapes)
    params, alphas, wide = dict[str, Tensor](), dict[str, float](), list[str]()
    for layer, halves in layers.items():
        name, reason = resolved(layer, named)
        if reason := why.get(layer) or _unusable(halves) or reason or ("it is there twice" if name in alphas else ""):
            unmatched |= dict.fromkeys(keys[layer], reason)
            continue
        down, up = halves[A].float(), halves[B].float()
        if not fit(down, up):
            raise ShapeError(f"{name}: lora_A is {list(down.shape)}, lora_B {list(up.shape)}; their ranks do not fit")
        if shapes is not None and shapes[name] != (len(up), down.shape[1]):
            wide.append(
                f"{name} is {down.shape[1]} -> {len(up)}, the model's is {shapes[name][1]} -> {shapes[name][0]}"
            )
        params |= {name + A: down, name + B: up}
        alphas[name] = _alpha(name, halves.get(ALPHA), len(down), found.configs)
    if wide:
        raise ShapeError(
            f"{len(wide)} adapters are for layers of another width: {'; '.join(wide[:3])}. "
            "Were they made for another kind of model?"
        )
    return params, alphas, unmatched


def _unusable(halves: Mapping[str, Tensor]) -> str:
    if A not in halves or B not in halves:
        return "half of its adapter is missing"
    if any(halves[half].dim() == 4 for half in (A, B)):
        return "a convolution's adapter, which we do not read"
    if any(halves[half].dim() != 2 or not halves[half].is_floating_point() for half in (A, B)):
        return "not a matrix of real numbers"
    return "" if ALPHA not in halves or halves[ALPHA].numel() == 1 else "its alpha is not one number"


def _places(model: Arrays) -> dict[str, tuple[int, int]]:
    """(out, in) of the layers that may have an adapter: those that have one, or every matrix of a bare model."""
    has = {name.removesuffix(A) for name in model if name.endswith(A) and name.removesuffix(A) + B in model}
    if has or any(map(is_word, model)):
        return {layer: (len(model[layer + B]), model[layer + A].shape[1]) for layer in has}
    return {
        name.removesuffix(".weight"): (value.shape[0], value.shape[1])
        for name, value in model.items()
        if name.startswith(NETWORKS) and name.endswith(".weight") and value.dim() == 2
    }


def _by_flat_name(layers: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    named: dict[str, Sequence[str]] = {}
    for layer in layers:
        named[flat(layer)] = (*named.get(flat(layer), ()), layer)
    return named


def _alpha(layer: str, told: Tensor | None, rank: int, configs: Mapping[str, Mapping[str, Any]]) -> float:
    """What the file says of a layer, in its own tensor or in peft's settings; its rank, when it says nothing."""
    if told is not None:
        return float(told.item())
    network = next(network for network in NETWORKS if layer.startswith(network))
    config = configs.get(network)
    if not config:
        return float(rank)
    try:
        patterns = config.get("alpha_pattern") or {}
        bare = layer.removeprefix(network)
        names = (bare, bare.removeprefix(LEVEL))
        # As peft looks it up: the first pattern that a name ends in.
        hits = [value for key, value in patterns.items() if any(re.fullmatch(rf"(.*\.)?({key})", n) for n in names)]
        alpha = float(hits[0] if hits else config.get("lora_alpha", 8))
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise ArtefactError(f"the alpha of {layer} is not readable in peft's settings ({error})") from error
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _one_alpha(params: Mapping[str, Tensor], alphas: Mapping[str, float]) -> tuple[dict[str, Tensor], float | None]:
    """None, where every layer's is its rank; the one that all share; or all of them in the parts, and None."""
    factors = {layer: alpha / len(params[layer + A]) for layer, alpha in alphas.items()}
    shared = set(alphas.values())
    if all(factor == 1 for factor in factors.values()):
        return dict(params), None
    if len(shared) == 1 and min(shared) > 0:
        return dict(params), shared.pop()
    return {
        name: folded(value, factors[name.removesuffix(B)]) if name.endswith(B) else value
        for name, value in params.items()
    }, None


def _word(found: Found, model: Arrays | None) -> tuple[dict[str, Tensor], dict[str, float], dict[str, str]]:
    """Its vectors for every text encoder. A word of one text encoder is none of a model of two, and the reverse."""
    plain = "emb_params" if "emb_params" in found.arrays else found.word
    keys = CLIPS if found.kind == "textual inversion, SDXL" else (plain,)
    params = {front + found.word: found.arrays[key].float() for front, key in zip(TOKENS, keys, strict=False)}
    params = {name: rows[None] if rows.dim() == 1 else rows for name, rows in params.items()}
    unmatched = {other: "no part of a word" for other in found.arrays if other not in keys}
    if odd := [rows for rows in params.values() if rows.dim() != 2 or 0 in rows.shape]:
        raise ShapeError(f"the word {found.word!r} is {list(odd[0].shape)}; expected [vectors, width]")
    if model is None:
        return params, {}, unmatched
    words = any(map(is_word, model))
    places = (
        {name for name in model if is_word(name)}
        if words
        else {front + found.word for front, table in zip(TOKENS, TOKEN_TABLES, strict=True) if table in model}
    )
    own = {name for name in places if name.split(".", 1)[1] == found.word}
    if own and own != params.keys():
        reason = f"the word is for {len(params)} text encoder{'s' * (len(params) > 1)}, the model has {len(own)}"
        return {}, {}, {**unmatched, **dict.fromkeys(keys, reason)}
    if not own:
        return {}, {}, {**unmatched, **dict.fromkeys(keys, f"the model has no word {found.word!r}")}
    for (name, rows), table in zip(params.items(), TOKEN_TABLES, strict=False):
        wanted = list(model[name].shape) if words else [len(rows), model[table].shape[1]]
        if list(rows.shape) != wanted:
            raise ShapeError(f"the word {found.word!r} is {list(rows.shape)}, the model's is {wanted}")
    return params, {}, unmatched
