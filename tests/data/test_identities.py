"""Pictures of one drawn person: the person stays, the rest varies and is said."""

import sys

import pytest
import torch

from personae.data import identities as module
from personae.data.identities import BACKGROUNDS, MOODS, identity
from personae.errors import ConfigError


@pytest.fixture
def drawing():
    for package in ("dicebear", "dicebear_styles", "resvg_py"):
        pytest.importorskip(package)


@pytest.mark.parametrize("style", MOODS)
def test_pictures_do_not_depend_on_how_many(drawing, style):
    few, more = identity(style, 1, 2), identity(style, 1, 4)
    assert few.images.pixels.shape == (2, 3, 32, 32) and few.images.pixels.dtype == torch.uint8
    assert torch.equal(few.images.pixels, more.images.pixels[:2]) and few.images.captions == more.images.captions[:2]
    assert few.label_names == (f"{style} person 1",) and few.images.labels.tolist() == [0, 0]
    assert len({picture.numpy().tobytes() for picture in more.images.pixels}) == 4


@pytest.fixture
def options(drawing, monkeypatch):
    """The options of every avatar that is drawn, in order."""
    import dicebear

    drawn = []

    class Watched(dicebear.Avatar):
        def to_json(self):
            made = super().to_json()
            drawn.append(made["options"])
            return made

    monkeypatch.setattr(dicebear, "Avatar", Watched)
    return drawn


@pytest.mark.parametrize("style", MOODS)
def test_the_person_stays_and_the_mood_varies(options, style):
    identity(style, 3, 12)
    person, *shots = options
    mood = f"{MOODS[style][0]}Variant"
    parts = [key for key in person if key.endswith(("Variant", "Color")) and key not in (mood, "backgroundColor")]
    assert len(parts) >= 4
    for shot in shots:
        assert {key: shot.get(key) for key in parts} == {key: person[key] for key in parts}
    varied = [key for key in shots[0] if key.endswith("Variant") and key not in (*parts, mood)]
    assert not varied  # nothing that the person does not wear
    assert len({shot[mood] for shot in shots}) > 2 and len({shot["rotate"] for shot in shots}) == 12


def test_captions_say_what_varies(options):
    source = identity("pixel-art", 0, 30)
    assert source.images.captions[0].startswith("a drawing of a ")
    for said, shot, picture in zip(source.images.captions, options[1:], source.images.pixels, strict=True):
        assert ("happy" in said, "sad" in said) == (
            shot["mouthVariant"].startswith("happy"),
            shot["mouthVariant"].startswith("sad"),
        )
        assert ("leaning right" in said, "leaning left" in said) == (shot["rotate"] >= 5, shot["rotate"] <= -5)
        (colour,) = (value for name, value in BACKGROUNDS.items() if f" {name} background" in said)
        assert picture[:, 0, 0].tolist() == list(bytes.fromhex(colour))
    assert {"an orange" in said for said in source.images.captions} == {True, False}
    assert not any("a orange" in said for said in source.images.captions)


def test_persons_differ(drawing):
    one, other = (identity("toon-head", person, 3).images.pixels.float() for person in (0, 1))
    assert (one.mean(0) - other.mean(0)).abs().mean() > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bottts", 0, 2), "style is 'bottts', expected one of pixel-art"),
        (("lorelei", 0, 0), "shots is 0"),
        (("lorelei", -1, 2), "person -1"),
        (("lorelei", 0, 2, 0), "size 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        identity(*arguments)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "dicebear", None)
    with pytest.raises(ConfigError, match=r'dicebear.*pip install "personae\[faces\]"'):
        module.identity("lorelei", 0, 1)
