"""The library's own text-to-image model: its autoencoder, then its text encoder and U-Net, from nothing.

"autoencoder": so many stretches of training on pictures. "latents": all pictures through it, once. "decoder": so many
more of its second half alone, which leaves latents as they are. "denoiser": so many stretches on latents and captions.
"refining": so many more on common things and scenes alone. "model": the pipeline's folder. Each stretch begins with
what the one before it left, and a stopped study goes on at its next stretch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from personae.artefact.save import load_state, save_state, write_json
from personae.backbone.autoencoder import fit_autoencoder, fit_decoder, set_scale
from personae.backbone.pipeline import SIZES, fresh, save_pipeline
from personae.backbone.schedule import schedule
from personae.backbone.text2image import TextToImage
from personae.backbone.vocabulary import read_tokenizer, write_tokenizer
from personae.core import Arrays, Client, ClientData, Images, State, Training, everything, joined, stream
from personae.data.emoji import SEEN_STYLES, caption, emoji, named, scene_names, scenes, vocabulary
from personae.errors import ConfigError
from personae.evaluate.charts import COLOURS, chart, logarithmic
from personae.evaluate.grids import save_grid
from personae.infer.sample import draw, to_bytes
from personae.local.fit import fit
from personae.study.study import Answer, Cell, Chart, Picture, Row, where

CHUNK = 50
"""Steps between two additions to the average of the weights."""

SHOWN = 8
"""Names in the grid of pictures, under every style, and as many scenes."""


@dataclass(frozen=True)
class Pretraining:
    """`autoencoder`, `decoder`, `denoiser` and `refining` say how a stretch trains; in each of them learning rates fall
    from stretch to stretch.

    `num_scenes` scenes are among the pictures, beside every seen name in every seen style, `copies` times with other
    words; the common things that scenes are made of come `common_copies` times more. `ema` is the decay of the average
    of weights that is the model in the end, at each CHUNK of steps.
    """

    size: str
    autoencoder: Training
    autoencoder_stretches: int
    decoder: Training
    decoder_stretches: int
    denoiser: Training
    denoiser_stretches: int
    refining: Training
    refining_stretches: int
    num_scenes: int = 10_000
    copies: int = 4
    common_copies: int = 20
    ema: float = 0.98
    max_tokens: int = 4000
    guidance: float = 3.0

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ConfigError(f"size is {self.size!r}, expected one of {', '.join(SIZES)}")
        stretches = (
            self.autoencoder_stretches,
            self.decoder_stretches,
            self.denoiser_stretches,
            self.refining_stretches,
        )
        if min(*stretches, self.num_scenes, self.copies) < 1:
            raise ConfigError("stretches, num_scenes and copies are to be at least 1")
        if self.common_copies < 0:
            raise ConfigError(f"common_copies is {self.common_copies}, expected 0 or more")
        if any(how.warmup_steps or how.decay != "constant" for how in self.stages().values()):
            raise ConfigError("warmup_steps and decay are left out here: the rates fall from stretch to stretch")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema is {self.ema}, expected 0 to below 1")

    def stages(self) -> dict[str, Training]:
        """Those that are made of stretches."""
        return {stage: getattr(self, stage) for stage in ("autoencoder", "decoder", "denoiser", "refining")}

    def cells(self, found: Sequence[Row]) -> Sequence[Cell]:
        whole: list[dict[str, Any]] = [
            *({"stage": "autoencoder", "stretch": number} for number in range(self.autoencoder_stretches)),
            {"stage": "latents"},
            *({"stage": "decoder", "stretch": number} for number in range(self.decoder_stretches)),
            *({"stage": "denoiser", "stretch": number} for number in range(self.denoiser_stretches)),
            *({"stage": "refining", "stretch": number} for number in range(self.refining_stretches)),
            {"stage": "model"},
        ]
        return whole[: len(found) + 1]  # one after the other: each begins with what the one before it left

    def measure(self, cell: Cell, seed: int, folder: Path) -> Mapping[str, Any]:
        (folder / "parts").mkdir(exist_ok=True)
        if cell["stage"] == "autoencoder":
            return self._autoencoder(int(cell["stretch"]), seed, folder)
        if cell["stage"] == "latents":
            return self._latents(seed, folder)
        if cell["stage"] == "decoder":
            return self._decoder(int(cell["stretch"]), seed, folder)
        if cell["stage"] == "denoiser":
            return self._denoiser(int(cell["stretch"]), seed, folder)
        if cell["stage"] == "refining":
            return self._refining(int(cell["stretch"]), seed, folder)
        return self._model(seed, folder)

    # --- the stages ------------------------------------------------------------------------------------------------

    def _autoencoder(self, number: int, seed: int, folder: Path) -> Mapping[str, Any]:
        vae = self._fresh(seed, folder).vae
        began = _before(folder, "autoencoder", number)
        if began is not None:
            vae.load_state_dict(dict(began.params))
        how = _slower(self.autoencoder, number, self.autoencoder_stretches)
        images = self.pictures(seed)
        moments = {} if began is None else began.extras
        learned = fit_autoencoder(vae, images.pixels, how, stream(seed, "autoencoder", number), moments)
        save_state(_part(folder, "autoencoder", number), State(vae.state_dict(), learned.moments))
        return {"loss": learned.loss, "error": learned.error}

    def _latents(self, seed: int, folder: Path) -> Mapping[str, Any]:
        model = self._fresh(seed, folder)
        model.vae.load_state_dict(dict(load_state(_part(folder, "autoencoder", self.autoencoder_stretches - 1)).params))
        images = self.pictures(seed)
        set_scale(model.vae, images.pixels)
        latents = torch.cat([model.encode(Images(part).floats()) for part in images.pixels.split(256)])
        facts = {"scaling_factor": float(model.vae.config.scaling_factor)}
        save_state(_part(folder, "latents", 0), State({**model.vae.state_dict()}, {"latents": latents}, facts))
        return {"pictures": len(images), **facts}

    def _decoder(self, number: int, seed: int, folder: Path) -> Mapping[str, Any]:
        model, latents = self._encoded(seed, folder)
        began = _before(folder, "decoder", number)
        if began is not None:
            model.vae.load_state_dict(dict(began.params))
        how = _slower(self.decoder, number, self.decoder_stretches)
        moments = {} if began is None else began.extras
        pixels = self.pictures(seed).pixels
        learned = fit_decoder(model.vae, latents, pixels, how, stream(seed, "decoder", number), moments)
        save_state(_part(folder, "decoder", number), State(model.vae.state_dict(), learned.moments))
        return {"loss": learned.loss, "error": learned.error}

    def _denoiser(self, number: int, seed: int, folder: Path) -> Mapping[str, Any]:
        began = _before(folder, "denoiser", number)
        how = _slower(self.denoiser, number, self.denoiser_stretches)
        return self._stretch("denoiser", number, how, began, 0, seed, folder)

    def _refining(self, number: int, seed: int, folder: Path) -> Mapping[str, Any]:
        """From where the denoiser's last stretch ended, on the pictures that come last: common things and scenes."""
        last = load_state(_part(folder, "denoiser", self.denoiser_stretches - 1))
        began = _before(folder, "refining", number) or last
        how = _slower(self.refining, number, self.refining_stretches)
        common = self.common_copies * len(SEEN_STYLES) * len(scene_names())
        return self._stretch("refining", number, how, began, -(common + self.num_scenes), seed, folder)

    def _stretch(
        self, stage: str, number: int, how: Training, began: State | None, first: int, seed: int, folder: Path
    ) -> Mapping[str, Any]:
        """On the pictures from the place `first` on."""
        model, latents = self._encoded(seed, folder)
        moments: Arrays = {}
        average = dict(model.params())
        if began is not None:
            model.load(began.params)
            moments, average = _split(began.extras)
        data = Images(latents[first:], captions=self.pictures(seed).captions[first:])
        client = Client("pretraining", ClientData(data, data), model, stream(seed, stage, number))
        before = number * how.steps + (self.denoiser_stretches * self.denoiser.steps if stage == "refining" else 0)
        losses = []
        for done in range(0, how.steps, CHUNK):
            steps = min(CHUNK, how.steps - done)
            fitted = fit(client, everything, dataclasses.replace(how, steps=steps), moments)
            losses += [fitted.loss] * steps
            moments, chunks = fitted.moments, (before + done) // CHUNK
            decay = min(self.ema, chunks / (chunks + 10))  # the first ones count less: nobody wants the random start
            for name, value in model.live().items():
                average[name] = average[name].lerp(value.detach(), 1 - decay)
        extras = {**moments, **{f"average.{name}": value for name, value in average.items()}}
        save_state(_part(folder, stage, number), State(model.params(), extras))
        return {"loss": math.fsum(losses) / len(losses)}

    def _model(self, seed: int, folder: Path) -> Mapping[str, Any]:
        model, _ = self._encoded(seed, folder)
        model.vae.load_state_dict(dict(load_state(_part(folder, "decoder", self.decoder_stretches - 1)).params))
        _, average = _split(load_state(_part(folder, "refining", self.refining_stretches - 1)).extras)
        model.load(average)
        if not (folder / "model").exists():
            save_pipeline(model, folder / "model", torch.float16)
        pixels = self.pictures(seed).pixels
        shown = pixels[torch.linspace(0, len(pixels) - 1, 16).long()]
        made = to_bytes(model.decode(model.encode(Images(shown).floats())))
        _picture(folder, "autoencoder", torch.stack([shown, made], 1).flatten(0, 1), columns=8)
        said = _told(seed)
        _picture(folder, "grid", draw(model, said, stream(seed, "grid"), guidance=self.guidance), columns=SHOWN)
        write_json(folder / "pictures" / "grid.json", {"captions": said})
        size = sum(path.stat().st_size for path in (folder / "model").rglob("*") if path.is_file())
        return {
            "bytes": size,
            "parameters": sum(p.numel() for p in model.parameters()),
            "picture": "pictures/grid.png",
            "encoded": "pictures/autoencoder.png",
        }

    # --- pieces ------------------------------------------------------------------------------------------------------

    def pictures(self, seed: int) -> Images:
        """Everything that is learned from, with captions; nothing that is held out."""
        return _pictures(self.num_scenes, self.copies, self.common_copies, seed)

    def _fresh(self, seed: int, folder: Path) -> TextToImage:
        where_, length = folder / "parts" / "tokenizer", SIZES[self.size]["text"]["max_position_embeddings"]
        if (where_ / "tokenizer_config.json").is_file():
            tokenizer = read_tokenizer(where_)
        else:
            tokenizer = write_tokenizer(where_, vocabulary(), max_tokens=self.max_tokens, length=length)
        levels = schedule(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False)
        return TextToImage(fresh(self.size, tokenizer, stream(seed, "fresh")), levels, everything)

    def _encoded(self, seed: int, folder: Path) -> tuple[TextToImage, Tensor]:
        """The model with its trained autoencoder, and all pictures' latents."""
        model, found = self._fresh(seed, folder), load_state(_part(folder, "latents", 0))
        model.vae.load_state_dict(dict(found.params))
        model.vae.register_to_config(scaling_factor=float(found.facts["scaling_factor"]))
        return model, found.extras["latents"]

    # --- the answer --------------------------------------------------------------------------------------------------

    def answer(self, found: Sequence[Row]) -> Answer:
        findings, charts, pictures, numbers = [], [], [], dict[str, Any]()
        for stage, steps in ((stage, how.steps) for stage, how in self.stages().items()):
            if rows := where(found, stage=stage):
                losses = [row["loss"] for row in rows]
                numbers[f"{stage}_loss"] = losses[-1]
                findings.append(f"The {stage}'s loss after {steps * len(rows):,} steps: {losses[-1]:.4f}.")
                charts.append(_curve(stage, steps, losses))
        for row in (where(found, stage="decoder") or where(found, stage="autoencoder"))[-1:]:
            numbers["autoencoder_error"] = row["error"]
        for row in where(found, stage="model"):
            numbers |= {"bytes": row["bytes"], "parameters": row["parameters"]}
            findings.append(f"The model has {row['parameters']:,} numbers and takes {row['bytes'] / 1e6:.1f} MB.")
            pictures.append(
                Picture(row["encoded"], "Every other one: a picture, and what the autoencoder makes of it.")
            )
            pictures.append(Picture(row["picture"], f"Names under the styles {', '.join(SEEN_STYLES)}, then scenes."))
        return Answer(findings, numbers, (), charts, pictures)


