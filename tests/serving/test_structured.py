"""Answers that must have a form: JSON of any kind, and calls of tools."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.serving.json_schemas import random_schema
from tests.serving.server import Server
from tests.serving.test_chat import token_id

pytestmark = pytest.mark.slow
CHAT = "/v1/chat/completions"
NUM_SCHEMAS, NUM_SCHEMAS_SHORT = 100, 10
ASKED: list[Any] = [{"role": "user", "content": "Describe the sea."}]
LOOK = {
    "type": "object",
    "properties": {
        "where": {"type": "string", "maxLength": 8},
        "how often": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["where", "how often"],
    "additionalProperties": False,
}
WAIT = {"type": "object", "properties": {"s": {"enum": [1, 2]}}, "required": ["s"], "additionalProperties": False}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "look_up", "description": "Looks.", "parameters": LOOK, "strict": True}},
    {"type": "function", "function": {"name": "wait", "parameters": WAIT}},
]
PARAMETERS = {"look_up": LOOK, "wait": WAIT}


def check(text: str | None, schema: dict[str, Any]) -> None:
    # Not `FormatChecker()`, which has the times of draft 3: without a zone.
    formats = jsonschema.Draft202012Validator.FORMAT_CHECKER
    assert {"date", "time", "uuid", "ipv4", "date-time"} <= formats.checkers.keys(), "a validator's extra is missing"
    checker = jsonschema.Draft202012Validator(schema, format_checker=formats)
    checker.validate(json.loads(text or ""))


def format_of(schema: dict[str, Any]) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "form", "strict": True, "schema": schema}}


@pytest.mark.shows(CHAT, "response_format")
@pytest.mark.parametrize(
    "seed",
    [pytest.param(seed, marks=[] if seed < NUM_SCHEMAS_SHORT else [pytest.mark.full]) for seed in range(NUM_SCHEMAS)],
)
def test_answers_satisfy_random_schemas(client: openai.OpenAI, seed: int) -> None:
    schema = random_schema(seed)
    for model in ("plain", "smollm2") if seed >= NUM_SCHEMAS_SHORT or seed % 5 == 0 else ("plain",):
        answer = client.chat.completions.create(
            model=model, messages=ASKED, response_format=format_of(schema), seed=seed, temperature=1.0, max_tokens=1200
        )
        assert answer.choices[0].finish_reason == "stop", (schema, answer.choices[0].message.content)
        check(answer.choices[0].message.content, schema)


@pytest.mark.shows(CHAT, "response_format")
def test_json_objects_and_streams(server: Server, client: openai.OpenAI) -> None:
    schema = random_schema(5)
    chunks = client.chat.completions.create(
        model="plain", messages=ASKED, response_format=format_of(schema), seed=1, max_tokens=1200, stream=True
    )
    check("".join(chunk.choices[0].delta.content or "" for chunk in chunks), schema)
    # A model of noise would write keys for ever; one that likes quotes and braces does not.
    bias = {str(token_id(server, "plain", mark)): 6 for mark in ('"', "}", "]")}
    for seed in range(4):
        answer = client.chat.completions.create(
            model="plain",
            messages=ASKED,
            response_format={"type": "json_object"},
            seed=seed,
            logit_bias=bias,
            max_tokens=1200,
        )
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
    plain = client.chat.completions.create(model="plain", messages=ASKED, response_format={"type": "text"}, max_tokens=2)
    assert plain.choices[0].finish_reason == "length"


def test_the_form_comes_after_the_reasoning(server: Server, client: openai.OpenAI) -> None:
    for model in ("talker", "thinker"):
        answer = client.chat.completions.create(
            model=model, messages=ASKED, response_format=format_of(WAIT), seed=3, max_tokens=400,
            logit_bias={str(token_id(server, model, "</think>")): 8}, reasoning_effort="high",
        )  # fmt: skip
        message = answer.choices[0].message
        check(message.content, WAIT)
        assert (message.model_extra or {})["reasoning_content"]


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "object", "properties": {"a": {"type": "nonsense"}}}, "nonsense"),
        ({"type": "string", "pattern": "(?<=a)b"}, "pattern"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}, "none"),
        ({"not": {"type": "string"}}, "not"),
    ],
    ids=["type", "pattern", "reference", "not"],
)
def test_a_schema_that_cannot_be_enforced_is_refused(client: openai.OpenAI, schema: dict[str, Any], word: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="plain", messages=ASKED, response_format=format_of(schema), max_tokens=5)
    assert caught.value.param == "response_format.json_schema.schema", caught.value.message
    assert word in caught.value.message


# ---- tools


def check_calls(calls: list[tuple[str, str]]) -> None:
    assert calls
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), PARAMETERS[name])


@pytest.mark.shows(CHAT, "tools", "tool_choice", "parallel_tool_calls")
@pytest.mark.parametrize("model", ["talker", "thinker", "mistral", "llama"])
@pytest.mark.parametrize("choice", ["required", "auto", "named"])
def test_tool_calls_whole_and_streamed(server: Server, client: openai.OpenAI, model: str, choice: str) -> None:
    asked: Any = {"model": model, "messages": ASKED, "tools": TOOLS, "seed": 8, "max_tokens": 1200}
    asked["tool_choice"] = {"type": "function", "function": {"name": "wait"}} if choice == "named" else choice
    if choice == "auto":
        # Nobody has taught this model when to call.
        begin = {"mistral": "[TOOL_CALLS]", "llama": "<|python_tag|>"}.get(model, "<tool_call>")
        asked["logit_bias"] = {str(token_id(server, model, begin)): 30 if model == "llama" else 9}
    asked["parallel_tool_calls"] = choice == "auto"
    # So that the prompt is in the cache both times: computed anew, its last bits may differ, and a draw with them.
    client.chat.completions.create(**{**asked, "max_tokens": 1})
    answer = client.chat.completions.create(**asked)
    message = answer.choices[0].message
    assert message.tool_calls
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls if call.type == "function"]
    if choice != "auto":
        assert answer.choices[0].finish_reason == "tool_calls"
        assert len(calls) == 1
        assert message.content is None
    if answer.choices[0].finish_reason == "tool_calls":
        check_calls(calls)
    if choice == "named":
        assert calls[0][0] == "wait"
    assert len({call.id for call in message.tool_calls}) == len(calls)
    streamed: list[list[str]] = []
    text, reason = "", None
    for chunk in client.chat.completions.create(**asked, stream=True):
        delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason or reason
        text += delta.content or ""
        for piece in delta.tool_calls or []:
            assert piece.function is not None
            if piece.index == len(streamed):
                assert piece.id
                assert (piece.type, piece.function.arguments) == ("function", "")
                streamed.append([piece.function.name or "", ""])
            else:
                assert piece.index == len(streamed) - 1
                assert (piece.id, piece.function.name) == (None, None)
                streamed[-1][1] += piece.function.arguments or ""
    assert [tuple(call) for call in streamed] == calls
    assert reason == answer.choices[0].finish_reason
    assert text == (message.content or "")


@pytest.mark.parametrize("model", ["talker", "mistral", "llama"])
def test_a_call_its_result_and_an_answer(server: Server, client: openai.OpenAI, model: str) -> None:
    messages = list(ASKED)
    asked: Any = {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 1200}
    if model == "talker":
        # It may think before it calls, and a random model that has begun to think seldom ends.
        asked["logit_bias"] = {str(token_id(server, model, "<think>")): -100}
    first = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, **asked)
    reply = first.choices[0].message
    assert reply.tool_calls
    messages += [
        reply.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": reply.tool_calls[0].id, "content": "blue"},
    ]
    second = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, tool_choice="none", max_tokens=3)
    assert second.choices[0].message.tool_calls is None
    question = client.chat.completions.create(model=model, messages=messages[:1], max_tokens=1)
    assert second.usage is not None
    assert question.usage is not None
    assert second.usage.prompt_tokens > question.usage.prompt_tokens + 10, "the call and its result are told"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": "plain", "tools": TOOLS}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "swim"}}}, "tool_choice"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "no good"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "odd"}}}],
                "tool_choice": "required",
            },
            "tools[0].function.parameters",
        ),
    ],
    ids=["no-tools", "none", "other", "both", "name", "custom", "schema"],
)
def test_wrong_tools(client: openai.OpenAI, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "talker", "messages": ASKED, "max_tokens": 2, **change})
    assert caught.value.param == param, caught.value.message
