"""Pictures of one drawn person: what a model is personalized to, and never pre-trained on.

Letters in shapes: `N` images.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from personae.core import Images
from personae.data.faces import definition_of, pixels_of
from personae.data.sources import Source
from personae.errors import ConfigError

MOODS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "pixel-art": ("mouth", {"happy": "happy", "sad": "sad"}),
    "lorelei": ("mouth", {"happy": "happy", "sad": "sad"}),
    "toon-head": (
        "mouth",
        {"agape": "surprised", "angry": "angry", "laugh": "laughing", "sad": "sad", "smile": "happy"},
    ),
    "personas": ("mouth", {"bigSmile": "laughing", "frown": "sad", "smile": "happy", "surprise": "surprised"}),
    "open-peeps": (
        "expression",
        {
            "angry": "angry",
            "fear": "afraid",
            "rage": "angry",
            "smileBig": "laughing",
            "smileLOL": "laughing",
            "smile": "happy",
            "tired": "tired",
            "veryAngry": "angry",
        },
    ),
}
"""By style: the part that shows the mood, and how captions call its variants that start so; the first that fits."""

BACKGROUNDS = {"blue": "b6e3f4", "orange": "ffdfbf", "purple": "d1c4f9", "green": "c7ecc0"}
POSE = {"rotate": [-12, 12], "translateX": [-6, 6], "translateY": [-4, 4], "scale": [0.85, 1.1]}
"""Degrees clockwise, percent to the right and down, and a factor: each picture's own are drawn from these ranges."""
LEANING_DEGREES = 5
"""From here on a caption says that the person leans."""


def identity(style: str, person: int, shots: int, size: int = 32) -> Source:
    """`shots` pictures of one person, the same ones at every call; the first of them do not depend on `shots`.

    Hair, skin, glasses, clothes and all else that makes the person stay; mood, pose and background vary. Captions say
    what varies: "a drawing of a happy person on a blue background leaning left".

    Shapes: pixels uint8 [shots, 3, size, size]; labels [shots] are all 0, with the one name "STYLE person PERSON".
    Raises: ConfigError, when a package is missing, `style` is none of MOODS, `shots` or `size` is below 1, or `person`
        is negative.
    Source: https://www.dicebear.com. "pixel-art", "lorelei" and "open-peeps" are CC0; "toon-head" (Johan Melin) and
        "personas" (Draftbit) are CC-BY-4.0.
    """
    if style not in MOODS:
        raise ConfigError(f"style is {style!r}, expected one of {', '.join(MOODS)}")
    if shots < 1 or size < 1 or person < 0:
        raise ConfigError(
            f"shots is {shots}, size {size} and person {person}, expected at least 1, at least 1 and not negative"
        )
    try:
        from dicebear import Avatar
        from resvg_py import svg_to_bytes

        definition, drawing = _drawing(style)
    except ImportError as error:
        raise ConfigError(f'identity needs the package {error.name}: pip install "personae[faces]"') from error
    name = f"{style} person {person}"
    fixed = _fixed(definition, Avatar(drawing, {"seed": name}).to_json()["options"], MOODS[style][0])
    varied = {"size": size, "backgroundColor": list(BACKGROUNDS.values()), **POSE}
    pictures = [Avatar(drawing, {**fixed, **varied, "seed": f"{name} shot {k}"}).to_json() for k in range(shots)]
    pixels = np.stack([pixels_of(svg_to_bytes(svg_string=picture["svg"])) for picture in pictures])
    captions = tuple(_caption(style, picture["options"]) for picture in pictures)
    labels = torch.zeros(shots, dtype=torch.int64)
    return Source(Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels, captions), (name,))


@cache
def _drawing(style: str) -> tuple[Any, Any]:
    """A style's definition, and what draws it: checking a definition takes longer than many pictures."""
    from dicebear import Style

    definition = definition_of(style)
    return definition, Style(definition)


def _fixed(definition: Mapping[str, Any], person: Mapping[str, Any], mood: str) -> dict[str, Any]:
    """The options that keep every part and colour of `person`, except which variant of the part `mood` is drawn."""
    options: dict[str, Any] = {}
    for part in definition["components"]:
        variant = person.get(f"{part}Variant")
        options[f"{part}Probability"] = 0 if variant is None else 100
        if variant is not None and part != mood:
            options[f"{part}Variant"] = [variant]
    for colour in definition.get("colors", {}):
        if f"{colour}Color" in person:
            options[f"{colour}Color"] = [value.lstrip("#") for value in person[f"{colour}Color"]]
    return options


def _caption(style: str, options: Mapping[str, Any]) -> str:
    part, words = MOODS[style]
    variant = str(options.get(f"{part}Variant"))
    mood = next((f"{word} " for start, word in words.items() if variant.startswith(start)), "")
    colour = {value: name for name, value in BACKGROUNDS.items()}[options["backgroundColor"][0].lstrip("#")]
    leans = (
        "" if abs(options["rotate"]) < LEANING_DEGREES else f" leaning {'right' if options['rotate'] > 0 else 'left'}"
    )
    article = "an" if mood[:1] in set("aeiou") else "a"
    return f"a drawing of {article} {mood}person on a {colour} background{leans}".replace("a orange", "an orange")