@lru_cache(maxsize=1)
def _pictures(num_scenes: int, copies: int, common_copies: int, seed: int) -> Images:
    things = [emoji(seed=seed + number).images for number in range(copies + common_copies)]
    common = [at for at, name in enumerate(named("seen") * len(SEEN_STYLES)) if name in scene_names()]
    return joined([*things[:copies], *(one[common] for one in things[copies:]), scenes(num_scenes, seed).images])


def _told(seed: int) -> list[str]:
    """Captions of the grid: the same names under each seen style, then scenes of another seed than those learned."""
    names = named("seen")
    order = torch.randperm(len(names), generator=stream(seed, "shown"))[:SHOWN].tolist()
    things = [caption(style, names[index]) for style in SEEN_STYLES for index in order]
    return [*things, *scenes(SHOWN, seed + 1).images.captions]


def _slower(how: Training, number: int, stretches: int) -> Training:
    """The training of one stretch: its rate goes down half a cosine over all of them, to a hundredth."""
    return dataclasses.replace(how, lr=how.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * number / stretches)) / 2))


def _part(folder: Path, stage: str, number: int) -> Path:
    return folder / "parts" / f"{stage}-{number:03d}.safetensors"


def _before(folder: Path, stage: str, number: int) -> State | None:
    """What the stretch before left. Older ones are deleted: nobody asks for them again."""
    if number >= 2:
        _part(folder, stage, number - 2).unlink(missing_ok=True)
    return load_state(_part(folder, stage, number - 1)) if number else None


def _split(extras: Arrays) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(moments, average of the weights)."""
    average = {name.removeprefix("average."): value for name, value in extras.items() if name.startswith("average.")}
    return {name: value for name, value in extras.items() if not name.startswith("average.")}, average


def _picture(folder: Path, name: str, pixels: Tensor, columns: int) -> None:
    (folder / "pictures").mkdir(exist_ok=True)
    save_grid(folder / "pictures" / f"{name}.png", pixels, columns)


def _curve(stage: str, steps: int, losses: Sequence[float]) -> Chart:
    def draw(axes: Axes) -> None:
        axes.plot(
            [steps * (at + 1) for at in range(len(losses))], losses, color=COLOURS["after"], marker="o", markersize=3
        )
        logarithmic(axes)
        axes.set(xlabel="steps", title=f"Loss of the {stage} (logarithmic)")

    return Chart(stage, chart(stage, 5.4, 3.2, draw, f"Loss of the {stage}"), "Mean of each stretch.")
