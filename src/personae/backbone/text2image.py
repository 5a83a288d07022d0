"""A latent text-to-image model of Stable Diffusion's anatomy behind the interface of denoisers.

An autoencoder turns pictures into latents and back, one or two text encoders a caption into vectors, a U-Net predicts
in latents while it attends to these. Names are "unet.", "text_encoder." and "text_encoder_2." before those of the bare
diffusers and transformers models; the autoencoder never moves. Beside them may stand adapters, new words, and a
client's vector.

Letters in shapes: `B` batch, `C H W` picture, `c h w` latent, `L` tokens, `D` width of a token's vector, `P` width of
what stands for a whole text, `V` width of what the client's vector is added to.
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

from personae.backbone.captions import Captions, Second, added
from personae.backbone.parts import copies, load_into
from personae.backbone.schedule import Schedule
from personae.core import Arrays, Batch, Select, everything, nothing, pick
from personae.errors import ConfigError, PersonaeError, ShapeError
from personae.personal.delta import Delta, Deltas, without_parts
from personae.personal.embedding import ClientEmbedding, clients_in
from personae.personal.lora import LEVEL, TEXT, TEXT_2, UNET, Adapters, Lora
from personae.personal.neurons import NeuronLists, Neurons
from personae.personal.tokens import Words

PIXELS_AT_ONCE = 2**18
"""Through the autoencoder: 256 pictures of 32 x 32, one of 512 x 512. More would want gigabytes."""


@dataclass(frozen=True)
class Networks:
    """The pieces of a pipeline, as diffusers and transformers name them. With a `second` it is of the XL kind."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    second: Second | None = None


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
    pooled: Float[Tensor, "B P"] | None = None
    vectors: Float[Tensor, "B V"] | None = None


