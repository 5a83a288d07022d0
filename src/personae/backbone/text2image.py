"""A latent text-to-image model of Stable Diffusion's anatomy behind the interface of denoisers.

An autoencoder turns pictures into latents and back, a causal text encoder a caption into vectors, a U-Net predicts in
latents while it attends to these. Names are "unet." and "text_encoder." before those of the bare diffusers and
transformers models; the autoencoder never moves. Beside them may stand adapters, new words, and a client's vector.

Letters in shapes: `B` batch, `C H W` picture, `c h w` latent, `L` tokens, `D` width of a token's vector, `V` width of
what the client's vector is added to.
"""

from __future__ import annotations

import copy
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from personae.backbone.parts import copies, load_into
from personae.backbone.schedule import Schedule
from personae.core import Arrays, Batch, Select, everything, nothing, pick
from personae.errors import ConfigError, PersonaeError, ShapeError
from personae.personal.embedding import ClientEmbedding, clients_in
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


@dataclass(frozen=True)
class Vector:
    """A client's vector on a text-to-image model: how many numbers, where they enter, and how they start.

    "time": added to the time embedding, where zeros change nothing; "token": one more vector behind the caption's, in
    every cross-attention, where zeros too take a little attention from the caption. Unconditional examples see the null
    vector.
    """

    width: int
    place: Literal["time", "token"] = "time"
    start: Literal["noise", "zero"] = "zero"

    def __post_init__(self) -> None:
        places = typing.get_args(typing.get_type_hints(Vector)["place"])
        if self.width < 1 or self.place not in places:
            raise ConfigError(
                f"embedding: width is {self.width}, place {self.place!r}; expected at least 1, and for a text-to-image "
                f"model of {', '.join(places)}"
            )


@dataclass(frozen=True)
class Told:
    """What the U-Net is told beside x_t and t."""

    text: Float[Tensor, "B L D"]
    vectors: Float[Tensor, "B V"] | None = None


