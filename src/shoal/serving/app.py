"""The application: which path leads where, and what holds for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from shoal.serving import openapi
from shoal.serving.chat import chat
from shoal.serving.completions import complete
from shoal.serving.embeddings import embed
from shoal.serving.failures import ApiError, from_error
from shoal.serving.gate import Gate, GateOptions
from shoal.serving.metrics import CONTENT_TYPE
from shoal.serving.replies import Health, ModelCards
from shoal.serving.requests import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TemplateRequest,
    TokenizeRequest,
    parse,
)
from shoal.serving.service import Service
from shoal.serving.texts import apply_template, detokenize, tokenize

BODY_BYTES_MAX = 8 << 20
"""Two million tokens of text; the message to the worker must hold it too."""
BODY_TIMEOUT_S = 30.0

_Asked = TypeVar("_Asked", bound=Body)


def make_app(service: Service, options: GateOptions) -> ASGIApp:
    """The whole API over `service`, behind its gate."""
    schema = msgspec.json.encode(openapi.describe())

    async def models(_: Request) -> Response:
        await service.catalogue.refresh()
        return _json(ModelCards([model.card() for model in service.catalogue.models]))

    async def model_by_id(request: Request) -> Response:
        return _json((await service.catalogue.find(request.path_params["model"], param="model")).card())

    async def health(_: Request) -> Response:
        return _json(Health("ok"))

    async def ready(_: Request) -> Response:
        loading = service.catalogue.loading_state()
        if loading is None:
            return _json(Health("ok"))
        return Response(
            msgspec.json.encode(Health("loading", loading)),
            status_code=503,
            media_type="application/json",
            headers={"retry-after": str(max(1, round(loading.eta_s)))},
        )

    async def metrics(_: Request) -> Response:
        return Response(await asyncio.to_thread(service.metrics.page), media_type=CONTENT_TYPE)

    async def description(_: Request) -> Response:
        return Response(schema, media_type="application/json")

    async def on_chat(asked: ChatRequest) -> Response:
        return chat(service, await service.ready(asked.model), asked)

    async def on_complete(asked: CompletionRequest) -> Response:
        return complete(service, await service.ready(asked.model), asked)

    async def on_embed(asked: EmbeddingRequest) -> Response:
        return embed(service, await service.ready(asked.model), asked)

    async def on_tokenize(asked: TokenizeRequest) -> Response:
        return await tokenize(service, asked)

    async def on_detokenize(asked: DetokenizeRequest) -> Response:
        return await detokenize(service, asked)

    async def on_template(asked: TemplateRequest) -> Response:
        return await apply_template(service, asked)

    async def refuse(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            text = "there is nothing at this path: see /openapi.json" if error.status_code == 404 else str(error.detail)
            return ApiError(error.status_code, text, headers=dict(error.headers or {})).response()
        service.report(error)
        return from_error(error).response()

    routes = [
        Route("/v1/chat/completions", _reads(ChatRequest, on_chat), methods=["POST"]),
        Route("/v1/completions", _reads(CompletionRequest, on_complete), methods=["POST"]),
        Route("/v1/embeddings", _reads(EmbeddingRequest, on_embed), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", model_by_id),
        Route("/tokenize", _reads(TokenizeRequest, on_tokenize), methods=["POST"]),
        Route("/detokenize", _reads(DetokenizeRequest, on_detokenize), methods=["POST"]),
        Route("/apply-template", _reads(TemplateRequest, on_template), methods=["POST"]),
        Route("/health", health),
        Route("/readyz", ready),
        Route("/metrics", metrics),
        Route("/openapi.json", description),
    ]
    handlers: dict[Any, Any] = {HTTPException: refuse, ApiError: refuse, Exception: refuse}
    app: ASGIApp = Starlette(routes=routes, exception_handlers=handlers)
    if options.origins:
        app = CORSMiddleware(
            app, allow_origins=list(options.origins), allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip
    return Gate(app, options)


def _reads(kind: type[_Asked], answer: Callable[[_Asked], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await answer(parse(await _read_body(request), kind))

    return endpoint


async def _read_body(request: Request) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is no JSON by its own word, too large, or too slow.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, f"the body is '{media_type or 'of no type'}': send it as 'Content-Type: application/json'")
    too_large = ApiError(413, f"the body is too large: at most {BODY_BYTES_MAX} bytes are read")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > BODY_BYTES_MAX:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_BYTES_MAX:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408, f"the body did not come within {BODY_TIMEOUT_S:.0f} s", headers={"connection": "close"}
        ) from None
    except ClientDisconnect:
        raise ApiError(400, "the client left before its body was read") from None
    return bytes(body)


def _json(reply: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(reply), media_type="application/json")
