"""Draw the emoji pack that `personae.data.emoji` reads, and write it into the package.

    python benchmarks/build_emoji_pack.py                  # fetches the five packages with `npm pack`
    python benchmarks/build_emoji_pack.py --from FOLDER    # the folder that holds the five .tgz files
    python benchmarks/build_emoji_pack.py --picture docs/emoji.png

Names are those that all five sets have, less the ones of LEFT_OUT. Names whose pictures look alike in any one set form
a family, and a family is either seen in pre-training or held out as a whole. The same versions of resvg-py and Pillow
give the same bytes. Needs `personae[faces]` for resvg-py; takes a minute or two.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image, ImageDraw

OUT = Path(__file__).resolve().parent.parent / "src/personae/data/packs/emoji"
SIZE = 32
DRAWN = 128
"""Pictures are drawn at this size and reduced by Lanczos' filter, which is sharper than drawing them small."""
LEVELS = 64
"""Of each colour. No pixel moves by more than 2 of 255, and the files are a quarter smaller."""
COLUMNS = 32
"""Pictures in a row of a sheet."""


@dataclass(frozen=True)
class Set:
    """One npm package. `word` stands for the style in captions; `sha256` is that of the .tgz file."""

    version: str
    sha256: str
    word: str
    held_out: bool
    title: str
    author: str
    url: str
    licence: str
    licence_url: str


APACHE, CC_BY = "https://www.apache.org/licenses/LICENSE-2.0", "https://creativecommons.org/licenses/by/4.0/"
FLUENT_LICENCE = "https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE"
SETS = {
    "noto": Set(
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "cartoon",
        False,
        "Noto Emoji",
        "Google Inc",
        "https://github.com/googlefonts/noto-emoji",
        "Apache-2.0",
        APACHE,
    ),
    "fluent-emoji-flat": Set(
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "flat",
        False,
        "Fluent Emoji Flat",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        "MIT",
        FLUENT_LICENCE,
    ),
    "emojione": Set(
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "clipart",
        False,
        "EmojiOne 2.3",
        "EmojiOne",
        "https://github.com/EmojiTwo/emojitwo",
        "CC-BY-4.0",
        CC_BY,
    ),
    "twemoji": Set(
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "sticker",
        True,
        "Twemoji",
        "Twitter, Inc and other contributors",
        "https://github.com/jdecked/twemoji",
        "CC-BY-4.0",
        CC_BY,
    ),
    "fluent-emoji-high-contrast": Set(
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        "ink",
        True,
        "Fluent Emoji High Contrast",
        "Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
        "MIT",
        FLUENT_LICENCE,
    ),
}

RENAMED = {
    "emojione": {
        "bullseye": "direct-hit",
        "cat-with-tears-of-joy": "cat-face-with-tears-of-joy",
        "cat-with-wry-smile": "cat-face-with-wry-smile",
        "crying-cat": "crying-cat-face",
        "grinning-cat": "grinning-cat-face",
        "grinning-cat-with-smiling-eyes": "grinning-cat-face-with-smiling-eyes",
        "heart-exclamation": "heavy-heart-exclamation",
        "kissing-cat": "kissing-cat-face",
        "knocked-out-face": "dizzy-face",
        "pouting-cat": "pouting-cat-face",
        "red-exclamation-mark": "exclamation-mark",
        "red-question-mark": "question-mark",
        "robot": "robot-face",
        "smiling-cat-with-heart-eyes": "smiling-cat-face-with-heart-eyes",
        "weary-cat": "weary-cat-face",
    }
}
"""Our name, which is that of the other sets: the name in this older one."""

LEFT_OUT = {
    "a key with one character on it": r"keycap-.+",
    "a button with Japanese letters": r"japanese-.+-button",
    "a button for a kind of letters": r"input-.+",
    "a clock at half past, hard to tell from the full hours": r".+-thirty",
    "rude": r"middle-finger",
    "another thing in one of the sets": r"cricket|up-button|white-square-button",
    "in one of the sets the same picture as another name": (
        r"dotted-six-pointed-star|dvd|grinning-cat|large-orange-diamond|multiply|new-moon|pouting-face|"
        r"small-orange-diamond|white-exclamation-mark|white-question-mark"
    ),
}
"""Why, and the names as a regular expression."""

