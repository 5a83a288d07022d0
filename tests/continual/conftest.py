"""The smallest model that has every part, and concepts for it."""

import pytest

from personae.backbone.text2image import TextToImage
from personae.core import nothing
from personae.personal.tokens import Words
from personae.testing.tiny_pipeline import SCHEDULE, tiny_networks


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """A function from a method's parts and concepts to a new model."""
    folder = tmp_path_factory.mktemp("tokenizer")

    def built(parts, tasks):
        words = Words(tuple(task.word for task in tasks), tuple(task.noun for task in tasks))
        own = {"lora": parts.lora, "delta": parts.delta, "neurons": parts.neurons, "words": words}
        return TextToImage(tiny_networks(folder), SCHEDULE, nothing, **own)

    return built
