"""A client's adapters and words in the formats of other tools, and back.

An adapter adds alpha / rank * B A to a layer's weight. Formats differ in how they say alpha, and in who listens:

    diffusers                in the header, which diffusers reads from 0.34 on, and other tools do not. So the factor
                             goes into B, and alpha is the rank for every reader
    peft                     in adapter_config.json, layer by layer, as it is
    kohya                    one tensor per layer. Of different ones diffusers takes the commonest for all, so there is
                             one alpha; where ranks differ and each was its own alpha, the ratio goes into B
    textual_inversion        {word: vectors}, a file for each word
    textual_inversion_a1111  {"emb_params": vectors}, likewise; the word is the file's name

A word of SDXL is the same file in both forms: {"clip_l": vectors, "clip_g": vectors}, of the first text encoder and the
second. The word is the file's name.

Where ranks differ between layers, diffusers before 0.34 (with kohya's form, before 0.33) scales some of them wrongly,
without a word and whatever the file says.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from personae.artefact.formats_names import NETWORKS, flat
from personae.artefact.save import json_text, write_bytes
from personae.backbone.parts import written_whole
from personae.core import Arrays, pick, under
from personae.errors import ArtefactError, ConfigError, ShapeError
from personae.personal.lora import LEVEL, TEXT, TEXT_2, UNET, A, B
from personae.personal.tokens import TOKENS, is_word

Form = Literal["diffusers", "peft", "kohya", "textual_inversion", "textual_inversion_a1111"]

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_HEADER = "lora_adapter_metadata"
PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
CLIPS = ("clip_l", "clip_g")
"""The vectors of a word of SDXL, in the order of TOKENS."""

BASE = "base_model"
"""In the header of a file: what the parts were made for, where the format has no place of its own for it."""

BASE_DIGEST = "personae_base"
"""In the header of a file: the weights that the parts were trained on, which tell models of one shape apart."""


@dataclass(frozen=True)
class Parts:
    """Adapters and words under our names. Without an alpha every layer's is its own rank: the factor is 1.

    `base` says which model they are for, in the words of whoever wrote them; `base_digest` by its weights, where we
    wrote it.
    """

    params: Arrays
    alpha: float | None = None
    base: str = ""
    base_digest: str = ""

    def __post_init__(self) -> None:
        if self.alpha is not None and not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ConfigError(f"parts: alpha is {self.alpha}; expected above 0")


def export_parts(parts: Parts, to: Path, form: Form) -> list[Path]:
    """Write a new folder `to` in one of the formats above, and return its files.

    A1111 and ComfyUI call a LoRA by its file's name, which is that of the folder, and a word likewise: its letters and
    digits.

    Raises: ConfigError, when the form cannot hold all of the parts; ShapeError, when two halves of an adapter do not
    fit; ArtefactError, when the folder exists, or a value is not finite.
    """
    if form not in FORMS:
        raise ConfigError(f"form is {form!r}; expected one of {', '.join(FORMS)}")
    holds_words = form.startswith("textual_inversion")
    strange = [name for name in parts.params if is_word(name) != holds_words or not _is_part(name)]
    if strange or not parts.params:
        other = "a LoRA's form, such as diffusers" if holds_words else "textual_inversion"
        raise ConfigError(
            f"form {form!r} holds {'words' if holds_words else 'adapters'}, and not the {len(strange)} of "
            f"{len(parts.params)} parts found ({', '.join(strange[:3])}); export adapters and words apart, these as "
            f"{other}"
        )
    refuse_infinite(parts.params, str(to))
    to = to.absolute()
    files = FORMS[form](parts, to.name)
    with written_whole(to) as partial:
        for name, data in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(partial / name, data)
    return [to / name for name in files]


def _is_part(name: str) -> bool:
    return is_word(name) or (name.startswith(NETWORKS) and name.endswith((A, B)))


def refuse_infinite(params: Arrays, where: str) -> None:
    if odd := [name for name, value in params.items() if not value.isfinite().all()]:
        raise ArtefactError(f"{where}: {len(odd)} parts have values that are not finite: {', '.join(odd[:3])}")


def _pairs(params: Arrays) -> dict[str, tuple[Tensor, Tensor]]:
    """Both halves of every layer's adapter. Raises: ShapeError."""
    layers = sorted({name.removesuffix(A).removesuffix(B) for name in params})
    pairs = {layer: (params.get(layer + A), params.get(layer + B)) for layer in layers}
    told, wrong = dict[str, tuple[Tensor, Tensor]](), []
    for layer, (down, up) in pairs.items():
        if down is None or up is None or not fit(down, up):
            shapes = [None if half is None else list(half.shape) for half in (down, up)]
            wrong.append(f"{layer} is {shapes[0]} and {shapes[1]}")
        else:
            told[layer] = down, up
    if wrong:
        raise ShapeError(
            f"{len(wrong)} adapters have halves that do not fit: {'; '.join(wrong[:3])}; expected [rank, in] and "
            "[out, rank]"
        )
    return told


