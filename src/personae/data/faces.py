"""Drawn faces with exact attributes, as many as wanted: a stand-in for photographs of people.

Letters in shapes: `N` images, `A` attributes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from personae.core import Images
from personae.data.sources import Source
from personae.errors import ConfigError

ATTRIBUTES = {
    "glasses": ("glasses", ""),
    "beard": ("beard", ""),
    "hat": ("hat", ""),
    "happy": ("mouth", "happy"),
    "long hair": ("hair", "long"),
}
"""An attribute is present when this component of the drawing has a variant whose name starts so."""

PERCENT = {"glasses": 35, "beard": 25, "hat": 25}
"""How many of a hundred faces wear it, in a style that can draw it. The other attributes are left to the style."""

CLASSES = ("glasses", "hat", "long hair")
"""The attributes that make up a face's class: those that can be told at 16 pixels, where a beard or a smile is a few
pixels of nearly the colour of the skin."""

BACKGROUNDS = ["b6e3f4", "ffdfbf", "d1d4f9", "c0aede"]


def faces(n: int, style: str = "pixel-art", size: int = 16) -> Source:
    """`n` faces in a DiceBear style, the same ones at every call; the first of them do not depend on `n`.

    Attributes are those of ATTRIBUTES that the style can draw: all five in "pixel-art", whose own size is 16.
    Captions read "a happy pixel-art face with glasses, long hair". A class is one combination of those of CLASSES that
    the style can draw, called "plain", "glasses", "hat", "glasses, hat" and so on; without any there are no labels.
    The eight classes of "pixel-art" have shares of 25, 14, 9, 5, 23, 13, 7 and 4 %, in the order of FACE_NAMES.

    Shapes: pixels [n, 3, size, size].
    Raises: ConfigError, when a package is missing, `style` is unknown or has no attribute, or `n` or `size` is below 1.
    Source: https://www.dicebear.com. The drawings of "pixel-art" and "lorelei" are CC0; look up the licence of others.
    """
    try:
        from dicebear import Avatar, Style
        from resvg_py import svg_to_bytes

        definition = definition_of(style)
    except ImportError as error:
        raise ConfigError(f'faces needs the package {error.name}: pip install "personae[faces]"') from error
    if n < 1 or size < 1:
        raise ConfigError(f"n is {n} and size {size}, expected at least 1")
    parts = {name: part.get("variants", {}) for name, part in definition["components"].items()}
    names = tuple(
        name
        for name, (part, start) in ATTRIBUTES.items()
        if any(variant.startswith(start) for variant in parts.get(part, ()))
    )
    if not names:
        raise ConfigError(f'style {style!r} draws none of {", ".join(ATTRIBUTES)}: choose another, such as "pixel-art"')
    odds = {f"{part}Probability": percent for part, percent in PERCENT.items() if part in parts}
    options = {"size": size, "backgroundColor": BACKGROUNDS, **odds}

    drawing, pixels, attributes = Style(definition), [], []
    for number in range(n):
        face = Avatar(drawing, {"seed": f"person{number}", **options}).to_json()
        pixels.append(pixels_of(svg_to_bytes(svg_string=face["svg"])))
        attributes.append([_has(face["options"], name) for name in names])
    captions = tuple(_caption(style, [name for name, has in zip(names, row, strict=True) if has]) for row in attributes)
    known = torch.tensor(attributes, dtype=torch.int64)
    telling = [name for name in CLASSES if name in names]
    bits = 2 ** torch.arange(len(telling))
    labels = known[:, [names.index(name) for name in telling]] @ bits if telling else None
    images = Images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), labels, captions)
    return Source(images, class_names(telling) if telling else (), known, names)


def class_names(attributes: Sequence[str]) -> tuple[str, ...]:
    """Names of the 2^A combinations of attributes; combination n has attribute a where bit a of n is 1."""
    return tuple(
        ", ".join(name for place, name in enumerate(attributes) if number >> place & 1) or "plain"
        for number in range(2 ** len(attributes))
    )


FACE_NAMES = class_names(CLASSES)
"""The classes of "pixel-art"."""


def definition_of(style: str) -> Any:
    """Raises: ImportError without the package dicebear_styles."""
    listed = files("dicebear_styles").iterdir()
    known = {file.name.removesuffix(".json"): file for file in listed if file.name.endswith(".json")}
    if style not in known:
        raise ConfigError(f"style is {style!r}, expected one of {', '.join(sorted(known))}")
    return json.loads(known[style].read_text("utf-8"))


def pixels_of(png: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))  # backgrounds are opaque


def _has(options: dict[str, Any], name: str) -> bool:
    part, start = ATTRIBUTES[name]
    variant = options.get(f"{part}Variant")
    return variant is not None and str(variant).startswith(start)


def _caption(style: str, has: list[str]) -> str:
    worn = [{"beard": "a beard", "hat": "a hat"}.get(name, name) for name in has if name != "happy"]
    return f"a {'happy ' if 'happy' in has else ''}{style} face" + (f" with {', '.join(worn)}" if worn else "")
