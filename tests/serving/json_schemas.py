"""Random JSON schemas, of what clients use: nested objects, arrays, choices, references, ranges, patterns and formats."""

from __future__ import annotations

import random
from typing import Any


def random_schema(seed: int) -> dict[str, Any]:
    """A schema whose every instance is of bounded size, so that a model that says anything at all comes to an end."""
    draw = random.Random(seed)
    definitions = {"point": _object(draw, 2, {})} if draw.random() < 0.3 else {}
    schema = _object(draw, 3, definitions) if draw.random() < 0.85 else _array(draw, 2, definitions)
    return {**schema, "$defs": definitions} if definitions else schema


def _any(draw: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    simple = [_string, _integer, _number, _choice, _constant, _truth, _nullable]
    nested = [_object, _array, _either]
    if definitions and draw.random() < 0.2:
        return {"$ref": "#/$defs/point"}
    if depth > 0 and draw.random() < 0.4:
        return draw.choice(nested)(draw, depth - 1, definitions)
    return draw.choice(simple)(draw)


def _object(draw: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    names = draw.sample(["name", "age", "größe", "tags", "a b", "x", "is_open", 'quo"te', "when", "12"], draw.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _any(draw, depth, definitions) for name in names},
        "required": names if draw.random() < 0.6 else draw.sample(names, draw.randint(0, len(names))),
        "additionalProperties": False,
    }


def _array(draw: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    low = draw.randint(0, 2)
    return {"type": "array", "items": _any(draw, depth, definitions), "minItems": low, "maxItems": low + draw.randint(0, 2)}


def _either(draw: random.Random, depth: int, definitions: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [_any(draw, depth, definitions) for _ in range(draw.randint(2, 3))]}


def _string(draw: random.Random) -> dict[str, Any]:
    kind = draw.randrange(3)
    if kind == 0:
        return {"type": "string", "format": draw.choice(["date", "time", "uuid", "ipv4", "date-time"])}
    if kind == 1:
        return {
            "type": "string",
            "pattern": draw.choice(["^[a-z]{2,5}$", r"^\d{3}-\d{4}$", "^(red|green|blue)$", "^[A-F0-9]{4}$"]),
        }
    low = draw.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + draw.randint(0, 8)}


def _integer(draw: random.Random) -> dict[str, Any]:
    low = draw.randint(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 5000)}


def _number(draw: random.Random) -> dict[str, Any]:
    low = draw.randint(-50, 50)
    return {"type": "number", "minimum": low, "maximum": low + draw.randint(1, 100)}


def _choice(draw: random.Random) -> dict[str, Any]:
    return {"enum": draw.sample(["red", "green", 7, -1.5, None, True, "ü\n"], draw.randint(1, 4))}


def _constant(draw: random.Random) -> dict[str, Any]:
    return {"const": draw.choice(["fixed", 0, False, None])}


def _truth(draw: random.Random) -> dict[str, Any]:
    del draw
    return {"type": "boolean"}


def _nullable(draw: random.Random) -> dict[str, Any]:
    return {"type": [draw.choice(["boolean", "null"]), "null"]} if draw.random() < 0.5 else {"type": "null"}
