"""Decides what a conversation looks like as one text, with the template that the model's file carries.

Templates are Jinja and are written for HF transformers, so they run here in the environment it gives them: the same
sandbox, whitespace rules, extensions, functions and filters. They come with the model from a stranger: the sandbox
keeps them from Python's insides, and what they can make the machine do is bounded in memory. Time is bounded only in
part (each loop over numbers has an end); who serves strangers' models renders in a process that may be killed.

What differs between models is smoothed here: some templates want a message's content as text, some as a list of
parts; most want the arguments of tool calls as an object, clients send them as JSON in a string.

Source: `render_jinja_template` of HF transformers; the choice of parts or text after vLLM's `chat_utils`, but a
template that can take both gets what the client sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shoal.errors import BadModelFile, TemplateError
from shoal.text.tokenizer import Tokenizer

# A prompt of 128 000 tokens is about half a million characters.
_NUM_OUTPUT_CHARS_MAX = 32 * 1024 * 1024
_NUM_REPEATED_MAX = 1_000_000
_NUM_ERROR_CHARS_MAX = 500
# What a template can raise from the values it is given; the first of its own accord.
_TEMPLATE_FAULTS = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError)


class ChatTemplate:
    """The template of one model, compiled. It may be used from several threads."""

    def __init__(
        self,
        source: str,
        *,
        bos_token: str,
        eos_token: str,
        tool_source: str | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Compiles the template.

        Args:
            source: Jinja.
            bos_token: text of the token that starts a text; templates write it themselves, so the result is to be
                encoded without another one (`add_special=False`).
            eos_token: text of the token that ends a text.
            tool_source: the template to use when there are tools, if the model has one of its own for that.
            now: tells templates the date.

        Raises:
            TemplateError: the source is no Jinja; names the line.
        """
        self.source = source
        self.tool_source = tool_source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        environment = _make_environment(now)
        self._plain = _Compiled(environment, source)
        self._with_tools = self._plain if tool_source is None else _Compiled(environment, tool_source)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template of a GGUF file (`tokenizer.chat_template`), or None if it has none.

        Raises:
            TemplateError: the template is no Jinja.
            BadModelFile: the key holds something other than text.
        """
        names = ("tokenizer.chat_template", "tokenizer.chat_template.default")
        source = next((metadata[name] for name in names if metadata.get(name)), None)
        tool_source = metadata.get("tokenizer.chat_template.tool_use")
        if source is None:
            return None
        if not isinstance(source, str) or not isinstance(tool_source, str | None):
            raise BadModelFile("tokenizer.chat_template is not text")
        bos_token, eos_token = (
            "" if role_id is None else tokenizer.text_of(role_id) for role_id in (tokenizer.bos_id, tokenizer.eos_id)
        )
        return cls(source, bos_token=bos_token, eos_token=eos_token, tool_source=tool_source)

    @property
    def takes_parts(self) -> bool:
        """Whether the template goes through a message's content part by part."""
        return self._plain.takes_parts

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Writes a conversation as the text of a prompt.

        Args:
            messages: as in OpenAI's API: `role`, `content` (text or parts), `tool_calls`, ...; not changed.
            add_generation_prompt: end with what makes the model answer.
            tools: as in OpenAI's API.
            documents: for models that answer from them.
            variables: what else the template understands, such as `enable_thinking`.

        Raises:
            TemplateError: the template refuses the messages or fails on them, content is no text, or the result is
                longer than 32 Mi characters.
        """
        compiled = self._with_tools if tools else self._plain
        values = dict(self._tokens) | variables
        values["messages"] = [_prepare_message(message, compiled) for message in messages]
        values |= {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        return compiled.render(values)


class _Compiled:
    """One Jinja source, and what it expects of a message's content."""

    def __init__(self, environment: jinja2.Environment, source: str) -> None:
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the model's chat template is not valid Jinja (line {error.lineno}): {_shorten(error)}"
            ) from error
        except RecursionError:
            raise TemplateError("the model's chat template is nested too deeply") from None
        self.takes_parts = _loops_over_content(tree)
        self.takes_text = not self.takes_parts or _tests_for_text(tree)

    def render(self, values: dict[str, Any]) -> str:
        chunks: list[str] = []
        num_chars = 0
        try:
            for chunk in self._template.generate(values):
                num_chars += len(chunk)
                if num_chars > _NUM_OUTPUT_CHARS_MAX:
                    raise TemplateError(f"the chat template wrote more than {_NUM_OUTPUT_CHARS_MAX} characters")
                chunks.append(chunk)
        except _Refusal as error:
            raise TemplateError(f"the model's chat template refuses these messages: {_shorten(error)}") from error
        except _TEMPLATE_FAULTS as error:
            kind = type(error).__name__
            raise TemplateError(f"the model's chat template fails on these messages: {kind}: {_shorten(error)}") from error
        except (RecursionError, MemoryError) as error:
            raise TemplateError("the model's chat template takes too much memory") from error
        return "".join(chunks)