LOOK_ALIKE = 0.08
"""Names are of one family when their pictures, or one picture and the other's mirror image, differ by less in a set.

The unit is the squared difference to white that two pictures do not share, as a part of their own: 0 for the same
picture, 2 for pictures that do not overlap.
"""
SAME = 0.005
"""Below this two pictures count as the same, and one of the two names has to be left out."""

SERIES = (
    r".+-oclock",
    r"(.+-)?moon(-face)?",
    r"(black|blue|green|purple|red|yellow)-heart|heart-suit",
    r"(black|white)-(large|medium|medium-small|small)-square|(black|white)-square-button",
    r"(black|blue|red|white)-circle",
    r"(large|small)-(blue|orange)-diamond",
    r"(up|down|left|right|up-down|left-right|(up|down)-(left|right))-arrow",
    r"(left|right)-arrow-curving-.+",
    r"backhand-index-pointing-.+",
    r"(1st|2nd|3rd)-place-medal|sports-medal|military-medal",
    r"(dollar|euro|pound|yen)-banknote",
    r"(blue|green|orange|closed)-book",
    r"globe-showing-.+",
    r"speaker-.+-volume|muted-speaker",
    r"(closed|open)-mailbox-.+",
    r"magnifying-glass-.+",
    r"sun-behind-.+",
    r"cloud-with-.+|cloud",
    r"(red|green)-apple",
    r"umbrella.*|closed-umbrella",
    r"locked.*|unlocked",
    r"snowman.*",
)
"""Names that are variants of one picture, whatever the distance says."""

HELD_OUT_OF = 5
"""One family in so many is held out."""

WORDS = {
    "1st-place-medal": "gold medal",
    "2nd-place-medal": "silver medal",
    "3rd-place-medal": "bronze medal",
    "automobile": "car",
    "backhand-index-pointing-down": "hand pointing down",
    "backhand-index-pointing-left": "hand pointing left",
    "backhand-index-pointing-right": "hand pointing right",
    "backhand-index-pointing-up": "hand pointing up",
    "beer-mug": "beer",
    "biohazard": "biohazard sign",
    "birthday-cake": "cake",
    "cheese-wedge": "cheese",
    "closed-book": "red book",
    "construction": "barrier",
    "cooking": "frying pan",
    "copyright": "copyright sign",
    "customs": "customs sign",
    "deciduous-tree": "tree",
    "delivery-truck": "truck",
    "desktop-computer": "computer",
    "divide": "divide sign",
    "dizzy": "dizzy star",
    "e-mail": "email",
    "ear-of-corn": "corn",
    "foggy": "foggy city",
    "game-die": "dice",
    "gem-stone": "gem",
    "high-voltage": "lightning",
    "honeybee": "bee",
    "hot-beverage": "coffee",
    "index-pointing-up": "finger pointing up",
    "information": "information sign",
    "jack-o-lantern": "pumpkin",
    "lady-beetle": "ladybug",
    "light-bulb": "bulb",
    "locked": "lock",
    "locked-with-key": "lock with key",
    "locked-with-pen": "lock with pen",
    "mans-shoe": "shoe",
    "minus": "minus sign",
    "mobile-phone": "phone",
    "mobile-phone-off": "phone off",
    "mobile-phone-with-arrow": "phone with arrow",
    "no-bicycles": "no bicycles sign",
    "no-entry": "no entry sign",
    "no-littering": "no littering sign",
    "no-mobile-phones": "no phones sign",
    "no-one-under-eighteen": "no one under eighteen sign",
    "no-pedestrians": "no pedestrians sign",
    "no-smoking": "no smoking sign",
    "om": "om symbol",
    "oncoming-automobile": "oncoming car",
    "performing-arts": "theater masks",
    "plus": "plus sign",
    "pool-8-ball": "eight ball",
    "prohibited": "prohibited sign",
    "radioactive": "radioactive sign",
    "red-apple": "apple",
    "registered": "registered sign",
    "t-shirt": "shirt",
    "top-hat": "hat",
    "unlocked": "open lock",
    "warning": "warning sign",
    "water-wave": "wave",
    "womans-boot": "boot",
    "womans-clothes": "blouse",
    "womans-hat": "sun hat",
    "womans-sandal": "sandal",
    "wrapped-gift": "gift",
}
"""Where the name with spaces for its hyphens would not be read as what is shown."""
ZODIAC = r"aquarius|aries|cancer|capricorn|gemini|leo|libra|ophiuchus|pisces|sagittarius|scorpio|taurus|virgo"

