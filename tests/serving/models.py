"""Random models with what a client can ask for: reasoning, tool calls, vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shoal.compute.gguf import GGUFFile
from shoal.lab.gguf_writer import TensorData, write_gguf
from shoal.lab.random_model import write_random_model
from shoal.lab.shapes import SHAPES

MARKS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
CONTROL, USER_DEFINED = 3, 4

TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Answer with <tool_call></tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content or [] %}{{ part.text }}{% endfor %}{% endif %}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking %}<think>
{% endif %}{% endif %}"""


MISTRAL_MARKS = (
    "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[INST]", "[/INST]",
)  # fmt: skip
MISTRAL_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == "user" %}
{%- if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}
[INST]{{ message.content }}[/INST]
{%- elif message.tool_calls %}[TOOL_CALLS][
{%- for call in message.tool_calls %}{{ call.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]
{%- elif message.role == "tool" %}[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]
{%- else %}{{ message.content }}{% endif %}{% endfor %}"""
"""As Mistral Instruct v0.3 has it: one mark, then a list of all calls."""

LLAMA_MARKS = ("<|python_tag|>",)
LLAMA_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Answer as {"name": function name, "parameters": dictionary of argument name and its value}.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.tool_calls %}
{%- for call in message.tool_calls -%}
<|python_tag|>{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}
{%- endfor %}{% else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""As Llama 3.1 has it: an answer that starts with an object is a call."""


def write_plain_model(path: Path, *, quantisation: str = "Q8_0", seed: int = 0) -> None:
    """A model that only talks, so small that it is loaded in a moment."""
    write_random_model(path, SHAPES["tiny"], quantisation=quantisation, seed=seed)


def write_talker(path: Path, *, mark_type: int = CONTROL, marks: Sequence[str] = MARKS, template: str = TEMPLATE) -> None:
    """A model whose template knows tools; `mark_type` is of the marks' tokens. That of `TEMPLATE` reasons as well."""

    def change(metadata: dict[str, Any]) -> None:
        tokens, types = list(metadata["tokenizer.ggml.tokens"]), np.array(metadata["tokenizer.ggml.token_type"], np.int32)
        tokens[-len(marks) :] = marks
        types[-len(marks) :] = mark_type
        metadata |= {
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.chat_template": template,
        }

    _write_changed(path, change)


def write_embedder(path: Path, *, pooling: int = 3) -> None:
    """A model that gives vectors; 3 takes the last token's hidden state."""

    def change(metadata: dict[str, Any]) -> None:
        metadata["qwen3.pooling_type"] = pooling

    _write_changed(path, change, architecture="qwen3")


def _write_changed(path: Path, change: Any, *, architecture: Any = "llama") -> None:
    shape = msgspec.structs.replace(SHAPES["tiny"], architecture=architecture)
    source = path.with_suffix(".source")
    write_random_model(source, shape, quantisation="Q8_0")
    with GGUFFile.open(source) as file:
        metadata = dict(file.metadata)
        change(metadata)
        tensors = [
            TensorData(info.name, info.shape, info.type, info.num_bytes, [np.frombuffer(file.view(info), np.uint8)])
            for info in file.tensors.values()
        ]
        write_gguf(path, metadata, tensors)
        tensors.clear()  # they are views of the file
    source.unlink()
