"""The emoji pack: what it holds, what is held out of it, and that captions are true."""

import hashlib
import importlib
import json
import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from personae.data.emoji import (
    HELD_OUT_STYLES,
    LAYOUTS,
    PLACES,
    SEEN_STYLES,
    STYLES,
    caption,
    emoji,
    named,
    pack,
    planned_scenes,
    scene_names,
    scenes,
    vocabulary,
)
from personae.data.sources import shrink
from personae.errors import ConfigError, DataError

FOLDER = Path(str(files("personae.data"))) / "packs/emoji"
INDEX = json.loads((FOLDER / "index.json").read_text("utf-8"))


def digest(picture):
    return hashlib.sha256(picture.numpy().tobytes()).hexdigest()


def nearest(ones, others):
    """The least distance of any of `ones` from any of `others` or its mirror image.

    Ink is what differs from white; the distance is the squared ink that two pictures do not share, as a part of their
    own: 0 for the same picture, 2 for pictures that do not overlap.
    """
    one = (255 - ones.float()).flatten(1)
    least = torch.tensor(9.0)
    for turned in (others, others.flip(-1)):
        other = (255 - turned.float()).flatten(1)
        own = (one**2).sum(1)[:, None] + (other**2).sum(1)
        least = torch.minimum(least, (torch.cdist(one, other, compute_mode="use_mm_for_euclid_dist") ** 2 / own).min())
    return float(2 * least)


# --- the pack --------------------------------------------------------------------------------------------------------


def test_the_pack_is_small_and_names_its_licences():
    kept = list(FOLDER.iterdir())
    assert sum(file.stat().st_size for file in kept) < 6_000_000
    assert {file.name for file in kept} == {INDEX["styles"][s]["sheet"] for s in STYLES} | {"index.json", "NOTICE"}
    notice = (FOLDER / "NOTICE").read_text("utf-8")
    for name, style in INDEX["styles"].items():
        (block,) = (part for part in re.split(r"\n\n(?=\S)", notice) if f'(style "{name}")' in part)
        assert all(style[key] in block for key in ("title", "author", "licence", "url", "package", "version"))
    assert {style["licence"] for style in INDEX["styles"].values()} == {"Apache-2.0", "MIT", "CC-BY-4.0"}


def test_no_file_tells_where_it_was_made():
    for file in ("index.json", "NOTICE"):
        assert not re.search(r"/(home|tmp|root|work|Users)/", (FOLDER / file).read_text("utf-8"))


def test_there_are_over_a_thousand_names_and_a_fifth_is_held_out():
    assert len(named("all")) > 1000 and named("all") == tuple(sorted(named("all")))
    assert set(named("seen")) | set(named("held_out")) == set(named("all"))
    assert not set(named("seen")) & set(named("held_out"))
    assert 0.18 < len(named("held_out")) / len(named("all")) < 0.22
    assert {style for style in STYLES if INDEX["styles"][style]["held_out"]} == set(HELD_OUT_STYLES)


def test_the_hash_of_a_family_says_what_is_held_out():
    for thing in pack().things.values():
        assert thing.held_out == (int(hashlib.sha256(thing.family.encode()).hexdigest(), 16) % 5 == 0)
    for series in (r".+-oclock", r".*moon(-face)?", r"(blue|red|green|purple|yellow|black)-heart"):
        assert len({thing.family for name, thing in pack().things.items() if re.fullmatch(series, name)}) == 1


def test_no_held_out_picture_is_a_seen_one():
    seen, held_out = emoji(SEEN_STYLES, "seen"), emoji(STYLES, "held_out")
    shown = {digest(picture) for picture in seen.images.pixels}
    assert not shown & {digest(picture) for picture in held_out.images.pixels}
    assert not shown & {digest(picture) for picture in emoji(HELD_OUT_STYLES, "all").images.pixels}
    assert digest(seen.images.pixels[7]) in {digest(picture) for picture in emoji(["noto"], "all").images.pixels}


@pytest.mark.parametrize("style", STYLES)
def test_no_held_out_picture_is_nearly_a_seen_one(style):
    seen, held_out = emoji([style], "seen").images.pixels, emoji([style], "held_out").images.pixels
    assert nearest(seen, held_out) > 0.075
    shifted = held_out.roll(1, 3)
    assert nearest(torch.cat([seen, shifted[:1].flip(3)]), shifted) < 1e-3  # it would be found


def test_no_two_names_have_the_same_picture():
    for style in STYLES:
        pixels = pack().pixels[style]
        assert len({digest(picture) for picture in pixels}) == len(pixels)


# --- single things ---------------------------------------------------------------------------------------------------


