"""A causal encoder's states give a prompt back, one's own words too; noise hides it, another prompt's states do not."""

import pytest
import torch

from personae.attack.prompts import PromptInverter, noisy_states, share_right
from personae.backbone.text2image import TextToImage
from personae.core import nothing, stream
from personae.errors import ConfigError
from personae.personal.tokens import Words
from personae.testing.tiny_pipeline import SCHEDULE, WORDS, tiny_networks

OWN = Words(("<own>",), "drawing")
PROMPTS = tuple(
    " ".join(WORDS[at] for at in torch.randint(len(WORDS), (8,), generator=stream(0, "prompt", number)).tolist())
    for number in range(12)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def client(folder):
    """Its word is far from where it started."""
    model = TextToImage(tiny_networks(folder), SCHEDULE, nothing, words=OWN)
    rows = torch.randn(1, 16, generator=stream(1)) * 0.05
    model.load({"tokens.<own>": model.params()["tokens.<own>"] + rows})
    return model


@pytest.fixture(scope="module")
def inverter(folder):
    return PromptInverter(TextToImage(tiny_networks(folder), SCHEDULE, nothing, words=OWN))


@torch.no_grad()
def sent(client, text):
    return client.captions([text], torch.tensor([False]))[0][0]


def shares(client, inverter, noise, other=0):
    """Of every prompt's tokens those that are right, when the states are those of the prompt so many places on."""
    found = []
    for number, text in enumerate(PROMPTS):
        states = sent(client, PROMPTS[(number + other) % len(PROMPTS)])
        guess = inverter.guess(noisy_states(states, noise, stream(noise != 0, text)))
        found.append(share_right(guess.tokens, inverter.tokens(text)))
    return sum(found) / len(found)


def test_a_prompt_is_read_back_and_another_prompts_states_say_nothing(client, inverter):
    """C15: at least 99 %."""
    exact, strange = shares(client, inverter, 0.0), shares(client, inverter, 0.0, other=1)
    assert exact >= 0.99
    # Nine tokens, of which the end's is always right and the others are one of eight.
    assert strange == pytest.approx((1 + 8 / len(WORDS)) / 9, abs=0.1)
    guess = inverter.guess(sent(client, PROMPTS[0]))
    assert inverter.text(guess.tokens) == PROMPTS[0]
    assert max(guess.residuals) < 1e-3 and len(guess.vectors) == 0


def test_noise_takes_it_away_little_by_little(client, inverter):
    some, most = (shares(client, inverter, noise) for noise in (0.3, 3.0))
    assert 0.99 > some > most and most < 0.2


def test_an_own_word_is_noticed_and_what_stands_beside_it_is_read(client, inverter):
    text = "a <own> drawing of a dog left of cat"
    guess = inverter.guess(sent(client, text), doubt=0.01)
    tokens = inverter.tokens(text)
    place = tokens.index(inverter.num_known)
    assert place == 1 and guess.tokens == tokens, "the tokens behind it need its vector"
    assert max(range(len(guess.residuals)), key=guess.residuals.__getitem__) == place
    assert inverter.text(guess.tokens) == "a ? drawing of a dog left of cat"
    start = inverter._model.initial(stream(0))["tokens.<own>"][0]
    ways = guess.vectors[0] - start, client.params()["tokens.<own>"][0] - start
    assert torch.cosine_similarity(*ways, dim=0) > 0.9


def test_known_tokens_alone_mark_the_place_by_a_residual_and_lead_astray_behind_it(client, inverter):
    guess = inverter.guess(sent(client, "a <own> drawing of a dog"))
    assert max(guess.tokens) < inverter.num_known and len(guess.vectors) == 0
    assert guess.residuals[1] > 0.1 > 0.001 > guess.residuals[0]
    assert guess.tokens[0] == inverter.tokens("a")[0]
    assert share_right(guess.tokens, inverter.tokens("a <own> drawing of a dog"), range(2, 7)) < 0.5


def test_reading_one_prompt_leaves_nothing_for_the_next(client, inverter):
    before = inverter.guess(sent(client, PROMPTS[0]))
    inverter.guess(sent(client, "dog <own>"), doubt=0.01)
    after = inverter.guess(sent(client, PROMPTS[0]))
    assert (before.tokens, before.residuals) == (after.tokens, after.residuals)


def test_share_right():
    assert share_right((1, 2, 3), (1, 2, 4)) == pytest.approx(2 / 3)
    assert share_right((1,), (1, 2)) == 0.5, "what was not read is wrong"
    assert share_right((1, 2, 3), (1, 9, 3), [0, 2]) == 1
    with pytest.raises(ConfigError, match="no tokens"):
        share_right((1,), (1,), [])


def test_two_encoders_are_refused(tmp_path):
    model = TextToImage(tiny_networks(tmp_path, "smallest_xl"), SCHEDULE)
    with pytest.raises(ConfigError, match="this one has two"):
        PromptInverter(model)
