"""A text-to-image model with every kind of layer and hardly any weights, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from personae.backbone.pipeline import fresh, save_pipeline
from personae.backbone.schedule import schedule
from personae.backbone.text2image import Networks, TextToImage
from personae.backbone.vocabulary import write_tokenizer
from personae.core import stream

WORDS = ("a", "drawing", "of", "dog", "cat", "tree", "left", "above")

SCHEDULE = schedule(prediction_type="v_prediction", clip_sample=False)


def tiny_networks(folder: Path, size: Literal["smallest", "smallest_xl"] = "smallest") -> Networks:
    """Random ones for pictures of 8 x 8 in latents of 4 x 4 x 4, that know WORDS and read 12 tokens.

    Their tokenizer's files are written to `folder`. The same at every call.
    """
    return fresh(size, write_tokenizer(folder, WORDS, max_tokens=600, length=12), stream(0, "tiny networks"))


def tiny_pipeline(folder: Path, size: Literal["smallest", "smallest_xl"] = "smallest") -> Path:
    """The same as a folder of Stable Diffusion's kind, or XL's. Returns `folder`."""
    networks = tiny_networks(folder.with_name(folder.name + "-tokenizer"), size)
    save_pipeline(TextToImage(networks, SCHEDULE), folder)
    return folder
