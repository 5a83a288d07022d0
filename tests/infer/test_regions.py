"""Captions at their places, beside an attention that looks up each position's caption."""

import math

import pytest
import torch

from personae.backbone.text2image import TextToImage, Vector
from personae.core import Batch, nothing, stream, under
from personae.errors import ConfigError
from personae.infer.regions import InRegions, Region, parsed, positions
from personae.infer.sample import draw, sample
from personae.personal.delta import Delta
from personae.personal.lora import TEXT, Lora
from personae.personal.neurons import AT, Neurons, placed
from personae.personal.tokens import Words
from personae.testing.tiny_pipeline import SCHEDULE, tiny_networks

# diffusers' DPM-Solver hands torch tensors to numpy in a way that numpy is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PARTS = {"lora": Lora(2, "self+cross"), "delta": Delta("cross_kv"), "words": Words(("<rex>", "<tom>"), ("dog", "cat"))}
EVERYWHERE = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


@pytest.fixture
def make(tmp_path):
    """A model whose parts all do something, on random networks whose captions tell pictures far apart."""

    def made(size="smallest", opened=nothing, **parts):
        networks = tiny_networks(tmp_path, size)
        for name, weight in networks.unet.named_parameters():
            if ".attn2.to_" in name:
                weight.data.mul_(8)
        model = TextToImage(networks, SCHEDULE, opened, **parts)
        weights = [name.removeprefix(AT) for name in model.params() if name.startswith(AT)]
        some = placed({name: model.base()[name].abs() > 0.2 for name in weights})
        loaded = model.params() | some
        for name, old in loaded.items():
            if not name.startswith(AT):
                scale = 1 if "token" in name else 1 / 4
                loaded[name] = scale * torch.randn(old.shape, generator=stream(1, name))
        model.load(loaded)
        return model

    return made


def forward(model, captions, height=8, width=12, unconditional=None):
    """One call in front of latents of another size than the model's, whose cross-attention has a grid of 4 x 6."""
    x_t = torch.randn(len(captions), 4, height, width, generator=stream(2))
    none = torch.zeros(len(captions), dtype=torch.bool)
    cond = model.condition(Batch(x_t, none if unconditional is None else unconditional, tuple(captions)))
    with torch.no_grad():
        return model.forward(x_t, torch.tensor([300]).expand(len(captions)), cond)


