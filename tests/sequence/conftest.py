"""The smallest pipeline, and pictures of three concepts for it."""

import numpy as np
import pytest
from PIL import Image

from personae.testing.tiny_pipeline import tiny_pipeline

SMALL = (
    "lesson.stretches=2",
    "lesson.training.steps=2",
    "lesson.training.batch_size=2",
    "scoring.loss_grid=2",
    "scoring.loss_draws=1",
    "scoring.draws=2",
    "scoring.num_images=2",
    "scoring.num_general=2",
    "num_prior=2",
    "num_prompts=4",
    "sampling.steps=2",
    "machine.threads=1",
)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    return tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "model")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder with one of pictures for each of three concepts."""
    folder = tmp_path_factory.mktemp("pictures")
    for concept in ("rex", "tom", "pip"):
        (folder / concept).mkdir()
        for number in range(5):
            pixels = np.random.default_rng((ord(concept[0]), number)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / concept / f"{number}.png")
    return folder


@pytest.fixture
def small():
    return SMALL
