"""Folders of Stable Diffusion's kind: made fresh, opened as a denoiser, and written as other tools read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging

from personae.backbone.parts import refuse_partial, written_whole
from personae.backbone.schedule import load_schedule
from personae.backbone.text2image import Networks, TextToImage, Vector, published
from personae.backbone.vocabulary import read_tokenizer, write_vocabulary
from personae.core import Select, nothing
from personae.errors import ArtefactError, ConfigError
from personae.personal.lora import Lora
from personae.personal.tokens import Words

SIZES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    # 8 x 8 pictures in latents of 4 x 4 x 4: every kind of layer and hardly any weights, for tests.
    "smallest": {
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
    },
    # 32 x 32 pictures in latents of 8 x 8 x 4.
    "tiny": {
        "vae": {
            "block_out_channels": (32, 64, 64),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "layers_per_block": 1,
            "latent_channels": 4,
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
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **options["text"],
        )
        width = options["text"]["hidden_size"]
        unet = UNet2DConditionModel(cross_attention_dim=width, **options["unet"])
        return Networks(AutoencoderKL(**options["vae"]), tokenizer, CLIPTextModel(text), unet)


def open_pipeline(
    folder: Path,
    opened: Select = nothing,
    *,
    lora: Lora | None = None,
    words: Words | None = None,
    vector: Vector | None = None,
) -> TextToImage:
    """Any local folder of Stable Diffusion's kind, weights in safetensors, with parts as TextToImage takes them.

    Raises: ArtefactError, when the folder lacks a component, holds another kind, or its weights do not fit;
    ConfigError, when a network has dropout.
    """
    missing = [part for part in COMPONENTS if not (folder / part).is_dir()]
    if missing:
        raise ArtefactError(
            f"{folder} is not a text-to-image pipeline: it has no {', '.join(missing)}; expected the folders "
            f"{', '.join(COMPONENTS)}, as StableDiffusionPipeline.save_pretrained writes them"
        )
    tokenizer = read_tokenizer(folder / "tokenizer")
    vae, unet = (
        _weights(kind, folder / part) for kind, part in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"))
    )
    text = _weights(CLIPTextModel, folder / "text_encoder")
    if len(tokenizer) > text.config.vocab_size:
        raise ArtefactError(
            f"{folder}: the tokenizer knows {len(tokenizer)} tokens, the text encoder {text.config.vocab_size}"
        )
    if unet.config.cross_attention_dim != text.config.hidden_size:
        raise ArtefactError(
            f"{folder}: the U-Net attends to vectors of {unet.config.cross_attention_dim} numbers, the text encoder "
            f"gives {text.config.hidden_size}; is it a pipeline of another kind?"
        )
    for name, dropout in (("unet", unet.config.dropout), ("text_encoder", text.config.attention_dropout)):
        if dropout:  # its masks come from torch's global generator: a resumed run would not end in the same bits
            raise ConfigError(f"the {name} in {folder} has dropout {dropout:g}, which cannot be repeated; set it to 0")
    saved = load_schedule(folder / "scheduler")
    # Latents are not within [-1, 1]; a scheduler's file may say nothing of it, and DDPM's default would cut them.
    unclipped = dataclasses.replace(saved, config=_with(saved.config, clip_sample=False))
    networks = Networks(vae, tokenizer, text, unet)
    return TextToImage(networks, unclipped, opened, lora=lora, words=words, vector=vector)


SAVED_SCHEDULE = {"steps_offset": 1, "timestep_spacing": "trailing"}
"""What pipelines expect of a scheduler; neither has a part in training."""

COMPONENTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")


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
    try:
        with quiet():
            model, found = kind.from_pretrained(
                str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # each of the libraries below has kinds of its own for a damaged file
        raise ArtefactError(f"{folder} cannot be read as {kind.__name__}: {error}") from error
    refuse_partial(folder, found)
    return model.float()


def _with(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A scheduler's config with other values. Of keys that it lists as defaults, diffusers would forget them again."""
    return {key: value for key, value in {**config, **changes}.items() if key != "_use_default_values"}


def save_pipeline(model: TextToImage, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """As `StableDiffusionPipeline.from_pretrained` reads it, with adapters and a client's vector put into the weights.

    `dtype` is that of the U-Net's and the autoencoder's files. The text encoder's stay in float32: transformers opens a
    file in its own type, diffusers in float32, and a pipeline of both would not run.

    Raises: ArtefactError, when the folder exists and is not empty; ConfigError, as `TextToImage.folded`.
    """
    from diffusers import StableDiffusionPipeline  # half of transformers comes with it, and its warnings

    networks = model.folded()
    with written_whole(folder) as partial, quiet():
        pipeline = StableDiffusionPipeline(
            nn.Module.to(networks.vae, dtype),  # diffusers' own `to` warns of modules that these do not have
            networks.text_encoder,
            networks.tokenizer,
            nn.Module.to(networks.unet, dtype),
            DDIMScheduler.from_config(_with(model.schedule.config, **SAVED_SCHEDULE)),
            None,
            None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(partial)
        weights = {published(name): value for name, value in networks.text_encoder.state_dict().items()}
        networks.text_encoder.save_pretrained(partial / "text_encoder", state_dict=weights)
        write_vocabulary(networks.tokenizer, partial / "tokenizer")
