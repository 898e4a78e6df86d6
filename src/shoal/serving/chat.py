"""`/v1/chat/completions`: from a conversation to its continuation, whole or as events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET
from starlette.responses import Response

from shoal.runtime.messages import Accepted, ChatMessage, Delta, Finished, Generate, PromptScores, TokenScore, ToolCallDelta
from shoal.serving.catalogue import ServedModel
from shoal.serving.events import EventStream, Outbox, WholeReply
from shoal.serving.failures import ApiError
from shoal.serving.generation import Counts, Spoken, check_stream_options, encode_event, encode_text, sampling_of, stops_of
from shoal.serving.replies import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatFinish,
    ChatLogprobs,
    ChatPiece,
    FunctionCall,
    FunctionPiece,
    TokenLogprob,
    ToolCall,
    ToolCallPiece,
    TopLogprob,
)
from shoal.serving.requests import ChatRequest, ObjectFormat, SchemaFormat, Tool, Turn
from shoal.serving.service import Service

_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


def chat(service: Service, model: ServedModel, request: ChatRequest) -> Response:
    """Answers one request. Raises ApiError where it cannot be answered as it stands."""
    asked = [_generate(service, model, request, choice) for choice in range(request.n or 1)]
    wants_usage = check_stream_options(request)
    generator = service.generator(model)
    head = (f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), model.id)
    if not request.stream:
        choices = [_WholeChoice(index, request) for index in range(len(asked))]

        async def produce_whole() -> bytes:
            counts = Counts()

            def hear(index: int, message: Spoken) -> None:
                choices[index].hear(message)
                if isinstance(message, Finished):
                    counts.add(message, counts_prompt=index == 0)

            await generator.run(asked, hear, lambda _: None)
            return encode_event(ChatCompletion(*head, [choice.result() for choice in choices], counts.usage()))

        return WholeReply(produce_whole, report=service.report)

    streams = [_StreamedChoice(index, request) for index in range(len(asked))]

    async def produce(outbox: Outbox) -> None:
        counts = Counts()
        no_usage = None if wants_usage else UNSET
        frames = [_text_frame(ChatChunk(*head, [_text_choice(index, _MARK)], usage=no_usage)) for index in range(len(asked))]

        def hear(index: int, message: Spoken) -> None:
            if isinstance(message, Delta) and message.is_text_only and not request.logprobs:
                # Nearly every event is one of these.
                if message.text:
                    before, after = frames[index]
                    outbox.put(before + encode_text(message.text) + after)
                return
            for choice in streams[index].hear(message):
                outbox.put(encode_event(ChatChunk(*head, [choice], usage=no_usage)))
            if isinstance(message, Finished):
                counts.add(message, counts_prompt=index == 0)

        await generator.run(asked, hear, outbox.comment)
        if wants_usage:
            outbox.put(encode_event(ChatChunk(*head, [], usage=counts.usage())))

    return EventStream(produce, report=service.report)


def _generate(service: Service, model: ServedModel, request: ChatRequest, choice: int) -> Generate:
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(400, "'max_tokens' and 'max_completion_tokens' are the same: give one", param="max_tokens")
    if request.max_tokens == 0:
        raise ApiError(400, "Invalid 'max_tokens': at least 1 is needed", param="max_tokens", code="invalid_value")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "'top_logprobs' is only allowed with 'logprobs': true", param="top_logprobs")
    tools, tool_choice, tool_name = tools_of(request.tools, request.tool_choice)
    schema = _schema_of(request)
    if schema and tools and tool_choice != "none":
        raise ApiError(400, "'response_format' and 'tools' cannot both rule one answer", param="response_format")
    return Generate(
        model=model.entry.path,
        messages=turns_of(request.messages),
        max_tokens=request.max_completion_tokens or request.max_tokens,
        stop=stops_of(request),
        ignore_end=bool(request.ignore_eos),
        sampling=sampling_of(request, choice=choice),
        options=service.catalogue.options,
        template_arguments=_template_arguments(request),
        reasoning_effort=request.reasoning_effort or "",
        logprobs=request.top_logprobs or 0 if request.logprobs else None,
        structured=True,
        tools=tools,
        tool_choice=tool_choice,
        tool_name=tool_name,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        json_schema=schema,
    )


def turns_of(turns: Sequence[Turn]) -> list[ChatMessage]:
    """A conversation as chat templates know it."""
    found = []
    for turn in turns:
        content: Any = turn.content
        if content is None:
            content = turn.refusal
        elif not isinstance(content, str):
            content = [{"type": "text", "text": part.text} for part in content]
        calls = None
        if turn.tool_calls:
            calls = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in turn.tool_calls
            ]
        found.append(
            ChatMessage(
                role="system" if turn.role == "developer" else turn.role,
                content=content,
                name=turn.name,
                tool_calls=calls,
                tool_call_id=turn.tool_call_id,
                reasoning_content=turn.reasoning_content,
            )
        )
    return found


def tools_of(tools: Sequence[Tool] | None, choice: Any = None) -> tuple[list[dict[str, Any]], Any, str]:
    """Tools as chat templates know them, whether a call must be made, and of which function."""
    found = [
        {
            "type": "function",
            "function": {
                key: value
                for key, value in (
                    ("name", tool.function.name),
                    ("description", tool.function.description),
                    ("parameters", tool.function.parameters),
                )
                if value is not None
            },
        }
        for tool in tools or ()
    ]
    if choice is None or isinstance(choice, str):
        if choice == "required" and not found:
            raise ApiError(400, "'tool_choice' is 'required', but there are no tools", param="tool_choice")
        return found, choice or "auto", ""
    name = choice.function.name
    if name not in [tool.function.name for tool in tools or ()]:
        raise ApiError(400, f"'tool_choice' names '{name}', which is not among the tools", param="tool_choice")
    return found, "required", name


def _schema_of(request: ChatRequest) -> str:
    match request.response_format:
        case ObjectFormat():
            return '{"type":"object"}'
        case SchemaFormat(json_schema=named):
            return msgspec.json.encode(named.schema if named.schema is not None else {}).decode()
    return ""


def _template_arguments(request: ChatRequest) -> dict[str, Any]:
    arguments = dict(request.chat_template_kwargs or {})
    for name in _RESERVED:
        if name in arguments:
            raise ApiError(
                400, f"'chat_template_kwargs.{name}' is set by the request itself", param=f"chat_template_kwargs.{name}"
            )
    return arguments


def _finish(finished: Finished) -> ChatFinish:
    return "stop" if finished.reason == "cancelled" else finished.reason


# ---- whole


class _WholeChoice:
    """Collects one answer."""

    def __init__(self, index: int, request: ChatRequest) -> None:
        self._index = index
        self._wants_scores = bool(request.logprobs)
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[str, list[str]]] = []
        self._scores: list[TokenLogprob] = []
        self._finished: Finished | None = None

    def hear(self, message: Spoken) -> None:
        if isinstance(message, (Accepted, PromptScores)):
            return
        self._content.append(message.text)
        self._reasoning.append(message.reasoning)
        for piece in message.tool_calls:
            if piece.index == len(self._calls):
                self._calls.append((piece.name, []))
            self._calls[piece.index][1].append(piece.arguments)
        if isinstance(message, Finished):
            self._finished = message
        elif message.score is not None:
            self._scores.append(_logprob(message.score))

    def result(self) -> ChatChoice:
        assert self._finished is not None
        content, reasoning = "".join(self._content), "".join(self._reasoning)
        calls = [ToolCall(_call_id(), FunctionCall(name, "".join(arguments))) for name, arguments in self._calls]
        message = ChatAnswer(
            content=content if content or not calls else None,  # an answer of calls only has no content
            reasoning_content=reasoning or UNSET,
            tool_calls=calls or UNSET,
        )
        logprobs = ChatLogprobs(self._scores) if self._wants_scores else None
        return ChatChoice(self._index, message, _finish(self._finished), logprobs)


# ---- as events

_MARK = "\x00"
"""Text that no chunk's other fields have: what stands around it is the same in all chunks of an answer."""


