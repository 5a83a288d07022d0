"""A run's shared model as a server."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import ssl
from pathlib import Path
from typing import Any

import h11
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from uvicorn.protocols.http.h11_impl import H11Protocol

from personae.core import pick, stream
from personae.errors import ArtefactError, ConfigError
from personae.personal.embedding import EMBEDDING, NULL_EMBEDDING
from personae.recipe.models import Model, build_denoiser
from personae.recipe.saved import SavedRun
from personae.serve.app import application
from personae.serve.client import LOCAL
from personae.serve.limits import Limits, Tokens


def shared_model(run: SavedRun) -> Model:
    """What the server draws with: the released model, without anybody's words, and for nobody in particular.

    Raises: ConfigError, for a model that reads no text.
    """
    recipe = dataclasses.replace(run.recipe, backbone=dataclasses.replace(run.recipe.backbone, words=None))
    model = build_denoiser(recipe, run.sample_shape)
    if not model.reads_captions:
        raise ConfigError(f"the model in {run.folder} reads no text; only drawings from a prompt are begun on a server")
    released = pick(run.released.params, model.live().__contains__)
    missing = model.live().keys() - released.keys()
    nobody = model.initial(stream(run.recipe.seed, "server"), missing.__contains__)
    if EMBEDDING in missing and NULL_EMBEDDING in released:
        nobody = {**nobody, EMBEDDING: released[NULL_EMBEDDING]}
    model.load({**nobody, **released})
    return model


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
    public = key.public_key().public_bytes_raw().hex()
    try:
        ear = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"nobody can listen at {host}, port {port}: {error.strerror or error}") from error
    print(f"serving {run.folder} on http{'s' if certificate else ''}://{host}:{port}; Ctrl-C stops it", flush=True)
    print(f"packets are signed by {public}", flush=True)
    uvicorn.Server(listening(app, host, port, certificate, certificate_key, (limits or Limits()).seconds)).run([ear])


def listening(
    app: Any, host: str, port: int, certificate: Path | None, certificate_key: Path | None, seconds: float
) -> uvicorn.Config:
    """How the server listens. Whoever takes longer than `seconds` to send the head of a request is cut off."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        ssl_certfile=certificate,
        ssl_keyfile=certificate_key,
        access_log=False,
        ws="none",
        http=type("PromptHeads", (PromptHeads,), {"seconds": seconds}),
        log_level="warning",
        timeout_keep_alive=10,
        h11_max_incomplete_event_size=16_384,
        limit_concurrency=512,
    )


class PromptHeads(H11Protocol):
    """A connection that is cut off when the head of a request is not whole in time, or the rest of a body that was
    answered already, for which uvicorn has no limits. Bodies that somebody reads have theirs in `serve/app.py`."""

    seconds: float
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(self.seconds, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        begun = self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]
        answered = self.conn.their_state is h11.SEND_BODY and self.conn.our_state in (h11.DONE, h11.MUST_CLOSE)
        if not (begun or answered):
            self._in_time()
        elif self._late is None:
            self._late = self.loop.call_later(self.seconds, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def read_key(path: Path) -> Ed25519PrivateKey:
    """The key in a file, which is made, for its owner's eyes only, where there is none.

    Raises: ArtefactError, when it holds something else or cannot be written.
    """
    try:
        if not path.exists():
            key = Ed25519PrivateKey.generate()
            data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            beside = path.with_name(f"{path.name}.{os.getpid()}")  # a kill leaves no half of a key
            try:
                with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(data)
                os.link(beside, path)
            finally:
                beside.unlink(missing_ok=True)
            return key
        found = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ArtefactError(f"{path} cannot be used as a signing key: {error}") from error
    if not isinstance(found, Ed25519PrivateKey):
        raise ArtefactError(f"{path} holds a key of another kind, expected Ed25519")
    return found
