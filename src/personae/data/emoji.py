"""Captioned emoji in five drawing styles, and small scenes composed of them: a tiny world for text-to-image models.

The pack comes with the library (packs/emoji; licences in its NOTICE; made by benchmarks/build_emoji_pack.py). Two whole
styles and a fifth of the names in every style are held out: a model is pre-trained without them, and they are what it
is personalized to. Names whose pictures look alike are held out together or not at all.

Letters in shapes: `N` images, `A` styles.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from torch import Tensor

from personae.core import Images, stream
from personae.data.sources import Source, shrink
from personae.data.style_mixtures import dealt, shares_of
from personae.errors import ConfigError, DataError

SEEN_STYLES = ("noto", "fluent-emoji-flat", "emojione")
HELD_OUT_STYLES = ("twemoji", "fluent-emoji-high-contrast")
STYLES = SEEN_STYLES + HELD_OUT_STYLES

SPLITS = ("seen", "held_out", "all", "common")
"""Which names: those of pre-training, those never shown there, both; of those of pre-training the ones that scenes are
made of, which a model knows best."""

TEMPLATES = ("a {style} drawing of {thing}", "a {style} picture of {thing}", "{thing} in {style} style", "{thing}")
"""The first is used unless a seed chooses. The last leaves the style open."""
WITHOUT_STYLE = "a drawing of {thing}"

PLACES = {
    "top left": (0, 0),
    "top": (0, 8),
    "top right": (0, 16),
    "left": (8, 0),
    "right": (8, 16),
    "bottom left": (16, 0),
    "bottom": (16, 8),
    "bottom right": (16, 16),
}
"""Where a thing of a scene begins, in pixels from the top and from the left. It is 16 pixels high and wide."""


@dataclass(frozen=True)
class Layout:
    """Where the things of a scene are, in the order {a}, {b}, {c}, and the ways to say so."""

    places: tuple[str, ...]
    wordings: tuple[str, ...]


LAYOUTS: Mapping[str, Layout] = {
    "beside": Layout(("left", "right"), ("{a} left of {b}", "{b} right of {a}")),
    "above": Layout(("top", "bottom"), ("{a} above {b}", "{b} below {a}")),
    "falling": Layout(
        ("top left", "bottom right"),
        ("{a} at the top left and {b} at the bottom right", "{b} at the bottom right and {a} at the top left"),
    ),
    "rising": Layout(
        ("bottom left", "top right"),
        ("{a} at the bottom left and {b} at the top right", "{b} at the top right and {a} at the bottom left"),
    ),
    "beside, one below": Layout(
        ("top left", "top right", "bottom"), ("{a} left of {b} and {c} below", "{b} right of {a} and {c} below")
    ),
    "beside, one above": Layout(
        ("bottom left", "bottom right", "top"), ("{a} left of {b} and {c} above", "{b} right of {a} and {c} above")
    ),
    "above, one on the left": Layout(
        ("top right", "bottom right", "left"),
        ("{a} above {b} and {c} on the left", "{b} below {a} and {c} on the left"),
    ),
    "above, one on the right": Layout(
        ("top left", "bottom left", "right"),
        ("{a} above {b} and {c} on the right", "{b} below {a} and {c} on the right"),
    ),
}
"""By name. The first four are of two things, the others of three."""

BLOCK = 256
"""Scenes are drawn by lot in blocks of so many, each with its own generator, so that the first do not depend on `n`."""


@dataclass(frozen=True)
class Thing:
    """What the pack knows of a name. `phrase` is how captions say it, with an article where there is one."""

    name: str
    words: str
    phrase: str
    category: str
    family: str
    held_out: bool


@dataclass(frozen=True)
class Pack:
    """The whole pack. `pixels` by style are uint8 [N, 3, 32, 32], in the order of `things`; do not write to them.

    `words` by style stand for it in captions; `scene` lists the names that scenes are made of, held-out ones included.
    """

    things: Mapping[str, Thing]
    words: Mapping[str, str]
    pixels: Mapping[str, Tensor]
    scene: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """What a scene shows. `things` are names in the order of the layout's places."""

    style: str
    layout: str
    things: tuple[str, ...]
    caption: str

    def places(self) -> dict[str, str]:
        """Name by place, which is one of PLACES: what should be found where."""
        return dict(zip(LAYOUTS[self.layout].places, self.things, strict=True))


