"""`/v1/embeddings`, for models whose file says how they pool."""

from __future__ import annotations

import base64

import numpy as np
from starlette.responses import Response

from shoal.runtime.messages import Embed, Embedded
from shoal.serving.catalogue import ServedModel, ask
from shoal.serving.completions import texts_of
from shoal.serving.events import WholeReply
from shoal.serving.failures import ApiError
from shoal.serving.generation import encode_event
from shoal.serving.replies import Embedding, EmbeddingList, EmbeddingUsage
from shoal.serving.requests import EmbeddingRequest
from shoal.serving.service import Service

INPUTS_MAX = 2048


def embed(service: Service, model: ServedModel, request: EmbeddingRequest) -> Response:
    """Answers one request. Raises ApiError where it cannot be answered as it stands."""
    inputs = texts_of(request.input, param="input")
    if len(inputs) > INPUTS_MAX:
        raise ApiError(400, f"Invalid 'input': {len(inputs)} texts, at most {INPUTS_MAX} are allowed", param="input")
    if any(not text for text in inputs):
        raise ApiError(400, "Invalid 'input': an empty text has no vector", param="input", code="invalid_value")
    service.catalogue.check_room(model)

    async def produce() -> bytes:
        found, num_tokens = [], 0
        async with service.catalogue.turn(model):
            for index, text in enumerate(inputs):
                is_text = isinstance(text, str)
                last = await ask(
                    service.catalogue.runtime,
                    Embed(
                        model.entry.path,
                        text=text if is_text else None,  # type: ignore[arg-type]
                        token_ids=None if is_text else text,  # type: ignore[arg-type]
                        options=service.catalogue.options,
                    ),
                )
                assert isinstance(last, Embedded)
                num_tokens += last.prompt_tokens
                found.append(Embedding(index, _write(last.values, as_base64=request.encoding_format == "base64")))
        return encode_event(EmbeddingList(found, model.id, EmbeddingUsage(num_tokens, num_tokens)))

    return WholeReply(produce, report=service.report)


def _write(values: bytes, *, as_base64: bool) -> list[float] | str:
    if as_base64:
        return base64.b64encode(values).decode()
    numbers: list[float] = np.frombuffer(values, dtype="<f4").astype(float).tolist()
    return numbers
