"""The model that a run teaches, opened for some of its concepts."""

from __future__ import annotations

from collections.abc import Sequence

from personae.backbone.pipeline import open_pipeline
from personae.backbone.shipped import model_folder
from personae.backbone.text2image import TextToImage
from personae.continual.contract import Continual
from personae.core import Task
from personae.personal.tokens import Words
from personae.recipe.models import at_device
from personae.sequence.config import SequenceRecipe


def model_for(recipe: SequenceRecipe, method: Continual, tasks: Sequence[Task]) -> TextToImage:
    """With the method's parts and a word for each concept. Raises: ArtefactError, ConfigError."""
    parts, words = method.parts, None
    if tasks:
        starts = tuple(task.noun for task in tasks)
        words = Words(tuple(task.word for task in tasks), starts, recipe.num_vectors)
    opened = open_pipeline(
        model_folder(recipe.model), lora=parts.lora, delta=parts.delta, neurons=parts.neurons, words=words
    )
    return at_device(opened, recipe.machine.device)
