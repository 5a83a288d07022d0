"""Folders of Stable Diffusion's and XL's kind: made fresh, opened as denoisers, written as other tools read them."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging

from personae.backbone.captions import Second
from personae.backbone.parts import refuse_partial, written_whole
from personae.backbone.schedule import load_schedule
from personae.backbone.shipped import shipped
from personae.backbone.text2image import Networks, TextToImage, Vector, published
from personae.backbone.vocabulary import read_tokenizer, write_vocabulary
from personae.core import Select, nothing
from personae.errors import ArtefactError, ConfigError
from personae.personal.delta import Delta
from personae.personal.lora import Lora
from personae.personal.neurons import Neurons
from personae.personal.tokens import Words

_SMALLEST: Mapping[str, Mapping[str, Any]] = {
    "vae": {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
    },
    "text": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
    },
    "unet": {
        "sample_size": 4,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
}

SIZES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    # 8 x 8 pictures in latents of 4 x 4 x 4: every kind of layer and hardly any weights, for tests.
    "smallest": _SMALLEST,
    # The same with two text encoders, of which the last layers but one are read.
    "smallest_xl": {
        "vae": _SMALLEST["vae"],
        "text": {**_SMALLEST["text"], "num_hidden_layers": 2},
        "text_2": {
            **_SMALLEST["text"],
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "hidden_act": "gelu",
            "projection_dim": 20,
        },
        "unet": {
            **_SMALLEST["unet"],
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 20,
        },
    },
    # 32 x 32 pictures in latents of 8 x 8 x 8.
    "tiny": {
        "vae": {
            "block_out_channels": (32, 64, 64),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "layers_per_block": 1,
            "latent_channels": 8,
            "norm_num_groups": 16,
        },
        "text": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 24,
        },
        "unet": {
            "sample_size": 8,
            "in_channels": 8,
            "out_channels": 8,
            "block_out_channels": (64, 128),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "norm_num_groups": 16,
        },
    },
}


def fresh(size: str, tokenizer: CLIPTokenizer, rng: torch.Generator) -> Networks:
    """Untrained networks for a vocabulary. Raises: ConfigError, when the size is unknown."""
    if size not in SIZES:
        raise ConfigError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    options = SIZES[size]
    with torch.random.fork_rng(devices=[]):  # both libraries draw from the global generator
        torch.manual_seed(int(torch.randint(2**27, (1,), generator=rng)))
        texts = [
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **options[name],
            )
            for name in ("text", "text_2")
            if name in options
        ]
        unet = UNet2DConditionModel(cross_attention_dim=sum(text.hidden_size for text in texts), **options["unet"])
        first = AutoencoderKL(**options["vae"]), tokenizer, CLIPTextModel(texts[0]), unet
        if len(texts) == 1:
            return Networks(*first)
        other = copy.deepcopy(tokenizer)
        other.pad_token = "!"  # as the published one's
        return Networks(*first, Second(other, CLIPTextModelWithProjection(texts[1])))


def open_pipeline(
    folder: Path,
    opened: Select = nothing,
    *,
    lora: Lora | None = None,
    delta: Delta | None = None,
    neurons: Neurons | None = None,
    words: Words | None = None,
    vector: Vector | None = None,
    half: bool = False,
    recompute: bool = False,
) -> TextToImage:
    """Any local folder of Stable Diffusion's kind, weights in safetensors, with what TextToImage takes.

    With a second text encoder it is of the XL kind.

    Raises: ArtefactError, when the folder lacks a component, holds another kind, or its weights do not fit;
    ConfigError, when a network has dropout, or TextToImage refuses.
    """
    if not folder.is_dir():
        raise ArtefactError(
            f"{folder} is no folder; give that of a text-to-image pipeline, or the name of a model that comes with "
            f"personae: {', '.join(shipped())}"
        )
    expected, kind = (COMPONENTS_XL, "XL") if is_xl(folder) else (COMPONENTS, "")
    if missing := [part for part in expected if not (folder / part).is_dir()]:
        raise ArtefactError(
            f"{folder} is not a text-to-image pipeline: it has no {', '.join(missing)}; expected the folders "
            f"{', '.join(expected)}, as StableDiffusion{kind}Pipeline.save_pretrained writes them"
        )
    networks = _read(folder)
    _check(networks, folder)
    saved = load_schedule(folder / "scheduler")
    # Latents are not within [-1, 1]; a scheduler's file may say nothing of it, and DDPM's default would cut them.
    unclipped = dataclasses.replace(saved, config=_with(saved.config, clip_sample=False))
    return TextToImage(
        networks,
        unclipped,
        opened,
        lora=lora,
        delta=delta,
        neurons=neurons,
        words=words,
        vector=vector,
        half=half,
        recompute=recompute,
    )


def is_xl(folder: Path) -> bool:
    """True for a pipeline with a second tokenizer or text encoder."""
    return any((folder / part).is_dir() for part in COMPONENTS_XL if part not in COMPONENTS)


def _read(folder: Path) -> Networks:
    second = None
    if is_xl(folder):
        other = _weights(CLIPTextModelWithProjection, folder / "text_encoder_2")
        second = Second(read_tokenizer(folder / "tokenizer_2"), other, _zeros_for_empty(folder))
    tokenizer = read_tokenizer(folder / "tokenizer")
    vae, unet = (
        _weights(kind, folder / part) for kind, part in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"))
    )
    return Networks(vae, tokenizer, _weights(CLIPTextModel, folder / "text_encoder"), unet, second)


def _zeros_for_empty(folder: Path) -> bool:
    """As diffusers has it: True, where the pipeline does not say otherwise. Raises: ArtefactError."""
    try:
        said = json.loads((folder / INDEX).read_text("utf-8"))
        return bool(said.get("force_zeros_for_empty_prompt", True))
    except (OSError, ValueError, AttributeError) as error:
        raise ArtefactError(f"{folder / INDEX} cannot be read: {error}; save the pipeline again") from error


def _check(networks: Networks, folder: Path) -> None:
    """Raises: ArtefactError, when the pieces do not fit each other; ConfigError, when a network has dropout."""
    unet, second = networks.unet.config, networks.second
    readers: list[tuple[str, CLIPTokenizer, Any]] = [("", networks.tokenizer, networks.text_encoder.config)]
    readers += [] if second is None else [("second ", second.tokenizer, second.text_encoder.config)]
    for which, tokenizer, config in readers:
        if len(tokenizer) > config.vocab_size:
            raise ArtefactError(
                f"{folder}: the {which}tokenizer knows {len(tokenizer)} tokens, the text encoder {config.vocab_size}"
            )
    if unet.cross_attention_dim != (given := sum(config.hidden_size for _, _, config in readers)):
        raise ArtefactError(
            f"{folder}: the U-Net attends to vectors of {unet.cross_attention_dim} numbers, the text "
            f"encoder{'' if second is None else 's together'} gives {given}; is it a pipeline of another kind?"
        )
    takes = unet.projection_class_embeddings_input_dim if unet.addition_embed_type == "text_time" else None
    told = None
    if second is not None:
        told = readers[1][2].projection_dim + 6 * (unet.addition_time_embed_dim or 0)
    if unet.addition_embed_type not in (None, "text_time") or takes != told:
        raise ArtefactError(
            f"{folder}: the U-Net takes {takes or 'no'} numbers beside the captions' vectors "
            f"({unet.addition_embed_type or 'nothing'}), this pipeline gives {told or 'none'}; is it of another kind?"
        )
    if len({config.max_position_embeddings for *_, config in readers}) > 1:
        raise ArtefactError(f"{folder}: its two text encoders read texts of different lengths")
    if unet.sample_size is None:
        raise ArtefactError(
            f"{folder / 'unet' / 'config.json'} has no sample_size; set it, 64 for pictures of 512 pixels"
        )
    channels = (unet.in_channels, unet.out_channels, networks.vae.config.latent_channels)
    if len(set(channels)) > 1:
        raise ArtefactError(
            f"{folder}: the U-Net takes {channels[0]} channels and gives {channels[1]}, the vae's latents have "
            f"{channels[2]}; expected one number. Is it for inpainting, or for editing pictures?"
        )
    if networks.vae.config.latents_mean is not None or networks.vae.config.latents_std is not None:
        raise ConfigError(f"the vae in {folder} has latents_mean and latents_std, which are not supported yet")
    dropouts = [("unet", unet.dropout), ("text_encoder", readers[0][2].attention_dropout)]
    dropouts += [("text_encoder_2", config.attention_dropout) for *_, config in readers[1:]]
    for name, dropout in dropouts:
        if dropout:  # its masks come from torch's global generator: a resumed run would not end in the same bits
            raise ConfigError(f"the {name} in {folder} has dropout {dropout:g}, which cannot be repeated; set it to 0")


SAVED_SCHEDULE = {"steps_offset": 1, "timestep_spacing": "trailing"}
"""What pipelines expect of a scheduler; neither has a part in training."""

COMPONENTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
COMPONENTS_XL = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
INDEX = "model_index.json"


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, which are done before anybody can read them."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _weights(kind: Any, folder: Path) -> Any:
    """Also of a folder that holds nothing but half precision, in files "*.fp16.safetensors"."""
    names = [path.name for path in folder.glob("*.safetensors")]
    variant = {"variant": "fp16"} if names and all(".fp16." in name or "-fp16" in name for name in names) else {}
    if not names:
        raise ArtefactError(
            f"{folder} holds no weights in safetensors; save the pipeline again with safe_serialization=True"
        )
    try:
        with quiet():
            model, found = kind.from_pretrained(
                str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True, **variant
            )
    except Exception as error:  # each of the libraries below has kinds of its own for a damaged file
        raise ArtefactError(f"{folder} cannot be read as {kind.__name__}: {error}") from error
    refuse_partial(folder, found)
    return model.float()


def _with(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A scheduler's config with other values. Of keys that it lists as defaults, diffusers would forget them again."""
    return {key: value for key, value in {**config, **changes}.items() if key != "_use_default_values"}


