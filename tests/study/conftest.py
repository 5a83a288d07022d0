"""What the studies of text-to-image models share."""

import pytest

from personae.backbone.pipeline import fresh, save_pipeline
from personae.backbone.schedule import schedule
from personae.backbone.text2image import TextToImage
from personae.backbone.vocabulary import write_tokenizer
from personae.core import stream
from personae.data.emoji import vocabulary


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A pipeline's folder: random networks of tiny-t2i's size, which read every caption of the emoji pack."""
    folder = tmp_path_factory.mktemp("untrained")
    networks = fresh("tiny", write_tokenizer(folder / "words", vocabulary(), max_tokens=4000, length=24), stream(0))
    save_pipeline(TextToImage(networks, schedule(prediction_type="v_prediction", clip_sample=False)), folder / "model")
    return folder / "model"
