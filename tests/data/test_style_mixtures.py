"""Mixtures of styles: read as they are written, dealt in their shares, and no picture twice."""

import pytest
import torch

from personae.data.emoji import emoji, named, pack, scenes
from personae.data.style_mixtures import dealt, shares_of
from personae.errors import ConfigError

BOTH = "70 noto + 30 emojione"


def test_shares_are_those_that_are_written():
    assert shares_of("noto") == {"noto": 1.0}
    assert shares_of(BOTH) == {"noto": pytest.approx(0.7), "emojione": pytest.approx(0.3)}
    assert shares_of("1 noto+1.5 twemoji + 2.5 emojione")["twemoji"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    "style", ["70 noto", "noto + emojione", "70 noto + emojione", "70 noto + -1 emojione", "1 noto + 2 noto", "", "+"]
)
def test_other_texts_are_refused(style):
    with pytest.raises(ConfigError, match="neither one style nor a mixture"):
        shares_of(style)


def test_styles_alone_have_every_name_in_order():
    assert dealt([{"a": 1.0}, {"b": 1.0}], 5) == [[(s, n) for n in range(5)] for s in "ab"]


def test_no_picture_is_dealt_twice_and_shares_are_kept():
    mixtures = [{"a": 1.0}, {"a": 0.7, "b": 0.3}, {"b": 1.0}, {"c": 1.0}]
    parts = dealt(mixtures, 100)
    pictures = [picture for part in parts for picture in part]
    assert len(set(pictures)) == len(pictures)
    assert {len(part) for part in parts} == {59}, "0.7 and 1 shares of a are 100 pictures; 58.8 is 59 and 41"
    assert [style for style, _ in parts[1]].count("a") == 41
    assert all(part == sorted(part, key=lambda picture: picture[1]) for part in parts)
    assert dealt(mixtures, 100) == parts


def test_a_mixture_alone_shows_every_name_once():
    (part,) = dealt([{"a": 0.7, "b": 0.3}], 50)
    assert [name for _, name in part] == list(range(50))
    assert [style for style, _ in part].count("b") == 15


def test_more_mixtures_than_pictures_are_refused():
    with pytest.raises(ConfigError, match="share 2 pictures"):
        dealt([{"a": 1.0}] * 3, 2)


def test_pictures_and_captions_of_a_mixture_are_those_of_its_styles():
    source = emoji(["noto", "emojione", BOTH], "held_out")
    assert source.attribute_names == ("noto", "emojione", BOTH)
    assert source.attributes.sum(0).tolist() == [124, 124, 124] and len(source.images) == 372
    mixed = source.images[source.attributes[:, 2].nonzero()[:, 0]]
    words = pack().words
    in_noto = torch.tensor([words["noto"] in caption.split() for caption in mixed.captions])
    assert int(in_noto.sum()) == 87 and len(set(mixed.labels.tolist())) == 124, "no name twice"
    for style, which in (("noto", in_noto), ("emojione", ~in_noto)):
        assert torch.equal(pack().pixels[style][mixed.labels[which]], mixed.pixels[which])
        alone = source.images[source.attributes[:, ("noto", "emojione").index(style)].nonzero()[:, 0]]
        assert not set(alone.labels.tolist()) & set(mixed.labels[which].tolist()), "not in both places"


def test_styles_alone_are_as_they_were():
    source = emoji(["noto", "twemoji"], "held_out")
    assert len(source.images) == 2 * len(named("held_out"))
    assert torch.equal(source.images.labels[:212], source.images.labels[212:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: emoji(["70 noto + 30 cubism"]), "expected some of noto"),
        (lambda: emoji([BOTH, BOTH]), "each once"),
        (lambda: scenes(1, styles=[BOTH]), "expected some of noto"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
