"""What a model's file says about texts - vocabulary, template, marks - and the questions that need nothing else.

A head worker has it beside the logits; a worker without weights answers tokenising and templates from it alone, so that
such questions neither wait for an answer under way nor disturb it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from shoal.errors import RequestError
from shoal.runtime.messages import (
    ApplyTemplate,
    ChatMessage,
    Detokenize,
    Detokenized,
    Generate,
    Message,
    Prompt,
    Tokenize,
    Tokenized,
)
from shoal.text.dialect import Dialect, read_dialect, starts_in_reasoning
from shoal.text.template import ChatTemplate
from shoal.text.tokenizer import Tokenizer


class PromptIds(NamedTuple):
    """A prompt as tokens, and whether it ends within the model's reasoning."""

    ids: list[int]
    in_reasoning: bool = False


class ModelTexts:
    """The texts of one model.

    Raises:
        BadModelFile: the vocabulary is damaged.
        UnsupportedModel: a tokenizer that we do not have.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.tokenizer = Tokenizer.from_metadata(metadata)
        self.template = ChatTemplate.from_metadata(metadata, self.tokenizer)
        self.dialect = Dialect()
        if self.template is not None:
            self.dialect = read_dialect(self.template.source, self.template.tool_source)
        marks = (self.tokenizer.id_of(mark) for mark in self.dialect.marks)
        self.mark_ids = frozenset(token_id for token_id in marks if token_id is not None)
        """Marks that are single tokens; special ones among them are text to whoever takes an answer apart."""

    def read_prompt(self, request: Generate) -> PromptIds:
        """The prompt of a request.

        Raises:
            RequestError: no template, one that refuses or takes no tools, or ids outside of the vocabulary.
        """
        if request.token_ids is not None:
            return PromptIds(self.check(request.token_ids, field="prompt"))
        if request.messages is None:
            return PromptIds(self.tokenizer.encode(request.prompt or "", add_special=True))
        arguments = {**request.template_arguments, **self._effort(request.reasoning_effort)}
        text = self.render(request.messages, request.tools, template_arguments=arguments)
        in_reasoning = starts_in_reasoning(self.dialect, text)
        return PromptIds(self.tokenizer.encode(text, add_special=False), in_reasoning)

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] = {},
    ) -> str:
        """A conversation as the text of a prompt. Raises RequestError as `read_prompt` does."""
        if self.template is None:
            raise RequestError("messages: this model has no chat template: it continues texts but holds no conversation")
        if tools and self.dialect.tools is None:
            raise RequestError("tools: this model's chat template has no tool calls that we know")
        for name in template_arguments:
            if name not in self.template.source:
                raise RequestError(f"chat_template_kwargs.{name}: this model's chat template has no such variable")
        turns = [msgspec.to_builtins(message) for message in messages]
        for turn in turns:
            # Content may be missing beside tool calls; templates ask for it all the same.
            turn.setdefault("content", "")
        return self.template.render(
            turns, add_generation_prompt=add_generation_prompt, tools=list(tools) or None, **template_arguments
        )

    def _effort(self, effort: str) -> dict[str, Any]:
        """The template's variables for how much to reason."""
        source = self.template.source if self.template is not None else ""
        if not effort:
            return {}
        if "reasoning_effort" in source:
            return {"reasoning_effort": effort}
        if "enable_thinking" in source:
            return {"enable_thinking": effort != "none"}
        if effort == "none" and self.dialect.reasoning is None:
            return {}
        raise RequestError("reasoning_effort: this model's chat template cannot be told how much to reason")

    def check(self, token_ids: Sequence[int], *, field: str) -> list[int]:
        """The ids, all of the vocabulary. Raises RequestError, which names `field`."""
        size = self.tokenizer.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < size:
                raise RequestError(f"{field}: token id {token_id} is outside the vocabulary of {size}")
        return list(token_ids)

    def answer(self, request: Message) -> Message:
        """Answers `Tokenize`, `Detokenize` or `ApplyTemplate`.

        Raises:
            RequestError: as `read_prompt`; anything else is no question about texts.
        """
        match request:
            case Tokenize():
                ids = self.tokenizer.encode(
                    request.text, add_special=request.add_special, parse_special=request.parse_special
                )
                return Tokenized(ids, [self.tokenizer.token_bytes(token_id) for token_id in ids])
            case Detokenize():
                return Detokenized(self.tokenizer.decode(self.check(request.token_ids, field="tokens"), skip_special=False))
            case ApplyTemplate():
                text = self.render(
                    request.messages,
                    request.tools,
                    add_generation_prompt=request.add_generation_prompt,
                    template_arguments=request.template_arguments,
                )
                return Prompt(text, len(self.tokenizer.encode(text, add_special=False)))
        raise RequestError(f"{type(request).__name__} needs the model's weights")