def test_emoji_lists_styles_then_names():
    source, num = emoji(), len(named())
    assert source.images.pixels.shape == (3 * num, 3, 32, 32) and source.images.pixels.dtype == torch.uint8
    assert source.attribute_names == SEEN_STYLES and source.attributes.sum(0).tolist() == [num] * 3
    place = num + named().index("cat")
    assert source.attributes[place].tolist() == [0, 1, 0]
    assert source.label_names[source.images.labels[place]] == "cat"
    assert source.images.captions[place] == "a flat drawing of a cat"
    assert torch.equal(source.images.pixels[place], pack().pixels["fluent-emoji-flat"][named("all").index("cat")])


def test_labels_mean_the_same_at_every_call():
    few, all_of_them = emoji(["noto"], "held_out"), emoji(["noto"], "all")
    assert all_of_them.images.labels.tolist() == list(range(len(named("all"))))
    assert torch.equal(all_of_them.images.pixels[few.images.labels], few.images.pixels)


def test_pictures_are_drawn_on_white_and_not_cut_off():
    for style in STYLES:
        pixels = pack().pixels[style]
        frame = torch.ones(32, 32, dtype=torch.bool)
        frame[1:-1, 1:-1] = False
        assert (pixels[:, :, frame].float().mean() > 215) and (pixels.float().flatten(1).mean(1) < 254).all()


@pytest.mark.parametrize(
    ("style", "name", "said"),
    [
        ("noto", "dog", "a cartoon drawing of a dog"),
        ("emojione", "owl", "a clipart drawing of an owl"),
        ("fluent-emoji-high-contrast", "unicorn", "an ink drawing of a unicorn"),
        ("twemoji", "scissors", "a sticker drawing of scissors"),
        ("noto", "three-oclock", "a cartoon drawing of a clock at three"),
        (None, "automobile", "a drawing of a car"),
    ],
)
def test_caption(style, name, said):
    assert caption(style, name) == said


def test_a_seed_varies_captions():
    said = {caption("noto", "dog", seed) for seed in range(40)}
    assert said == {"a cartoon drawing of a dog", "a cartoon picture of a dog", "a dog in cartoon style", "a dog"}
    first = emoji(["noto"], seed=3)
    assert first.images.captions == emoji(["noto"], seed=3).images.captions != emoji(["noto"]).images.captions


def test_the_vocabulary_holds_every_caption():
    words = vocabulary()
    assert 500 < len(words) < 2000 and list(words) == sorted(set(words))
    captions = [c for seed in (None, 0, 1) for c in emoji(STYLES, "all", seed).images.captions]
    captions += [plan.caption for plan in planned_scenes(2000, styles=STYLES, names="all")]
    assert {word for text in captions for word in text.split(" ")} <= set(words)
    assert all(re.fullmatch("[a-z]+", word) for word in words)


# --- scenes ----------------------------------------------------------------------------------------------------------


def test_scenes_do_not_depend_on_how_many():
    few, more = scenes(3, seed=4), scenes(300, seed=4)
    assert few.images.pixels.shape == (3, 3, 32, 32) and few.images.pixels.dtype == torch.uint8
    assert torch.equal(few.images.pixels, more.images.pixels[:3])
    assert few.images.captions == more.images.captions[:3] != scenes(3, seed=5).images.captions
    assert torch.equal(more.images.pixels, scenes(300, seed=4).images.pixels)
    assert torch.equal(few.attributes, more.attributes[:3]) and (more.attributes.sum(1) == 1).all()


def test_scene_names_are_many_single_words_and_distinct():
    assert len(scene_names()) >= 100 and set(scene_names()) <= set(named())
    assert set(scene_names("held_out")) <= set(named("held_out"))
    things = [pack().things[name] for name in scene_names("all")]
    assert all(" " not in thing.words for thing in things)
    assert len({thing.family for thing in things}) == len(things)
    small = shrink(pack().pixels["noto"], 16)[[named("all").index(name) for name in scene_names()]]
    assert all(nearest(small[k : k + 1], small[k + 1 :]) > 0.14 for k in range(len(small) - 1))


def test_things_are_where_the_plan_says_and_the_rest_is_white():
    plans, source = planned_scenes(200, names="all"), scenes(200, names="all")
    for plan, picture, said, known in zip(
        plans, source.images.pixels, source.images.captions, source.attributes, strict=True
    ):
        assert said == plan.caption and source.attribute_names[known.argmax()] == plan.style
        rest = torch.ones(32, 32, dtype=torch.bool)
        for place, name in plan.places().items():
            top, left = PLACES[place]
            own = pack().pixels[plan.style][named("all").index(name)][None]
            assert torch.equal(picture[:, top : top + 16, left : left + 16], shrink(own, 16)[0])
            rest[top : top + 16, left : left + 16] = False
        assert (picture[:, rest] == 255).all()


