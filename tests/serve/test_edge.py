"""From a run to a picture that a server began, over HTTPS, with real sockets."""

import http.client
import itertools
import json
import shutil
import socket
import ssl
import threading
import time

import pytest
import torch
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from personae.core import stream
from personae.errors import ArtefactError, ConfigError, RefusedPacket, ServerRefused
from personae.infer.sample import to_bytes
from personae.infer.split import SplitPlan, begin, finish
from personae.personal.tokens import Words, is_word
from personae.recipe.personal import personal_recipe
from personae.recipe.workflow import open_run, run
from personae.serve.app import application
from personae.serve.client import Server, neutral, sample_with
from personae.serve.edge import listening as listening_as
from personae.serve.edge import read_key, serve, shared_model
from personae.serve.limits import Tokens
from personae.testing.tiny_pipeline import tiny_pipeline

TOKEN = "a-token-of-anna-0"
HEAD_SECONDS = 2.0


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of one client with a word and adapters of its own."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("edge")
    (folder / "photos").mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number, 90, 200)).save(folder / "photos" / f"{number}.png")
    few = [
        "rounds=1",
        "method.training.steps=2",
        "method.training.lr=0.1",
        "sampling.steps=6",
        "evaluation.num_images=2",
    ]
    recipe = personal_recipe(
        tiny_pipeline(folder / "model"), folder / "photos", "lora+tokens", "dog", name="rex", overrides=few
    )
    return run(recipe, folder / "run")


@pytest.fixture(scope="module")
def listening(saved, certificate, tmp_path_factory):
    """Its address, and the bodies of all requests that came."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(f"anna {TOKEN}\n", "utf-8")
    app, came = application(shared_model(saved), Ed25519PrivateKey.generate(), Tokens.read(tokens)), []

    async def recording(scope, receive, send):
        async def heard():
            message = await receive()
            came.append(message.get("body", b""))
            return message

        await app(scope, heard if scope["type"] == "http" else receive, send)

    server = uvicorn.Server(listening_as(recording, "127.0.0.1", 0, *certificate, seconds=HEAD_SECONDS))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "it did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"https://127.0.0.1:{port}", came
    server.should_exit = True
    thread.join(10)


def test_the_server_needs_three_files_of_a_run(saved, tmp_path):
    for name in ("config.toml", "images.json", "server.safetensors"):
        shutil.copy(saved.folder / name, tmp_path)
    served, whole = shared_model(open_run(tmp_path)).params(), shared_model(saved).params()
    assert served.keys() == whole.keys() and all(torch.equal(served[name], whole[name]) for name in whole)


def test_a_picture_begins_there_and_ends_here(saved, listening, certificate):
    url, came = listening
    images = sample_with(saved, "rex", "a <rex> left of a tree", Server(url, TOKEN, certificate[0]), 0.3, 2, seed=4)
    plan, own = SplitPlan("dpmsolver++", 6, 2, 3.0), saved.model("rex")
    seed = int(torch.randint(2**62, (), generator=stream(4, "server", 0)))
    packet = begin(shared_model(saved), ["a dog left of a tree"] * 2, plan, stream(seed, "begin"))
    expected = to_bytes(finish(own, ["a <rex> left of a tree"] * 2, plan, packet))
    assert torch.equal(images, expected)
    sent = b"".join(came)
    assert b"a dog left of a tree" in sent and b"rex" not in sent


PROMPT, NEUTRAL = "a <rex> dog left of a tree", "a dog left of a tree"


@pytest.fixture
def travelling(saved, listening, certificate, monkeypatch):
    """Draws, and says all bytes on both ways, as they are before TLS: heads, addresses and bodies."""
    sent, came, send, read = [], [], http.client.HTTPConnection.send, http.client.HTTPResponse.read

    def sending(self, data):
        sent.append(bytes(data))
        return send(self, data)

    def reading(self, *asked):
        came.append(read(self, *asked))
        return came[-1]

    def draw():
        sample_with(saved, "rex", PROMPT, Server(listening[0], TOKEN, certificate[0]), 0.3, seed=8)

    monkeypatch.setattr(http.client.HTTPConnection, "send", sending)
    monkeypatch.setattr(http.client.HTTPResponse, "read", reading)
    return draw, sent, came


def numbers(value):
    return json.dumps(value.flatten()[:4].tolist())[1:-1]


def private_in(data, run):
    """The names of the client's own words and arrays that stand there, these as bytes or written out."""
    own = run.personal("rex")
    bare = {name: (value.flatten()[:4].numpy().tobytes(), numbers(value).encode()) for name, value in own.items()}
    found = {name for name, forms in bare.items() if any(form in data for form in forms)}
    return found | ({"rex"} if b"rex" in data.lower() else set())