def fit(down: Tensor, up: Tensor) -> bool:
    return down.dim() == up.dim() == 2 and len(down) == up.shape[1] > 0


def _most(values: Mapping[str, float]) -> float:
    return Counter(values.values()).most_common(1)[0][0]


def _config(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """One network's, as peft writes it.

    A text encoder's names go without their first level: as ends of names they fit every version of transformers.
    """
    fronts = "|".join(map(re.escape, (UNET, TEXT + LEVEL, TEXT_2 + LEVEL)))
    bare = {layer: re.sub(f"^(?:{fronts})", "", layer) for layer in ranks}
    rank, alpha = _most(ranks), _most(alphas)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(bare.values()),
        "rank_pattern": {bare[layer]: value for layer, value in ranks.items() if value != rank},
        "alpha_pattern": {bare[layer]: value for layer, value in alphas.items() if value != alpha},
    }


def _plain(number: float) -> float:
    """A whole number as an int, as peft's own files have it."""
    return int(number) if float(number).is_integer() else float(number)


def folded(up: Tensor, factor: float) -> Tensor:
    return up if factor == 1 else (up.double() * factor).to(up.dtype)


def _diffusers(parts: Parts, name: str) -> dict[str, bytes]:
    pairs = _pairs(parts.params)
    tensors, about = dict[str, Tensor](), dict[str, Any]()
    for layer, (down, up) in pairs.items():
        factor = 1.0 if parts.alpha is None else parts.alpha / len(down)
        tensors |= {f"{layer}{A}.weight": down, f"{layer}{B}.weight": folded(up, factor)}
    for network in NETWORKS:
        if ranks := {layer: len(down) for layer, (down, _) in pairs.items() if layer.startswith(network)}:
            about |= {network + key: value for key, value in _config(ranks, ranks).items()}
    return {LORA_FILE: _file(tensors, parts, **{LORA_HEADER: json.dumps(about, indent=2, sort_keys=True)})}


def _peft(parts: Parts, name: str) -> dict[str, bytes]:
    """The first text encoder's tensors stand there twice, with and without the first level of their names.

    peft compares names as they are, transformers 5 has left that level out, and what is not found stays at zero.
    """
    files = dict[str, bytes]()
    for network in NETWORKS:
        pairs = _pairs(pick(parts.params, under(network)))
        if not pairs:
            continue
        ranks = {layer: len(down) for layer, (down, _) in pairs.items()}
        alphas = {layer: _plain(parts.alpha or rank) for layer, rank in ranks.items()}
        tensors = dict[str, Tensor]()
        for layer, (down, up) in pairs.items():
            bare = layer.removeprefix(network)
            for each in dict.fromkeys((bare, bare.removeprefix(LEVEL) if network == TEXT else bare)):
                tensors |= {f"base_model.model.{each}{A}.weight": down, f"base_model.model.{each}{B}.weight": up}
        config = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": parts.base or None,
            "bias": "none",
            "inference_mode": True,
            "lora_dropout": 0.0,
            **_config(ranks, alphas),
        }
        folder = network.removesuffix(".")
        files[f"{folder}/{PEFT_CONFIG}"] = (json_text(config, indent=2) + "\n").encode()
        files[f"{folder}/{PEFT_FILE}"] = _file(tensors, parts)
    return files