def save_pipeline(model: TextToImage, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """As `StableDiffusionPipeline.from_pretrained` reads it, or `StableDiffusionXLPipeline`'s where there are two text
    encoders, with adapters and a client's vector put into the weights.

    `dtype` is that of the U-Net's and the autoencoder's files. The text encoders' stay in float32: transformers opens a
    file in its own type, diffusers in float32, and a pipeline of both would not run.

    Raises: ArtefactError, when the folder exists and is not empty; ConfigError, as `TextToImage.folded`.
    """
    networks = model.folded()
    with written_whole(folder) as partial, quiet():
        pipeline = _pipeline(networks, DDIMScheduler.from_config(_with(model.schedule.config, **SAVED_SCHEDULE)), dtype)
        pipeline.save_pretrained(partial)
        weights = {published(name): value for name, value in networks.text_encoder.state_dict().items()}
        networks.text_encoder.save_pretrained(partial / "text_encoder", state_dict=weights)
        write_vocabulary(networks.tokenizer, partial / "tokenizer")
        if networks.second is not None:
            write_vocabulary(networks.second.tokenizer, partial / "tokenizer_2")


def _pipeline(networks: Networks, scheduler: DDIMScheduler, dtype: torch.dtype) -> Any:
    # Half of transformers comes with them, and its warnings.
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    # diffusers' own `to` warns of modules that these do not have.
    vae, unet = nn.Module.to(networks.vae, dtype), nn.Module.to(networks.unet, dtype)
    text, tokenizer, second = networks.text_encoder, networks.tokenizer, networks.second
    if second is None:
        return StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    return StableDiffusionXLPipeline(
        vae,
        text,
        second.text_encoder,
        tokenizer,
        second.tokenizer,
        unet,
        scheduler,
        force_zeros_for_empty_prompt=second.zeros_for_empty,
        add_watermarker=False,
    )
