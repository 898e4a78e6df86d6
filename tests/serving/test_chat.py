"""`/v1/chat/completions` as the official client meets it."""

from __future__ import annotations

import json
import math
from typing import Any

import openai
import pytest

from tests.serving.server import Server

pytestmark = pytest.mark.slow
CHAT = "/v1/chat/completions"
HELLO: list[Any] = [{"role": "user", "content": "Say hello to the sailor."}]


def token_id(server: Server, model: str, text: str) -> int:
    with server.http() as http:
        (found,) = http.post("/tokenize", json={"model": model, "content": text}).json()["tokens"]
    return int(found)


@pytest.mark.shows(CHAT, "model", "messages", "max_tokens", "temperature", "seed")
def test_an_answer(client: openai.OpenAI) -> None:
    asked: Any = {"model": "plain", "messages": HELLO, "max_tokens": 8, "temperature": 0.7, "seed": 3}
    answer = client.chat.completions.create(**asked)
    assert answer.object == "chat.completion"
    assert answer.model == "plain"
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.message.role == "assistant"
    assert choice.message.refusal is None
    assert choice.message.tool_calls is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    again = client.chat.completions.create(**asked)
    assert again.choices[0].message.content == choice.message.content
    assert again.id != answer.id
    other = client.chat.completions.create(**{**asked, "seed": 4})
    assert other.choices[0].message.content != choice.message.content


@pytest.mark.shows(CHAT, "stream", "stream_options")
def test_a_stream_is_what_clients_expect(client: openai.OpenAI) -> None:
    asked: Any = {"model": "plain", "messages": HELLO, "max_tokens": 8, "seed": 3}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"
    first, *middle, end, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in middle)
    assert all(chunk.choices[0].finish_reason is None for chunk in (first, *middle))
    assert end.choices[0].finish_reason == "length"
    assert end.choices[0].delta.content is None
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert usage.choices == []
    assert usage.usage is not None
    assert whole.usage is not None
    assert usage.usage.completion_tokens == whole.usage.completion_tokens
    text = "".join(chunk.choices[0].delta.content or "" for chunk in middle)
    assert text == whole.choices[0].message.content


def test_the_bytes_of_a_stream(server: Server) -> None:
    body = {"model": "plain", "messages": HELLO, "max_tokens": 2, "stream": True}
    with server.http() as http:
        reply = http.post(CHAT, json=body)
        with_usage = http.post(CHAT, json={**body, "stream_options": {"include_usage": True}}).text
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    events = [event for event in reply.text.split("\n\n") if event and not event.startswith(":")]
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert all("usage" not in chunk for chunk in chunks)
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])
    assert '"finish_reason":""' not in reply.text
    assert with_usage.count('"usage":null') == with_usage.count("data: {") - 1


@pytest.mark.shows(CHAT, "n")
def test_several_choices_differ_and_come_back(client: openai.OpenAI) -> None:
    asked: Any = {"model": "plain", "messages": HELLO, "max_tokens": 6, "n": 3, "seed": 5}
    answer = client.chat.completions.create(**asked)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 18
    single = client.chat.completions.create(**{**asked, "n": 1})
    assert single.choices[0].message.content == texts[0]
    assert single.usage is not None
    assert single.usage.prompt_tokens == answer.usage.prompt_tokens, "a prompt counts once"
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for piece in chunk.choices:
            streamed[piece.index] += piece.delta.content or ""
    assert streamed == texts


@pytest.mark.shows(CHAT, "stop")
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_an_answer_and_are_not_in_it(client: openai.OpenAI, stream: bool) -> None:
    asked: Any = {"model": "smollm2", "messages": [{"role": "user", "content": "Count: one, two, three, four"}]}
    asked |= {"max_tokens": 40, "temperature": 0.0}
    text = client.chat.completions.create(**asked).choices[0].message.content
    assert text is not None
    assert len(text) > 20
    stop = text[8:11]
    for stops in (stop, ["never said", stop]):
        if stream:
            chunks = list(client.chat.completions.create(**asked, stop=stops, stream=True))
            found = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            choice = client.chat.completions.create(**asked, stop=stops).choices[0]
            found, reason = choice.message.content or "", choice.finish_reason
        assert (found, reason) == (text[: text.index(stop)], "stop")


