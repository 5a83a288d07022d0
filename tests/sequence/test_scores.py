"""What pictures of concepts are said to show while they are scored."""

import torch

from personae.core import Images
from personae.sequence.scores import saying


def test_other_words_come_with_their_article():
    pictures = Images(
        torch.zeros(3, 3, 2, 2, dtype=torch.uint8),
        captions=("a flat drawing of a <rex> and a dog", "an ant beside an <rex>", "my <rex>"),
    )
    assert saying(pictures, "<rex>", "egg").captions == (
        "a flat drawing of an egg and a dog",
        "an ant beside an egg",
        "my egg",
    )
    assert saying(pictures, "<rex>", "<tom>").captions == (
        "a flat drawing of a <tom> and a dog",
        "an ant beside a <tom>",
        "my <tom>",
    )
    assert torch.equal(saying(pictures, "<rex>", "egg").pixels, pictures.pixels)
