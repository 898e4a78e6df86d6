"""Decides what a request of the API asks of the model, one `Generate` per choice, and follows each to its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from shoal.runtime.messages import (
    Accepted,
    Delta,
    EngineDescription,
    Finished,
    Generate,
    Message,
    Progress,
    PromptScores,
    Sampling,
)
from shoal.serving.catalogue import Catalogue, ServedModel, ask
from shoal.serving.failures import ApiError
from shoal.serving.metrics import Metrics
from shoal.serving.replies import (
    CompletionTokensDetails,
    PromptTokensDetails,
    Usage,
)
from shoal.serving.requests import Sampled

Spoken = Accepted | PromptScores | Delta | Finished
"""What a choice hears of its answer, in this order."""


@dataclass
class Counts:
    """Tokens of all choices of one request."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0

    def add(self, finished: Finished, *, counts_prompt: bool) -> None:
        if counts_prompt:
            self.prompt += finished.prompt_tokens
            self.cached += finished.cached_tokens
        self.completion += len(finished.token_ids)
        self.reasoning += finished.reasoning_tokens

    def usage(self) -> Usage:
        return Usage(
            self.prompt,
            self.completion,
            self.prompt + self.completion,
            PromptTokensDetails(self.cached),
            CompletionTokensDetails(self.reasoning),
        )


class Generator:
    """Asks one model for the choices of one request, which have its turn together."""

    def __init__(self, catalogue: Catalogue, metrics: Metrics, model: ServedModel) -> None:
        self._catalogue = catalogue
        self._metrics = metrics
        self._model = model
        self._arrived_s = time.monotonic()

    async def run(self, asked: list[Generate], hear: Callable[[int, Spoken], None], comment: Callable[[str], None]) -> None:
        """Follows all of `asked`, one after the other.

        Args:
            hear: takes the index of a choice and what is said of it.
            comment: takes what is being done, for a client that waits.

        Raises:
            ShoalError: what the ring reported.
            ApiError: 429 where the line is full.
        """
        before = self._model.num_waiting + self._model.num_running
        comment(f"waiting for {before} before this one" if before else "waiting")
        async with self._catalogue.turn(self._model):
            for index, request in enumerate(asked):
                await self._follow(index, request, hear, comment)

    async def _follow(
        self, index: int, request: Generate, hear: Callable[[int, Spoken], None], comment: Callable[[str], None]
    ) -> None:
        timing = self._metrics.begin(self._model.id, arrived_s=self._arrived_s)

        def listen(message: Message) -> None:
            if isinstance(message, Delta):
                timing.token()
                hear(index, message)
            elif isinstance(message, Progress):
                done = f" {message.done}/{message.total}" if message.total else ""
                comment(f"{message.text}{done}")
            elif isinstance(message, EngineDescription):
                self._catalogue.touch(self._model, message)
            elif isinstance(message, (Accepted, PromptScores)):
                hear(index, message)

        try:
            last = await ask(self._catalogue.runtime, request, listen)
        except BaseException as error:
            timing.fail(error)
            raise
        assert isinstance(last, Finished)
        timing.finish(last, self._model.description)
        hear(index, last)


def sampling_of(request: Sampled, *, choice: int) -> Sampling:
    """How the tokens of one choice are chosen; choices of one seed differ from each other, and are the same next time."""
    top_p = 1.0 if request.top_p is None else request.top_p
    top_k = max(0, request.top_k or 0)
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        # Nothing but the likeliest token is how OpenAI reads a top_p of 0.
        top_k=1 if top_p == 0.0 else top_k,
        top_p=top_p or 1.0,
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias={int(token_id): bias for token_id, bias in (request.logit_bias or {}).items()},
        seed=None if request.seed is None else request.seed + choice,
    )


def stops_of(request: Sampled) -> list[str]:
    """Stop strings. Raises ApiError for more than four, as OpenAI does."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > 4:
        raise ApiError(
            400, f"Invalid 'stop': {len(stops)} strings, at most 4 are allowed", param="stop", code="invalid_value"
        )
    return stops


def check_stream_options(request: Sampled) -> bool:
    """Whether usage is wanted as a last chunk. Raises ApiError where options are given without a stream."""
    if request.stream_options is None:
        return False
    if not request.stream:
        raise ApiError(400, "'stream_options' is only allowed with 'stream': true", param="stream_options")
    return request.stream_options.include_usage


def encode_event(event: msgspec.Struct) -> bytes:
    return _encoder.encode(event)


def encode_text(text: str) -> bytes:
    return _encoder.encode(text)


_encoder = msgspec.json.Encoder()