WITHOUT_ARTICLE = """
    bacon badminton bowling bread camping cooked-rice cricket-game curry-rice
    field-hockey fire fog ice-cream ice-hockey mrs-claus nail-polish non-potable-water oden ping-pong popcorn
    potable-water sake santa-claus shaved-ice soft-ice-cream spaghetti sushi tennis zzz high-voltage ear-of-corn
    cheese-wedge hot-beverage mount-fuji money-with-wings
"""
"""Stuff, games and persons. Those whose main word is in the plural have no article either."""
SINGULAR_IN_S = ("lis", "rhinoceros")
AN_BEFORE = re.compile(r"(?!uni|one|euro|ewe)[aeiou]|hour")
SCENE = """
    cat dog bear rabbit fox frog owl duck fish whale snake snail turtle crab octopus spider butterfly elephant horse
    pig cow penguin bat bee ladybug lion tiger monkey mouse squid shrimp dolphin koala panda rooster chicken dove eagle
    bird unicorn camel deer gorilla crocodile shark wolf hamster goat dragon ant scorpion lizard rhinoceros
    tree cactus rose tulip sunflower mushroom apple banana pear peach lemon grapes watermelon pineapple strawberry
    tomato carrot corn eggplant avocado pizza hamburger taco burrito cookie doughnut candy lollipop egg croissant
    pancakes popcorn sushi cake potato beer coffee bacon cucumber cherries cheese bread key bell books hammer
    wrench scissors guitar violin trumpet drum saxophone camera television radio telephone phone laptop computer printer
    keyboard bulb candle flashlight bomb gift balloon crown ring gem hat shirt dress jeans umbrella glasses sunglasses
    watch anchor dagger shield trophy dice basketball baseball volleyball pencil paintbrush scroll envelope
    package battery microscope telescope syringe pill door bed toilet bathtub backpack handbag briefcase necktie boot
    ghost skull robot alien snowman pumpkin moai car bus taxi ambulance tractor bicycle motorcycle train airplane
    helicopter rocket sailboat ship canoe house castle church tent factory mountain volcano fountain sun star
    cloud rainbow snowflake fire tornado lightning wave ribbon shoe lock truck
"""
"""Words of things that are common, told by one word, and still known when 16 pixels high. Of
those that look alike at that size the first is taken."""
SCENE_APART = 0.15
"""At 16 pixels two things of the scenes differ by at least so much in every seen set, in the unit of LOOK_ALIKE."""


# --- reading ---------------------------------------------------------------------------------------------------------


