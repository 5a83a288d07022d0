"""A run's shared model as a server, and a client's drawing that begins there and ends here."""

from __future__ import annotations

import dataclasses
import os
import re
import ssl
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from torch import Tensor

from personae.core import stream
from personae.errors import ArtefactError, ConfigError
from personae.infer.sample import to_bytes
from personae.infer.split import Plan, calls_of, finish
from personae.personal.tokens import Words
from personae.recipe.models import Model, build_denoiser
from personae.recipe.workflow import SavedRun
from personae.serve.app import application
from personae.serve.client import LOCAL, Server
from personae.serve.limits import Limits, Tokens


def shared_model(run: SavedRun) -> Model:
    """What the server draws with: the released model, without anybody's words.

    Raises: ConfigError, for a model that reads no text.
    """
    recipe = dataclasses.replace(run.recipe, backbone=dataclasses.replace(run.recipe.backbone, words=None))
    model = build_denoiser(recipe, run.denoiser.image_shape)
    if not model.reads_captions:
        raise ConfigError(f"the model in {run.folder} reads no text; only drawings from a prompt are begun on a server")
    missing = model.live().keys() - run.released.params.keys()
    nobody = model.initial(stream(run.recipe.seed, "server"), missing.__contains__)
    model.load({**nobody, **run.released.params})
    return model


def neutral(prompt: str, words: Words | None) -> str:
    """The prompt as the server may see it: one's own words give way to the one that they started from."""
    if words is None:
        return prompt
    for word in sorted(words.words, key=len, reverse=True):
        prompt = re.sub(re.escape(word), words.start, prompt, flags=re.IGNORECASE)
    said = prompt.split()
    return " ".join(word for at, word in enumerate(said) if at == 0 or word != said[at - 1])


def sample_with(
    run: SavedRun,
    client: str,
    prompt: str,
    server: Server,
    share: float,
    num_images: int = 1,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
) -> Tensor:
    """What a client's personal model draws when the server takes this share of the model's calls, the first ones.

    The server sees the prompt without the client's own words, how many pictures, the plan and the seed.

    Shapes: uint8 [num_images, C, H, W].
    Raises: ConfigError; ServerRefused; RefusedPacket.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"the server's share of steps is {share}, expected 0 to 1")
    model, options = run.model(client), run.recipe.sampling
    if not model.reads_captions:
        raise ConfigError(f"the model in {run.folder} reads no text; leave out the server")
    steps = options.steps if steps is None else steps
    guidance = options.guidance if guidance is None else guidance
    calls = round(share * calls_of(model, options.sampler, steps))
    plan = Plan(options.sampler, steps, calls, guidance)
    packet = server.begin([neutral(prompt, run.recipe.backbone.words)] * num_images, plan, seed)
    return to_bytes(finish(model, [prompt] * num_images, plan, packet))


def serve(
    run: SavedRun,
    tokens: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8443,
    certificate: Path | None = None,
    certificate_key: Path | None = None,
    signing_key: Path | None = None,
    limits: Limits | None = None,
) -> None:
    """Serve until it is interrupted. Without a signing key packets are signed with a new one at each start.

    Raises: ConfigError, for an address that others reach without a certificate, or unusable files.
    """
    import uvicorn

    if certificate is None and host not in LOCAL:
        raise ConfigError(
            f"{host} is reached by others, and without TLS captions and tokens would be read on the way; give "
            "--certificate and --certificate-key, or serve 127.0.0.1"
        )
    if (certificate is None) != (certificate_key is None):
        raise ConfigError("a certificate and its key belong together; give both")
    if certificate is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, certificate_key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{certificate} and {certificate_key} cannot be used: {error}") from error
    key = Ed25519PrivateKey.generate() if signing_key is None else read_key(signing_key)
    app = application(shared_model(run), key, Tokens.read(tokens), limits)
    uvicorn.run(
        app,
        host=host,
        port=port,
        ssl_certfile=certificate,
        ssl_keyfile=certificate_key,
        access_log=False,
        ws="none",
        log_level="warning",
        timeout_keep_alive=10,
        h11_max_incomplete_event_size=16_384,
        limit_concurrency=512,
    )


def read_key(path: Path) -> Ed25519PrivateKey:
    """The key in a file, which is made, for its owner's eyes only, where there is none.

    Raises: ArtefactError, when it holds something else or cannot be written.
    """
    try:
        if not path.exists():
            key = Ed25519PrivateKey.generate()
            data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
            return key
        found = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ArtefactError(f"{path} cannot be used as a signing key: {error}") from error
    if not isinstance(found, Ed25519PrivateKey):
        raise ArtefactError(f"{path} holds a key of another kind, expected Ed25519")
    return found
