"""Decides which tokens may come next where an answer must have a form: JSON of a schema, or calls of given functions.

The work is done by `llguidance`; what is here gives it our vocabulary and writes its grammars (a dialect of Lark).
A schema that it cannot enforce in full is refused, not enforced in part.

What a model may repeat without end is held short, since one that has nothing to say would fill its answer with it:
whitespace in JSON, the digits of integers (those of 64 bits), and the fractions of seconds and of numbers for which a
range is given (nine digits).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from shoal.errors import RequestError, ShoalError
from shoal.text.dialect import Dialect, Reasoning, ToolFormat
from shoal.text.tokenizer import Tokenizer

_WHITESPACE = r"[ ]?|\n[ ]{0,16}"
_SPECIAL_MARK = b"\xff"
"""How llguidance knows a token that steers the model from text that happens to read the same."""


class GrammarEngine:
    """The vocabulary as llguidance wants it; built once per model, in about a second for 150 000 tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._engine: Any = None

    def start(self, grammar: str) -> GrammarState:
        """A grammar at its beginning.

        Raises:
            RequestError: it cannot be enforced; says what of it.
        """
        if self._engine is None:
            vocabulary = TokenizerWrapper(_Vocabulary(self._tokenizer))
            self._engine = LLTokenizer(vocabulary, eos_token=sorted(self._tokenizer.eog_ids) or None)
        matcher = LLMatcher(self._engine, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(_first_line(matcher.get_error()))
        return GrammarState(matcher, self._tokenizer.vocab_size)


class GrammarState:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._mask = np.zeros(-(-vocab_size // 32), dtype=np.int32)
        self._is_fresh = False

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow: the answer is whole without an end token."""
        return self._matcher.is_stopped()

    def prepare(self) -> None:
        """Computes what may come next, if that is not yet known; work that fits beside the next token's."""
        if not self._is_fresh and not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
            self._is_fresh = True

    def allowed(self) -> npt.NDArray[np.bool_]:
        """bool [vocabulary]: the tokens that may come next."""
        self.prepare()
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little", count=self._vocab_size)
        return bits.view(np.bool_)

    def accept(self, token_id: int) -> None:
        """Goes on by a token.

        Raises:
            ShoalError: the grammar has become too large to follow.
        """
        self._is_fresh = False
        if not self._matcher.consume_token(token_id):
            raise ShoalError(
                f"the answer's grammar cannot be followed any further: {_first_line(self._matcher.get_error())}"
            )


class _Vocabulary:
    """What llguidance asks of a tokenizer. Special tokens are marked, so that no text can stand for them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = range(tokenizer.vocab_size)
        self.eos_token_id = min(tokenizer.eog_ids) if tokenizer.eog_ids else (tokenizer.eos_id or 0)
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = [token_id for token_id in ids if tokenizer.is_special(token_id)]
        special = set(self.special_token_ids)
        self.tokens = [(_SPECIAL_MARK if token_id in special else b"") + tokenizer.token_bytes(token_id) for token_id in ids]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return self._tokenizer.encode(text, parse_special=False)


class GrammarWriter:
    """Writes the grammars of one model's answers.

    `in_reasoning` where the prompt ends within it: it is then finished before the form begins.
    """

    def __init__(self, tokenizer: Tokenizer, dialect: Dialect, *, in_reasoning: bool) -> None:
        self._tokenizer = tokenizer
        self._dialect = dialect
        self._in_reasoning = in_reasoning

    def json(self, schema: str) -> str:
        """An answer that satisfies a JSON schema.

        Raises:
            RequestError: the schema is no JSON object.
        """
        return self._assemble("body", f"body: {json_grammar(schema, where='response_format.json_schema.schema')}")

    def calls(self, tools: Sequence[Mapping[str, Any]], *, is_required: bool, name: str = "", parallel: bool = True) -> str:
        """Calls of `tools` (as in OpenAI's API): at least one if required, else wherever the model begins one.

        Args:
            name: the only function that may be called, if not empty.
            parallel: whether more than one call may be made.

        Raises:
            RequestError: no such function, or a schema that is no object.
        """
        form = self._dialect.tools
        assert form is not None, "the caller has checked that the template takes tools"
        functions = [tool["function"] for tool in tools]
        if name:
            functions = [function for function in functions if function["name"] == name]
            if not functions:
                raise RequestError(f"tool_choice: there is no function '{name}' among the tools")
        rules = []
        for index, function in enumerate(functions):
            schema = json.dumps(function.get("parameters") or {"type": "object"})
            begin = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "{form.arguments_key}": '
            body = json_grammar(schema, where=f"tools[{index}].function.parameters")
            rules.append(f'object_{index}: {_literal(begin)} {body} "}}"')
        objects = " | ".join(f"object_{index}" for index in range(len(functions)))
        rules.append(f"object: {objects}")
        start, more = self._calls(form, is_required=is_required, parallel=parallel)
        return self._assemble(start, *rules, *more)

    def _calls(self, form: ToolFormat, *, is_required: bool, parallel: bool) -> tuple[str, list[str]]:
        """The start rule's body and the rules it needs besides `object`."""
        if not form.begin:
            lead = f"({self._mark(form.lead)})? " if form.lead else ""
            if is_required:
                return f"{lead}object", []
            return f"{lead}object | PLAIN?", [r"PLAIN: /[^{](.|\n)*/"]
        body = _list(parallel=parallel) if form.is_list else "SPACE object SPACE"
        end = f" {self._mark(form.end)}" if form.end else ""
        rules = ["SPACE: /[ ]?|\\n/"]
        if is_required:
            more = " (SPACE call)*" if parallel and not form.is_list else ""
            return f"call{more}", [*rules, f"call: {self._mark(form.begin)} {body}{end}"]
        rules += [r"TEXT: /(.|\n)*/"]
        if self._is_token(form.begin):
            rules.append(f"call: TEXT {self._mark(form.begin)} {body}{end}")
        else:
            rules += [f"head[lazy]: TEXT {_literal(form.begin)}", f"call: head {body}{end}"]
        # A list holds all calls there are; single calls repeat.
        return ("(call)* tail" if parallel and not form.is_list else "(call)? tail"), [*rules, "tail: TEXT"]

    def _assemble(self, start: str, *rules: str) -> str:
        lines = ["%llguidance {}"]
        reasoning = self._dialect.reasoning
        if reasoning is None:
            lines.append(f"start: {start}")
        else:
            lines += self._after_reasoning(reasoning, start)
        return "\n".join([*lines, *rules])

    def _after_reasoning(self, reasoning: Reasoning, start: str) -> list[str]:
        gap = r"GAP: /\s{0,4}/"
        if self._is_token(reasoning.end):
            rules = [gap, r"thought: /(.|\n)*/ " + self._mark(reasoning.end)]
        else:
            rules = [gap, rf"thought[lazy]: /(.|\n)*/ {_literal(reasoning.end)}"]
        if self._in_reasoning:
            return ["start: thought GAP answer", f"answer: {start}", *rules]
        return [f"start: ({self._mark(reasoning.begin)} thought GAP)? answer", f"answer: {start}", *rules]

    def _is_token(self, mark: str) -> bool:
        token_id = self._tokenizer.id_of(mark)
        return token_id is not None and self._tokenizer.is_special(token_id)

    def _mark(self, mark: str) -> str:
        return f"<[{self._tokenizer.id_of(mark)}]>" if self._is_token(mark) else _literal(mark)


def _list(*, parallel: bool) -> str:
    return 'SPACE "[" object (", " object)* "]"' if parallel else 'SPACE "[" object "]"'


def json_grammar(schema: str, *, where: str) -> str:
    """A grammar of JSON texts that satisfy a schema, as the body of a rule.

    Raises:
        RequestError: it cannot be enforced, `where` it stands in the request.
    """
    try:
        parsed = json.loads(schema)
    except ValueError as error:
        raise RequestError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise RequestError(f"{where}: a JSON schema is an object, not {type(parsed).__name__}")
    grammar = "%json " + json.dumps({**_held_short(parsed), "x-guidance": {"whitespace_pattern": _WHITESPACE}})
    if problem := LLMatcher.validate_grammar(f"start: {grammar}"):
        raise RequestError(f"{where}: cannot be enforced: {_first_line(problem)}")
    return grammar


_IN_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_IN_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_ALONE = ("items", "additionalProperties")
"""Keywords below which a schema has schemas that an answer must satisfy: by name, in order, alone."""
_RANGE = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_FRACTION_STEP = 1e-9
_YEAR = r"(000[1-9]|00[1-9]\d|0[1-9]\d\d|[1-9]\d{3})"
_LEAP_YEAR = r"(\d\d(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DATE = rf"({_YEAR}-(0[13-9]|1[0-2])-\d\d|{_YEAR}-02-([01]\d|2[0-8])|{_LEAP_YEAR}-02-29)"
_TIME = r"\d\d:\d\d:[0-5]"
_PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}", "date-time": f"^{_DATE}[Tt ]{_TIME}"}
"""What the formats let through and readers refuse is left out: 29 February of any year, the year 0, second 60."""
_LENGTHS_MAX = {
    "time": len("12:34:56.123456789+00:00"),
    "date-time": len("2000-01-01T12:34:56.123456789+00:00"),
    "duration": len("P12345678Y12M12DT12H12M12.123456789S"),
}
_INTEGER_MAX = 9 * 10**18
"""Nearly all of 64 bits: llguidance draws no range that ends at 2^63 - 1."""


def _held_short(schema: Any) -> Any:
    """The schema with numbers and times of bounded length and dates that exist: what satisfies it satisfies `schema`."""
    if not isinstance(schema, dict):
        return schema
    short = dict(schema)
    for keyword, value in schema.items():
        if keyword in _IN_MAPS and isinstance(value, dict):
            short[keyword] = {name: _held_short(part) for name, part in value.items()}
        elif keyword in _IN_LISTS and isinstance(value, list):
            short[keyword] = [_held_short(part) for part in value]
        elif keyword in _ALONE:
            short[keyword] = _held_short(value)
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    bounds = [schema[name] for name in _RANGE if isinstance(schema.get(name), (int, float))]
    if "number" in kinds:
        # Without a range a number may have an exponent, which a step would rule out.
        if bounds and "multipleOf" not in schema and all(bound == 0 or abs(bound) >= 1e-3 for bound in bounds):
            short["multipleOf"] = _FRACTION_STEP
    elif "integer" in kinds and all(abs(bound) <= _INTEGER_MAX for bound in bounds):
        if "minimum" not in schema and "exclusiveMinimum" not in schema:
            short["minimum"] = -_INTEGER_MAX
        if "maximum" not in schema and "exclusiveMaximum" not in schema:
            short["maximum"] = _INTEGER_MAX
    if schema.get("format") in _LENGTHS_MAX and not {"minLength", "maxLength"} & schema.keys():
        short["maxLength"] = _LENGTHS_MAX[schema["format"]]
    if schema.get("format") in _PATTERNS and "pattern" not in schema:
        short["pattern"] = _PATTERNS[schema["format"]]
    return short


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _first_line(text: str) -> str:
    """What is wrong, without where in our own grammar. A pattern's fault is told at the end, behind a drawing of where."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return "it is too large"
    first = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", lines[0])
    if first.startswith("regex parse error"):
        faults = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return f"a pattern is not understood: {faults[0] if faults else lines[-1]}"
    return first