class Literal:
    """Attention position by position and head by head, with the text of the last box that holds the position."""

    def __init__(self, texts, boxes, height, width):
        self.texts, self.boxes, self.height, self.width = texts, boxes, height, width

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        rows = []
        for image, text in zip(hidden_states, encoder_hidden_states, strict=True):
            for at, x in enumerate(image):
                y_share, x_share = (at // self.width + 0.5) / self.height, (at % self.width + 0.5) / self.width
                read = text
                for own, (left, top, right, bottom) in zip(self.texts, self.boxes, strict=True):
                    if left <= x_share < right and top <= y_share < bottom:
                        read = own
                query, keys, values = attn.to_q(x[None])[0], attn.to_k(read), attn.to_v(read)
                heads = zip(*(part.chunk(attn.heads, dim=-1) for part in (query, keys, values)), strict=True)
                seen = [torch.softmax(k @ q / math.sqrt(len(q)), dim=0) @ v for q, k, v in heads]
                rows.append(attn.to_out[0](torch.cat(seen)[None])[0])
        return torch.stack(rows).view_as(hidden_states)


@pytest.mark.parametrize("size", ["smallest", "smallest_xl"])
def test_beside_a_literal_twin(make, size):
    model, captions = make(size, **PARTS), ("a <rex> left of a <tom>", "a tree")
    regions = [Region(LEFT, "a <rex>"), Region((0.3, 0.5, 1.0, 1.0), "a <tom>")]
    found, plain = forward(InRegions(model, regions), captions), forward(model, captions)
    none = torch.zeros(1, dtype=torch.bool)
    texts = [model.condition(Batch(torch.zeros(1), none, (region.caption,))).text[0] for region in regions]
    for name, layer in model.unet.named_modules():
        if name.endswith(".attn2"):
            layer.set_processor(Literal(texts, [region.box for region in regions], 4, 6))
    torch.testing.assert_close(found, forward(model, captions), rtol=0, atol=1e-5)
    assert (found - plain).abs().max() > 1e-2, "regions matter"


@pytest.mark.parametrize(
    "parts",
    [
        {},
        PARTS,
        {"neurons": Neurons(), "words": PARTS["words"]},
        {"vector": Vector(3, "token"), "words": PARTS["words"]},
        {"half": True, "opened": under(TEXT)},
    ],
    ids=["bare", "adapters and changes", "neurons", "a client's vector", "half"],
)
def test_a_region_over_the_whole_picture_is_that_caption_alone(make, parts):
    model, options = make(**parts), {"sampler": "ddim", "steps": 4, "guidance": 3.0, "batch_size": 2}
    whole = InRegions(model, [Region(EVERYWHERE, "a cat")])
    found = sample(whole, 3, stream(3), captions=("a dog",) * 3, **options)
    alone, other = (sample(model, 3, stream(3), captions=(said,) * 3, **options) for said in ("a cat", "a dog"))
    torch.testing.assert_close(found, alone, rtol=0, atol=2e-2 if "half" in parts else 1e-5)
    assert (found - other).abs().max() > (5e-2 if "half" in parts else 1e-3)


def test_in_one_layer_positions_outside_all_boxes_see_the_caption_only(make):
    model, seen = make(), []
    layer = next(name for name, _ in model.unet.named_modules() if name.endswith(".attn2"))
    behind = model.unet.get_submodule(layer.removesuffix("attn2") + "norm3")
    behind.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    box = (0.5, 0.5, 1.0, 1.0)
    forward(model, ["a dog"])
    forward(InRegions(model, [Region(box, "a cat left of a tree")]), ["a dog"])
    inside = positions(box, 4, 6)
    outside = [at for at in range(24) if at not in inside.tolist()]
    assert inside.tolist() == [15, 16, 17, 21, 22, 23]
    assert torch.equal(seen[0][outside], seen[1][outside])
    assert (seen[0][inside] - seen[1][inside]).abs().amax(1).min() > 1e-4


def test_without_regions_and_after_them_every_bit_is_as_before(make):
    model, captions = make(**PARTS), ("a <rex>", "a dog")
    before = draw(model, captions, stream(4), steps=3)
    assert torch.equal(before, draw(InRegions(model, ()), captions, stream(4), steps=3))
    regions = InRegions(model, [Region(LEFT, "a cat"), Region(RIGHT, "a <tom>")])
    assert not torch.equal(before, draw(regions, captions, stream(4), steps=3))
    with pytest.raises(RuntimeError):
        forward(regions, captions, height=0)
    assert torch.equal(before, draw(model, captions, stream(4), steps=3))


def test_the_unconditional_half_of_guidance_has_no_regions(make):
    model, captions = make(), ("a dog", "a dog")
    regions = InRegions(model, [Region(EVERYWHERE, "a cat")])
    nulls = [sample(each, 2, stream(5), steps=2, guidance=0.0, captions=captions) for each in (model, regions)]
    assert torch.equal(*nulls)
    assert regions.condition(Batch(torch.zeros(2), torch.ones(2, dtype=torch.bool), captions)).texts == ()
    mixed = torch.tensor([False, True])
    plain, told = (forward(each, captions, unconditional=mixed) for each in (model, regions))
    torch.testing.assert_close(plain[1], told[1], rtol=0, atol=1e-5)
    assert (plain[0] - told[0]).abs().max() > 1e-3


def test_of_overlapping_regions_the_last_one_wins(make):
    model, one, other = make(), Region(EVERYWHERE, "a dog"), Region(EVERYWHERE, "a cat")
    both, turned, alone = (
        forward(InRegions(model, each), ["a tree"]) for each in ([one, other], [other, one], [other])
    )
    assert torch.equal(both, alone) and not torch.equal(turned, alone)


@pytest.mark.parametrize(
    ("box", "height", "width", "expected"),
    [
        (LEFT, 2, 4, [0, 1, 4, 5]),
        (RIGHT, 2, 4, [2, 3, 6, 7]),
        ((0.0, 0.4, 1.0, 0.6), 3, 2, [2, 3]),
        ((0.34, 0.0, 1.0, 1.0), 1, 3, [1, 2]),  # by the middles of positions, of which the first is at 1/6
        ((0.9, 0.9, 0.95, 0.95), 2, 2, [3]),  # none inside: the nearest
        ((0.0, 0.0, 0.01, 1.0), 2, 2, [0, 2]),  # thinner than a column: the nearest one
        (RIGHT, 1, 1, [0]),
        (EVERYWHERE, 2, 2, [0, 1, 2, 3]),
    ],
)
def test_positions_of_a_box(box, height, width, expected):
    assert positions(box, height, width).tolist() == expected


def test_a_region_is_read():
    assert parsed("0,0,0.5,1: a <rex>") == Region((0.0, 0.0, 0.5, 1.0), "a <rex>")
    assert parsed(" 0.25 , 0, 1, 1:a sign: stop") == Region((0.25, 0.0, 1.0, 1.0), "a sign: stop")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,0,1,1", "the region '0,0,1,1' has no caption; expected \"left,top,right,bottom: caption\""),
        ("0,0,1: a dog", "begins with '0,0,1', expected four numbers"),
        ("0,0,1,1,1: a dog", "begins with '0,0,1,1,1', expected four numbers"),
        ("left: a dog", "begins with 'left', expected four numbers"),
        ("0,0,1,1: ", "the box 0,0,1,1 of the caption '' says nothing"),
        ("0,0,2,1: a dog", "the box 0,0,2,1 of the caption 'a dog' is outside the picture; expected shares"),
        ("-0.1,0,1,1: a dog", "is outside the picture"),
        ("0,0,nan,1: a dog", "the box 0,0,nan,1 of the caption 'a dog' is outside the picture"),
        ("0.5,0,0.5,1: a dog", "the box 0.5,0,0.5,1 of the caption 'a dog' is empty; expected left below right"),
        ("0,1,1,0: a dog", "is empty"),
    ],
)
def test_what_is_no_region_is_said(text, message):
    with pytest.raises(ConfigError) as error:
        parsed(text)
    assert message in str(error.value)


def test_a_caption_that_is_too_long_is_said(make):
    with pytest.raises(ConfigError, match="tokens, of which this model reads 12"):
        draw(InRegions(make(), [Region(LEFT, "a dog " * 8)]), ("a dog",), stream(6), steps=1)
