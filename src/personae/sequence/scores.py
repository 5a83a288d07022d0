"""What a model knows of the concepts so far, without drawing anything.

Letters in shapes: `B` pictures, `K` concepts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from personae.backbone.text2image import TextToImage
from personae.continual.contract import load_kept
from personae.core import Batch, Denoiser, Images, State, device_of, stream
from personae.evaluate.forgetting import drift_of_predictions
from personae.evaluate.loss import denoising_loss
from personae.infer.sample import draw, latents_at_once
from personae.objective.dc_score import dc_errors, noise_bank
from personae.sequence.config import SequenceRecipe


def scores_of(
    model: TextToImage,
    recipe: SequenceRecipe,
    heldout: Mapping[str, Images],
    said: Mapping[str, str],
    nouns: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    """Of each concept with held-out pictures: their denoising loss, the same with its noun alone in the captions, and
    for which concepts they are taken.

    `said` is how captions name each concept. `taken` counts pictures by concept, in this order: each is asked about its
    own caption with one concept after the other in the concept's place, so that candidates differ in nothing else. All
    noises are the same at every call. The model is as it is to draw.
    """
    found = {}
    bank = noise_bank(model, recipe.scoring.draws, stream(recipe.seed, "scores"))
    for name, images in heldout.items():
        with torch.no_grad():
            x_0 = model.encode(images.floats().to(device_of(model)))
        candidates = [[_said_so(text, said[name], other) for other in said.values()] for text in images.captions]
        errors = torch.cat(
            [
                dc_errors(model, one[None], texts, bank, batch_size=latents_at_once(model))
                for one, texts in zip(x_0, candidates, strict=True)
            ]
        )
        found[name] = {
            "loss": loss_of(model, recipe, images),
            "noun": loss_of(model, recipe, saying(images, said[name], nouns[name])),
            "taken": dict(zip(said, torch.bincount(errors.argmin(1), minlength=len(said)).tolist(), strict=True)),
        }
    return found


def saying(images: Images, said: str, instead: str) -> Images:
    """The same with other words for the concept in their captions, and the article that goes with them."""
    return Images(images.pixels, captions=tuple(_said_so(text, said, instead) for text in images.captions))


def _said_so(text: str, said: str, instead: str) -> str:
    article = "an" if instead[0] in "aeiou" else "a"
    return re.sub(rf"\ban? {re.escape(said)}", f"{article} {instead}", text).replace(said, instead)


def loss_of(model: Denoiser, recipe: SequenceRecipe, images: Images) -> float:
    """On the recipe's timesteps and noises, as the model is now."""
    return denoising_loss(
        model,
        images,
        grid=recipe.scoring.loss_grid,
        draws=recipe.scoring.loss_draws,
        seed=recipe.seed,
        batch_size=latents_at_once(model),
    )


@torch.no_grad()
def drift_of(model: TextToImage, kept: State, recipe: SequenceRecipe, captions: Sequence[str]) -> float:
    """How far predictions under captions of other things are from those of the untaught model: mean squared
    difference, on noised pictures that the untaught model draws of them. Leaves the model as it was kept."""
    options = recipe.sampling
    load_kept(model, State(), stream(recipe.seed, "untaught"))
    pictures = draw(model, captions, stream(recipe.seed, "drift"), steps=options.steps, guidance=options.guidance)
    x_0 = model.encode(Images(pictures).floats().to(device_of(model)))
    before = _predictions(model, x_0, captions, recipe.seed)
    load_kept(model, kept, stream(recipe.seed, "untaught"))
    return drift_of_predictions(before, _predictions(model, x_0, captions, recipe.seed))


def _predictions(
    model: TextToImage, x_0: Float[Tensor, "B ..."], captions: Sequence[str], seed: int
) -> Float[Tensor, "B ..."]:
    """Each picture at one timestep, spread over the schedule, with a noise of its own."""
    count, most, device = len(captions), model.schedule.num_timesteps, x_0.device
    t = torch.tensor([(2 * at + 1) * most // (2 * count) for at in range(count)], device=device)
    noise = torch.randn(x_0.shape, generator=stream(seed, "drift noise")).to(device)
    x_t, parts = model.schedule.add_noise(x_0, noise, t), []
    for part in torch.arange(count).split(latents_at_once(model)):
        told, plain = tuple(captions[at] for at in part.tolist()), torch.zeros(len(part), dtype=torch.bool)
        cond = model.condition(Batch(x_t[part], plain.to(device), told))
        parts.append(model.forward(x_t[part], t[part], cond).float())
    return torch.cat(parts)