def test_nothing_private_is_in_what_travels(saved, travelling):
    draw, sent, came = travelling
    draw()
    up, down = b"".join(sent), b"".join(came)
    seed = int(torch.randint(2**62, (), generator=stream(8, "server", 0)))
    plan = {"sampler": "dpmsolver++", "steps": 6, "calls": 2, "guidance": 3.0}
    assert json.loads(sent[-1]) == {"captions": [NEUTRAL], **plan, "seed": seed}
    packet = came[-1]
    head = packet[8 : 8 + int.from_bytes(packet[:8], "little")]
    assert b"extras/latent" in head, "the packet is what was recorded"
    assert any(is_word(name) for name in saved.personal("rex"))
    assert private_in(up, saved) == private_in(down, saved) == set()
    assert b"dog" not in up.replace(NEUTRAL.encode(), b""), "the noun is in the neutral prompt only"
    for said in ("dog", "left of", "tree"):
        assert said.encode() not in down


@pytest.mark.parametrize("leak", ["rex", "tokens.<rex>"])
def test_what_a_careless_client_sends_is_found(saved, travelling, monkeypatch, leak):
    draw, sent, _ = travelling
    said = {"rex": PROMPT, "tokens.<rex>": numbers(saved.personal("rex")["tokens.<rex>"])}[leak]
    monkeypatch.setattr("personae.serve.client.neutral", lambda prompt, words: said)
    with pytest.raises(ServerRefused, match="tokens, of which this model reads 12"):
        draw()
    assert private_in(b"".join(sent), saved) == {leak}


def test_the_command_draws_with_a_server(saved, listening, certificate, command, monkeypatch, tmp_path):
    monkeypatch.setenv("PERSONAE_TOKEN", TOKEN)
    asked = ("sample", saved.folder, "--client", "rex", "--prompt", "a <rex>", "-n", 2, "--server", listening[0])
    code, out, error = command(*asked, "--authority", certificate[0], "--out", tmp_path / "drawn")
    assert code == 0, error
    assert "wrote 2 images" in out and len(list((tmp_path / "drawn").glob("0*.png"))) == 2
    monkeypatch.delenv("PERSONAE_TOKEN")
    code, _, error = command(*asked, "--out", tmp_path / "again")
    assert code == 2 and "PERSONAE_TOKEN" in error
    monkeypatch.setenv("PERSONAE_TOKEN", "x" * 20)
    code, _, error = command(*asked, "--authority", certificate[0], "--out", tmp_path / "again")
    assert code == 8 and "refused (401)" in error and not (tmp_path / "again").exists()


def test_a_server_that_is_not_known_is_not_trusted(saved, listening, certificate):
    url, _ = listening
    with pytest.raises(ServerRefused, match="check the address and its certificate"):
        sample_with(saved, "rex", "a <rex>", Server(url, TOKEN), 0.3)
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    with pytest.raises(RefusedPacket, match="it was changed"):
        sample_with(saved, "rex", "a <rex>", Server(url, TOKEN, certificate[0], other), 0.3)
    with pytest.raises(ServerRefused, match="cannot be reached"):
        sample_with(saved, "rex", "a <rex>", Server("https://127.0.0.1:1", TOKEN), 0.3)
    with pytest.raises(ServerRefused, match="cannot be reached"):
        sample_with(saved, "rex", "a <rex>", Server("https://my..server:8443", TOKEN), 0.3)


def test_a_port_that_is_taken_is_named(saved, listening, command, tmp_path):
    (tmp_path / "tokens").write_text(f"anna {TOKEN}\n")
    port = listening[0].rsplit(":", 1)[1]
    code, out, error = command("serve", saved.folder, "--tokens", tmp_path / "tokens", "--port", port)
    assert (code, out) == (2, "") and f"nobody can listen at 127.0.0.1, port {port}: " in error


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"GET /v1/model HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /v1/begin HTTP/1.1\r\nHost: a\r\nContent-Length: 9999\r\n\r\n",
    ],
    ids=["head", "second head", "body that was answered"],
)
def test_a_letter_now_and_then_keeps_no_connection_open(listening, certificate, first):
    port = int(listening[0].rsplit(":", 1)[1])
    context = ssl.create_default_context(cafile=certificate[0])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as client,
    ):
        if first:
            client.sendall(first)
            assert b"401" in client.recv(4096)
            time.sleep(0.1)
        client.settimeout(0.1)
        began = time.monotonic()
        for letter in itertools.cycle(b"X"):
            try:
                client.sendall(bytes([letter]))
                if client.recv(4096) == b"":
                    break
            except TimeoutError:
                assert time.monotonic() - began < 10 * HEAD_SECONDS, "it is still listening"
            except OSError:
                break
        assert time.monotonic() - began > HEAD_SECONDS / 2


