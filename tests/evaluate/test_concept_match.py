"""Pictures are taken for the concept that they are like, and never for the copy of one that is left out."""

import pytest
import torch

from personae.data.emoji import SEEN_STYLES
from personae.errors import DataError, ShapeError
from personae.evaluate.concept_match import Known, References, nearest_concepts, references, told_apart
from personae.evaluate.text2image_features import pooled, renderings


def of(*vectors, groups):
    return References(torch.tensor(vectors), tuple(groups))


# Two concepts on a plane, around the centre (1, 1): one to the right of it, one to the left.
RIGHT, LEFT = of([3.0, 1.0], [2.0, 1.0], groups="ab"), of([0.0, 1.0], [-1.0, 1.0], groups="ab")


def test_the_centre_is_taken_off_first():
    """From the origin both of these point the same way; from the centre they do not."""
    found = torch.tensor([[1.5, 1.5], [0.5, 0.5]])
    assert nearest_concepts(found, [None, None], {"right": RIGHT, "left": LEFT}) == ("right", "left")


def test_references_of_its_own_group_do_not_count():
    """The picture is a copy of one of b's, whose other picture is unlike it, and like one of a's."""
    a, b = of([0.0, 2.0], [2.0, 0.0], groups="xy"), of([3.0, 0.0], [-3.0, -2.0], groups="xy")
    copy = torch.tensor([[3.0, 0.0]])
    known = {"a": a, "b": b}
    assert nearest_concepts(copy, ["x"], known) == ("a",)
    assert nearest_concepts(copy, ["y"], known) == ("b",)
    assert nearest_concepts(copy.repeat(2, 1), ["x", "y"], known) == ("a", "b")


def test_shares_by_hand():
    """Groups a and b agree, so all 4 are right; with b's exchanged, each is taken for the other."""
    known = {"right": RIGHT, "left": LEFT}
    assert told_apart(known, [["right", "left"]]) == 1
    odd = {**known, "left": of([0.0, 1.0], [2.5, 1.0], groups="ab")}
    assert told_apart(odd, [["right", "left"]], asked="b") == 0.5  # of pictures in b, that of left is on the right
    crossed = {
        "right": of([3.0, 1.0], [-1.0, 1.0], groups="ab"),
        "left": of([0.0, 1.0], [2.0, 1.0], groups="ab"),
    }
    assert told_apart(crossed, [["right", "left"]]) == 0


def test_real_things_are_told_apart_across_styles():
    names = ("cow", "banana", "robot", "crab", "bell")
    known = {name: Known(torch.cat([renderings(s, [name]) for s in SEEN_STYLES]), SEEN_STYLES) for name in names}
    whole, small = (references(pooled(), known, size) for size in (32, 16))
    assert told_apart(whole, [names]) > 0.6 and told_apart(small, [names]) > 0.6
    noise = torch.randint(0, 256, (5, 3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    random = {name: Known(pictures, SEEN_STYLES) for name, pictures in zip(names, noise, strict=True)}
    assert told_apart(references(pooled(), random, 32), [names]) < 0.5


def test_what_is_refused():
    with pytest.raises(DataError, match="all pictures of left are of group 'a'"):
        nearest_concepts(torch.zeros(1, 2), ["a"], {"right": RIGHT, "left": of([0.0, 1.0], groups="a")})
    with pytest.raises(DataError, match="two concepts or more"):
        nearest_concepts(torch.zeros(1, 2), [None], {"right": RIGHT})
    with pytest.raises(ShapeError, match="real pictures of cow"):
        references(pooled(), {"cow": Known(torch.zeros(1, 3, 32, 32), ("a",))}, 16)
