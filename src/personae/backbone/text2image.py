"""A latent text-to-image model of Stable Diffusion's anatomy behind the interface of denoisers.

An autoencoder turns pictures into latents and back, a causal text encoder a caption into vectors, a U-Net predicts in
latents while it attends to these. Names are "unet." and "text_encoder." before those of the bare diffusers and
transformers models; the autoencoder never moves.

Letters in shapes: `B` batch, `C H W` picture, `c h w` latent, `L` tokens, `D` width of a token's vector.
"""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from personae.backbone.parts import copies, load_into, written_whole
from personae.backbone.schedule import Schedule, load_schedule
from personae.backbone.vocabulary import read_tokenizer, write_vocabulary
from personae.core import Arrays, Batch, Cond, Select, everything, nothing, pick
from personae.errors import ArtefactError, ConfigError, PersonaeError, ShapeError
from personae.personal.lora import LEVEL, Adapters, Lora, without_lora
from personae.personal.tokens import TOKENS, NewWords, Words

UNET, TEXT = "unet.", "text_encoder."

ENCODED_AT_ONCE = 64
"""Pictures, so that a folder of many does not ask for memory for all."""

REMEMBERED = 4096
"""Captions, whose vectors are kept while nothing in the text encoder moves."""


@dataclass(frozen=True)
class Networks:
    """The pieces of a pipeline, as diffusers and transformers name them."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel


class TextToImage(nn.Module):
    """A pipeline's networks, of whose weights `opened` says which may move; all others are the frozen base.

    `lora` puts adapters on attention layers, `words` adds new words; both are parts that may move. A caption that is
    empty, and every caption of an example that is unconditional, is the empty text.

    Raises: ConfigError, when the networks have no place for a part, or a new word is not new.
    """

    def __init__(
        self,
        networks: Networks,
        schedule: Schedule,
        opened: Select = nothing,
        *,
        lora: Lora | None = None,
        words: Words | None = None,
    ) -> None:
        super().__init__()
        self.vae, self.text_encoder, self.unet = networks.vae, networks.text_encoder, networks.unet
        self.tokenizer, self.schedule = networks.tokenizer, schedule
        self.requires_grad_(False)
        self.words = None if words is None else NewWords(words, self.tokenizer, _table(self.text_encoder))
        self._adapters = None if lora is None else Adapters({UNET: self.unet, TEXT: self.text_encoder}, lora)
        named = _named(self.unet, self.text_encoder)
        self._opened = {name: parameter for name, parameter in named.items() if opened(name)}
        self._frozen = {name: parameter for name, parameter in named.items() if name not in self._opened}
        self._began = copies(self._opened)
        self._told: dict[str, Tensor] = {}
        self._live = self._parts()

    @property
    def is_bare(self) -> bool:
        """True without adapters and new words."""
        return self._adapters is None and self.words is None

    @property
    def sample_shape(self) -> tuple[int, ...]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (self.unet.config.in_channels, height, width)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of a picture: channels, height, width."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        _, height, width = self.sample_shape
        return (self.vae.config.in_channels, height * factor, width * factor)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B ..."]) -> Float[Tensor, "B c h w"]:
        """Latents of unit variance, the mean of what the autoencoder says. Latents are left as they are.

        Raises: ShapeError, when the images are neither pictures nor latents of this model.
        """
        if tuple(images.shape[1:]) == self.sample_shape:
            return images
        if tuple(images.shape[1:]) != self.image_shape:
            raise ShapeError(
                f"images are {list(images.shape[1:])}, expected {list(self.image_shape)} or latents "
                f"{list(self.sample_shape)}"
            )
        parts = [self.vae.encode(part).latent_dist.mean for part in images.split(ENCODED_AT_ONCE)]
        return torch.cat(parts) * self._scale

    @torch.no_grad()
    def decode(self, x_0: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        parts = [self.vae.decode(part).sample for part in (x_0 / self._scale).split(ENCODED_AT_ONCE)]
        return torch.cat(parts)

    def condition(self, batch: Batch) -> Cond:
        """[B, L, D]: one row of vectors per example. They carry gradients where something in the text encoder moves."""
        captions = batch.captions or ("",) * len(batch)
        texts = ["" if alone else text for alone, text in zip(batch.unconditional.tolist(), captions, strict=True)]
        different = list(dict.fromkeys(texts))
        rows = torch.tensor([different.index(text) for text in texts], device=batch.images.device)
        return self._encoded(different)[rows]

    def forward(
        self, x_t: Float[Tensor, "B c h w"], t: Int64[Tensor, " B"], cond: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B c h w"]:
        return self.unet(x_t, t, encoder_hidden_states=cond).sample

    def initial(self, rng: torch.Generator, only: Select = everything) -> Arrays:
        """Opened weights and words as the model began with them; adapters are drawn, and add nothing yet."""
        drawn = self._adapters.initial(rng) if self._adapters is not None else {}
        told = self.words.initial() if self.words is not None else {}
        return pick({**self._began, **drawn, **told}, only)

    def params(self) -> Arrays:
        return copies(self._live)

    def live(self) -> Mapping[str, nn.Parameter]:
        return self._live

    def base(self) -> Arrays:
        return {name: value.detach() for name, value in self._frozen.items()}

    def load(self, params: Arrays, num_clients: int = 1) -> None:
        """Adapters take the rank of what is loaded."""
        self._told.clear()
        if self._adapters is None or params.keys() != self._live.keys() or not self._adapters.differ(params):
            load_into(self._live, None, params, num_clients)
            return
        before = self.params()
        try:
            self._adapters.make_room(params)
            self._live = self._parts()
            load_into(self._live, None, params, num_clients)
        except PersonaeError:
            self._adapters.make_room(before)
            self._live = self._parts()
            load_into(self._live, None, before, 1)
            raise

    def _parts(self) -> dict[str, nn.Parameter]:
        adapters = self._adapters.live() if self._adapters is not None else {}
        words = self.words.live() if self.words is not None else {}
        return {**self._opened, **adapters, **words}

    def tokens(self, texts: Sequence[str]) -> Int64[Tensor, "B L"]:
        """Padded to the text encoder's length.

        Raises: ConfigError, when a text is longer than that: diffusers would cut it with no more than a log line.
        """
        length = self.text_encoder.config.max_position_embeddings
        rows = [self._numbers(text) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(row) > length:
                raise ConfigError(
                    f"the caption {text!r} has {len(row)} tokens, of which this model reads {length}; shorten it"
                )
        pad = self.tokenizer.pad_token_id
        return torch.tensor([row + [pad] * (length - len(row)) for row in rows])

    def _numbers(self, text: str) -> list[int]:
        """Of a text's tokens, between the marks of its two ends."""
        pieces = [text] if self.words is None else self.words.pieces(text)
        numbers = [self.tokenizer.bos_token_id]
        for piece in pieces:
            known = [piece] if isinstance(piece, int) else self.tokenizer(piece, add_special_tokens=False)["input_ids"]
            numbers += known
        return [*numbers, self.tokenizer.eos_token_id]

    def _encoded(self, texts: Sequence[str]) -> Tensor:
        moves = any(name.startswith((TEXT, TOKENS)) and p.requires_grad for name, p in self._live.items())
        if torch.is_grad_enabled() and moves:
            self._told.clear()
            return self._asked(texts, self.text_encoder)
        if new := [text for text in texts if text not in self._told]:
            if len(self._told) > REMEMBERED:
                self._told.clear()
                new = list(texts)
            training = self.text_encoder.training
            with torch.no_grad(), torch.autocast(self.unet.device.type, enabled=False):
                self._told |= dict(zip(new, self._asked(new, self.text_encoder.eval()), strict=True))
            self.text_encoder.train(training)
        return torch.stack([self._told[text] for text in texts])

    def _asked(self, texts: Sequence[str], encoder: CLIPTextModel) -> Tensor:
        states: Tensor = encoder(self.tokens(texts).to(self.unet.device))[0]
        return states

    @property
    def _scale(self) -> float:
        return float(self.vae.config.scaling_factor)


