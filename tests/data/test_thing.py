import pytest
import torch

from personae.data import thing
from personae.data.emoji import SEEN_STYLES, pack, scene_names
from personae.errors import ConfigError


def test_one_thing_alone_and_beside_others():
    source = thing("cow", 9)
    row = list(pack().things).index("cow")
    assert all(torch.equal(source.images.pixels[at], pack().pixels[style][row]) for at, style in enumerate(SEEN_STYLES))
    assert source.images.captions[0] == "a cartoon drawing of a cow"
    assert len({bytes(picture.numpy().tobytes()) for picture in source.images.pixels}) == 9
    others = {pack().things[name].phrase for name in scene_names()}
    for said in source.images.captions[3::2]:
        assert "a cow" in said and any(other in said for other in others)


def test_every_second_one_is_alone_again_in_some_size_at_some_place():
    images = thing("cow", 23).images
    alone = images.captions[4::2]
    assert {said.replace("an ", "a ") for said in alone} <= {
        f"a {pack().words[style]} drawing of a cow" for style in SEEN_STYLES
    }
    inside = (images.pixels[4::2] < 255).any(1)
    spans = {(int(m.any(1).sum()), int(m.any(0).sum())) for m in inside}
    tops = {int(m.any(1).nonzero()[0]) for m in inside}
    assert len(spans) > 3 and len(tops) > 2 and max(max(span) for span in spans) <= 30


def test_the_first_do_not_depend_on_how_many():
    few, many = thing("crab", 5).images, thing("crab", 12).images
    assert torch.equal(few.pixels, many.pixels[:5]) and few.captions == many.captions[:5]
    assert torch.equal(thing("crab", 2).images.pixels, few.pixels[:2])


def test_another_wording():
    captions = thing("cow", 6, "a <rex>").images.captions
    assert all("a <rex>" in said and "cow" not in said for said in captions)


@pytest.mark.parametrize(("name", "shots"), [("no such thing", 3), ("cow", 0)])
def test_what_there_is_not(name, shots):
    with pytest.raises(ConfigError, match=r"named\('all'\)"):
        thing(name, shots)
