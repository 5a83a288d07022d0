"""diffusers' unconditional U-Net, opened for one vector per client.

The vector may enter in one of five places:

- "time":   added to the time embedding, so that every residual block receives it (diffusers' path for classes);
- "blocks": its own scale and shift in every residual block, by shared linear heads;
- "input":  as constant planes beside the image under a 1x1 first layer, that is, a shift of the first convolution;
- "token":  one more key and value in every attention layer;
- "gate":   how far every residual block's second convolution moves along a few shared directions of rank one.

All but "token" can be folded into the weights of an ordinary U-Net for one client (`folded`). `places.py` holds all but
"time".

Letters in shapes: `B` batch, `C H W` image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from jaxtyping import Float, Int64
from torch import Tensor, nn

from personae.backbone.parts import copies, load_into, refuse_partial, written_whole
from personae.backbone.places import Head, heads
from personae.backbone.schedule import Schedule, load_schedule
from personae.core import Arrays, Batch, Cond, Select, everything, pick
from personae.errors import ArtefactError, ConfigError, ShapeError
from personae.personal.embedding import ClientEmbedding

Place = Literal["time", "blocks", "input", "token", "gate"]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # 8x8 digits on a laptop: 0.27 M parameters.
    "tiny": {
        "block_out_channels": (32, 32),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "add_attention": False,
    },
    # The same with attention at half the size, for places that need some: 0.28 M parameters.
    "tiny_attention": {
        "block_out_channels": (32, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    },
    # 16 to 32 pixels: 1.7 M parameters.
    "small": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "norm_num_groups": 16,
    },
    # The CIFAR-10 network of Ho et al. 2020: 35.7 M parameters.
    "cifar": {
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "attention_head_dim": None,
    },
}


class UNetDenoiser(nn.Module):
    """A U-Net over pixels, its noise schedule, and optionally a client embedding.

    Parameter names are those of the bare `UNet2DModel`; beside them stand `embedding.weight`,
    `null_embedding.weight`, and where needed `embedding_projection.weight` and `embedding_heads.*`.
    """

    reads_captions = False

    def __init__(
        self,
        unet: UNet2DModel,
        schedule: Schedule,
        *,
        embedding_width: int | None = None,
        place: Place = "time",
        start: Literal["noise", "zero"] = "noise",
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.unet, self.schedule, self.place = unet, schedule, place
        self.part: ClientEmbedding | None = None
        self._heads: dict[str, Head] = {}
        if embedding_width is not None:
            time_width = unet.time_embedding.linear_2.out_features
            self.part = ClientEmbedding(embedding_width, time_width if place == "time" else embedding_width, start)
            self._heads = heads(unet, place, embedding_width)
        for name, head in self._heads.items():
            _listen(unet.get_submodule(name), head, self)
        self.embedding_heads = nn.ModuleDict({name.replace(".", "-"): head for name, head in self._heads.items()})
        self._vectors: Tensor | None = None
        self._live = {**dict(unet.named_parameters())}
        if self.part is not None:
            self._live |= dict(self.part.named_parameters())
            self._live |= {f"embedding_heads.{n}": p for n, p in self.embedding_heads.named_parameters()}
        self._pretrained = copies(dict(unet.named_parameters())) if pretrained else None

    @property
    def sample_shape(self) -> tuple[int, ...]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (self.unet.config.in_channels, height, width)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of a picture: channels, height, width."""
        return self.sample_shape

    def encode(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return images

    def decode(self, x_0: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return x_0

    def condition(self, batch: Batch) -> Cond:
        return None if self.part is None else self.part(batch.unconditional, batch.clients)

    def forward(self, x_t: Float[Tensor, "B C H W"], t: Int64[Tensor, " B"], cond: Cond) -> Float[Tensor, "B C H W"]:
        """`cond` holds one vector per image, or is None without an embedding.

        Raises: ShapeError, when `cond` has another shape: diffusers would broadcast it in silence.
        """
        if self.part is None:
            return self.unet(x_t, t).sample
        width = (
            self.unet.time_embedding.linear_2.out_features
            if self.place == "time"
            else self.part.embedding.embedding_dim
        )
        if cond is None or tuple(cond.shape) != (len(x_t), width):
            found = "nothing" if cond is None else list(cond.shape)
            raise ShapeError(f"the client's vectors are {found}, expected [{len(x_t)}, {width}]: one per image")
        if self.place == "time":
            return self.unet(x_t, t, class_labels=cond).sample
        self._vectors = cond
        try:
            return self.unet(x_t, t).sample
        finally:
            self._vectors = None

    def initial(self, rng: torch.Generator, only: Select = everything) -> Arrays:
        seed = int(torch.randint(2**27, (1,), generator=rng))  # wider ranges are drawn differently before torch 2.7
        values = dict(self.part.initial(rng)) if self.part is not None else {}
        for name, head in self.embedding_heads.named_parameters():
            # Zero heads would pass no gradient to the embedding; unit variance is that of the random codes.
            values[f"embedding_heads.{name}"] = torch.randn(head.shape, generator=rng) / head[0].numel() ** 0.5
        if any(only(name) for name in self._live.keys() - values.keys()):
            values |= self._pretrained or _drawn(self.unet, seed)
        return pick(values, only)

    def params(self) -> Arrays:
        return copies(self._live)

    def live(self) -> Mapping[str, nn.Parameter]:
        return self._live

    def base(self) -> Arrays:
        return {}

    def load(self, params: Arrays, num_clients: int = 1) -> None:
        load_into(self._live, self.part, params, num_clients)

    @torch.no_grad()
    @torch.random.fork_rng(devices=[])  # diffusers draws weights, which are then overwritten
    def folded(self) -> UNet2DModel:
        """An ordinary U-Net that draws this client's distribution, with the vector folded into its weights.

        "time": into the bias of the time embedding's last layer; "blocks": into the second norm of each residual block;
        "input": into the bias of the first convolution; "gate": into the second convolution of each residual block.
        Equal to the unfolded model up to rounding.

        Raises: ConfigError, for "token".
        """
        config = {**self.unet.config, "class_embed_type": None}
        plain = UNet2DModel.from_config(config)
        plain.load_state_dict(self.unet.state_dict())
        if self.part is None:
            return plain.eval()
        device = next(iter(self._live.values())).device
        plain.to(device)
        vector = self.part(torch.zeros(1, dtype=torch.bool, device=device))
        if self.place == "time":
            plain.time_embedding.linear_2.bias += vector[0]
        for name, head in self._heads.items():
            head.fold(vector, plain.get_submodule(name))
        return plain.cpu().eval()


def _drawn(unet: UNet2DModel, seed: int) -> dict[str, Tensor]:
    """The weights of a new U-Net of the same shape. diffusers draws from the global generator, so it is forked."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return copies(dict(UNet2DModel.from_config(unet.config).named_parameters()))


def _listen(module: nn.Module, head: Head, owner: UNetDenoiser) -> None:
    """Let the output of `module` be bent by the vectors of the current call."""

    def bend(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return head(owner._vectors, module, inputs[0], output)

    module.register_forward_hook(bend)


@torch.random.fork_rng(devices=[])  # a model is built to be loaded: what it draws here is nobody's
def preset(
    name: str,
    schedule: Schedule,
    *,
    size: int,
    channels: int,
    embedding_width: int | None = None,
    place: Place = "time",
    start: Literal["noise", "zero"] = "noise",
    scale_shift: bool = False,
) -> UNetDenoiser:
    """A fresh U-Net. `size` is the height and width in pixels; `scale_shift` makes blocks modulate, not only shift.

    Raises: ConfigError, when the name is unknown, the picture cannot be halved often enough, or nothing is at `place`.
    """
    if name not in PRESETS:
        raise ConfigError(f"backbone preset is {name!r}; expected one of {', '.join(PRESETS)}")
    layers = PRESETS[name]
    factor = 2 ** (len(layers["block_out_channels"]) - 1)
    if size % factor:
        raise ConfigError(
            f"backbone preset {name!r} needs pictures whose size is a multiple of {factor}, found {size}; "
            f"set data.size to {max(factor, round(size / factor) * factor)}"
        )
    unet = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        class_embed_type="identity" if embedding_width is not None and place == "time" else None,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
        **layers,
    )
    return UNetDenoiser(unet, schedule, embedding_width=embedding_width, place=place, start=start)


@torch.random.fork_rng(devices=[])  # diffusers draws weights, then reads them
def open_folder(
    folder: Path,
    *,
    embedding_width: int | None = None,
    place: Place = "time",
    start: Literal["noise", "zero"] = "noise",
) -> UNetDenoiser:
    """Any local diffusers folder with an unconditional U-Net and its scheduler: a DDPM pipeline, or the two together.

    With a zero vector the opened model gives the same bits as the plain one.

    Raises: ArtefactError, when the folder is not such a folder; ConfigError, when the U-Net already takes class labels,
    has dropout, or nothing at `place`.
    """
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler_folder = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    if not (unet_folder / "config.json").is_file():
        raise ArtefactError(f"{folder} is not a diffusers model folder: no config.json in {unet_folder}")
    try:
        config = UNet2DModel.load_config(unet_folder)
    except OSError as error:
        raise ArtefactError(f"the config.json in {unet_folder} cannot be read: {error}") from error
    if config.get("_class_name") not in (None, "UNet2DModel"):
        raise ArtefactError(f"{unet_folder} holds a {config['_class_name']}; expected an unconditional UNet2DModel")
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        raise ConfigError(f"the U-Net in {unet_folder} already takes class labels; an unconditional one is expected")
    if config.get("dropout"):
        # Its masks come from torch's global generator: a resumed run would not end in the same bits.
        raise ConfigError(
            f"the U-Net in {unet_folder} has dropout {config['dropout']:g}, which cannot be repeated exactly; "
            f"set dropout to 0 in {unet_folder / 'config.json'}"
        )
    opened = {"class_embed_type": "identity"} if embedding_width is not None and place == "time" else {}
    try:
        unet, found = UNet2DModel.from_pretrained(
            unet_folder, low_cpu_mem_usage=False, use_safetensors=True, output_loading_info=True, **opened
        )
    except (OSError, RuntimeError) as error:
        raise ArtefactError(f"the weights in {unet_folder} cannot be read: {error}") from error
    refuse_partial(unet_folder, found)
    return UNetDenoiser(
        unet.train(),
        load_schedule(scheduler_folder),
        embedding_width=embedding_width,
        place=place,
        start=start,
        pretrained=True,
    )


def save_pipeline(model: UNetDenoiser, folder: Path) -> None:
    """Write what the model has loaded as a diffusers pipeline, which stock `DDPMPipeline.from_pretrained` reads.

    Raises: ArtefactError, when the folder exists and is not empty; ConfigError, when the vector cannot be folded.
    """
    with written_whole(folder) as partial:
        scheduler = DDPMScheduler.from_config(dict(model.schedule.config))
        DDPMPipeline(unet=model.folded(), scheduler=scheduler).save_pretrained(partial)
