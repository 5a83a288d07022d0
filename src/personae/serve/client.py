"""The client's side: ask a server to begin, check that what comes back is from it, and finish at home."""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from torch import Tensor

from personae.core import State, stream
from personae.errors import ConfigError, RefusedPacket, ServerRefused
from personae.infer.sample import latents_at_once, to_bytes
from personae.infer.split import REQUEST, SplitPlan, begin, calls_of, finish, request_digest, unsealed
from personae.personal.tokens import Words, plain
from personae.recipe.saved import SavedRun

LOCAL = ("localhost", "127.0.0.1", "::1")

MOST_BYTES = 2**28
"""Of an answer: a client has limits too."""

AT_ONCE = 8
"""Pictures in a request, as many as servers take unless they are told otherwise."""


@dataclass(frozen=True)
class Server:
    """Where an inference server is, and what to show it.

    `certificate` is that of its authority, where this machine does not know it. `key`, in hexadecimal, is the one that
    must have signed its packets; without one that which the server names is taken, which TLS vouches for.

    Raises: ConfigError, for an address without TLS that is not this machine, an unusable key, token or certificate.
    """

    url: str
    token: str = field(repr=False)
    certificate: Path | None = None
    key: str | None = None
    seconds: float = 120.0

    def __post_init__(self) -> None:
        try:
            address = urlsplit(self.url)
            usable = address.scheme in ("http", "https") and bool(address.hostname) and (address.port or 1) > 0
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError(f"the server's address is {self.url!r}; expected https://HOST:PORT")
        if address.scheme == "http" and address.hostname not in LOCAL:
            raise ConfigError(f"{self.url} has no TLS: captions and the token would be read on the way; use https://")
        if not self.token.isascii() or self.token.split() != [self.token]:
            raise ConfigError("the token holds white space or other letters than ASCII's; it was copied wrongly")
        if self.certificate is not None and not self.certificate.is_file():
            raise ConfigError(f"there is no certificate {self.certificate}")
        if self.key is not None:
            _public(self.key, ConfigError("the server's key is not 64 hexadecimal digits"))

    def begin(self, captions: Sequence[str], plan: SplitPlan, seed: int) -> State:
        """The packet of a picture for each caption. What is sent is the captions, the plan and the seed.

        Raises: ServerRefused, when the server cannot be reached or refuses; RefusedPacket, when what comes back was
        not signed by its key, or answers another request.
        """
        public = _public(self.key or self._named(), ServerRefused(f"{self.url} names no key that could have signed"))
        told = {"sampler": plan.sampler, "steps": plan.steps, "calls": plan.calls, "guidance": float(plan.guidance)}
        data = self._ask("/v1/begin", {"captions": list(captions), **told, "seed": seed})
        packet = unsealed(data, lambda content, signature: public.verify(signature, content))
        facts = dict(packet.facts)
        if facts.pop(REQUEST, None) != request_digest(captions, replace(plan, guidance=float(plan.guidance)), seed):
            raise RefusedPacket(f"{self.url} answered another request; ask again")
        return replace(packet, facts=facts)

    def _named(self) -> str:
        try:
            return str(json.loads(self._ask("/v1/model"))["key"])
        except (ValueError, KeyError, TypeError) as error:
            raise ServerRefused(f"{self.url} is no server of personae: it does not say its key") from error

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        request = urllib.request.Request(
            self.url.rstrip("/") + path,
            None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"},
        )
        try:
            trust = ssl.create_default_context(cafile=None if self.certificate is None else str(self.certificate))
            handlers = [urllib.request.HTTPSHandler(context=trust), _Stays()]
            if self.url.startswith("http:"):  # never by way of a proxy, which would read all of it
                handlers.append(urllib.request.ProxyHandler({}))
            with urllib.request.build_opener(*handlers).open(request, timeout=self.seconds) as answer:
                data = bytes(answer.read(MOST_BYTES + 1))
        except urllib.error.HTTPError as error:
            raise ServerRefused(f"{self.url} refused ({error.code}): {_reason(error.read(10_000))}") from error
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            raise ServerRefused(
                f"{self.url} cannot be reached: {why}; check the address and its certificate"
            ) from error
        if len(data) > MOST_BYTES:
            raise ServerRefused(f"{self.url} answered with more than {MOST_BYTES} bytes")
        return data


class _Stays(urllib.request.HTTPRedirectHandler):
    """The token goes to the address that was given, and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _public(key: str, otherwise: Exception) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
    except ValueError:
        raise otherwise from None


def _reason(data: bytes) -> str:
    try:
        return str(json.loads(data)["error"])
    except (ValueError, KeyError, TypeError):
        return "it gave no reason"


def neutral(prompt: str, words: Words | None) -> str:
    """The prompt as the server may see it: one's own words give way to the one that they started from."""
    return prompt if words is None else plain(prompt, words)


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

    The server sees the prompt without the client's own words, how many pictures, the plan and the seed. A share of no
    whole call sends nothing.

    Shapes: uint8 [num_images, C, H, W].
    Raises: ConfigError; ServerRefused; RefusedPacket.
    """
    if not 0 <= share <= 1 or num_images < 1:
        raise ConfigError(f"the server's share is {share} of {num_images} pictures; expected 0 to 1, and at least 1")
    model, options = run.model(client), run.recipe.sampling
    if not model.reads_captions:
        raise ConfigError(f"the model in {run.folder} reads no text; leave out the server")
    steps = options.steps if steps is None else steps
    guidance = options.guidance if guidance is None else guidance
    calls = round(share * calls_of(model, options.sampler, steps))
    plan = SplitPlan(options.sampler, steps, calls, guidance)
    said, parts = neutral(prompt, run.recipe.backbone.words), []
    at_once = min(AT_ONCE, latents_at_once(model))
    for number, start in enumerate(range(0, num_images, at_once)):
        count = min(at_once, num_images - start)
        own = int(torch.randint(2**62, (), generator=stream(seed, "server", number)))  # each part draws other noise
        if calls:
            packet = server.begin([said] * count, plan, own)
        else:
            packet = begin(model, [said] * count, plan, stream(own, "begin"))
        parts.append(to_bytes(finish(model, [prompt] * count, plan, packet)))
    return torch.cat(parts)
