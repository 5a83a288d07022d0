"""A concept's pictures, with captions that say it, and what methods ask for beside them."""

from __future__ import annotations

import dataclasses
import re
from itertools import islice

import torch

from personae.backbone.text2image import TextToImage
from personae.continual.contract import Continual, caption
from personae.core import CONCEPT, ClientData, Given, Images, Task, stream
from personae.data.emoji import named, pack
from personae.errors import ConfigError, DataError
from personae.infer.sample import draw
from personae.recipe.build import source_of, split_client
from personae.sequence.config import Concept, SequenceRecipe


def read_concept(
    concept: Concept, method: Continual, recipe: SequenceRecipe, image_shape: tuple[int, int, int]
) -> ClientData:
    """Its pictures in the model's size, whose captions name it as the method does; some of them held out.

    Raises: DataError, ConfigError.
    """
    channels, size, width = image_shape
    if size != width or channels != 3:
        raise ConfigError(f"pictures of {channels} x {size} x {width} are asked for, expected square ones in colour")
    data = dataclasses.replace(concept.data, size=size)
    if data.source == "thing":  # one size, and captions that say the noun as a folder's do
        data = dataclasses.replace(concept.data, caption=f"a {concept.noun}")
    images = source_of(data).images
    if len(images) < 2:
        raise DataError(
            f"concept {concept.name!r} has {len(images)} pictures; at least 2 are needed, of which one is held out"
        )
    task = recipe.task(concept)
    told = Images(images.pixels, captions=_captions(images, task, method.said(task)))
    return split_client(concept.name, told, concept.data.heldout, recipe.seed)


def _captions(images: Images, task: Task, said: str) -> tuple[str, ...]:
    """ "a <rex>", or the pictures' own with the noun, the word, or both together replaced.

    Raises: DataError, when one names neither.
    """
    if not images.captions:
        return (caption(task, said),) * len(images)
    noun = re.escape(task.noun)
    named = re.compile(rf"{re.escape(task.word)}(?:\s+{noun}\b)?|(?<![\w<-]){noun}(?![\w>-])", re.IGNORECASE)
    missing = [text for text in images.captions if not named.search(text)]
    if missing:
        raise DataError(
            f"concept {task.name!r}: the caption {missing[0]!r} names neither {task.noun!r} nor {task.word}; "
            "write one of them where the concept is meant, or leave captions out"
        )
    return tuple(named.sub(lambda _: said, text) for text in images.captions)


def general_prompts(model: TextToImage, recipe: SequenceRecipe, count: int, nouns: frozenset[str]) -> tuple[str, ...]:
    """Captions of named things, the same ones at every call; none that says one of these nouns, and none that the model
    cannot read whole."""
    order = torch.randperm(len(named("seen")), generator=stream(recipe.seed, "prompts")).tolist()
    phrases = (pack().things[named("seen")[at]].phrase for at in order)
    taken = frozenset(noun.lower() for noun in nouns)
    others = (phrase for phrase in phrases if not taken & set(phrase.lower().split()))
    captions = (recipe.wording.replace(CONCEPT, phrase) for phrase in others)
    return tuple(islice((said for said in captions if _is_read_whole(model, said)), count))


def _is_read_whole(model: TextToImage, said: str) -> bool:
    try:
        model.captions.check([said])
    except ConfigError:
        return False
    return True


def given(method: Continual, recipe: SequenceRecipe, task: Task, model: TextToImage) -> Given:
    """What the method asks for. The model is left as it is before anybody teaches it."""
    prior = None
    if "prior_images" in method.needs:
        model.load(model.initial(stream(recipe.seed, "untaught")))
        said = (caption(task, task.noun),) * recipe.num_prior
        options = recipe.sampling
        rng = stream(recipe.seed, "prior", task.noun)
        prior = Images(draw(model, said, rng, steps=options.steps, guidance=options.guidance), captions=said)
    prompts: tuple[str, ...] = ()
    if "calibration_prompts" in method.needs:
        prompts = general_prompts(model, recipe, recipe.num_prompts, frozenset(task.noun.split()))
    return Given(prior, prompts)
