"""What a schema lets a model write."""

from __future__ import annotations

import calendar
import json
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from shoal.text.grammar import json_grammar

_TOKENIZER = LLTokenizer("byte")


def allowed(schema: dict[str, Any], text: str) -> bool:
    matcher = LLMatcher(_TOKENIZER, f"start: {json_grammar(json.dumps(schema), where='schema')}", log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = _TOKENIZER.tokenize_str(text)
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


@pytest.mark.parametrize(
    ("schema", "texts", "endless"),
    [
        ({"type": "integer"}, ["0", "-9000000000000000000", "9000000000000000000"], "9" * 19),
        ({"type": "integer", "minimum": 3}, ["3", "9000000000000000000"], "9" * 19),
        ({"type": "integer", "exclusiveMaximum": 3, "multipleOf": 2}, ["2", "-4"], "-" + "98" * 10),
        ({"type": "number", "minimum": -2, "maximum": 50}, ["-2", "0.123456789", "50", "7.5"], "1.0000000000"),
        ({"type": "array", "items": {"$ref": "#/$defs/n"}, "$defs": {"n": {"type": "integer"}}}, ["[1, 2]"],
         f"[{'1' * 20}]"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, ["12", "null"], "1" * 20),
        ({"type": "string", "format": "time"}, ['"10:53:10Z"', '"10:53:10.123456789+02:00"'], f'"10:53:10.{"1" * 20}Z"'),
        ({"type": "string", "format": "date-time"}, ['"2026-11-25T10:53:10.5Z"'], f'"2026-11-25T10:53:10.{"1" * 20}Z"'),
        ({"type": "string", "format": "duration"}, ['"P3DT4H"'], f'"P{"1" * 40}D"'),
        ({"type": ["integer", "string"]}, ["12", '"x"'], "1" * 20),
        ({"type": "object", "properties": {"type": {"type": "integer"}}, "required": ["type"]}, ['{"type": 1}'],
         f'{{"type": {"1" * 20}}}'),
    ],
)  # fmt: skip
def test_numbers_end(schema: dict[str, Any], texts: list[str], endless: str) -> None:
    for text in texts:
        assert allowed(schema, text), text
        jsonschema.validate(json.loads(text), schema)
    assert not allowed(schema, endless)


@pytest.mark.parametrize(
    ("form", "text", "exists"),
    [
        ("time", "09:52:59-21:50", True),
        ("time", "09:52:60-21:50", False),
        ("date-time", "2024-02-29T10:00:59.5Z", True),
        ("date-time", "2023-02-29T10:00:00Z", False),
        ("date-time", "2024-02-29T10:00:60Z", False),
        ("date", "2023-04-31", False),
        ("date", "0000-01-01", False),
    ],
)
def test_only_times_that_exist(form: str, text: str, exists: bool) -> None:
    assert allowed({"type": "string", "format": form}, f'"{text}"') == exists


def test_the_last_of_february_is_there_in_leap_years() -> None:
    for year in (*range(1, 40), *range(1880, 2120), 2200, 2400, 9996, 9999):
        schema = {"type": "string", "format": "date"}
        assert allowed(schema, f'"{year:04}-02-29"') == calendar.isleap(year), year
        assert allowed(schema, f'"{year:04}-02-28"')
        assert allowed(schema, f'"{year:04}-12-31"')


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "number"}, "6.02214076e23"),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1e-12}, "0.0000000000001"),
        ({"enum": [{"type": "integer"}]}, '{"type": "integer"}'),
        ({"const": {"type": "integer"}}, '{"type": "integer"}'),
    ],
)
def test_what_is_not_held_short(schema: dict[str, Any], text: str) -> None:
    assert allowed(schema, text)
