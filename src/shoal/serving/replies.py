"""What HTTP clients are answered: the bodies of OpenAI's API, and of the few endpoints beside it.

`UNSET` fields are left out; fields that are None appear as null, because clients tell the two apart.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

ChatFinish = Literal["stop", "length", "tool_calls", "content_filter"]
TextFinish = Literal["stop", "length", "content_filter"]


class LoadingState(msgspec.Struct, frozen=True):
    """A model on its way into memory. `eta_s` is a guess from earlier loads."""

    model: str
    state: str
    elapsed_s: float
    eta_s: float


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong, in OpenAI's four fields."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """Every reply that is no success; also the data of an `error` event."""

    error: ErrorDetail
    loading: LoadingState | UnsetType = UNSET


# ---- usage and log-probabilities


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Tokens of the prompt that were in the cache already."""

    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """Tokens of the answer that were reasoning."""

    reasoning_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Tokens of all choices together; a prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()


class TopLogprob(msgspec.Struct, frozen=True):
    """An alternative to a token. `bytes` are UTF-8, as numbers."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token of the answer."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Every token of the answer, or of a chunk."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct):
    """The older shape: lists of equal length, null where a token has no predecessor."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


# ---- chat


class FunctionCall(msgspec.Struct, frozen=True):
    """`arguments` is JSON in a string."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    """A call that the model wants made."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class FunctionPiece(msgspec.Struct, frozen=True):
    """More of a call's function."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallPiece(msgspec.Struct, frozen=True):
    """More of call number `index`: id, type and name come first, arguments in pieces."""

    index: int
    function: FunctionPiece
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatAnswer(msgspec.Struct, frozen=True):
    """The message of a choice."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """One of `n` answers."""

    index: int
    message: ChatAnswer
    finish_reason: ChatFinish
    logprobs: ChatLogprobs | None = None


class ChatCompletion(msgspec.Struct, frozen=True):
    """Answer of `/v1/chat/completions`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class ChatPiece(msgspec.Struct, frozen=True):
    """What a chunk adds to its choice."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallPiece] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """One choice in a chunk."""

    index: int
    delta: ChatPiece
    finish_reason: ChatFinish | None = None
    logprobs: ChatLogprobs | None = None


class ChatChunk(msgspec.Struct, frozen=True):
    """One event of a streamed answer. `usage` is there when asked for: null until the last chunk, which has no choices."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | UnsetType | None = UNSET


# ---- completions


class TextChoice(msgspec.Struct, frozen=True):
    """One of the continuations, or of a chunk's pieces of them."""

    index: int
    text: str
    finish_reason: TextFinish | None
    logprobs: TextLogprobs | None = None


class TextCompletion(msgspec.Struct, frozen=True):
    """Answer of `/v1/completions`, whole or one event of it."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | UnsetType | None = UNSET


# ---- embeddings


class Embedding(msgspec.Struct, frozen=True):
    """One vector of length 1: numbers, or float32 little endian in base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(msgspec.Struct, frozen=True):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True):
    """Answer of `/v1/embeddings`."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


# ---- models and state


class ModelCard(msgspec.Struct, frozen=True):
    """A model that may be asked. `max_model_len` and `context_length` are known once it was loaded."""

    id: str
    created: int
    owned_by: str = "shoal"
    object: Literal["model"] = "model"
    state: Literal["unloaded", "loading", "ready"] = "unloaded"
    max_model_len: int | None = None
    context_length: int | None = None


class ModelCards(msgspec.Struct, frozen=True):
    """Answer of `/v1/models`."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class Health(msgspec.Struct, frozen=True):
    """Answer of `/health` and of `/readyz`."""

    status: Literal["ok", "loading"]
    loading: LoadingState | UnsetType = UNSET


# ---- texts


class TokenPiece(msgspec.Struct, frozen=True):
    """A token id, and its text: a string, or bytes as numbers where it is part of a character."""

    id: int
    piece: str | list[int]


class TokenizeReply(msgspec.Struct, frozen=True):
    """Token ids of a text; with `with_pieces`, each with its text."""

    tokens: list[int | TokenPiece]
    count: int
    max_model_len: int | None = None


class DetokenizeReply(msgspec.Struct, frozen=True):
    """The text of token ids, under both names that clients look for."""

    content: str
    prompt: str


class TemplateReply(msgspec.Struct, frozen=True):
    """A conversation as the text that the model reads."""

    prompt: str
    count: int