def fetched(style: str, folder: Path) -> Path:
    """The package's .tgz file in `folder`, fetched when it is not there, and checked."""
    file = folder / f"iconify-json-{style}-{SETS[style].version}.tgz"
    if not file.is_file():
        command = ["npm", "pack", f"@iconify-json/{style}@{SETS[style].version}", "--silent"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SETS[style].sha256:
        raise SystemExit(f"{file.name} has SHA-256 {found}, expected {SETS[style].sha256}: fetch it anew")
    return file


def opened(file: Path) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The icons of a package, and its categories."""
    with tarfile.open(file) as archive:
        icons, metadata = (
            json.loads(archive.extractfile(f"package/{name}.json").read())  # type: ignore[union-attr]
            for name in ("icons", "metadata")
        )
    return icons, metadata["categories"]


def drawn(icons: Mapping[str, Any], name: str) -> NDArray[np.uint8]:
    """One picture on white, centred where it is not square. Shapes: [SIZE, SIZE, 3]."""
    flipped = False
    while name in icons.get("aliases", {}):
        alias = icons["aliases"][name]
        if unknown := set(alias) - {"parent", "hFlip"}:
            raise SystemExit(f"{name} is turned by {unknown}, which is not drawn here")
        flipped ^= alias.get("hFlip", False)
        name = alias["parent"]
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    side = max(width, height)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
        f'viewBox="{(width - side) / 2} {(height - side) / 2} {side} {side}" width="{side}" height="{side}">'
        f"{icon['body']}</svg>"
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN, height=DRAWN)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    small = page.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    pixels = np.asarray(small.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else small, np.float64)
    step = 255 / (LEVELS - 1)
    return np.rint(np.rint(pixels / step) * step).astype(np.uint8)


# --- names -----------------------------------------------------------------------------------------------------------


def shared(sets: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], dict[str, list[str]]]:
    """The names that all sets have and that are kept, and by reason those left out."""
    have = [
        icons["icons"].keys() | icons.get("aliases", {}).keys() | RENAMED.get(style, {}).keys()
        for style, icons in sets.items()
    ]
    names = sorted(set.intersection(*map(set, have)))
    out = {reason: [n for n in names if re.fullmatch(pattern, n)] for reason, pattern in LEFT_OUT.items()}
    gone = {name for some in out.values() for name in some}
    return [name for name in names if name not in gone], out


def readable(name: str) -> str:
    if re.fullmatch(ZODIAC, name):
        return f"{name} sign"
    if name.endswith("-oclock"):
        return f"clock at {name.removesuffix('-oclock')}"
    return WORDS.get(name, name.replace("-", " "))


def article(name: str) -> str:
    words = readable(name)
    head = re.split(r" (?:with|without|of|at|on|in|for|and|over|showing|lifting|pointing|behind|under) ", words)[0]
    last = head.split()[-1]
    plural = last.endswith("s") and not last.endswith(("ss", "us")) and last not in SINGULAR_IN_S
    if name in WITHOUT_ARTICLE.split() or plural:
        return ""
    return "an" if AN_BEFORE.match(words) else "a"


# --- look-alikes -----------------------------------------------------------------------------------------------------


def distances(pixels: NDArray[np.uint8], mirrored: bool) -> NDArray[np.float32]:
    """Between all pictures of a set, or between each and the mirror images of all. Shapes: [N, H, W, 3] to [N, N]."""
    ink = 255 - pixels.astype(np.float32)
    one, other = ink.reshape(len(ink), -1), (ink[:, :, ::-1] if mirrored else ink).reshape(len(ink), -1)
    energy = (one**2).sum(1)
    both = energy[:, None] + energy[None]
    return np.maximum(both - 2 * one @ other.T, 0) / (both / 2 + 1)


def same_pictures(names: Sequence[str], sheets: Mapping[str, NDArray[np.uint8]]) -> list[str]:
    """What would have to be left out. The white and black set cannot tell colours, so mirrored ones are not asked."""
    return [
        f"{style}: {names[a]} and {names[b]}"
        for style, pixels in sheets.items()
        for a, b in np.argwhere(np.triu(distances(pixels, False) < SAME, 1))
    ]


def families(names: Sequence[str], sheets: Mapping[str, NDArray[np.uint8]]) -> dict[str, str]:
    """Name to family, which is called after its first member."""
    parent = list(range(len(names)))

    def root(place: int) -> int:
        while parent[place] != place:
            place = parent[place]
        return place

    def join(one: int, other: int) -> None:
        low, high = sorted((root(one), root(other)))
        parent[high] = low

    for pixels in sheets.values():
        for mirrored in (False, True):
            for one, other in np.argwhere(distances(pixels, mirrored) < LOOK_ALIKE):
                join(int(one), int(other))
    for pattern in SERIES:
        members = [place for place, name in enumerate(names) if re.fullmatch(pattern, name)]
        for one, other in pairwise(members):
            join(one, other)
    return {name: names[root(place)] for place, name in enumerate(names)}


def is_held_out(family: str) -> bool:
    return int(hashlib.sha256(family.encode()).hexdigest(), 16) % HELD_OUT_OF == 0


def scene_names(names: Sequence[str], sheets: Mapping[str, NDArray[np.uint8]]) -> list[str]:
    """Those of SCENE that differ enough, in every seen set, from all taken before; in the order of names."""
    by_words = {readable(name): place for place, name in enumerate(names)}
    candidates = [by_words[words] for words in SCENE.split()]
    quarter = {
        s: p[candidates].reshape(-1, SIZE // 2, 2, SIZE // 2, 2, 3).mean((2, 4)).astype(np.uint8)
        for s, p in sheets.items()
        if not SETS[s].held_out
    }
    apart = np.min([np.minimum(distances(p, False), distances(p, True)) for p in quarter.values()], axis=0)
    taken: list[int] = []
    for place in range(len(candidates)):
        if all(apart[place, other] >= SCENE_APART for other in taken):
            taken.append(place)
    return sorted(names[candidates[place]] for place in taken)


# --- writing ---------------------------------------------------------------------------------------------------------


def sheet(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """All pictures in rows of COLUMNS, the last row filled up with white."""
    rows = -(-len(pixels) // COLUMNS)
    page = np.full((rows * COLUMNS, SIZE, SIZE, 3), 255, np.uint8)
    page[: len(pixels)] = pixels
    return page.reshape(rows, COLUMNS, SIZE, SIZE, 3).swapaxes(1, 2).reshape(rows * SIZE, COLUMNS * SIZE, 3)


def encoded(page: NDArray[np.uint8]) -> tuple[str, bytes]:
    """The smaller of lossless WebP and PNG: suffix and bytes."""
    kinds = {"webp": {"lossless": True, "quality": 100, "method": 6}, "png": {"optimize": True}}
    files = {}
    for kind, options in kinds.items():
        file = io.BytesIO()
        Image.fromarray(page).save(file, kind, **options)
        files[kind] = file.getvalue()
    best = min(files, key=lambda kind: len(files[kind]))
    return best, files[best]


def notice(num_names: int) -> str:
    blocks = [
        "\n".join(
            (
                f'{s.title} (style "{style}"), {s.author}',
                f"  Source:  {s.url}",
                f"  Package: @iconify-json/{style} {s.version} (npm)",
                f"  Licence: {s.licence}, {s.licence_url}",
                *([MIT] if s.licence == "MIT" else []),
            )
        )
        for style, s in SETS.items()
    ]
    changes = (
        f"The sheets beside this file hold {num_names} pictures from each of five sets of emoji, which stay under\n"
        "their own licences. What was changed: the vector drawings were put on white, drawn at 128 by 128 pixels,\n"
        "reduced to 32 by 32 with 64 levels of each colour, and joined into one sheet per set; those not square were\n"
        "centred. Names were unified, and not all drawings of the sets were taken. The authors do not endorse this\n"
        "library."
    )
    return "\n\n".join((changes, *blocks)) + "\n"


MIT = """
  Copyright (c) Microsoft Corporation.

  Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
  documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
  rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
  persons to whom the Software is furnished to do so, subject to the following conditions:

  The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
  Software.

  THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
  WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
  COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
  OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."""


def listed(items: Iterable[Any]) -> str:
    """A JSON list with one item per line."""
    return "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in items) + "\n ]"


def build(folder: Path, out: Path) -> None:
    opened_sets = {style: opened(fetched(style, folder)) for style in SETS}
    sets = {style: icons for style, (icons, _) in opened_sets.items()}
    names, left_out = shared(sets)
    sheets = {
        style: np.stack([drawn(icons, RENAMED.get(style, {}).get(name, name)) for name in names])
        for style, icons in sets.items()
    }
    if same := same_pictures(names, sheets):
        raise SystemExit("the same picture under two names, leave one out:\n" + "\n".join(same))
    if len({readable(name) for name in names}) < len(names):
        raise SystemExit("two names read the same")
    category = {
        name: kind.lower() for style in reversed(SETS) for kind, some in opened_sets[style][1].items() for name in some
    }
    family = families(names, sheets)
    things = [
        {
            "name": name,
            "words": readable(name),
            "article": article(name),
            "category": category[name],
            "family": family[name],
            "held_out": is_held_out(family[name]),
        }
        for name in names
    ]
    scene = scene_names(names, sheets)
    out.mkdir(parents=True, exist_ok=True)
    styles = {}
    for style, pixels in sheets.items():
        kind, content = encoded(sheet(pixels))
        (out / f"{style}.{kind}").write_bytes(content)
        s = SETS[style]
        styles[style] = {
            "word": s.word,
            "held_out": s.held_out,
            "title": s.title,
            "author": s.author,
            "licence": s.licence,
            "url": s.url,
            "package": f"@iconify-json/{style}",
            "version": s.version,
            "sheet": f"{style}.{kind}",
            "pixels_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        }
        print(f"{style}.{kind}: {len(content)} bytes")
    (out / "index.json").write_text(
        f'{{"size": {SIZE}, "columns": {COLUMNS},\n "styles": {json.dumps(styles, indent=2)},\n'
        f' "left_out": {json.dumps(left_out, indent=2)},\n'
        f' "scene": {json.dumps(scene)},\n "things": {listed(things)}}}\n',
        "utf-8",
    )
    (out / "NOTICE").write_text(notice(len(names)), "utf-8")
    num_held_out = sum(thing["held_out"] for thing in things)
    print(
        f"{len(names)} names, {len(set(family.values()))} families, {num_held_out} names held out, "
        f"{len(scene)} for scenes"
    )


SHOWN = (
    "cat",
    "owl",
    "fox",
    "guitar",
    "bicycle",
    "house",
    "tree",
    "umbrella",
    "anchor",
    "car",
    "pizza",
    "robot",
    "bed",
    "bomb",
)
"""Words on the page of examples; the last five are held out."""


def examples(file: Path) -> None:
    """A page of some things in all styles, a style to a row, and of some scenes with their captions."""
    from personae.data import emoji

    by_words = {thing.words: name for name, thing in emoji.pack().things.items()}
    order = {name: place for place, name in enumerate(emoji.named("all"))}
    page = Image.new("RGB", (160 + 64 * len(SHOWN), 360 + 2 * 190), "white")
    draw = ImageDraw.Draw(page)
    for row, style in enumerate(emoji.STYLES):
        held_out = ", held out" if style in emoji.HELD_OUT_STYLES else ""
        draw.text((8, 24 + 64 * row + 20), f"{style}\n({emoji.pack().words[style]}{held_out})", "black")
        for column, words in enumerate(SHOWN):
            picture = emoji.pack().pixels[style][order[by_words[words]]].permute(1, 2, 0).numpy()
            page.paste(
                Image.fromarray(picture).resize((60, 60), Image.Resampling.NEAREST), (162 + 64 * column, 26 + 64 * row)
            )
            draw.text((162 + 64 * column + 30, 12), words, "black", anchor="mm")
    plans = emoji.planned_scenes(14)
    for place, (plan, picture) in enumerate(zip(plans, emoji.drawn_scenes(plans), strict=True)):
        left, top = 8 + 150 * (place % 7), 364 + 188 * (place // 7)
        shown = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((128, 128), Image.Resampling.NEAREST)
        page.paste(shown, (left, top))
        draw.rectangle((left - 1, top - 1, left + 128, top + 128), outline="gray")
        draw.text((left, top + 131), "\n".join(wrap(plan.caption, 26)), "black", spacing=0)
    page.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--from", dest="folder", type=Path, help="folder with the .tgz files; without it, npm fetches them"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--picture", type=Path, help="only draw a page of examples from the built pack, as this PNG file"
    )
    arguments = parser.parse_args()
    if arguments.picture:
        return examples(arguments.picture)
    with tempfile.TemporaryDirectory() as temporary:
        build(arguments.folder or Path(temporary), arguments.out)


if __name__ == "__main__":
    main()