# --- the pack --------------------------------------------------------------------------------------------------------


@cache
def pack() -> Pack:
    """All of the pack, read once.

    Raises: DataError, when a file is missing or damaged.
    """
    index = json.loads(_content("index.json"))
    things = {
        t["name"]: Thing(
            t["name"], t["words"], f"{t['article']} {t['words']}".strip(), t["category"], t["family"], t["held_out"]
        )
        for t in index["things"]
    }
    return Pack(
        things,
        {style: index["styles"][style]["word"] for style in STYLES},
        {style: _sheet(index, index["styles"][style], len(things)) for style in STYLES},
        tuple(index["scene"]),
    )


def _content(name: str) -> bytes:
    file = files("personae.data").joinpath("packs", "emoji", name)
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"the emoji pack lacks {name} ({error}): install personae anew") from error


def _sheet(index: Mapping[str, Any], style: Mapping[str, Any], num_things: int) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    size, columns = index["size"], index["columns"]
    try:
        page = np.asarray(Image.open(io.BytesIO(_content(style["sheet"]))).convert("RGB"))
        pictures = page.reshape(-1, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)[:num_things]
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise DataError(
            f"{style['sheet']} of the emoji pack cannot be read ({error}): install personae anew"
        ) from error
    found = hashlib.sha256(pictures.tobytes()).hexdigest()
    if found != style["pixels_sha256"]:
        raise DataError(
            f"the pixels of {style['sheet']} in the emoji pack have SHA-256 {found[:12]}, expected "
            f"{style['pixels_sha256'][:12]}: install personae anew"
        )
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


# --- single things ---------------------------------------------------------------------------------------------------


def emoji(
    styles: Sequence[str] = SEEN_STYLES,
    names: str = "seen",
    seed: int | None = None,
    told: bool = True,
    wording: str | None = None,
) -> Source:
    """Every named thing once in every style, style by style, in the order of names.

    Labels are places among all names, whichever are asked for, so that they mean the same at every call. Attribute a is
    1 where the picture is in the style `attribute_names[a]`. Captions read "a cartoon drawing of a dog"; a seed varies
    them over TEMPLATES. Unless the style is `told`, they read "a drawing of a dog".
    A `wording` takes their place, with {thing} for "a dog".

    A style may be a mixture, as "70 noto + 30 emojione": its pictures are in either style, in these shares. No picture
    is in two of `styles`, so that beside a mixture there are fewer of each, but equally many of all.

    Shapes: pixels uint8 [N, 3, 32, 32], attributes [N, A]; N is 798 per style for "seen", 212 for "held_out".
    Raises: ConfigError, when a style or `names` is unknown, or a wording has no {thing}; DataError, when the pack is
    damaged.
    Source: Noto Emoji, Fluent Emoji, EmojiOne 2, Twemoji; see packs/emoji/NOTICE.
    """
    _check_styles(styles, mixed=True)
    parts = dealt([shares_of(style) for style in styles], len(chosen := named(names)))
    whole, pictures = pack(), [(style, chosen[at]) for part in parts for style, at in part]
    order = {name: place for place, name in enumerate(whole.things)}
    if wording is None:
        captions = tuple(caption(style if told else None, name, seed) for style, name in pictures)
    elif "{thing}" in wording:
        captions = tuple(wording.replace("{thing}", whole.things[name].phrase) for _, name in pictures)
    else:
        raise ConfigError(f"the wording {wording!r} says the same of every emoji; put {{thing}} where its name belongs")
    return Source(
        Images(
            torch.stack([whole.pixels[style][order[name]] for style, name in pictures]),
            torch.tensor([order[name] for _, name in pictures]),
            captions,
        ),
        tuple(whole.things),
        torch.eye(len(styles), dtype=torch.int64).repeat_interleave(len(parts[0]), 0),
        tuple(styles),
    )


def named(names: str = "seen") -> tuple[str, ...]:
    """The names of a split, in order.

    Raises: ConfigError, when `names` is not one of SPLITS.
    """
    if names not in SPLITS:
        raise ConfigError(f"names is {names!r}, expected one of {', '.join(SPLITS)}")
    things = [t for t in pack().things.values() if names == "all" or t.held_out == (names == "held_out")]
    return tuple(t.name for t in things if names != "common" or t.name in pack().scene)


