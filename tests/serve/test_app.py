"""The server under load and under attack: nobody gets another's picture, and what is refused is refused in time."""

import asyncio
import json
from dataclasses import replace

import httpx
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from personae.backbone.text2image import TextToImage
from personae.core import stream
from personae.infer.split import SplitPlan, begin, begin_together, finish, request_digest, unsealed
from personae.serve.app import application
from personae.serve.batches import Batches, Full
from personae.serve.limits import Limits, Tokens
from personae.testing.tiny_pipeline import SCHEDULE, tiny_networks

TOKEN, BENS = "a-token-of-anna-0", "b-token-of-ben-00"
ASKED = {"captions": ["a dog"], "sampler": "dpmsolver++", "steps": 6, "calls": 2, "guidance": 3.0, "seed": 1}
SAID = ("a dog", "a cat", "a tree", "a drawing of a dog")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return TextToImage(tiny_networks(tmp_path_factory.mktemp("serve") / "tokenizer"), SCHEDULE)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.write_text(f"anna {TOKEN}\nben {BENS}\n", "utf-8")
    return Tokens.read(path)


def talk(app, work):
    """What `work`, given a client of the running app, returns."""

    async def whole():
        transport = httpx.ASGITransport(app)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers, timeout=60) as client,
        ):
            return await work(client)

    return asyncio.run(whole())


def test_a_hundred_requests_at_once_and_none_is_mixed_up(model, tokens):
    """Three plans, several captions and two tokens, in batches of sixteen pictures."""
    key = Ed25519PrivateKey.generate()
    app = application(model, key, tokens, Limits(per_minute=1000))
    asked = [{**ASKED, "captions": [SAID[n % 4]] * (1 + n % 2), "calls": 2 + n % 3, "seed": n % 50} for n in range(100)]

    async def work(client):
        public = (await client.get("/v1/model")).json()["key"]
        whose = [{"Authorization": f"Bearer {(TOKEN, BENS)[n // 6 % 2]}"} for n in range(100)]
        posts = [client.post("/v1/begin", json=each, headers=own) for each, own in zip(asked, whose, strict=True)]
        return public, await asyncio.gather(*posts)

    public, answers = talk(app, work)
    check = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
    assert {answer.status_code for answer in answers} == {200}
    packets = [unsealed(answer.content, lambda data, signature: check.verify(signature, data)) for answer in answers]
    assert len({packet.facts["request"] for packet in packets}) == 100
    for number, (each, packet) in enumerate(zip(asked, packets, strict=True)):
        plan = SplitPlan("dpmsolver++", 6, each["calls"], 3.0)
        alone = begin(model, each["captions"], plan, stream(each["seed"], "begin"))
        assert packet.facts == {**alone.facts, "request": request_digest(each["captions"], plan, each["seed"])}
        assert packet.extras.keys() == alone.extras.keys()
        assert all(torch.allclose(packet.extras[name], value, atol=1e-4) for name, value in alone.extras.items())
        if number % 7 == 0:
            pictures = finish(model, each["captions"], plan, replace(packet, facts=alone.facts))
            assert pictures.shape == (len(each["captions"]), 3, 8, 8)


def test_a_batch_has_no_more_than_its_room(app, monkeypatch):
    seen = []

    def counted(model, requests, plan, rngs):
        seen.append(sum(map(len, requests)))
        return begin_together(model, requests, plan, rngs)

    monkeypatch.setattr("personae.serve.app.begin_together", counted)
    asked = [{**ASKED, "captions": ["a dog"] * 2, "seed": n} for n in range(9)]
    answers = talk(app(batch=5, batch_seconds=0.2), lambda client: together(client, asked))
    assert {answer.status_code for answer in answers} == {200}
    assert sum(seen) == 18 and max(seen) == 4


def test_what_does_not_fit_waits_and_what_is_larger_than_the_room_goes_alone():
    seen = []

    def work(sizes):
        seen.append(sizes)
        return sizes

    async def whole():
        batches = Batches(work, kind=lambda _: 0, size=lambda size: size, room=8, seconds=0.01, waiting=8, each=8)
        running = asyncio.create_task(batches.run())
        found = await asyncio.gather(*(batches.ask("anna", size) for size in (5, 3, 1, 8, 2, 9, 4, 4)))
        running.cancel()
        return found

    assert asyncio.run(whole()) == [5, 3, 1, 8, 2, 9, 4, 4]
    assert seen == [[5, 3], [1, 2, 4], [8], [9], [4]]


def test_nothing_of_a_request_stays(model, app):
    talk(app(), lambda client: client.post("/v1/begin", json={**ASKED, "captions": ["a tree left of a cat"]}))
    assert not model.captions._told