def test_many_pictures_are_asked_for_in_parts_and_none_for_no_step(saved, listening, certificate):
    url, came = listening
    server = Server(url, TOKEN, certificate[0])
    images = sample_with(saved, "rex", "a <rex>", server, 0.3, 10, seed=1)
    assert len(images) == 10 and len({image.numpy().tobytes() for image in images}) == 10
    before = len(came)
    at_home = sample_with(saved, "rex", "a <rex>", Server("http://127.0.0.1:1", TOKEN), 0.01, 2)
    assert at_home.shape == (2, 3, 8, 8) and len(came) == before


def test_the_token_goes_nowhere_else(listening, certificate):
    """A server that sends one elsewhere is not followed."""
    import http.server

    seen = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/stolen")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Elsewhere) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(ServerRefused, match=r"refused \(302\)"):
            Server(f"http://127.0.0.1:{other.server_port}", TOKEN).begin(["a dog"], SplitPlan("ddim", 5, 1), 0)
        other.shutdown()
    assert seen == ["/v1/model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": "two words"}, "copied wrongly"),
        ({"token": "a\nb"}, "copied wrongly"),
        ({"key": "abc"}, "64 hexadecimal digits"),
        ({"url": "https://host:abc"}, "expected https"),
    ],
)
def test_what_a_client_mistypes_is_said(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as found:
        Server(**{"url": "https://127.0.0.1:1", "token": TOKEN, **options})
    assert "two words" not in str(found.value)
    with pytest.raises(ConfigError, match="there is no certificate"):
        Server("https://127.0.0.1:1", TOKEN, tmp_path / "nothing.pem")
    assert TOKEN not in repr(Server("https://127.0.0.1:1", TOKEN))


@pytest.mark.parametrize("url", ["http://example.org:80", "ftp://127.0.0.1", "127.0.0.1:8443"])
def test_an_address_without_tls_is_refused(url):
    with pytest.raises(ConfigError, match=r"no TLS|expected https"):
        Server(url, TOKEN)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_a_part(saved, share):
    with pytest.raises(ConfigError, match="expected 0 to 1"):
        sample_with(saved, "rex", "a <rex>", Server("http://127.0.0.1:1", TOKEN), share)


def test_ones_own_words_give_way_to_known_ones():
    words = Words(("<rex>", "<rexy>"), "dog")
    assert neutral("a <REX> left of a <rexy>", words) == "a dog left of a dog"
    assert neutral("a <own> drawing of a cat", Words(("<own>",), "drawing")) == "a drawing of a cat"
    assert neutral("a  cat", None) == "a  cat"
    assert neutral("a very very small <rex>", words) == "a very very small dog"
    assert neutral("<rex>left of a tree<rex>tall", words) == "dog left of a tree dog tall"
    assert neutral("a <rex>", Words(("<rex>", "og"), "dog")) == "a dog"


def test_a_server_for_others_needs_a_certificate(saved, tmp_path, certificate):
    (tmp_path / "tokens").write_text(f"anna {TOKEN}\n", "utf-8")
    for options, message in (
        ({"host": "0.0.0.0"}, "without TLS"),
        ({"certificate": certificate[0]}, "give both"),
        ({"certificate": certificate[1], "certificate_key": certificate[0]}, "cannot be used"),
    ):
        with pytest.raises(ConfigError, match=message):
            serve(saved, tmp_path / "tokens", **options)


def test_a_model_that_reads_no_text_is_not_served(tiny_run):
    with pytest.raises(ConfigError, match="reads no text"):
        shared_model(tiny_run)


def test_a_signing_key_is_made_once(tmp_path):
    made, again = read_key(tmp_path / "key.pem"), read_key(tmp_path / "key.pem")
    assert made.private_bytes_raw() == again.private_bytes_raw()
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600
    (tmp_path / "other").write_text("no key")
    with pytest.raises(ArtefactError, match="cannot be used as a signing key"):
        read_key(tmp_path / "other")
