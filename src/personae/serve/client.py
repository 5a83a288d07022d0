"""The client's side: ask a server to begin, and check that what comes back is from it."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from personae.core import State
from personae.errors import ConfigError, ServerRefused
from personae.infer.split import Plan, unsealed

LOCAL = ("localhost", "127.0.0.1", "::1")

MOST_BYTES = 2**28
"""Of an answer: a client has limits too."""


@dataclass(frozen=True)
class Server:
    """Where an inference server is, and what to show it.

    `certificate` is that of its authority, where this machine does not know it. `key`, in hexadecimal, is the one that
    must have signed its packets; without one that which the server names is taken, which TLS vouches for.

    Raises: ConfigError, for an address without TLS that is not this machine.
    """

    url: str
    token: str
    certificate: Path | None = None
    key: str | None = None
    seconds: float = 120.0

    def __post_init__(self) -> None:
        address = urlparse(self.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ConfigError(f"the server's address is {self.url!r}; expected https://HOST:PORT")
        if address.scheme == "http" and address.hostname not in LOCAL:
            raise ConfigError(f"{self.url} has no TLS: captions and the token would be read on the way; use https://")

    def begin(self, captions: Sequence[str], plan: Plan, seed: int) -> State:
        """The packet of a picture for each caption. What is sent is the captions, the plan and the seed.

        Raises: ServerRefused, when the server cannot be reached or refuses; RefusedPacket, when what comes back was
        not signed by its key.
        """
        key = self.key or str(json.loads(self._ask("/v1/model"))["key"])
        told = {"sampler": plan.sampler, "steps": plan.steps, "calls": plan.calls, "guidance": float(plan.guidance)}
        data = self._ask("/v1/begin", {"captions": list(captions), **told, "seed": seed})
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        return unsealed(data, lambda content, signature: public.verify(signature, content))

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        request = urllib.request.Request(
            self.url.rstrip("/") + path,
            None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"},
        )
        trust = ssl.create_default_context(cafile=None if self.certificate is None else str(self.certificate))
        try:
            with urllib.request.urlopen(request, timeout=self.seconds, context=trust) as answer:
                data = bytes(answer.read(MOST_BYTES + 1))
        except urllib.error.HTTPError as error:
            raise ServerRefused(f"{self.url} refused ({error.code}): {_reason(error.read(10_000))}") from error
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise ServerRefused(
                f"{self.url} cannot be reached: {reason}; check the address and its certificate"
            ) from error
        if len(data) > MOST_BYTES:
            raise ServerRefused(f"{self.url} answered with more than {MOST_BYTES} bytes")
        return data


def _reason(data: bytes) -> str:
    try:
        return str(json.loads(data)["error"])
    except (ValueError, KeyError, TypeError):
        return "it gave no reason"
