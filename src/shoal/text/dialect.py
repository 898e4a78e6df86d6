"""Decides how a model marks what is not plain text in its answers: reasoning and tool calls.

GGUF files do not say it, but their chat template does: it writes earlier reasoning and calls back in the marks that the
model was trained on. What no template here is known to use is not guessed: such a model has no tools.

Source: the templates of Qwen 2.5 and 3, Hermes, DeepSeek R1's distillates, Mistral Instruct v0.3 and Llama 3.1.
"""

from __future__ import annotations

import msgspec


class Reasoning(msgspec.Struct, frozen=True):
    """The marks around what a model thinks before it answers."""

    begin: str
    end: str


class ToolFormat(msgspec.Struct, frozen=True):
    """How calls are written: `begin` {"name": ..., `arguments_key`: ...} `end`, or `begin` and a list of such objects.

    An empty `begin` means that an answer which starts with an object is a call; `lead` may stand before it.
    """

    begin: str
    end: str
    arguments_key: str = "arguments"
    is_list: bool = False
    lead: str = ""


class Dialect(msgspec.Struct, frozen=True):
    """What a model's template knows; None where it does not."""

    reasoning: Reasoning | None = None
    tools: ToolFormat | None = None

    @property
    def marks(self) -> list[str]:
        """Every mark, for those that are single tokens of the vocabulary."""
        found: list[str] = []
        if self.reasoning is not None:
            found += [self.reasoning.begin, self.reasoning.end]
        if self.tools is not None:
            found += [self.tools.begin, self.tools.end, self.tools.lead]
        return [mark for mark in found if mark]


def read_dialect(template: str, tool_template: str | None = None) -> Dialect:
    """The dialect that a chat template (and the one for tools, where the model has its own) shows."""
    reasoning = Reasoning("<think>", "</think>") if "</think>" in template else None
    return Dialect(reasoning=reasoning, tools=_find_tools(template if tool_template is None else tool_template))


def _find_tools(template: str) -> ToolFormat | None:
    if "tools" not in template:
        return None
    if "</tool_call>" in template and "<function=" not in template:
        return ToolFormat(begin="<tool_call>", end="</tool_call>")
    if "[TOOL_CALLS]" in template and "[ARGS]" not in template and "[CALL_ID]" not in template:
        return ToolFormat(begin="[TOOL_CALLS]", end="", is_list=True)
    if '"parameters"' in template and '{"name":' in template:
        lead = "<|python_tag|>" if "<|python_tag|>" in template else ""
        return ToolFormat(begin="", end="", arguments_key="parameters", lead=lead)
    return None


def starts_in_reasoning(dialect: Dialect, prompt: str) -> bool:
    """Whether a prompt ends in the middle of reasoning, as templates of models that always reason do."""
    if dialect.reasoning is None:
        return False
    return prompt.rfind(dialect.reasoning.begin) > prompt.rfind(dialect.reasoning.end)