# --- making, opening and saving ---------------------------------------------------------------------------------------

SIZES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
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


def open_pipeline(folder: Path, opened: Select = nothing) -> TextToImage:
    """Any local folder of Stable Diffusion's kind, weights in safetensors.

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
    return TextToImage(Networks(vae, tokenizer, text, unet), unclipped, opened)


def save_pipeline(model: TextToImage, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """As `StableDiffusionPipeline.from_pretrained` reads it.

    `dtype` is that of the U-Net's and the autoencoder's files. The text encoder's stay in float32: transformers opens a
    file in its own type, diffusers in float32, and a pipeline of both would not run.

    Raises: ArtefactError, when the folder exists and is not empty; ConfigError, when parts are attached.
    """
    from diffusers import StableDiffusionPipeline  # half of transformers comes with it, and its warnings

    if not model.is_bare:
        raise ConfigError(f"{folder}: the model has parts of a client; a pipeline is written without, and parts alone")
    with written_whole(folder) as partial:
        scheduler = DDIMScheduler.from_config(_with(model.schedule.config, **SAVED_SCHEDULE))
        pipeline = StableDiffusionPipeline(
            model.vae,
            model.text_encoder,
            model.tokenizer,
            model.unet,
            scheduler,
            None,
            None,
            requires_safety_checker=False,
        )
        pipeline = copy.deepcopy(pipeline)
        pipeline.unet.to(dtype)
        pipeline.vae.to(dtype)
        pipeline.save_pretrained(partial)
        weights = {_published(name): value for name, value in pipeline.text_encoder.state_dict().items()}
        pipeline.text_encoder.save_pretrained(partial / "text_encoder", state_dict=weights)
        write_vocabulary(model.tokenizer, partial / "tokenizer")


SAVED_SCHEDULE = {"steps_offset": 1, "timestep_spacing": "trailing"}
"""What pipelines expect of a scheduler; neither has a part in training."""

COMPONENTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")


def _weights(kind: Any, folder: Path) -> Any:
    try:
        model, found = kind.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # each of the libraries below has kinds of its own for a damaged file
        raise ArtefactError(f"{folder} cannot be read as {kind.__name__}: {error}") from error
    for what, names in (("lack", found["missing_keys"]), ("have unknown", found["unexpected_keys"])):
        if names:
            raise ArtefactError(f"the weights in {folder} {what} {', '.join(sorted(names)[:3])}; save the model again")
    return model.float()


def _with(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A scheduler's config with other values. Of keys that it lists as defaults, diffusers would forget them again."""
    return {key: value for key, value in {**config, **changes}.items() if key != "_use_default_values"}


def _named(unet: nn.Module, text_encoder: nn.Module) -> dict[str, nn.Parameter]:
    both = ((UNET, unet), (TEXT, text_encoder))
    return {
        prefix + (_published(bare) if prefix == TEXT else bare): parameter
        for prefix, network in both
        for name, parameter in network.named_parameters()
        if (bare := without_lora(name)) is not None
    }


def _published(name: str) -> str:
    """A text encoder's parameter as published files name it; newer versions of transformers leave the front out."""
    return name if name.startswith(LEVEL) else LEVEL + name


def _table(text_encoder: CLIPTextModel) -> nn.Embedding:
    """The vectors of all known tokens, wherever this version of transformers keeps them."""
    return typing.cast("nn.Embedding", text_encoder.get_input_embeddings())