def _kohya(parts: Parts, name: str) -> dict[str, bytes]:
    pairs = _pairs(parts.params)
    ranks = {layer: len(down) for layer, (down, _) in pairs.items()}
    alpha = parts.alpha or _most(ranks)
    tensors, two = dict[str, Tensor](), any(layer.startswith(TEXT_2) for layer in pairs)
    for layer, (down, up) in pairs.items():
        factor, name_there = 1.0 if parts.alpha is not None else ranks[layer] / alpha, flat(layer, two)
        tensors |= {
            f"{name_there}.lora_down.weight": down,
            f"{name_there}.lora_up.weight": folded(up, factor),
            f"{name_there}.alpha": torch.tensor(float(alpha)),
        }
    about = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(_most(ranks)) if len(set(ranks.values())) == 1 else "Dynamic",
        "ss_network_alpha": str(_plain(alpha)),
        "ss_output_name": name,
    }
    if parts.base:
        about["ss_base_model_version"] = parts.base
    return {f"{name}.safetensors": _file(tensors, parts, **about)}


def _words(parts: Parts) -> dict[str, tuple[str, list[Tensor]]]:
    """Each word and its vectors, of each text encoder, by the name of its file. Raises: ShapeError, ConfigError."""
    files = dict[str, tuple[str, list[Tensor]]]()
    for word in dict.fromkeys(name.split(".", 1)[1] for name in parts.params):
        found = {front + word: parts.params.get(front + word) for front in TOKENS}
        file = (re.sub(r"[^\w.-]", "", word).strip(".") or "word") + ".safetensors"
        for name, rows in found.items():
            if rows is not None and (rows.dim() != 2 or 0 in rows.shape):
                raise ShapeError(f"{name} is {list(rows.shape)}; expected [vectors, width]")
        first, second = found.values()
        if first is None or (second is not None and len(first) != len(second)):
            raise ShapeError(f"the word {word!r} needs as many vectors for the first text encoder as for the second")
        if file in files:
            raise ConfigError(f"the words {files[file][0]!r} and {word!r} would both be {file}; export them apart")
        files[file] = word, [first] if second is None else [first, second]
    return files


def _textual_inversion(parts: Parts, name: str) -> dict[str, bytes]:
    return {
        file: _file({word: rows[0]}, parts) if len(rows) == 1 else _word_of_two(word, rows, parts)
        for file, (word, rows) in _words(parts).items()
    }


def _textual_inversion_a1111(parts: Parts, name: str) -> dict[str, bytes]:
    return {
        file: _file({"emb_params": rows[0]}, parts, name=word) if len(rows) == 1 else _word_of_two(word, rows, parts)
        for file, (word, rows) in _words(parts).items()
    }


def _word_of_two(word: str, rows: Sequence[Tensor], parts: Parts) -> bytes:
    return _file(dict(zip(CLIPS, rows, strict=True)), parts, name=word)


FORMS: Mapping[Form, Callable[[Parts, str], dict[str, bytes]]] = {
    "diffusers": _diffusers,
    "peft": _peft,
    "kohya": _kohya,
    "textual_inversion": _textual_inversion,
    "textual_inversion_a1111": _textual_inversion_a1111,
}


def _file(tensors: Arrays, parts: Parts, **about: str) -> bytes:
    told = {key: value for key, value in ((BASE, parts.base), (BASE_DIGEST, parts.base_digest)) if value}
    apart = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    return save(apart, metadata={"format": "pt", **told, **about})