class TextToImage(nn.Module):
    """A pipeline's networks, of whose weights `opened` says which may move; all others are the frozen base.

    `lora` puts adapters on attention layers, `delta` lets the weights of some of them change, `neurons` chosen ones
    among these, `words` adds new words, `vector` gives each client some numbers; all are parts that may move. What an
    example reads that is unconditional, `Captions` says.

    With two text encoders the last layer of the first has no say: what opens or adapts it does not move.

    `half` keeps the networks of which nothing is opened in bfloat16; the autoencoder, parts, and what the model is
    given and predicts stay in float32. `recompute` trades time for memory in training: the
    U-Net and the text encoders run again, layer by layer, where their gradients are taken.

    Raises: ConfigError, when the networks have no place for a part, a new word is not new, or `half` finds no network
    of which nothing is opened.
    """

    reads_captions = True

    def __init__(
        self,
        networks: Networks,
        schedule: Schedule,
        opened: Select = nothing,
        *,
        lora: Lora | None = None,
        delta: Delta | None = None,
        neurons: Neurons | None = None,
        words: Words | None = None,
        vector: Vector | None = None,
        half: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.vae, self.unet, self.schedule = networks.vae, networks.unet, schedule
        self.requires_grad_(False)
        self.captions = Captions(networks.tokenizer, networks.text_encoder, networks.second, words)
        self._networks = {UNET: self.unet, **self.captions.encoders()}
        self._adapters = None if lora is None else Adapters(self._networks, lora)
        self._deltas = None if delta is None else Deltas(self._networks, delta)
        self._neurons = None if neurons is None else NeuronLists(self._networks, neurons)
        self.part: ClientEmbedding | None = None
        if vector is not None:
            self.part = ClientEmbedding(vector.width, _room(self.unet, vector.place), vector.start)
        self._added: Tensor | None = None
        self._as_token = vector is not None and vector.place == "token"
        if vector is not None and vector.place == "time":
            self.unet.time_embedding.register_forward_hook(self._add)
        named = _named(self._networks)
        self._opened = {name: parameter for name, parameter in named.items() if opened(name)}
        self._frozen = {name: parameter for name, parameter in named.items() if name not in self._opened}
        self._began = copies(self._opened)
        for what, part in (("delta", self._deltas), ("neurons", self._neurons)):
            if twice := [name for name in (part.changes() if part is not None else {}) if name in self._opened]:
                raise ConfigError(
                    f"{what}: {twice[0]} trains itself; freeze the base, or leave out the change beside it"
                )
            if half and part is not None:
                raise ConfigError(
                    f"half and {what} do not go together: bfloat16 has no room for small changes of weights"
                )
        self._dtype = self._halved() if half else None
        if recompute:
            self.unet.enable_gradient_checkpointing()
            self.captions.recompute()
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
        parts = [self.vae.encode(part).latent_dist.mean for part in images.split(self._at_once)]
        return torch.cat(parts) * self._scale

    @torch.no_grad()
    def decode(self, x_0: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        parts = [self.vae.decode(part).sample for part in (x_0 / self._scale).split(self._at_once)]
        return torch.cat(parts)

    def condition(self, batch: Batch) -> Told:
        """One caption and, with vectors, one of these per example. They carry gradients where what makes them moves."""
        text, *whole = self.captions(batch.captions or ("",) * len(batch), batch.unconditional)
        vectors = None if self.part is None else self.part(batch.unconditional, batch.clients)
        return Told(text, whole[0] if whole else None, vectors)

    def forward(self, x_t: Float[Tensor, "B c h w"], t: Int64[Tensor, " B"], cond: Told) -> Float[Tensor, "B c h w"]:
        text = cond.text if self._dtype is None else cond.text.to(self._dtype)
        x = x_t if self._dtype is None else x_t.to(self._dtype)
        if cond.vectors is not None and self._as_token:
            text = torch.cat([text, cond.vectors[:, None].to(text.dtype)], dim=1)
        self._added = None if self._as_token else cond.vectors
        try:
            _, height, width = self.image_shape
            also = added(cond.pooled, height, width)
            return self.unet(x, t, encoder_hidden_states=text, added_cond_kwargs=also).sample.to(x_t.dtype)
        finally:
            self._added = None

    def _add(self, _: nn.Module, inputs: tuple[Any, ...], output: Float[Tensor, "B V"]) -> Float[Tensor, "B V"] | None:
        return None if self._added is None else output + self._added.to(output.dtype)

    def initial(self, rng: torch.Generator, only: Select = everything) -> Arrays:
        """Opened weights and words as the model began with them; adapters are drawn, and add nothing yet."""
        drawn = self._adapters.initial(rng) if self._adapters is not None else {}
        for part in (self._deltas, self._neurons):
            drawn |= part.initial() if part is not None else {}
        own = self.part.initial(rng) if self.part is not None else {}
        return pick({**self._began, **drawn, **self.captions.initial(), **own}, only)

    def params(self) -> Arrays:
        return copies(self._live)

    def live(self) -> Mapping[str, nn.Parameter]:
        return self._live

    def base(self) -> Arrays:
        return {name: value.detach() for name, value in self._frozen.items()}

    def load(self, params: Arrays, num_clients: int = 1) -> None:
        """Adapters take the rank of what is loaded, and neurons their number."""
        self.captions.forget()
        sized = [part for part in (self._adapters, self._neurons) if part is not None]
        if params.keys() != self._live.keys() or not [part for part in sized if part.differ(params)]:
            load_into(self._live, self.part, params, num_clients)
            return
        before = self.params()
        try:
            self._make_room(sized, params)
            load_into(self._live, self.part, params, num_clients)
        except PersonaeError:
            self._make_room(sized, before)
            load_into(self._live, self.part, before, clients_in(before))
            raise

    def _make_room(self, sized: Sequence[Adapters | NeuronLists], params: Arrays) -> None:
        for part in sized:
            part.make_room(params)
        self._live = self._parts()

    @torch.no_grad()
    @torch.random.fork_rng(devices=[])  # networks are made, and then overwritten
    def folded(self) -> Networks:
        """Bare copies, on the CPU: adapters, changes and the client's vector are put into the weights.

        With the first two they draw the same. With a vector, the same without guidance: here the unconditional half of
        guidance sees the null vector, and a bare U-Net has the client's in both halves.

        Raises: ConfigError, for a vector that is a token, and for new words: bare networks have no weights for them.
        """
        if self.captions.live() or self._as_token:
            what = "new words" if self.captions.live() else 'a vector at place "token"'
            raise ConfigError(
                f"a model with {what} cannot be written as a pipeline of its own: its weights have no room for them. "
                "Export the parts alone, or sample from the run itself"
            )
        weights = {name: value.detach().float().clone() for name, value in _named(self._networks).items()}
        for part in (self._adapters, self._deltas, self._neurons):
            for name, change in part.changes().items() if part is not None else ():
                weights[name] += change
        if self.part is not None:
            alone = torch.zeros(1, dtype=torch.bool, device=self.unet.device)
            weights[f"{UNET}time_embedding.linear_2.bias"] += self.part(alone)[0]
        bare: dict[str, Any] = {
            name: type(encoder)(encoder.config) for name, encoder in self.captions.encoders().items()
        }
        bare[UNET] = UNet2DConditionModel.from_config(self.unet.config)
        for name, parameter in _named(bare).items():
            parameter.copy_(weights[name])
        vae = copy.deepcopy(self.vae).cpu()
        for network in (vae, bare[UNET]):
            network.register_to_config(_name_or_path="")  # a folder on the client's disk
        for encoder in (bare[name] for name in self.captions.encoders()):
            encoder.config._name_or_path = ""
        first, *others = self.captions.tokenizers()
        second = Second(others[0], bare[TEXT_2].eval(), self.captions.zeros_for_empty) if others else None
        return Networks(vae, first, bare[TEXT].eval(), bare[UNET].eval(), second)

    def _halved(self) -> torch.dtype:
        """The type that the U-Net's weights then have."""
        whole = tuple(front for front in self._networks if not any(name.startswith(front) for name in self._opened))
        if not whole:
            raise ConfigError(
                "half is for weights that do not train, and every network has some that do; freeze the base and train "
                "parts beside it, or leave it out"
            )
        for name, parameter in self._frozen.items():
            if name.startswith(whole):
                parameter.data = parameter.data.bfloat16()
        return torch.bfloat16 if UNET in whole else torch.float32

    def _parts(self) -> dict[str, nn.Parameter]:
        beside: dict[str, nn.Parameter] = {}
        for part in (self._adapters, self._deltas, self._neurons):
            beside |= part.live() if part is not None else {}
        own = dict(self.part.named_parameters()) if self.part is not None else {}
        return {**self._opened, **beside, **self.captions.live(), **own}

    @property
    def _at_once(self) -> int:
        _, height, width = self.image_shape
        return max(1, PIXELS_AT_ONCE // (height * width))

    @property
    def _scale(self) -> float:
        return float(self.vae.config.scaling_factor)


def _room(unet: UNet2DConditionModel, place: str) -> int:
    """How many numbers a vector's place takes."""
    return int(unet.time_embedding.linear_2.out_features if place == "time" else unet.config.cross_attention_dim)


def _named(networks: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {
        prefix + (published(bare) if prefix == TEXT else bare): parameter
        for prefix, network in networks.items()
        for name, parameter in network.named_parameters()
        if (bare := without_parts(name)) is not None
    }


def published(name: str) -> str:
    """A first text encoder's parameter as published files name it; newer versions of transformers shorten it."""
    return name if name.startswith(LEVEL) else LEVEL + name
