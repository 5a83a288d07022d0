"""The server's side of a split drawing, over HTTP.

`POST /v1/begin` takes a plan, neutral captions and a seed, as JSON, and answers with a packet (`infer/split.py`).
`GET /v1/model` says which base the server has, and the key that signs its packets. Both need `Authorization: Bearer
TOKEN`. Nothing of a request is logged, or kept when it is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from personae.core import stream
from personae.errors import PersonaeError
from personae.infer.samplers import Sampler
from personae.infer.split import REQUEST, SplitPlan, base_digest, begin_together, calls_of, request_digest, sealed
from personae.serve.batches import Batches, Full
from personae.serve.limits import Limits, Rate, Tokens

OCTETS = "application/octet-stream"


class Begin(BaseModel):
    """What a client asks for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    captions: Annotated[list[str], Field(min_length=1)]
    sampler: str
    steps: Annotated[int, Field(ge=1)]
    calls: Annotated[int, Field(ge=0)]
    guidance: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]

    def plan(self) -> SplitPlan:
        return SplitPlan(self.sampler, self.steps, self.calls, self.guidance)  # type: ignore[arg-type]  # checked before

    def digest(self) -> str:
        return request_digest(self.captions, self.plan(), self.seed)


class Refused(Exception):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def application(model: Any, key: Ed25519PrivateKey, tokens: Tokens, limits: Limits | None = None) -> FastAPI:
    """`model`, which reads captions, draws the first steps for everybody who has a token. It is not changed."""
    allowed = limits or Limits()
    rate = Rate(allowed.per_minute)
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
    about = {"base": base_digest(model), "key": public, "sample_shape": list(model.sample_shape)}

    def work(requests: Sequence[Begin]) -> list[bytes]:
        rngs = [stream(request.seed, "begin") for request in requests]
        try:
            packets = begin_together(model, [request.captions for request in requests], requests[0].plan(), rngs)
        finally:
            model.captions.forget()
        told = [replace(p, facts={**p.facts, REQUEST: r.digest()}) for p, r in zip(packets, requests, strict=True)]
        return [sealed(packet, key.sign) for packet in told]

    batches: Batches[Begin, bytes] = Batches(
        work,
        kind=lambda request: (request.plan(), len(request.captions)),
        size=lambda request: len(request.captions),
        room=allowed.batch,
        seconds=allowed.batch_seconds,
        waiting=allowed.waiting,
        each=allowed.waiting_each,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(batches.run())
        try:
            yield
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    app = FastAPI(title="personae", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"error": str(error)}, error.status)

    @app.get("/v1/model")
    async def known(request: Request) -> dict[str, Any]:
        _owner(request, tokens, rate)
        return about

    @app.post("/v1/begin")
    async def begin(request: Request) -> Response:
        owner = _owner(request, tokens, rate)
        asked = _read(await _body(request, allowed), allowed, model)
        drawing, gone = asyncio.ensure_future(batches.ask(owner, asked)), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({drawing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                raise Refused(499, "the client went away")
            return Response(drawing.result(), media_type=OCTETS)
        except Full:
            raise Refused(503, "too many requests are waiting already; try again in a moment") from None
        except PersonaeError as error:
            raise Refused(422, str(error)) from error
        finally:
            drawing.cancel()
            gone.cancel()

    return app


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _owner(request: Request, tokens: Tokens, rate: Rate) -> str:
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    owner = tokens.owner(token) if kind.lower() == "bearer" else None
    if owner is None:
        raise Refused(401, "this server needs a token that it knows: Authorization: Bearer TOKEN")
    if not rate.allows(owner):
        raise Refused(429, f"more than {rate.per_minute} requests in a minute; wait a little")
    return owner


async def _body(request: Request, limits: Limits) -> bytes:
    """No more of it is read than may be sent."""
    too_large = Refused(413, f"a request has at most {limits.bytes} bytes")
    told = request.headers.get("content-length", "0")
    if told.isdigit() and int(told) > limits.bytes:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                data += part
                if len(data) > limits.bytes:
                    raise too_large
    except ClientDisconnect:
        raise Refused(499, "the client went away") from None
    except TimeoutError:
        raise Refused(408, f"the request took more than {limits.seconds:g} seconds to send") from None
    return bytes(data)


def _read(data: bytes, limits: Limits, model: Any) -> Begin:
    try:
        asked = Begin.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        raise Refused(422, f"{where}: {first['msg']}") from None
    problems = [
        (len(asked.captions) > limits.pictures, f"captions: {len(asked.captions)}, at most {limits.pictures}"),
        (max(map(len, asked.captions)) > limits.characters, f"captions: at most {limits.characters} characters each"),
        (asked.sampler not in get_args(Sampler), f"sampler: {asked.sampler!r}, one of {', '.join(get_args(Sampler))}"),
        (asked.steps > limits.steps, f"steps: {asked.steps}, at most {limits.steps}"),
    ]
    for wrong, why in problems:
        if wrong:
            raise Refused(422, why)
    try:
        model.captions.check(asked.captions)
        most = calls_of(model, asked.plan().sampler, asked.steps)
    except PersonaeError as error:
        raise Refused(422, str(error)) from error
    if asked.calls > most:
        raise Refused(422, f"calls: {asked.calls}, at most {most}")
    return asked