class _Refusal(jinja2.TemplateError):
    """The template itself called `raise_exception`."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with bounds on operators that make much out of little."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (not _is_small(left) or not _is_small(right)):
            raise SecurityError("the numbers of ** are too large")
        for text, count in ((left, right), (right, left)):
            if operator == "*" and isinstance(text, str | list | tuple) and isinstance(count, int):
                self._check_repetition(len(text) * count)
        return super().call_binop(context, operator, left, right)

    def _check_repetition(self, num_items: int) -> None:
        if num_items > _NUM_REPEATED_MAX:
            raise SecurityError(f"a repetition makes {num_items} items, more than {_NUM_REPEATED_MAX}")


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only its contents."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance variable)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _make_environment(now: Callable[[], datetime]) -> jinja2.Environment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML, which models have not been trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _is_small(number: Any) -> bool:
    return not isinstance(number, int) or number.bit_length() <= 12


def _shorten(error: Exception) -> str:
    """The error's text on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= _NUM_ERROR_CHARS_MAX else f"{text[:_NUM_ERROR_CHARS_MAX]}..."


def _prepare_message(message: Mapping[str, Any], compiled: _Compiled) -> dict[str, Any]:
    prepared = dict(message)
    content = prepared.get("content")
    if isinstance(content, str) and not compiled.takes_text:
        prepared["content"] = [{"type": "text", "text": content}]
    elif isinstance(content, Sequence) and not isinstance(content, str) and not compiled.takes_parts:
        prepared["content"] = "\n".join(_read_text_part(part) for part in content)
    if prepared.get("tool_calls"):
        prepared["tool_calls"] = [_parse_arguments(call) for call in prepared["tool_calls"]]
    return prepared


def _read_text_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return cast(str, part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise TemplateError(f"a message has content of type '{kind}', but the model takes only text")


def _parse_arguments(call: Any) -> Any:
    """A tool call with its arguments as an object; what is no JSON stays as it is."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _loops_over_content(tree: nodes.Template) -> bool:
    names = _name_contents(tree)
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _tests_for_text(tree: nodes.Template) -> bool:
    names = _name_contents(tree)
    return any(test.name == "string" and _is_content(test.node, names) for test in tree.find_all(nodes.Test))


def _name_contents(tree: nodes.Template) -> set[str]:
    """Variables that hold a message's content: those set from it, and macros' parameters of that name."""
    names = {"content"}
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, names):
            names.add(assignment.target.name)
    return names


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    return any(
        (isinstance(part, nodes.Name) and part.name in names)
        or (isinstance(part, nodes.Getattr) and part.attr == "content")
        or (isinstance(part, nodes.Getitem) and isinstance(part.arg, nodes.Const) and part.arg.value == "content")
        for part in _unwrap(node)
    )


def _unwrap(node: nodes.Node) -> Iterator[nodes.Node]:
    """What an expression gives on, through filters, slices and choices."""
    yield node
    is_slice = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    if isinstance(node, nodes.Filter | nodes.Getitem) and (is_slice or isinstance(node, nodes.Filter)):
        if node.node is not None:
            yield from _unwrap(node.node)
    elif isinstance(node, nodes.CondExpr):
        yield from _unwrap(node.expr1)
        if node.expr2 is not None:
            yield from _unwrap(node.expr2)
    elif isinstance(node, nodes.Or | nodes.And):
        yield from _unwrap(node.left)
        yield from _unwrap(node.right)
