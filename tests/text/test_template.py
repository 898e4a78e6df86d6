from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from shoal.errors import BadModelFile, TemplateError
from shoal.text.template import ChatTemplate
from shoal.text.tokenizer import Tokenizer
from tests.text.vocabularies import byte_level

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PARTS = (
    "{% for message in messages %}{% for part in message.content %}{{ part.type }}={{ part.text }};{% endfor %}{% endfor %}"
)
USER = [{"role": "user", "content": "Hi"}]


def render(source: str, messages: list[dict[str, Any]] | None = None, **variables: Any) -> str:
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>", now=lambda: datetime(2026, 2, 3))
    return template.render(messages or USER, **variables)


def test_chatml() -> None:
    assert render(CHATML) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"


def test_variables_and_functions_of_transformers() -> None:
    assert render("{{ bos_token }}|{{ eos_token }}|{{ enable_thinking }}", enable_thinking=True) == "<s>|</s>|True"
    assert render("{{ strftime_now('%d %b %Y') }}") == "03 Feb 2026"
    assert render("{{ tools is none }} {{ documents is none }}") == "True True"
    assert render("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("a{% generation %}b{{ messages[0].content }}{% endgeneration %}c") == "abHic"


def test_json_is_plain() -> None:
    tools = [{"name": "f", "text": "é<b>&'"}]
    assert render("{{ tools | tojson }}", tools=tools) == '[{"name": "f", "text": "é<b>&\'"}]'
    assert render("{{ {'b': 1, 'a': [2]} | tojson(separators=(',', ':'), sort_keys=True) }}") == '{"a":[2],"b":1}'
    assert render("{{ {'a': 1} | tojson(indent=2) }}") == '{\n  "a": 1\n}'


@pytest.mark.parametrize(
    ("source", "takes_parts"),
    [
        (CHATML, False),
        (PARTS, True),
        ("{% for m in messages %}{% set c = m['content'] %}{% for p in c %}{{ p.text }}{% endfor %}{% endfor %}", True),
        ("{% macro r(content) %}{% for p in content %}{{ p }}{% endfor %}{% endmacro %}{{ r(messages[0].content) }}", True),
        ("{% for p in messages[0].content | selectattr('type') %}{{ p.text }}{% endfor %}", True),
        ("{% for m in messages[1:] %}{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}", False),
    ],
)
def test_finds_what_content_a_template_takes(source: str, takes_parts: bool) -> None:
    assert ChatTemplate(source, bos_token="", eos_token="").takes_parts == takes_parts


def test_content_becomes_what_the_template_takes() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert render("{{ messages[0].content }}", parts) == "a\nb"
    assert render(PARTS, parts) == "text=a;text=b;"
    assert render(PARTS) == "text=Hi;"
    both = "{% if messages[0].content is string %}S{% else %}{% for p in messages[0].content %}P{% endfor %}{% endif %}"
    assert render(both) == "S"
    assert render(both, parts) == "PP"


def test_content_of_another_kind_is_refused() -> None:
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(TemplateError, match="'image_url', but the model takes only text"):
        render(CHATML, image)


def test_arguments_of_tool_calls_become_objects() -> None:
    def call(arguments: str) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]

    source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    messages = call('{"x": 1}')
    assert render(source, messages) == '{"x": 1}'
    assert messages == call('{"x": 1}')
    assert render(source, call("not json")) == '"not json"'
    assert render(source, call("")) == "{}"


def test_refusal_of_the_template_is_one_line() -> None:
    with pytest.raises(TemplateError) as caught:
        render("{{ raise_exception('Roles must\n alternate') }}")
    assert str(caught.value) == "the model's chat template refuses these messages: Roles must alternate"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[9].role.x }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError|SecurityError"),
        ("{{ 'a' * 10**9 }}", "SecurityError"),
        ("{{ 10 ** 9 ** 9 }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError|UndefinedError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "memory"),
        ("{% set t = 'a' * 1000000 %}{% for i in range(100) %}{{ t }}{% endfor %}", "wrote more than"),
    ],
)
def test_faults_of_the_template_are_one_line(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message) as caught:
        render(source)
    assert "\n" not in str(caught.value)


def test_source_that_is_no_jinja_names_the_line() -> None:
    with pytest.raises(TemplateError, match=r"not valid Jinja \(line 2\)"):
        render("a\n{% for %}")


def test_template_of_a_file() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level())
    assert ChatTemplate.from_metadata({}, tokenizer) is None
    metadata = {
        "tokenizer.chat_template": "plain {{ bos_token }}{{ eos_token }}",
        "tokenizer.chat_template.tool_use": "tools {{ tools | length }}",
    }
    template = ChatTemplate.from_metadata(metadata, tokenizer)
    assert template is not None
    assert template.render(USER) == "plain <|begin_of_text|><|endoftext|>"
    assert template.render(USER, tools=[{}]) == "tools 1"
    with pytest.raises(BadModelFile, match="not text"):
        ChatTemplate.from_metadata({"tokenizer.chat_template": ["x"]}, tokenizer)
