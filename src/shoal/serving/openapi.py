"""The published description of the API, made from the very types that bodies are read with and replies written from."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from shoal import __version__
from shoal.serving import replies, requests

_REF = "#/components/schemas/{name}"


class Operation(NamedTuple):
    """One endpoint. `body` and `reply` are types of ours; a reply that is text names its media type."""

    method: str
    path: str
    summary: str
    body: type[requests.Body] | None
    reply: type[msgspec.Struct] | None
    statuses: tuple[int, ...]
    stream: type[msgspec.Struct] | None = None
    parameters: tuple[str, ...] = ()


_ALWAYS = (401, 403, 405)
_BODY = (400, 408, 413, 415, *_ALWAYS)
_MODEL = (404, 500, 503, *_BODY)

OPERATIONS = (
    Operation(
        "post", "/v1/chat/completions", "Continue a conversation.", requests.ChatRequest, replies.ChatCompletion,
        (429, *_MODEL), replies.ChatChunk,
    ),
    Operation(
        "post", "/v1/completions", "Continue texts.", requests.CompletionRequest, replies.TextCompletion,
        (429, *_MODEL), replies.TextCompletion,
    ),
    Operation(
        "post", "/v1/embeddings", "Turn texts into vectors.", requests.EmbeddingRequest, replies.EmbeddingList,
        (429, *_MODEL),
    ),
    Operation("get", "/v1/models", "Models that may be asked.", None, replies.ModelCards, _ALWAYS),
    Operation(
        "get", "/v1/models/{model}", "One of them; its id may have slashes.", None, replies.ModelCard, (404, *_ALWAYS),
        parameters=("model",),
    ),
    Operation("post", "/tokenize", "A text's tokens.", requests.TokenizeRequest, replies.TokenizeReply, _MODEL),
    Operation("post", "/detokenize", "The text of tokens.", requests.DetokenizeRequest, replies.DetokenizeReply, _MODEL),
    Operation(
        "post", "/apply-template", "A conversation as the text that the model reads.", requests.TemplateRequest,
        replies.TemplateReply, _MODEL,
    ),
    Operation("get", "/health", "Whether the server is alive; needs no key.", None, replies.Health, (403, 405)),
    Operation("get", "/readyz", "Whether the models named at the start are in memory; needs no key.", None, replies.Health,
              (403, 405, 503)),
    Operation("get", "/metrics", "Figures in Prometheus' format.", None, None, _ALWAYS),
)  # fmt: skip


def describe() -> dict[str, Any]:
    """An OpenAPI 3.1 document."""
    types = [part for operation in OPERATIONS for part in (operation.body, operation.reply, operation.stream) if part]
    schemas, components = msgspec.json.schema_components([*types, replies.ErrorBody], ref_template=_REF)
    by_type: dict[Any, Any] = dict(zip([*types, replies.ErrorBody], schemas, strict=True))
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _describe(operation, by_type)
    return {
        "openapi": "3.1.0",
        "info": {"title": "shoal", "version": __version__, "description": "OpenAI's API over the devices you own."},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _event(data: dict[str, Any], error: dict[str, Any]) -> dict[str, Any]:
    texts = [
        *({"type": "string", "contentMediaType": "application/json", "contentSchema": schema} for schema in (data, error)),
        {"const": "[DONE]"},
    ]
    return {"type": "object", "properties": {"data": {"anyOf": texts}}, "required": ["data"]}


def _describe(operation: Operation, schemas: dict[Any, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.reply is not None:
        content["application/json"] = {"schema": schemas[operation.reply]}
    else:
        content["text/plain"] = {"schema": {"type": "string"}}
    if operation.stream is not None:
        # Before OpenAPI 3.2 the schema of a stream of events is each event's.
        content["text/event-stream"] = {"schema": _event(schemas[operation.stream], schemas[replies.ErrorBody])}
    error = {"application/json": {"schema": schemas[replies.ErrorBody]}}
    if operation.path == "/readyz":
        error = {"application/json": {"schema": {"anyOf": [schemas[replies.Health], schemas[replies.ErrorBody]]}}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": operation.path.strip("/").replace("/", "_").replace("{", "").replace("}", "").replace("-", "_"),
        "responses": {
            "200": {"description": "The answer.", "content": content},
            **{str(status): {"description": _WORDS[status], "content": error} for status in sorted(operation.statuses)},
        },
    }
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schemas[operation.body]}}}
    if operation.parameters:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in operation.parameters
        ]
    return described


_WORDS = {
    400: "A field is wrong, unknown or not supported; `param` names it.",
    401: "The API key is missing or wrong.",
    403: "The Host or Origin header is not allowed.",
    404: "No such model.",
    405: "Another method is needed.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body does not say that it is JSON.",
    429: "Too many requests wait; try again after `Retry-After`.",
    500: "A fault of ours.",
    503: "The model is loading or a device was lost; try again after `Retry-After`.",
}
