"""Drawn faces: the same at every call, with attributes that one can see."""

import sys

import pytest
import torch

from personae.data import faces
from personae.data.faces import CLASSES, FACE_NAMES, class_names
from personae.errors import ConfigError


@pytest.fixture
def drawing():
    for package in ("dicebear", "dicebear_styles", "resvg_py"):
        pytest.importorskip(package)


def test_faces_do_not_depend_on_how_many(drawing):
    few, more = faces(3), faces(6)
    assert few.images.pixels.shape == (3, 3, 16, 16) and few.images.pixels.dtype == torch.uint8
    assert torch.equal(few.images.pixels, more.images.pixels[:3])
    assert torch.equal(few.attributes, more.attributes[:3])


def test_captions_say_the_attributes(drawing):
    source = faces(60)
    assert source.attribute_names == ("glasses", "beard", "hat", "happy", "long hair")
    for name, column in zip(source.attribute_names, source.attributes.T, strict=True):
        assert 0 < column.sum() < 60
        assert [name in caption for caption in source.images.captions] == column.bool().tolist()


def test_glasses_change_the_row_of_the_eyes(drawing):
    source = faces(60)
    bare = source.attributes[:, 0] == 0
    eyes = source.images.floats()[:, :, 5:8, 3:13].flatten(1)
    assert (eyes[bare].mean(0) - eyes[~bare].mean(0)).abs().max() > 0.3


def test_a_class_is_a_combination_of_what_can_be_seen(drawing):
    source = faces(60)
    assert source.label_names == FACE_NAMES
    assert FACE_NAMES[:5] == ("plain", "glasses", "hat", "glasses, hat", "long hair")
    assert FACE_NAMES[-1] == "glasses, hat, long hair" and len(FACE_NAMES) == 8
    for label, row in zip(source.images.labels.tolist(), source.attributes.tolist(), strict=True):
        worn = [name for name, has in zip(source.attribute_names, row, strict=True) if has and name in CLASSES]
        assert FACE_NAMES[label] == (", ".join(worn) or "plain")
    assert source.images.labels.unique().tolist() == list(range(8))


@pytest.mark.parametrize(
    ("style", "names"), [("lorelei", ("plain", "glasses")), ("adventurer", class_names(("glasses", "long hair")))]
)
def test_a_style_has_the_classes_that_it_can_draw(drawing, style, names):
    source = faces(8, style=style)
    assert source.label_names == names and source.images.labels.max() < len(names)


def test_a_style_without_any_of_them_has_no_labels(drawing):
    source = faces(2, style="croodles")
    assert source.images.labels is None and source.label_names == ()


def test_a_style_has_the_attributes_that_it_can_draw(drawing):
    source = faces(4, style="lorelei", size=24)
    assert source.images.pixels.shape == (4, 3, 24, 24)
    assert source.attribute_names == ("glasses", "beard", "happy") and source.attributes.shape == (4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 2, "style": "../secret"}, "expected one of"),
        ({"n": 2, "style": "rings"}, "draws none of"),
        ({"n": 0}, "at least 1"),
        ({"n": 2, "size": 0}, "at least 1"),
    ],
)
def test_bad_arguments(drawing, arguments, message):
    with pytest.raises(ConfigError, match=message):
        faces(**arguments)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "dicebear", None)
    with pytest.raises(ConfigError, match=r'dicebear.*pip install "personae\[faces\]"'):
        faces(1)