def caption(style: str | None, name: str, seed: int | None = None) -> str:
    """What is said of one thing: "a cartoon drawing of a dog", or "a drawing of a dog" without a style.

    A seed chooses one of TEMPLATES for this style and name.

    Raises: ConfigError, when the style or the name is unknown.
    """
    if name not in pack().things:
        raise ConfigError(f"no emoji is called {name!r}, expected one of personae.data.emoji.named('all')")
    thing = pack().things[name].phrase
    if style is None:
        return WITHOUT_STYLE.format(thing=thing)
    _check_styles([style])
    choice = 0 if seed is None else int(torch.randint(len(TEMPLATES), (), generator=stream(seed, style, name)))
    return _said(style, thing, choice)


def _said(style: str, thing: str, template: int) -> str:
    word = pack().words[style]
    text = TEMPLATES[template].format(style=word, thing=thing)
    return text.replace(f"a {word}", f"an {word}", 1) if word[0] in "aeiou" else text


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption of this file can hold, held-out names and styles included, in alphabetical order.

    Captions are words of the letters a to z with one space between them, and nothing else.
    """
    texts = [*TEMPLATES, WITHOUT_STYLE, *(w for layout in LAYOUTS.values() for w in layout.wordings), "an"]
    texts += [*pack().words.values(), *(thing.phrase for thing in pack().things.values())]
    return tuple(sorted({word for text in texts for word in text.split() if not word.startswith("{")}))


def _check_styles(styles: Sequence[str], mixed: bool = False) -> None:
    if isinstance(styles, str):
        raise ConfigError(f"styles is {styles!r}, expected several: [{styles!r}]")
    unknown = [style for style in styles if not (shares_of(style).keys() if mixed else {style}) <= set(STYLES)]
    if unknown or not styles or len(set(styles)) < len(styles):
        raise ConfigError(f"styles are {list(styles)}, expected some of {', '.join(STYLES)}, each once")


# --- scenes ----------------------------------------------------------------------------------------------------------


def scenes(
    n: int,
    seed: int = 0,
    styles: Sequence[str] = SEEN_STYLES,
    names: str = "seen",
    layouts: Sequence[str] = tuple(LAYOUTS),
) -> Source:
    """Pictures of two or three things at named places: "a cartoon drawing of a cat left of a tree and a star below".

    The same at every call; the first do not depend on `n`. What is where is told by `planned_scenes` with the same
    arguments. Attributes are the styles, as in `emoji`; there are no labels.

    Shapes: pixels uint8 [n, 3, 32, 32], attributes [n, A].
    Raises: ConfigError, when `n` is below 1 or a style, a layout or `names` is unknown; DataError, when the pack is
        damaged.
    """
    plans = planned_scenes(n, seed, styles, names, layouts)
    known = torch.tensor([[int(plan.style == style) for style in styles] for plan in plans])
    return Source(Images(drawn_scenes(plans), None, tuple(plan.caption for plan in plans)), (), known, tuple(styles))


def planned_scenes(
    n: int,
    seed: int = 0,
    styles: Sequence[str] = SEEN_STYLES,
    names: str = "seen",
    layouts: Sequence[str] = tuple(LAYOUTS),
) -> tuple[Scene, ...]:
    """What the pictures of `scenes` show. Style, layout, wording and the different things are drawn evenly."""
    if n < 1:
        raise ConfigError(f"n is {n}, expected at least 1")
    _check_styles(styles)
    if not layouts or (unknown := [layout for layout in layouts if layout not in LAYOUTS]):
        raise ConfigError(f"layouts are {unknown if layouts else []}, expected some of: {'; '.join(LAYOUTS)}")
    things = scene_names(names)
    lots = [
        torch.randint(2**40, (BLOCK, 7), generator=stream(seed, "emoji scenes", block))
        for block in range(-(-n // BLOCK))
    ]
    return tuple(_planned(lot, styles, things, layouts) for lot in torch.cat(lots)[:n].tolist())


def scene_names(names: str = "seen") -> tuple[str, ...]:
    """The names that scenes are made of: common things, told by one word, that can be known at 16 pixels."""
    chosen = set(named(names))
    return tuple(name for name in pack().scene if name in chosen)


def drawn_scenes(plans: Sequence[Scene]) -> Tensor:
    """The pictures of planned scenes. Every thing is its picture pooled by area to 16 x 16 pixels, on white.

    Shapes: uint8 [len(plans), 3, 32, 32].
    """
    order = {name: place for place, name in enumerate(pack().things)}
    small = {style: shrink(pack().pixels[style], 16) for style in {plan.style for plan in plans}}
    pixels = torch.full((len(plans), 3, 32, 32), 255, dtype=torch.uint8)
    for picture, plan in zip(pixels, plans, strict=True):
        for place, name in plan.places().items():
            top, left = PLACES[place]
            picture[:, top : top + 16, left : left + 16] = small[plan.style][order[name]]
    return pixels


def _planned(lot: Sequence[int], styles: Sequence[str], names: Sequence[str], layouts: Sequence[str]) -> Scene:
    """`lot` are seven large random numbers."""
    style, layout = styles[lot[0] % len(styles)], layouts[lot[1] % len(layouts)]
    left = list(names)
    things = tuple(left.pop(number % len(left)) for number, _ in zip(lot[4:], LAYOUTS[layout].places, strict=False))
    wordings = LAYOUTS[layout].wordings
    phrases = dict(zip("abc", (pack().things[name].phrase for name in things), strict=False))
    said = wordings[lot[2] % len(wordings)].format(**phrases)
    return Scene(style, layout, things, _said(style, said, lot[3] % len(TEMPLATES)))


# --- one thing -------------------------------------------------------------------------------------------------------


def thing(thing: str, shots: int, wording: str | None = None) -> Source:
    """Pictures of one named thing: alone in every seen style, then in turn beside or above another one, in scenes of
    two, and alone in some size at some place.

    The same at every call; the first do not depend on `shots`. Captions read "a cartoon drawing of a cow left of a
    tree"; with a `wording` that stands for "a cow".

    Shapes: pixels uint8 [shots, 3, 32, 32].
    Raises: ConfigError, when the name is unknown or `shots` is below 1; DataError, when the pack is damaged.
    """
    whole = pack()
    if thing not in whole.things or shots < 1:
        raise ConfigError(
            f"thing is {thing!r} and shots {shots}, expected one of personae.data.emoji.named('all'), and at least 1"
        )
    row = list(whole.things).index(thing)
    called = wording or whole.things[thing].phrase
    lots = torch.randint(2**40, (shots, 5), generator=stream(0, "emoji thing", thing)).tolist()
    found = [(whole.pixels[style][row], _said(style, called, 0)) for style in SEEN_STYLES[:shots]]
    for number, lot in enumerate(lots[len(SEEN_STYLES) :]):
        if number % 2:
            style = SEEN_STYLES[lot[0] % len(SEEN_STYLES)]
            found.append((_moved(whole.pixels[style][row], lot[1:]), _said(style, called, 0)))
        else:
            plan = _beside(thing, called, lot)
            found.append((drawn_scenes([plan])[0], plan.caption))
    pixels, captions = zip(*found, strict=True)
    return Source(Images(torch.stack(pixels), captions=captions))


def _moved(picture: Tensor, lot: Sequence[int]) -> Tensor:
    """The same, 20 to 30 pixels wide, somewhere on white. `lot` are three large random numbers, or more."""
    size = 20 + lot[0] % 11
    top, left = (number % (33 - size) for number in lot[1:3])
    moved = torch.full_like(picture, 255)
    moved[:, top : top + size, left : left + size] = shrink(picture[None], size)[0]
    return moved


def _beside(thing: str, called: str, lot: Sequence[int]) -> Scene:
    """`lot` are five large random numbers."""
    layouts = [name for name, layout in LAYOUTS.items() if len(layout.places) == 2]
    others = [name for name in scene_names() if name != thing]
    style, layout, other = (
        many[number % len(many)] for many, number in zip((SEEN_STYLES, layouts, others), lot, strict=False)
    )
    things = (thing, other) if lot[3] % 2 else (other, thing)
    phrases = {thing: called, other: pack().things[other].phrase}
    wordings = LAYOUTS[layout].wordings
    said = wordings[lot[4] % len(wordings)].format(a=phrases[things[0]], b=phrases[things[1]])
    return Scene(style, layout, things, _said(style, said, 0))