def _text_choice(index: int, text: str) -> ChatChunkChoice:
    return ChatChunkChoice(index, ChatPiece(content=text))


def _text_frame(chunk: ChatChunk) -> tuple[bytes, bytes]:
    """What stands before and after the text of a chunk that has nothing else."""
    before, _, after = encode_event(chunk).partition(encode_text(_MARK))
    return before, after


class _StreamedChoice:
    """Turns what is said of one answer into chunks: the role first, the finish reason alone at the end."""

    def __init__(self, index: int, request: ChatRequest) -> None:
        self._index = index
        self._wants_scores = bool(request.logprobs)
        self._scores: list[TokenLogprob] = []

    def hear(self, message: Spoken) -> list[ChatChunkChoice]:
        if isinstance(message, Accepted):
            return [ChatChunkChoice(self._index, ChatPiece(role="assistant", content=""))]
        if isinstance(message, PromptScores):
            return []
        if isinstance(message, Delta) and message.score is not None:
            # Scores travel with the text they belong to; those of text that is held back wait for it.
            self._scores.append(_logprob(message.score))
        chunks = [self._chunk(piece) for piece in _pieces(message)]
        if isinstance(message, Finished):
            if self._scores:
                chunks.append(self._chunk(ChatPiece(content="")))
            chunks.append(ChatChunkChoice(self._index, ChatPiece(), _finish(message)))
        return chunks

    def _chunk(self, piece: ChatPiece) -> ChatChunkChoice:
        return ChatChunkChoice(self._index, piece, logprobs=self._take_scores())

    def _take_scores(self) -> ChatLogprobs | None:
        if not self._wants_scores or not self._scores:
            return None
        scores, self._scores = self._scores, []
        return ChatLogprobs(scores)


def _pieces(message: Delta | Finished) -> list[ChatPiece]:
    pieces = []
    if message.reasoning:
        pieces.append(ChatPiece(reasoning_content=message.reasoning))
    if message.text:
        pieces.append(ChatPiece(content=message.text))
    pieces += [ChatPiece(tool_calls=[_call_piece(call)]) for call in message.tool_calls if call.name or call.arguments]
    return pieces


def _call_piece(call: ToolCallDelta) -> ToolCallPiece:
    if call.name:
        return ToolCallPiece(call.index, FunctionPiece(call.name, ""), id=_call_id(), type="function")
    return ToolCallPiece(call.index, FunctionPiece(arguments=call.arguments))


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _logprob(score: TokenScore) -> TokenLogprob:
    assert score.logprob is not None
    return TokenLogprob(
        token=score.token.decode(errors="replace"),
        logprob=score.logprob,
        bytes=list(score.token),
        top_logprobs=[TopLogprob(token.decode(errors="replace"), value, list(token)) for token, value in score.top],
    )
