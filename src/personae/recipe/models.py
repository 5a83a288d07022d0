"""From a recipe to its denoiser, and back to a folder that other tools read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from personae.backbone import unet
from personae.backbone.schedule import schedule
from personae.backbone.shipped import model_folder
from personae.backbone.unet import UNetDenoiser
from personae.core import ClientData, everything, nothing, stream
from personae.errors import ConfigError, DataError
from personae.infer.sample import draw, latents_at_once
from personae.recipe.schema import Backbone, Recipe

if TYPE_CHECKING:
    from personae.backbone.text2image import TextToImage

    Model = UNetDenoiser | TextToImage
else:
    Model = "UNetDenoiser | TextToImage"  # the second is slow to import, and most recipes have no use for it


AnyModel = TypeVar("AnyModel", bound=nn.Module)


def is_text_to_image(folder: Path) -> bool:
    """True for a folder with a text encoder, as pipelines of Stable Diffusion's kind have one."""
    return (folder / "text_encoder").is_dir()


def build_denoiser(recipe: Recipe, image_shape: tuple[int, ...]) -> Model:
    """`image_shape` is that of the images: channels, height, width. Raises: ConfigError, ArtefactError."""
    backbone = recipe.backbone
    folder = backbone.folder
    model = _fresh(backbone, image_shape) if folder is None else _opened(backbone, model_folder(folder))
    if model.image_shape != tuple(image_shape):
        raise ConfigError(
            f"the backbone in {folder} draws {list(model.image_shape)}, the images are "
            f"{list(image_shape)} (channels, height, width); set data.size and data.channels"
        )
    return at_device(model, recipe.machine.device)


def at_device(model: AnyModel, device: str) -> AnyModel:
    """Raises: ConfigError, when the device is not there."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, for a bad name and for what is not there
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"machine.device {device!r} cannot be used here: {reason}") from error


def draw_from_pipeline(
    folder: Path, prompt: str, num_images: int, seed: int, steps: int | None, guidance: float | None, device: str
) -> Tensor:
    """What a text-to-image pipeline draws by itself, in 25 steps with guidance 3 where these are None.

    Shapes: uint8 [num_images, C, H, W].
    Raises: ConfigError, ArtefactError.
    """
    from personae.backbone.pipeline import open_pipeline

    rng = stream(seed, "sample", prompt)
    model = at_device(open_pipeline(folder), device)
    steps, guidance = 25 if steps is None else steps, 3.0 if guidance is None else guidance
    return draw(model, (prompt,) * num_images, rng, steps=steps, guidance=guidance)


def check_captions(recipe: Recipe, model: Model, name: str, data: ClientData) -> None:
    """Before anything trains.

    Raises: DataError, when a caption says nothing; ConfigError, when a client's captions never say a new word, from
        which nothing would be learned, or one is longer than the model reads.
    """
    if isinstance(model, UNetDenoiser):
        return
    for images in (data.train, data.heldout):
        if empty := sum(not text.strip() for text in images.captions):
            raise DataError(
                f"client {name!r}: {empty} of {len(images.captions)} captions say nothing; write what the pictures "
                "show into the metadata.jsonl beside them, or leave the file out and set data.caption"
            )
    words = recipe.backbone.words.words if recipe.backbone.words is not None else ()
    if words and not any(word in text.lower() for text in data.train.captions for word in words):
        raise ConfigError(
            f"no caption of client {name!r} says {' or '.join(words)}, so that it would not train; set data.caption, "
            "or write it into the metadata.jsonl beside the images"
        )
    try:
        model.captions.check(sorted({*data.train.captions, *data.heldout.captions}))
    except ConfigError as error:
        raise ConfigError(f"client {name!r}: {error}") from error


def rows_at_once(model: Model) -> int:
    """How many pictures go through a model together while nothing trains."""
    return latents_at_once(model) if model.reads_captions else 256


def write_pipeline(model: Model, folder: Path) -> None:
    """A folder that diffusers reads, with all that is loaded put into its weights.

    Raises: ArtefactError, when the folder exists and is not empty; ConfigError, when a part cannot be put there.
    """
    if isinstance(model, UNetDenoiser):
        unet.save_pipeline(model, folder)
        return
    from personae.backbone import pipeline

    pipeline.save_pipeline(model, folder)


def _fresh(backbone: Backbone, image_shape: tuple[int, ...]) -> UNetDenoiser:
    channels, _, size = image_shape
    embedding = backbone.embedding
    return unet.preset(
        str(backbone.preset),
        schedule(backbone.num_timesteps, backbone.beta_schedule, backbone.prediction_type),
        size=size,
        channels=channels,
        embedding_width=None if embedding is None else embedding.width,
        place="time" if embedding is None else embedding.place,
        start="noise" if embedding is None else embedding.start,
        scale_shift=backbone.scale_shift,
    )


SAVINGS = ("half", "recompute")


def _refuse(backbone: Backbone, keys: Sequence[str], why: str) -> None:
    """Raises: ConfigError, when one of these is set."""
    if named := [key for key in keys if getattr(backbone, key)]:
        raise ConfigError(f"backbone.{named[0]} is for text-to-image pipelines, and {why}; leave it out")


def _opened(backbone: Backbone, folder: Path) -> Model:
    embedding = backbone.embedding
    if is_text_to_image(folder):
        from personae.backbone.pipeline import open_pipeline
        from personae.backbone.text2image import Vector

        vector = None if embedding is None else Vector(embedding.width, embedding.place, embedding.start)  # type: ignore[arg-type]  # it checks the place
        opened = nothing if backbone.frozen else everything
        return open_pipeline(
            folder,
            opened,
            lora=backbone.lora,
            delta=backbone.delta,
            words=backbone.words,
            vector=vector,
            half=backbone.half,
            recompute=backbone.recompute,
        )
    _refuse(backbone, ("frozen", "lora", "delta", "words", *SAVINGS), f"{folder} has no text_encoder")
    return unet.open_folder(
        folder,
        embedding_width=None if embedding is None else embedding.width,
        place="time" if embedding is None else embedding.place,
        start="noise" if embedding is None else embedding.start,
    )
