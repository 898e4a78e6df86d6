"""Models by name, vectors, and questions about texts."""

from __future__ import annotations

import base64
import struct
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from tests.oracle.llamacpp import Llama
from tests.serving.models import write_plain_model
from tests.serving.server import running

pytestmark = pytest.mark.slow
EMBEDDINGS = "/v1/embeddings"


@pytest.mark.shows("/v1/models")
def test_models_are_listed(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"plain", "exact", "talker", "thinker", "mistral", "llama", "embedder", "smollm2"}
    plain = models["plain"]
    assert (plain.object, plain.owned_by) == ("model", "shoal")
    assert plain.created > 1_600_000_000
    assert plain.model_extra == {"state": "ready", "max_model_len": 2048, "context_length": 2048}


@pytest.mark.shows("/v1/models/{model}", "model")
def test_a_model_by_its_id_with_slashes(tmp_path: Path, cache: Path) -> None:
    # As a Hugging Face cache holds it.
    snapshot = tmp_path / "models--someone--tiny-GGUF" / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    write_plain_model(snapshot / "tiny-Q8_0.gguf")
    with running(models=tmp_path, cache=cache) as server, server.openai() as client:
        (model,) = client.models.list()
        assert model.id == "someone/tiny-GGUF:Q8_0"
        assert client.models.retrieve(model.id).id == model.id
        with server.http() as http:
            assert http.get("/v1/models/someone/tiny-GGUF:Q8_0").json()["id"] == model.id
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("someone/else")
        assert caught.value.code == "model_not_found"
        assert "someone/tiny-GGUF:Q8_0" in caught.value.message


@pytest.mark.shows(EMBEDDINGS, "model", "input", "encoding_format", "user")
def test_vectors_of_texts(client: openai.OpenAI, http: httpx2.Client) -> None:
    ids = http.post("/tokenize", json={"model": "embedder", "content": "the sea"}).json()["tokens"]
    asked: Any = {"model": "embedder", "user": "u"}
    single = client.embeddings.create(**asked, input="the sea")  # the client asks for base64
    assert single.object == "list"
    vector = single.data[0].embedding
    assert len(vector) == 256
    assert abs(np.linalg.norm(vector) - 1.0) < 1e-5
    assert (single.usage.prompt_tokens, single.usage.total_tokens) == (len(ids), len(ids))
    several = client.embeddings.create(**asked, input=["the sea", "a fish"], encoding_format="float")
    assert [item.index for item in several.data] == [0, 1]
    np.testing.assert_allclose(several.data[0].embedding, vector, rtol=1e-6)
    assert float(np.dot(several.data[1].embedding, vector)) < 0.999
    by_ids = client.embeddings.create(**asked, input=[ids, ids])
    np.testing.assert_array_equal(by_ids.data[1].embedding, vector)
    raw = http.post(EMBEDDINGS, json={"model": "embedder", "input": ids, "encoding_format": "base64"}).json()
    values = struct.unpack("<256f", base64.b64decode(raw["data"][0]["embedding"]))
    np.testing.assert_allclose(values, vector, rtol=1e-6)


def test_a_model_without_vectors_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not made for embeddings"):
        client.embeddings.create(model="plain", input="the sea")
    for wrong in ("", [""], []):
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="embedder", input=wrong)
        assert caught.value.param == "input"


@pytest.mark.shows(
    "/tokenize", "model", "content", "prompt", "add_special", "add_special_tokens", "parse_special", "with_pieces"
)
@pytest.mark.shows("/detokenize", "model", "tokens")
def test_tokens_and_texts(http: httpx2.Client, served_models: Path) -> None:
    text = "Hello, <|im_start|>wörld \U0001f600"
    with Llama(served_models / "smollm2.gguf", vocab_only=True) as llama:
        theirs = llama.tokenize(text)
        plain = llama.tokenize(text, parse_special=False)
    found = http.post("/tokenize", json={"model": "smollm2", "content": text}).json()
    assert found["tokens"] == theirs
    assert found["count"] == len(theirs)
    assert found["max_model_len"] > 0
    assert http.post("/tokenize", json={"model": "smollm2", "prompt": text}).json()["tokens"] == theirs
    asked = {"model": "smollm2", "content": text, "parse_special": False}
    assert http.post("/tokenize", json=asked).json()["tokens"] == plain != theirs
    for name in ("add_special", "add_special_tokens"):
        special = http.post("/tokenize", json={"model": "smollm2", "content": text, name: True}).json()["tokens"]
        assert special[-len(theirs) :] == theirs
    pieces = http.post("/tokenize", json={"model": "smollm2", "content": text, "with_pieces": True}).json()["tokens"]
    spelled = b"".join(p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces)
    assert spelled.decode() == text
    assert [piece["id"] for piece in pieces] == theirs
    back = http.post("/detokenize", json={"model": "smollm2", "tokens": theirs}).json()
    assert back == {"content": text, "prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"model": "plain"}, "content"),
        ("/tokenize", {"model": "plain", "content": "a", "prompt": "a"}, "content"),
        ("/tokenize", {"content": "a"}, "model"),
        ("/detokenize", {"model": "plain", "tokens": [512]}, "tokens"),
        ("/detokenize", {"model": "plain", "tokens": [-1]}, "tokens[0]"),
        ("/apply-template", {"model": "plain", "messages": []}, "messages"),
    ],
    ids=str,
)
def test_wrong_questions_about_texts(http: httpx2.Client, path: str, body: dict[str, Any], param: str | None) -> None:
    reply = http.post(path, json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


@pytest.mark.shows("/apply-template", "model", "messages", "tools", "add_generation_prompt", "chat_template_kwargs")
def test_a_conversation_as_the_model_reads_it(http: httpx2.Client) -> None:
    body: dict[str, Any] = {"model": "plain", "messages": [{"role": "user", "content": "hi"}]}
    found = http.post("/apply-template", json=body).json()
    assert found["prompt"] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert found["count"] == len(
        http.post("/tokenize", json={"model": "plain", "content": found["prompt"]}).json()["tokens"]
    )
    bare = http.post("/apply-template", json={**body, "add_generation_prompt": False}).json()["prompt"]
    assert bare == "<|im_start|>user\nhi<|im_end|>\n"
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    more = {"model": "talker", "tools": tools, "chat_template_kwargs": {"enable_thinking": True}}
    prompt = http.post("/apply-template", json={**body, **more}).json()["prompt"]
    assert '"name": "look"' in prompt
    assert prompt.endswith("assistant\n<think>\n")
