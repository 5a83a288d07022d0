"""C-LoRA: the price of changing what was changed, and the sum that grows by one product a concept."""

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from personae.backbone.text2image import TextToImage
from personae.continual import CLora
from personae.continual.c_lora import draw_word
from personae.core import Client, State, nothing, pick, stream
from personae.personal.delta import DELTA, is_delta
from personae.personal.lora import is_lora, products
from personae.personal.tokens import Words
from personae.testing.contract import differing
from personae.testing.tiny_pipeline import SCHEDULE, tiny_networks

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("small.py"))))

METHOD = CLora(2, "cross_kv", weight=100.0)


def dense(kept):
    """The same, with changes by earlier concepts that are nowhere near zero."""
    drawn = {n: torch.randn(v.shape, generator=stream(8, n)) for n, v in kept.params.items() if is_delta(n)}
    return replace(kept, params={**kept.params, **{n: value + value.sign() for n, value in drawn.items()}})


@pytest.fixture
def kept(build):
    return dense(small.taught(METHOD, build, 1)[0])


def price(client):
    (penalty,) = client.plan.penalties
    return penalty(client.model, small.noised_with(client.model, ["a <tom>"]))


def test_the_first_concept_pays_nothing(build):
    assert small.begun(METHOD, build, 1, State()).plan.penalties == ()


def test_the_price_is_the_formula_and_an_absolute_value_makes_no_difference(build, kept):
    positive = replace(kept, params={n: v.abs() if is_delta(n) else v for n, v in kept.params.items()})
    found = []
    for state in (kept, positive):
        client = small.begun(METHOD, build, 2, state)
        assert price(client).item() == 0, "an adapter adds nothing when it starts"
        learned = {n: v for n, v in small.scattered(client.model).items() if is_lora(n)}
        found.append(price(client).detach())
    by_hand = sum((kept.params[DELTA + name] * value).square().sum() for name, value in products(learned).items())
    assert found[0] == found[1] and float(found[0]) == pytest.approx(100 * float(by_hand), rel=1e-5)


def test_the_price_alone_drives_the_product_to_zero(build, kept):
    client = small.begun(METHOD, build, 2, kept)
    small.scattered(client.model)
    client.model.load({**client.model.params(), **pick(kept.params, is_delta)})
    live, (penalty,) = pick(client.model.live(), is_lora), client.plan.penalties
    batch = small.noised_with(client.model, ["a <tom>"])

    def size():
        return torch.cat([value.detach().flatten() for value in products(live).values()]).norm()

    before, optimizer = size(), torch.optim.Adam(live.values(), 0.01)
    for _ in range(600):
        optimizer.zero_grad()
        penalty(client.model, batch).backward()
        optimizer.step()
    assert size() < 1e-2 * before


def test_what_was_kept_changes_by_the_new_product_alone(build):
    states, method = [State()], replace(METHOD, weight=0.01)
    for number in (1, 2, 3):
        client = small.trained(method, build, number, states[-1])
        learned = client.model.params()
        assert differing(pick(states[-1].params, is_delta), pick(learned, is_delta)) == [] or number == 1
        states.append(method.end(client, states[-1]))
        before, after = (pick(state.params, is_delta) for state in states[-2:])
        added = {DELTA + name: value for name, value in products(learned).items()}
        assert after.keys() == added.keys() and all(value.any() for value in added.values())
        summed = {n: before[n] + value if n in before else 0.0 + value for n, value in added.items()}
        assert differing(summed, after) == []
    assert not any(is_lora(name) for name in states[-1].params)


def test_a_price_keeps_the_new_product_off_what_was_changed(build, kept):
    training = replace(small.TRAINING, steps=15, weight_decay=0.0)

    def met(weight):
        client = small.trained(replace(METHOD, weight=weight), build, 2, kept, training)
        added = products(client.model.params())
        return float(sum((kept.params[DELTA + name] * value).square().sum() for name, value in added.items()))

    assert met(1e4) < met(0.0) / 10


def test_captions_leave_the_noun_out():
    assert METHOD.said(small.TASKS[0]) == "<rex>"


def test_a_word_starts_at_random_as_widely_spread_as_known_ones(build):
    client = small.client_for(METHOD, build(METHOD.parts, small.TASKS[:2]), 2)
    before = client.model.params()
    (spread,) = (v.std() for n, v in client.model.base().items() if n.endswith("token_embedding.weight"))
    drawn = []
    for _ in range(100):
        draw_word(client)
        drawn.append(client.model.params()["tokens.<tom>"])
    assert differing(before, client.model.params()) == ["tokens.<tom>"]
    assert float(torch.stack(drawn).std()) == pytest.approx(float(spread), rel=0.06)
    assert float(torch.stack(drawn).mean()) == pytest.approx(0.0, abs=0.1 * float(spread))


def test_a_word_of_two_text_encoders_starts_as_each_ones_table(tmp_path):
    words = Words(("<rex>",), "dog")
    networks = tiny_networks(tmp_path, "smallest_xl")
    with torch.no_grad():
        networks.second.text_encoder.get_input_embeddings().weight.mul_(100)
    model = TextToImage(networks, SCHEDULE, nothing, words=words)
    client = Client("own", None, model, stream(0), tasks=small.TASKS[:1])
    drawn = {"tokens.<rex>": [], "tokens_2.<rex>": []}
    for _ in range(100):
        draw_word(client)
        for name, found in drawn.items():
            found.append(model.params()[name])
    one, two = (float(torch.stack(found).std()) for found in drawn.values())
    tables = [each.get_input_embeddings().weight.std().item()
              for each in (networks.text_encoder, networks.second.text_encoder)]  # fmt: skip
    assert [one, two] == pytest.approx(tables, rel=0.06) and two > 20 * one