class TextToImage(nn.Module):
    """A pipeline's networks, of whose weights `opened` says which may move; all others are the frozen base.

    `lora` puts adapters on attention layers, `words` adds new words, `vector` gives each client some numbers; all are
    parts that may move. A caption that is empty, and every caption of an example that is unconditional, is the empty
    text.

    Raises: ConfigError, when the networks have no place for a part, or a new word is not new.
    """

    reads_captions = True

    def __init__(
        self,
        networks: Networks,
        schedule: Schedule,
        opened: Select = nothing,
        *,
        lora: Lora | None = None,
        words: Words | None = None,
        vector: Vector | None = None,
    ) -> None:
        super().__init__()
        self.vae, self.text_encoder, self.unet = networks.vae, networks.text_encoder, networks.unet
        self.tokenizer, self.schedule = networks.tokenizer, schedule
        self.requires_grad_(False)
        self.words = None if words is None else NewWords(words, self.tokenizer, _table(self.text_encoder))
        self._adapters = None if lora is None else Adapters({UNET: self.unet, TEXT: self.text_encoder}, lora)
        self.vector, self.part = (
            vector,
            None if vector is None else ClientEmbedding(vector.width, _room(self.unet, vector.place), vector.start),
        )
        self._added: Tensor | None = None
        self._as_token = vector is not None and vector.place == "token"
        if vector is not None and vector.place == "time":
            self.unet.time_embedding.register_forward_hook(self._add)
        named = _named(self.unet, self.text_encoder)
        self._opened = {name: parameter for name, parameter in named.items() if opened(name)}
        self._frozen = {name: parameter for name, parameter in named.items() if name not in self._opened}
        self._began = copies(self._opened)
        self._told: dict[str, Tensor] = {}
        self._live = self._parts()

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

    def condition(self, batch: Batch) -> Told:
        """One caption and, with vectors, one of these per example. They carry gradients where what makes them moves."""
        captions = batch.captions or ("",) * len(batch)
        texts = ["" if alone else text for alone, text in zip(batch.unconditional.tolist(), captions, strict=True)]
        different = list(dict.fromkeys(texts))
        rows = torch.tensor([different.index(text) for text in texts], device=batch.images.device)
        text = self._encoded(different)[rows]
        return Told(text, None if self.part is None else self.part(batch.unconditional, batch.clients))

    def forward(self, x_t: Float[Tensor, "B c h w"], t: Int64[Tensor, " B"], cond: Told) -> Float[Tensor, "B c h w"]:
        text = cond.text
        if cond.vectors is not None and self._as_token:
            text = torch.cat([text, cond.vectors[:, None].to(text.dtype)], dim=1)
        self._added = None if self._as_token else cond.vectors
        try:
            return self.unet(x_t, t, encoder_hidden_states=text).sample
        finally:
            self._added = None

    def _add(self, _: nn.Module, inputs: tuple[Any, ...], output: Float[Tensor, "B V"]) -> Float[Tensor, "B V"] | None:
        return None if self._added is None else output + self._added.to(output.dtype)

    def initial(self, rng: torch.Generator, only: Select = everything) -> Arrays:
        """Opened weights and words as the model began with them; adapters are drawn, and add nothing yet."""
        drawn = self._adapters.initial(rng) if self._adapters is not None else {}
        told = self.words.initial() if self.words is not None else {}
        own = self.part.initial(rng) if self.part is not None else {}
        return pick({**self._began, **drawn, **told, **own}, only)

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
            load_into(self._live, self.part, params, num_clients)
            return
        before = self.params()
        try:
            self._adapters.make_room(params)
            self._live = self._parts()
            load_into(self._live, self.part, params, num_clients)
        except PersonaeError:
            self._adapters.make_room(before)
            self._live = self._parts()
            load_into(self._live, self.part, before, clients_in(before))
            raise

    @torch.no_grad()
    @torch.random.fork_rng(devices=[])  # networks are made, and then overwritten
    def folded(self) -> Networks:
        """Bare copies, on the CPU, that draw the same: adapters and the client's vector are put into the weights.

        Raises: ConfigError, for a vector that is a token, and for new words: bare networks have no weights for them.
        """
        if self.words is not None or self._as_token:
            what = "new words" if self.words is not None else 'a vector at place "token"'
            raise ConfigError(
                f"a model with {what} cannot be written as a pipeline of its own: its weights have no room for them. "
                "Export the parts alone, or sample from the run itself"
            )
        weights = {name: value.detach().clone() for name, value in _named(self.unet, self.text_encoder).items()}
        if self._adapters is not None:
            for name, change in self._adapters.changes().items():
                weights[name] += change
        if self.part is not None:
            alone = torch.zeros(1, dtype=torch.bool, device=self.unet.device)
            weights[f"{UNET}time_embedding.linear_2.bias"] += self.part(alone)[0]
        unet = UNet2DConditionModel.from_config(self.unet.config)
        text = CLIPTextModel(self.text_encoder.config)
        for name, parameter in _named(unet, text).items():
            parameter.copy_(weights[name])
        return Networks(copy.deepcopy(self.vae).cpu(), self.tokenizer, text.eval(), unet.eval())

    def _parts(self) -> dict[str, nn.Parameter]:
        adapters = self._adapters.live() if self._adapters is not None else {}
        words = self.words.live() if self.words is not None else {}
        own = dict(self.part.named_parameters()) if self.part is not None else {}
        return {**self._opened, **adapters, **words, **own}

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


def _room(unet: UNet2DConditionModel, place: str) -> int:
    """How many numbers a vector's place takes."""
    return int(unet.time_embedding.linear_2.out_features if place == "time" else unet.config.cross_attention_dim)


def _named(unet: nn.Module, text_encoder: nn.Module) -> dict[str, nn.Parameter]:
    both = ((UNET, unet), (TEXT, text_encoder))
    return {
        prefix + (published(bare) if prefix == TEXT else bare): parameter
        for prefix, network in both
        for name, parameter in network.named_parameters()
        if (bare := without_lora(name)) is not None
    }


def published(name: str) -> str:
    """A text encoder's parameter as published files name it; newer versions of transformers leave the front out."""
    return name if name.startswith(LEVEL) else LEVEL + name


def _table(text_encoder: CLIPTextModel) -> nn.Embedding:
    """The vectors of all known tokens, wherever this version of transformers keeps them."""
    return typing.cast("nn.Embedding", text_encoder.get_input_embeddings())
