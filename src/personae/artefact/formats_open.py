"""Which of the forms of other tools a file or folder has, and its tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from personae.artefact.formats import BASE, BASE_DIGEST, CLIPS, LORA_FILE, LORA_HEADER, PEFT_CONFIG, PEFT_FILE
from personae.artefact.formats_names import ALPHA, NETWORKS, is_flat, looks_like_text, taken_apart
from personae.artefact.save import load_arrays, read_json, read_metadata
from personae.core import Arrays
from personae.errors import ArtefactError
from personae.personal.lora import TEXT, UNET

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")

CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways to begin an adapter, as peft names them, that also change the weights beneath it."""


@dataclass(frozen=True)
class Found:
    """A file's tensors by its own keys; peft's begin with the network instead of "base_model.model."."""

    kind: str
    arrays: Arrays
    base: str = ""
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of peft, by network
    word: str = ""
    base_digest: str = ""


def refuse_pickle(path: Path) -> None:
    """Raises: ArtefactError, by the file's name alone."""
    if path.suffix in PICKLES:
        raise ArtefactError(
            f"{path} may hold a pickle, which can run code when opened; convert it to safetensors first"
        )


def opened(path: Path) -> Found | None:
    """None: nothing of these kinds."""
    refuse_pickle(path)
    if path.name == PEFT_FILE and (path.parent / PEFT_CONFIG).is_file():
        path = path.parent
    if path.is_dir():
        return _folder(path)
    metadata, arrays = read_metadata(path), load_arrays(path)
    if metadata.get("format", "").startswith("personae"):
        return None
    base = metadata.get(BASE) or metadata.get("ss_base_model_version") or metadata.get("ss_sd_model_name") or ""
    found = partial(Found, arrays=arrays, base=base, base_digest=metadata.get(BASE_DIGEST, ""))
    if set(CLIPS) <= arrays.keys():
        return found("textual inversion, SDXL", word=metadata.get("name", path.stem))
    if "emb_params" in arrays:
        return found("textual inversion, A1111", word=metadata.get("name", path.stem))
    parts = [told for key in arrays if (told := taken_apart(key))]
    if all(part == ALPHA for _, part in parts):
        return found("textual inversion, diffusers", word=next(iter(arrays))) if _is_word(arrays) else None
    if any(is_flat(layer) for layer, _ in parts):
        return found("LoRA, kohya")
    if any(key.startswith("base_model.model.") for key in arrays):
        raise ArtefactError(f"{path} is one of peft's two files; {PEFT_CONFIG}, which says its alpha, is not beside it")
    old = not any(re.search(r"\.lora_[AB]\b", key) for key in arrays)
    return found("LoRA, diffusers" + " before peft" * old, configs=_headed(path, metadata))


def _is_word(arrays: Arrays) -> bool:
    """One word's vectors, and not one weight of something else."""
    if len(arrays) != 1 or re.search(r"/|\.(weight|bias)$", next(iter(arrays))):
        return False
    value = next(iter(arrays.values()))
    return value.dim() in (1, 2) and value.numel() > 0 and value.is_floating_point()


def _headed(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """diffusers' header: peft's settings of all networks in one."""
    if LORA_HEADER not in metadata:
        return {}
    try:
        about = json.loads(metadata[LORA_HEADER])
        return {
            network: {key.removeprefix(network): value for key, value in about.items() if key.startswith(network)}
            for network in NETWORKS
        }
    except (ValueError, AttributeError, RecursionError) as error:
        raise ArtefactError(f"{path} is damaged: {LORA_HEADER} in its header is not readable ({error})") from error


def _folder(path: Path) -> Found | None:
    """One adapter of peft or one for each network; or the folder that diffusers wrote."""
    candidates = (path, *(path / network.removesuffix(".") for network in NETWORKS))
    folders = [folder for folder in candidates if (folder / PEFT_CONFIG).is_file()]
    if not folders:
        return opened(path / LORA_FILE) if (path / LORA_FILE).is_file() else None
    arrays, configs, base, digests = dict[str, Tensor](), dict[str, Mapping[str, Any]](), "", set[str]()
    for folder in folders:
        config = read_json(folder / PEFT_CONFIG)
        if not isinstance(config, dict):
            raise ArtefactError(f"{folder / PEFT_CONFIG} is not peft's: it has no settings by name")
        if (pickled := (folder / PEFT_FILE).with_suffix(".bin")).exists() and not (folder / PEFT_FILE).exists():
            refuse_pickle(pickled)
        found = {key.removeprefix("base_model.model."): value for key, value in load_arrays(folder / PEFT_FILE).items()}
        alone = TEXT if looks_like_text(list(found)) else UNET
        network = folder.name + "." if folder.name + "." in NETWORKS else alone
        if (begun := str(config.get("init_lora_weights", "")).lower()).startswith(CHANGES_BASE):
            raise ArtefactError(
                f"{folder}: this adapter began as {begun!r}, which changes the model beneath it too; save it again "
                "with peft's path_initial_model_for_weight_conversion"
            )
        arrays |= {network + key: value for key, value in found.items()}
        configs[network] = config
        base = base or str(config.get("base_model_name_or_path") or "")
        digests |= {read_metadata(folder / PEFT_FILE).get(BASE_DIGEST, "")} - {""}
    return Found("LoRA, peft", arrays, base, configs, base_digest=" and ".join(sorted(digests)))