def test_nobody_is_told_of_anothers_request():
    """What fails for a batch is tried for each alone."""

    def work(requests):
        if "bad" in requests:
            raise ValueError(f"cannot draw {requests}")
        return [request.upper() for request in requests]

    async def whole():
        batches = Batches(work, kind=lambda _: 0, size=lambda _: 1, room=8, seconds=0.01, waiting=8, each=8)
        running = asyncio.create_task(batches.run())
        found = await asyncio.gather(*(batches.ask("anna", r) for r in ("one", "bad", "two")), return_exceptions=True)
        running.cancel()
        return found

    one, bad, two = asyncio.run(whole())
    assert (one, two) == ("ONE", "TWO") and str(bad) == "cannot draw ['bad']"


def test_who_went_away_gives_its_place_up_and_one_cannot_take_all():
    async def whole():
        batches = Batches(list, kind=lambda _: 0, size=lambda _: 1, room=8, seconds=0.01, waiting=4, each=2)
        mine = [asyncio.ensure_future(batches.ask("anna", n)) for n in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Full):
            await batches.ask("anna", 2)
        other = asyncio.ensure_future(batches.ask("ben", 3))
        await asyncio.sleep(0)
        mine[0].cancel()
        await asyncio.sleep(0)
        later = asyncio.ensure_future(batches.ask("anna", 4))
        await asyncio.sleep(0)
        running = asyncio.create_task(batches.run())
        found = await asyncio.gather(mine[1], other, later)
        running.cancel()
        return found

    assert asyncio.run(whole()) == [1, 3, 4]


def test_more_than_may_wait_are_told_to_come_again(model, tokens):
    app = application(model, Ed25519PrivateKey.generate(), tokens, Limits(waiting=3, batch=1, per_minute=1000))
    answers = talk(app, lambda client: together(client, [ASKED] * 20))
    codes = [answer.status_code for answer in answers]
    assert codes.count(200) >= 3 and codes.count(503) >= 10 and set(codes) == {200, 503}
    assert all("try again" in answer.json()["error"] for answer in answers if answer.status_code == 503)


async def together(client, asked):
    return await asyncio.gather(*(client.post("/v1/begin", json=each) for each in asked))


@pytest.fixture(scope="module")
def app(model, tokens):
    return lambda **limits: application(model, Ed25519PrivateKey.generate(), tokens, Limits(**limits))


@pytest.mark.parametrize("header", [None, "Bearer nobody-knows-this", "Basic abc", "", f"Bearer {TOKEN} "])
@pytest.mark.parametrize("path", ["/v1/begin", "/v1/model"])
def test_without_a_token_nothing_is_said(app, header, path):
    async def work(client):
        client.headers.pop("Authorization")
        headers = {} if header is None else {"Authorization": header}
        if path == "/v1/model":
            return await client.get(path, headers=headers)
        return await client.post(path, json=ASKED, headers=headers)

    answer = talk(app(), work)
    assert answer.status_code == 401 and "needs a token" in answer.json()["error"]


def test_the_rate_is_each_ones_own(app):
    async def work(client):
        mine = [(await client.get("/v1/model")).status_code for _ in range(4)]
        other = await client.get("/v1/model", headers={"Authorization": f"Bearer {BENS}"})
        return mine, other.status_code

    assert talk(app(per_minute=3), work) == ([200, 200, 200, 429], 200)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": []}, "captions"),
        ({"captions": ["a dog"] * 9}, "captions: 9, at most 8"),
        ({"captions": ["dog " * 200]}, "at most 500 characters"),
        ({"captions": ["a dog and a dog and a dog and a dog and a dog"]}, "tokens, of which this model reads 12"),
        ({"captions": "a dog"}, "captions"),
        ({"sampler": "magic"}, "sampler: 'magic'"),
        ({"steps": 101}, "steps: 101, at most 100"),
        ({"steps": 0}, "steps"),
        ({"calls": 7}, "calls: 7, at most 6"),
        ({"calls": -1}, "calls"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": "3"}, "guidance"),
        ({"seed": -1}, "seed"),
        ({"words": {}}, "words"),
    ],
)
def test_what_cannot_be_drawn_is_said(app, change, message):
    body = json.dumps({**ASKED, **change})
    answer = talk(app(), lambda client: client.post("/v1/begin", content=body))
    assert answer.status_code == 422 and message in answer.json()["error"]


def test_an_odd_body_is_refused(app):
    answer = talk(app(), lambda client: client.post("/v1/begin", content=b"\xff\x00"))
    assert answer.status_code == 422


def test_a_large_body_is_not_read_to_its_end(app):
    read = []

    async def parts():
        for _ in range(1000):
            read.append(1)
            yield b" " * 1000

    answer = talk(app(), lambda client: client.post("/v1/begin", content=parts()))
    assert answer.status_code == 413 and "at most 16384 bytes" in answer.json()["error"]
    assert len(read) < 30
    told = talk(app(), lambda client: client.post("/v1/begin", content=b" " * 20_000))
    assert told.status_code == 413


def test_a_slow_client_is_not_waited_for(app):
    async def parts():
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    answer = talk(app(seconds=0.2), lambda client: client.post("/v1/begin", content=parts()))
    assert answer.status_code == 408 and "0.2 seconds" in answer.json()["error"]