@pytest.mark.shows(CHAT, "logprobs", "top_logprobs")
def test_logprobs(client: openai.OpenAI) -> None:
    asked: Any = {"model": "plain", "messages": HELLO, "max_tokens": 6, "seed": 1, "logprobs": True, "top_logprobs": 4}
    answer = client.chat.completions.create(**asked)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 6
    for token in logprobs.content:
        assert -50.0 < token.logprob <= 0.0
        assert len(token.top_logprobs) == 4
        best = [other.logprob for other in token.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert token.logprob <= best[0]
        assert sum(math.exp(value) for value in best) <= 1.0 + 1e-6
        for other in token.top_logprobs:
            if other.bytes == token.bytes:
                assert other.logprob == token.logprob
    spelled = b"".join(bytes(token.bytes or []) for token in logprobs.content)
    assert spelled.decode(errors="replace") == answer.choices[0].message.content
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert [token.model_dump() for token in streamed] == [token.model_dump() for token in logprobs.content]
    bare = client.chat.completions.create(**{**asked, "top_logprobs": openai.omit})
    assert bare.choices[0].logprobs is not None
    assert all(token.top_logprobs == [] for token in bare.choices[0].logprobs.content or [])


@pytest.mark.shows(CHAT, "logit_bias")
def test_logit_bias_forces_and_forbids(server: Server, client: openai.OpenAI) -> None:
    word = token_id(server, "plain", " there")
    asked: Any = {"model": "plain", "messages": HELLO, "max_tokens": 4, "temperature": 0.0}
    forced = client.chat.completions.create(**asked, logit_bias={str(word): 100})
    assert forced.choices[0].message.content == " there" * 4
    best = client.chat.completions.create(**asked, logprobs=True).choices[0].logprobs
    assert best is not None
    assert best.content is not None
    with server.http() as http:
        pieces = http.post("/tokenize", json={"model": "plain", "content": "", "with_pieces": True}).json()
    assert pieces["count"] == 0
    forbidden = client.chat.completions.create(**asked, logit_bias={str(word): -100}, logprobs=True)
    assert " there" not in (forbidden.choices[0].message.content or "")


@pytest.mark.shows(CHAT, "frequency_penalty", "presence_penalty", "repetition_penalty")
@pytest.mark.parametrize(
    "penalty", [{"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repetition_penalty": 100.0}], ids=str
)
def test_penalties_make_repetition_rarer(server: Server, client: openai.OpenAI, penalty: dict[str, Any]) -> None:
    # Two words are a little likelier than all others and take turns, until a penalty lets others have theirs.
    bias = {str(token_id(server, "plain", word)): 3 for word in (" there", " good")}
    asked: Any = {"model": "plain", "messages": HELLO, "max_tokens": 12, "temperature": 0.0, "logit_bias": bias}
    plain = client.chat.completions.create(**asked).choices[0].message.content
    punished = client.chat.completions.create(**asked, extra_body=penalty).choices[0].message.content
    assert plain is not None
    assert punished is not None
    often = max((" there", " good"), key=plain.count)
    assert plain.count(often) >= 4
    assert punished.count(often) < plain.count(often)


@pytest.mark.shows(CHAT, "top_k", "min_p", "top_p")
@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 0.0}, {"top_p": 1e-6}], ids=str)
def test_narrow_sampling_is_greedy(client: openai.OpenAI, narrow: dict[str, Any]) -> None:
    asked: Any = {"model": "plain", "messages": HELLO, "max_tokens": 6}
    greedy = client.chat.completions.create(**asked, temperature=0.0).choices[0].message.content
    found = client.chat.completions.create(**asked, temperature=2.0, seed=9, extra_body=narrow).choices[0].message.content
    assert found == greedy
    wide = client.chat.completions.create(
        **asked, temperature=2.0, seed=9, extra_body={"top_k": -1, "min_p": 0.0, "top_p": 1.0}
    )
    assert wide.choices[0].message.content != greedy


