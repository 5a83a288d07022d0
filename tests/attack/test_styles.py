"""Styles are named from descriptors that tell them, and not from those that do not."""

import math

import pytest
import torch

from personae.attack.styles import (
    alike,
    blurred,
    known_vectors,
    naming,
    naming_by_chance,
    shadow_descriptor,
    token_of,
    word_descriptors,
    word_rank,
)
from personae.backbone.text2image import TextToImage
from personae.core import Client, ClientData, Images, State, Training, nothing, stream
from personae.errors import ConfigError
from personae.methods import ClusterLora
from personae.methods.cluster_lora import LEVELS, projected
from personae.personal.lora import Lora
from personae.personal.tokens import Words
from personae.testing.tiny_pipeline import SCHEDULE, tiny_networks

STYLES, CLIENTS = 4, 40
CENTRES = torch.eye(16)[:STYLES]
TRUTH = [number % STYLES for number in range(CLIENTS)]
CAPTIONS = ("a <own> of a dog", "a <own> of a cat")


def descriptors(noise):
    return blurred(CENTRES[TRUTH], noise, stream(0))


@pytest.fixture
def model(tmp_path):
    return TextToImage(tiny_networks(tmp_path), SCHEDULE, nothing, lora=Lora(2), words=Words(("<own>",), "drawing"))


def test_styles_are_named_where_descriptors_tell_them():
    found = naming(alike(descriptors(0.05), CENTRES), TRUTH)
    assert (found.top_1, found.reciprocal_rank) == (1, 1) and found.bits == pytest.approx(math.log2(STYLES))


def test_and_not_where_they_do_not():
    scores = alike(descriptors(20.0), CENTRES)
    found, (chance, most) = naming(scores, TRUTH), naming_by_chance(scores, TRUTH, stream(0))
    assert found.top_1 <= most < 0.5 and chance.top_1 == pytest.approx(1 / STYLES, abs=0.02)
    harmonic = sum(1 / rank for rank in range(1, STYLES + 1)) / STYLES
    assert chance.reciprocal_rank == pytest.approx(harmonic, abs=0.02)
    assert 0.01 < chance.bits < 0.4, "counts of forty clients tell a little where there is nothing"


def test_shuffled_styles_are_named_by_chance_from_the_best_descriptors():
    chance, most = naming_by_chance(alike(descriptors(0.0), CENTRES), TRUTH, stream(0))
    assert chance.top_1 == pytest.approx(1 / STYLES, abs=0.02) and 1 / STYLES < most < 0.5


def test_a_guess_among_equals_is_none():
    found = naming(torch.zeros(4, 2), [0, 1, 0, 1])
    assert (found.top_1, found.reciprocal_rank, found.bits) == (0, 0.5, 0)


def test_bits_of_a_guess_that_is_always_the_same_wrong_one():
    """It tells everything, and names nothing."""
    scores = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[[0, 1, 0, 1]]
    found = naming(scores, [0, 1, 0, 1])
    assert (found.top_1, found.reciprocal_rank, found.bits) == (0, 0.5, 1)


@pytest.mark.parametrize("truth", [[], [0], [0, 7]])
def test_styles_that_do_not_fit_are_refused(truth):
    with pytest.raises(ConfigError, match="expected one for each row"):
        naming(torch.zeros(2, 3), truth)


def test_a_word_described_as_pictures_would_that_pull_straight_to_it(model):
    """Pictures whose loss is the distance to "dog" give exactly what the attacker expects of "dog"."""
    before = model.params()
    expected = word_descriptors(model, {"a": "dog", "b": "cat"}, 8)
    assert all(torch.equal(value, before[name]) for name, value in model.params().items()), "it is left as it was"
    word = before["tokens.<own>"].clone().requires_grad_()
    (word - known_vectors(model)[token_of(model, "dog")]).square().sum().backward()
    sent = projected(word.grad.flatten().repeat(LEVELS), 8)
    assert sent.shape == (8,) and torch.allclose(sent, expected["a"], atol=1e-6)
    assert alike(sent[None], expected["b"][None]) < 0.99


def test_a_word_of_several_tokens_is_refused(model):
    with pytest.raises(ConfigError, match="'zebra' is 5 tokens"):
        word_descriptors(model, {"a": "zebra"}, 8)


def test_a_shadow_does_what_a_client_does(model):
    """The same images and draws give the same description; others another."""
    method = ClusterLora(
        Training(2, 0.01, 2), Training(3, 0.05, 2), Training(1, 0.01, 2), describing=2, descriptor_width=8
    )
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=stream(0))
    images = Images(pixels, captions=CAPTIONS * 2)

    def at(seed):
        return Client("shadow", ClientData(images, images), model, stream(seed))

    first, again, other = (shadow_descriptor(method, at(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (8,) and float(first.norm()) == pytest.approx(1)
    model.load(model.initial(stream(5)))
    update, _ = method.local(at(0), method.init(model.initial(stream(9))), State())
    assert torch.allclose(update.sent.extras["descriptor"], first, atol=1e-6)


def test_the_rank_of_a_known_word():
    table = torch.randn(50, 6, generator=stream(0))
    near = table[7] + 0.01
    assert word_rank(near[None], table, 7) == 1
    order = alike(near[None], table)[0].argsort(descending=True).tolist()
    assert [word_rank(near[None], table, token) for token in order] == list(range(1, 51))
    assert word_rank(torch.stack([-near, near]), table, 7) == 1, "the best of several vectors counts"
    start = 10 * torch.ones(6)
    token = int(alike(table[3][None] - start, table - start)[0].argsort(descending=True)[1])
    assert word_rank((start + 3 * (table[3] - start))[None], table, 3, start) == 1
    assert word_rank((start + 3 * (table[3] - start))[None], table, token, start) == 2


def test_ranks_of_a_random_vector_are_spread_evenly():
    table = torch.randn(50, 6, generator=stream(0))
    ranks = [word_rank(torch.randn(1, 6, generator=stream(1, n)), table, 7) for n in range(400)]
    assert sum(ranks) / len(ranks) == pytest.approx(25.5, abs=3) and {1, 50} <= set(ranks)


def test_blurring_shortens_first():
    long = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    assert torch.allclose(blurred(long, 0.0, stream(0)), torch.tensor([[0.6, 0.8], [0.3, 0.4]]))
    spread = blurred(torch.zeros(1000, 64), 0.1, stream(0))
    assert spread.std().item() == pytest.approx(0.1, rel=0.02)
    assert spread.norm(dim=1).mean().item() == pytest.approx(0.1 * 64**0.5, rel=0.02)
