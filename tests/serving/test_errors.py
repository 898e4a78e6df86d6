"""What clients are told when something is wrong: OpenAI's shape and status, and the field to blame."""

from __future__ import annotations

from typing import Any

import httpx2
import msgspec
import openai
import pytest

from shoal.serving.requests import UNSUPPORTED, ChatRequest, CompletionRequest, EmbeddingRequest
from tests.serving.server import Server

pytestmark = pytest.mark.slow
CHAT: dict[str, Any] = {"model": "plain", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
TEXT: dict[str, Any] = {"model": "plain", "prompt": "hi", "max_tokens": 1}
VECTOR: dict[str, Any] = {"model": "embedder", "input": "hi"}
BODIES = {
    ChatRequest: ("/v1/chat/completions", CHAT),
    CompletionRequest: ("/v1/completions", TEXT),
    EmbeddingRequest: ("/v1/embeddings", VECTOR),
}


def error_of(reply: httpx2.Response, status: int, *, kind: str = "invalid_request_error") -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert set(reply.json()) == {"error"}
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == kind
    assert error["message"]
    assert "\n" not in error["message"]
    assert error["code"] is None or isinstance(error["code"], str)
    return error


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in UNSUPPORTED.items() for name in names], ids=lambda value: str(value)
)
def test_openais_fields_that_are_not_supported_are_named(http: httpx2.Client, kind: Any, name: str) -> None:
    path, body = BODIES[kind]
    error = error_of(http.post(path, json={**body, name: 1}), 400)
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert name in error["message"]
    assert http.post(path, json={**body, name: None}).status_code == 200, "null asks for nothing"


@pytest.mark.parametrize("kind", list(BODIES), ids=lambda kind: str(kind.__name__))
def test_a_field_that_nobody_knows_is_named(http: httpx2.Client, kind: Any) -> None:
    path, body = BODIES[kind]
    error = error_of(http.post(path, json={**body, "frobnicate": 1}), 400)
    assert (error["param"], error["code"]) == ("frobnicate", "unknown_parameter")
    missing = error_of(http.post(path, json={k: v for k, v in body.items() if k != "model"}), 400)
    assert (missing["param"], missing["code"]) == ("model", "missing_required_parameter")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0, "max_tokens": None}, "max_completion_tokens"),
        ({"max_completion_tokens": 5}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"presence_penalty": -2.5}, "presence_penalty"),
        ({"logit_bias": {"abc": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"512": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "pirate", "content": "a"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
        ),
        ({"messages": [{"role": "user", "content": "a", "mood": "x"}]}, "messages[0].mood"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"store": True}, "store"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"no_such": 1}}, "chat_template_kwargs.no_such"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, None),
    ],
    ids=lambda value: str(value)[:50],
)
def test_values_that_are_not_allowed(http: httpx2.Client, change: dict[str, Any], param: str | None) -> None:
    error = error_of(http.post("/v1/chat/completions", json={**CHAT, **change}), 400)
    if param is None:
        assert error["code"] == "context_length_exceeded"
    else:
        assert error["param"] is not None, error
        assert error["param"].startswith(param), error
    # The same answer where a stream was asked for: nothing has been sent yet.
    if "stream_options" not in change:
        assert error_of(http.post("/v1/chat/completions", json={**CHAT, "stream": True, **change}), 400) == error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [5, 512]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a"] * 600, "n": 2}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": []}, "tools"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_values_that_completions_do_not_allow(http: httpx2.Client, change: dict[str, Any], param: str) -> None:
    assert error_of(http.post("/v1/completions", json={**TEXT, **change}), 400)["param"] == param


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {"content-type": "application/json"}, 400),
        (b"[1]", {"content-type": "application/json"}, 400),
        (b"\xff", {"content-type": "application/json"}, 400),
        (b"[" * 100_000, {"content-type": "application/json"}, 400),
        (b"", {"content-type": "application/json"}, 400),
        (msgspec.json.encode(CHAT), {"content-type": "text/plain"}, 415),
        (msgspec.json.encode(CHAT), {}, 415),
        (b" " * (9 << 20), {"content-type": "application/json"}, 413),
    ],
    ids=["cut", "list", "bytes", "deep", "empty", "plain", "untyped", "large"],
)
def test_bodies_that_are_no_requests(http: httpx2.Client, content: bytes, headers: dict[str, str], status: int) -> None:
    error_of(http.post("/v1/chat/completions", content=content, headers=headers), status)


def test_a_body_that_grows_too_large_is_cut_off(http: httpx2.Client) -> None:
    chunks = (b" " * (1 << 20) for _ in range(64))
    reply = http.post("/v1/chat/completions", content=chunks, headers={"content-type": "application/json"})
    error_of(reply, 413)


def test_paths_methods_and_models_that_are_not_there(http: httpx2.Client, client: openai.OpenAI) -> None:
    error_of(http.get("/v1/nothing"), 404, kind="not_found_error")
    wrong = http.get("/v1/chat/completions")
    error_of(wrong, 405)
    assert wrong.headers["allow"] == "POST"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=CHAT["messages"])
    assert (caught.value.param, caught.value.code, caught.value.type) == ("model", "model_not_found", "not_found_error")
    assert "plain" in caught.value.message


@pytest.mark.shows("/v1/chat/completions", "X-Request-Id")
def test_a_request_keeps_its_id(http: httpx2.Client, client: openai.OpenAI) -> None:
    for path, body in (("/v1/completions", TEXT), ("/v1/completions", {**TEXT, "stream": True}), ("/v1/nothing", {})):
        assert http.post(path, json=body, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    first, second = (http.get("/health").headers["x-request-id"] for _ in range(2))
    assert first != second
    evil = http.get("/health", headers={"x-request-id": "a" * 200}).headers["x-request-id"]
    assert evil.startswith("req_")
    answer = client.chat.completions.with_raw_response.create(**CHAT, extra_headers={"X-Request-Id": "mine-2"})
    assert answer.request_id == "mine-2"


def test_a_refused_request_disturbs_nobody(server: Server, http: httpx2.Client) -> None:
    before = server.figure("vllm:request_success_total")
    http.post("/v1/completions", json={**TEXT, "logit_bias": {"512": 1}})
    http.post("/v1/completions", json=TEXT)
    assert server.figure("vllm:request_success_total") == before + 1
    assert server.is_quiet()