def middle(plan, thing):
    (place,) = (place for place, name in plan.places().items() if name == thing)
    return np.array(PLACES[place]) + 8


def test_captions_say_where_things_are():
    """Read the relation of the first two things out of the caption, and compare the middles of both."""
    phrases = {pack().things[name].phrase: name for name in scene_names()}
    relations = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}
    found = dict.fromkeys(relations, 0)
    for plan in planned_scenes(600, seed=2):
        text = re.sub(r"^an? \w+ (drawing|picture) of | in \w+ style$", "", plan.caption)
        said = re.fullmatch(r"(.+?) (left of|right of|above|below) (.+?)(?: and (.+) (above|below|on the \w+))?", text)
        if said is None:
            assert re.fullmatch(r".+ at the (top|bottom) (left|right) and .+ at the (top|bottom) (left|right)", text)
            for phrase, place in re.findall(r"(?:^|and )(.+?) at the (\w+ \w+)", text):
                assert plan.places()[place] == phrases[phrase]
            continue
        one, relation, other, third, where = said.groups()
        axis, sign = relations[relation]
        offset = middle(plan, phrases[one]) - middle(plan, phrases[other])
        assert offset[axis] * sign == 16 and offset[1 - axis] == 0
        if third:
            away = middle(plan, phrases[third]) - middle(plan, phrases[other])
            axis, sign = {"above": (0, -1), "below": (0, 1), "on the left": (1, -1), "on the right": (1, 1)}[where]
            assert away[axis] * sign == 16
        found[relation] += 1
    assert min(found.values()) > 40


def test_scenes_show_only_what_is_asked():
    plans = planned_scenes(400)
    assert {plan.style for plan in plans} == set(SEEN_STYLES) and {plan.layout for plan in plans} == set(LAYOUTS)
    assert {name for plan in plans for name in plan.things} <= set(named("seen"))
    assert all(len(set(plan.things)) == len(plan.things) for plan in plans)
    others = planned_scenes(50, styles=["twemoji"], names="held_out", layouts=["beside"])
    assert {plan.style for plan in others} == {"twemoji"} and {plan.layout for plan in others} == {"beside"}
    assert {name for plan in others for name in plan.things} <= set(named("held_out"))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: emoji(["openmoji"]), "'openmoji'.*expected some of noto"),
        (lambda: emoji("noto"), r"expected several: \['noto'\]"),
        (lambda: emoji([]), "expected some of noto"),
        (lambda: emoji(["noto", "noto"]), "each once"),
        (lambda: emoji(names="unseen"), "'unseen', expected one of seen, held_out, all"),
        (lambda: caption("noto", "doge"), "no emoji is called 'doge'"),
        (lambda: caption("sketch", "dog"), "'sketch'"),
        (lambda: scenes(0), "n is 0, expected at least 1"),
        (lambda: scenes(1, styles=["noto", "sketch"]), "'sketch'"),
        (lambda: scenes(1, names="some"), "'some', expected one of"),
        (lambda: scenes(1, layouts=["circle"]), "'circle'.*expected some of: beside;"),
        (lambda: scenes(1, layouts=[]), "expected some of: beside;"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


module = importlib.import_module("personae.data.emoji")  # `personae.data.emoji` by attribute is the function


@pytest.fixture
def changed(monkeypatch):
    """A function that puts other bytes in the place of a file of the pack."""
    original = module._content

    def change(name, content):
        monkeypatch.setattr(module, "_content", lambda asked: content if asked == name else original(asked))

    pack.cache_clear()
    yield change
    pack.cache_clear()


def test_a_damaged_sheet(changed):
    whole = (FOLDER / INDEX["styles"]["noto"]["sheet"]).read_bytes()
    changed(INDEX["styles"]["noto"]["sheet"], whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"noto.*install personae anew"):
        pack()


def test_a_sheet_with_other_pixels(changed):
    changed(INDEX["styles"]["noto"]["sheet"], (FOLDER / INDEX["styles"]["twemoji"]["sheet"]).read_bytes())
    with pytest.raises(DataError, match="pixels of noto"):
        pack()


def test_a_missing_file(monkeypatch):
    with pytest.raises(DataError, match=r"lacks nothing\.png"):
        module._content("nothing.png")


def test_other_words_may_be_said_of_all():
    images = emoji(["noto", "twemoji"], "held_out", wording="a <own> drawing of {thing}").images
    plain = emoji(["noto", "twemoji"], "held_out", told=False).images
    assert images.captions == tuple(text.replace("a drawing", "a <own> drawing") for text in plain.captions)
    with pytest.raises(ConfigError, match="says the same of every emoji"):
        emoji(wording="a <own>")