@pytest.mark.shows(CHAT, "max_completion_tokens", "ignore_eos")
def test_the_length_by_its_newer_name(server: Server, client: openai.OpenAI) -> None:
    asked: Any = {"model": "plain", "messages": HELLO}
    answer = client.chat.completions.create(**asked, max_completion_tokens=3)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    end = {str(token_id(server, "plain", "<|im_end|>")): 100}
    ended = client.chat.completions.create(**asked, max_completion_tokens=3, logit_bias=end)
    assert (ended.choices[0].message.content, ended.choices[0].finish_reason) == ("", "stop")
    goes_on = client.chat.completions.create(
        **asked, max_completion_tokens=3, logit_bias=end, extra_body={"ignore_eos": True}
    )
    assert goes_on.choices[0].finish_reason == "length"


def test_usage_tells_what_came_from_the_cache(client: openai.OpenAI) -> None:
    story = "The sailor and the sea. " * 20
    asked: Any = {"model": "plain", "max_tokens": 2, "temperature": 0.0}
    first = client.chat.completions.create(**asked, messages=[{"role": "user", "content": f"1 {story}"}]).usage
    second = client.chat.completions.create(**asked, messages=[{"role": "user", "content": f"1 {story} And then?"}]).usage
    assert first is not None
    assert second is not None
    assert second.prompt_tokens_details is not None
    assert first.prompt_tokens - 32 <= (second.prompt_tokens_details.cached_tokens or 0) < second.prompt_tokens


@pytest.mark.shows(CHAT, "chat_template_kwargs", "reasoning_effort")
@pytest.mark.parametrize("model", ["talker", "thinker"])
@pytest.mark.parametrize("how", [{"chat_template_kwargs": {"enable_thinking": True}}, {"reasoning_effort": "high"}], ids=str)
def test_reasoning_is_apart_from_the_answer(server: Server, client: openai.OpenAI, model: str, how: dict[str, Any]) -> None:
    bias = {str(token_id(server, model, "</think>")): 3}
    asked: Any = {"model": model, "messages": HELLO, "max_tokens": 60, "seed": 2, "logit_bias": bias, "extra_body": how}
    answer = client.chat.completions.create(**asked)
    message = answer.choices[0].message
    reasoning = message.model_extra["reasoning_content"] if message.model_extra else None
    assert reasoning
    assert "think>" not in reasoning
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert 0 < (answer.usage.completion_tokens_details.reasoning_tokens or 0) < 60
    streamed, order = {"content": "", "reasoning_content": ""}, []
    for chunk in client.chat.completions.create(**asked, stream=True):
        delta = chunk.choices[0].delta.model_dump(exclude_unset=True)
        for name in streamed:
            if delta.get(name):
                streamed[name] += delta[name]
                order.append(name)
    assert streamed == {"content": message.content, "reasoning_content": reasoning}
    assert order == sorted(order, reverse=True), "reasoning comes first"


@pytest.mark.shows(CHAT, "reasoning_effort")
def test_no_reasoning_where_none_is_wanted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="talker", messages=HELLO, max_tokens=4, reasoning_effort="none")
    assert "reasoning_content" not in (answer.choices[0].message.model_extra or {})
    with pytest.raises(openai.BadRequestError, match="cannot be told how much to reason"):
        client.chat.completions.create(model="plain", messages=HELLO, max_tokens=4, reasoning_effort="high")


@pytest.mark.shows(CHAT, "messages")
def test_conversations_of_every_kind(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"where": "sea"}'}}
    messages: list[Any] = [
        {"role": "developer", "content": "Be short."},
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "user", "name": "ann", "content": "What is there?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "fish"},
        {"role": "assistant", "content": "fish", "refusal": None, "reasoning_content": "hm"},
        {"role": "user", "content": "And?"},
    ]
    answer = client.chat.completions.create(model="talker", messages=messages, max_tokens=2)
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.shows(CHAT, "user", "safety_identifier", "prompt_cache_key", "store", "service_tier", "modalities")
def test_fields_that_ask_for_nothing(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="plain", messages=HELLO, max_tokens=1, user="u", safety_identifier="s", prompt_cache_key="k", store=False,
        service_tier="auto", modalities=["text"], extra_body={"audio": None, "functions": None},
    )  # fmt: skip
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1
