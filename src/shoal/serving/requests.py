"""What HTTP clients may ask: the bodies of OpenAI's API with the fields that are supported, and their ranges.

Nothing is ignored in silence: a field that is not here answers 400 and is named. Those of OpenAI's that are known but not
supported, and those that are accepted because they change nothing, are listed at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from shoal.serving.failures import from_validation, unsupported

_Body = TypeVar("_Body", bound="Body")

Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
BiasedId = Annotated[str, Meta(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = list[TokenId]
_STOPS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 4}, {"type": "null"}]}
_TEXTS = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            "minItems": 1,
        },
    ]
}
Stops = Annotated[str | list[str] | None, Meta(extra_json_schema=_STOPS)]
Texts = Annotated[str | list[str | TokenId | TokenIds], Meta(extra_json_schema=_TEXTS)]
"""One text, several, one as token ids, or several as token ids."""


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all bodies."""


# ---- conversations


class TextPart(Body, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """A part of a message. Models here read text only."""

    text: str


class CalledFunction(Body, frozen=True, kw_only=True):
    """The function of an earlier call."""

    name: str
    arguments: str


class EarlierCall(Body, frozen=True, kw_only=True):
    """A call that an earlier answer made."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None


class Turn(Body, frozen=True, kw_only=True):
    """One message of a conversation. `developer` is read as `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[EarlierCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    """An earlier answer's refusal is what it said, where it has no content."""
    annotations: list[dict[str, Any]] | None = None
    """Notes on an earlier answer, sent back; models read none."""
    audio: None = None
    function_call: None = None


# ---- what may be called


class Function(Body, frozen=True, kw_only=True):
    """A function that the model may call; `parameters` is a JSON schema, which its arguments will satisfy."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Arguments satisfy the schema in any case."""


class Tool(Body, frozen=True, kw_only=True):
    """A tool: functions are all there is."""

    type: Literal["function"]
    function: Function


class ChosenFunction(Body, frozen=True, kw_only=True):
    """The one function to call."""

    name: str


class ChosenTool(Body, frozen=True, kw_only=True):
    """`tool_choice` that names a function."""

    type: Literal["function"]
    function: ChosenFunction


# ---- the answer's form


class TextFormat(Body, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """Any text."""


class ObjectFormat(Body, frozen=True, kw_only=True, tag_field="type", tag="json_object"):
    """A JSON object."""


class NamedSchema(Body, frozen=True, kw_only=True):
    """A JSON schema. It is enforced whether or not `strict` says so; one that cannot be answers 400."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class SchemaFormat(Body, frozen=True, kw_only=True, tag_field="type", tag="json_schema"):
    """JSON that satisfies a schema."""

    json_schema: NamedSchema


class StreamOptions(Body, frozen=True, kw_only=True):
    """How to stream."""

    include_usage: bool = False
    """One more chunk at the end, without choices, with `usage`."""


# ---- the endpoints


class Sampled(Body, frozen=True, kw_only=True):
    """What chats and completions share."""

    model: str
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stops = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    """Only the k likeliest tokens; 0 and -1 are no limit."""
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] | None = None
    logit_bias: dict[Annotated[str, Meta(pattern=r"^[0-9]{1,9}$")], Annotated[float, Meta(ge=-100.0, le=100.0)]] | None = (
        None
    )
    ignore_eos: bool | None = None
    """Go on where the model would end; for measuring."""
    user: str | None = None
    """Who asks; changes nothing here."""


class ChatRequest(Sampled, frozen=True, kw_only=True):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Turn], Meta(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: TextFormat | ObjectFormat | SchemaFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """More variables for the model's chat template, such as `enable_thinking`."""
    safety_identifier: str | None = None
    """Who asks; changes nothing here."""
    prompt_cache_key: str | None = None
    """A hint where to look for a cache; there is one, and it is looked at in any case."""
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionRequest(Sampled, frozen=True, kw_only=True):
    """Body of `/v1/completions`. Without `max_tokens` 16 tokens are written, as OpenAI does."""

    prompt: Texts
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    """Accepted where it equals `n`: nothing is thrown away."""


class EmbeddingRequest(Body, frozen=True, kw_only=True):
    """Body of `/v1/embeddings`."""

    model: str
    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


class TokenizeRequest(Body, frozen=True, kw_only=True):
    """Body of `/tokenize`; the text is `content` or `prompt`. `model` may be left out where there is only one."""

    model: str | None = None
    content: str | None = None
    prompt: str | None = None
    add_special: bool = False
    add_special_tokens: bool | None = None
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Body, frozen=True, kw_only=True):
    """Body of `/detokenize`."""

    tokens: TokenIds
    model: str | None = None


class TemplateRequest(Body, frozen=True, kw_only=True):
    """Body of `/apply-template`."""

    messages: Annotated[list[Turn], Meta(min_length=1)]
    model: str | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


UNSUPPORTED: Mapping[type[Body], Mapping[str, str]] = {
    ChatRequest: {
        "audio": "models here answer in text",
        "function_call": "use tool_choice, which replaced it",
        "functions": "use tools, which replaced it",
        "metadata": "nothing is stored that it could be kept with",
        "moderation": "nothing is moderated",
        "prediction": "answers are not predicted from a text",
        "prompt_cache_retention": "the last conversation stays in the cache until another takes its place",
        "verbosity": "ask for a short or a long answer in the messages",
        "web_search_options": "models here have no access to the web",
    },
    CompletionRequest: {"suffix": "texts are continued at their end only"},
    EmbeddingRequest: {"dimensions": "vectors have the model's own size"},
}
"""Fields of OpenAI's API that answer 400, and what to do instead. A null is the same as none."""

WITHOUT_EFFECT = {
    ChatRequest: ("user", "safety_identifier", "prompt_cache_key", "store", "service_tier", "modalities"),
    CompletionRequest: ("user", "best_of"),
    EmbeddingRequest: ("user",),
}
"""Fields that are accepted because, with the values that are allowed, they ask for nothing."""


def parse(body: bytes, kind: type[_Body]) -> _Body:
    """A request's body.

    Raises:
        ApiError: 400, naming the field.
    """
    try:
        fields = msgspec.json.decode(body)
        if isinstance(fields, dict):
            for name, advice in UNSUPPORTED.get(kind, {}).items():
                if fields.pop(name, None) is not None:
                    raise unsupported(name, msgspec.json.decode(body)[name], advice)
        return msgspec.convert(fields, kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        if not isinstance(error, msgspec.MsgspecError):
            error = msgspec.DecodeError(
                "JSON is malformed: " + ("too deep" if isinstance(error, RecursionError) else "no UTF-8")
            )
        raise from_validation(error) from None
