"""`/tokenize`, `/detokenize` and `/apply-template`: questions that need a model's file, but not its weights."""

from __future__ import annotations

from starlette.responses import Response

from shoal.runtime.messages import ApplyTemplate, Detokenize, Detokenized, Prompt, Tokenize, Tokenized
from shoal.serving.catalogue import ask
from shoal.serving.chat import tools_of, turns_of
from shoal.serving.events import WholeReply
from shoal.serving.failures import ApiError
from shoal.serving.generation import encode_event
from shoal.serving.replies import DetokenizeReply, TemplateReply, TokenizeReply, TokenPiece
from shoal.serving.requests import DetokenizeRequest, TemplateRequest, TokenizeRequest
from shoal.serving.service import Service


async def tokenize(service: Service, request: TokenizeRequest) -> Response:
    """The tokens of a text. Raises ApiError where there is no text, or two."""
    text = request.content if request.prompt is None else request.prompt
    if text is None or (request.content is not None and request.prompt is not None):
        raise ApiError(400, "content: give the text as 'content', or as 'prompt'", param="content")
    model = await service.catalogue.find(request.model)
    add_special = request.add_special if request.add_special_tokens is None else request.add_special_tokens

    async def produce() -> bytes:
        asked = Tokenize(model.entry.path, text, add_special=add_special, parse_special=request.parse_special)
        found = await ask(service.catalogue.runtime, asked)
        assert isinstance(found, Tokenized)
        tokens: list[int | TokenPiece] = list(found.token_ids)
        if request.with_pieces:
            pieces = zip(found.token_ids, found.pieces, strict=True)
            tokens = [TokenPiece(token_id, _show(piece)) for token_id, piece in pieces]
        return encode_event(TokenizeReply(tokens, len(tokens), model.card().max_model_len))

    return WholeReply(produce, report=service.report)


async def detokenize(service: Service, request: DetokenizeRequest) -> Response:
    """The text of token ids."""
    model = await service.catalogue.find(request.model)

    async def produce() -> bytes:
        found = await ask(service.catalogue.runtime, Detokenize(model.entry.path, request.tokens))
        assert isinstance(found, Detokenized)
        return encode_event(DetokenizeReply(content=found.text, prompt=found.text))

    return WholeReply(produce, report=service.report)


async def apply_template(service: Service, request: TemplateRequest) -> Response:
    """A conversation as the text of a prompt."""
    model = await service.catalogue.find(request.model)
    tools, _, _ = tools_of(request.tools)

    async def produce() -> bytes:
        asked = ApplyTemplate(
            model.entry.path,
            turns_of(request.messages),
            tools=tools,
            add_generation_prompt=request.add_generation_prompt,
            template_arguments=request.chat_template_kwargs or {},
        )
        found = await ask(service.catalogue.runtime, asked)
        assert isinstance(found, Prompt)
        return encode_event(TemplateReply(found.text, found.num_tokens))

    return WholeReply(produce, report=service.report)


def _show(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
