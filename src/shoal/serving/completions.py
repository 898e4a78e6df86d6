"""`/v1/completions`: texts and their continuations, with the log-probabilities that evaluation harnesses read."""

from __future__ import annotations

import secrets
import time
from typing import cast

from msgspec import UNSET
from starlette.responses import Response

from shoal.runtime.messages import Accepted, Finished, Generate, PromptScores, TokenScore
from shoal.serving.catalogue import ServedModel
from shoal.serving.events import EventStream, Outbox, WholeReply
from shoal.serving.failures import ApiError
from shoal.serving.generation import Counts, Spoken, check_stream_options, encode_event, sampling_of, stops_of
from shoal.serving.replies import TextChoice, TextCompletion, TextFinish, TextLogprobs
from shoal.serving.requests import CompletionRequest, TokenIds
from shoal.serving.service import Service

MAX_TOKENS = 16
"""OpenAI's default."""
CHOICES_MAX = 1024


def complete(service: Service, model: ServedModel, request: CompletionRequest) -> Response:
    """Answers one request. Raises ApiError where it cannot be answered as it stands."""
    prompts = texts_of(request.prompt, param="prompt")
    num = request.n or 1
    if request.best_of is not None and request.best_of != num:
        raise ApiError(400, f"'best_of' must equal 'n' ({num}): nothing is thrown away", param="best_of")
    if len(prompts) * num > CHOICES_MAX:
        raise ApiError(400, f"{len(prompts)} prompts times n = {num} is more than {CHOICES_MAX}", param="n")
    wants_usage = check_stream_options(request)
    asked = [_generate(service, model, request, prompt, choice) for prompt in prompts for choice in range(num)]
    generator = service.generator(model)
    head = (f"cmpl-{secrets.token_hex(12)}", int(time.time()), model.id)
    choices = [_Choice(index, request) for index in range(len(asked))]
    if not request.stream:

        async def produce_whole() -> bytes:
            counts = Counts()

            def hear(index: int, message: Spoken) -> None:
                choices[index].hear(message)
                if isinstance(message, Finished):
                    counts.add(message, counts_prompt=index % num == 0)

            await generator.run(asked, hear, lambda _: None)
            return encode_event(TextCompletion(*head, [choice.take() for choice in choices], usage=counts.usage()))

        return WholeReply(produce_whole, report=service.report)

    async def produce(outbox: Outbox) -> None:
        counts = Counts()
        no_usage = None if wants_usage else UNSET

        def hear(index: int, message: Spoken) -> None:
            choice = choices[index]
            choice.hear(message)
            if choice.has_news:
                outbox.put(encode_event(TextCompletion(*head, [choice.take()], usage=no_usage)))
            if isinstance(message, Finished):
                counts.add(message, counts_prompt=index % num == 0)

        await generator.run(asked, hear, outbox.comment)
        if wants_usage:
            outbox.put(encode_event(TextCompletion(*head, [], usage=counts.usage())))

    return EventStream(produce, report=service.report)


def texts_of(texts: str | list[str | int | TokenIds], *, param: str) -> list[str | TokenIds]:
    """One or several texts, as strings or token ids. Raises ApiError where the two are mixed, or there is none."""
    if isinstance(texts, str):
        return [texts]
    kinds = {type(text) for text in texts}
    if not texts or len(kinds) > 1 or (kinds == {list} and not all(texts)):
        raise ApiError(
            400, f"Invalid '{param}': a string, strings, token ids, or lists of token ids, and not empty",
            param=param, code="invalid_value",
        )  # fmt: skip
    if kinds == {int}:
        return [cast(TokenIds, texts)]
    return cast(list[str | TokenIds], texts)


def _generate(
    service: Service, model: ServedModel, request: CompletionRequest, prompt: str | TokenIds, choice: int
) -> Generate:
    return Generate(
        model=model.entry.path,
        prompt=prompt if isinstance(prompt, str) else None,
        token_ids=None if isinstance(prompt, str) else prompt,
        max_tokens=MAX_TOKENS if request.max_tokens is None else request.max_tokens,
        stop=stops_of(request),
        ignore_end=bool(request.ignore_eos),
        sampling=sampling_of(request, choice=choice),
        options=service.catalogue.options,
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
        echo=bool(request.echo),
    )


class _Choice:
    """One continuation: what of it has not been taken yet."""

    def __init__(self, index: int, request: CompletionRequest) -> None:
        self._index = index
        self._echo = bool(request.echo)
        self._scores = TextLogprobs() if request.logprobs is not None else None
        self._num_top = request.logprobs or 0
        self._text = ""
        self._offset = 0
        self._finish_reason: TextFinish | None = None

    @property
    def has_news(self) -> bool:
        return bool(self._text) or self._finish_reason is not None

    def hear(self, message: Spoken) -> None:
        match message:
            case Accepted():
                # With scores the prompt's text comes as the tokens they are of.
                if self._echo and self._scores is None:
                    self._text += message.prompt_text
            case PromptScores():
                for score in message.scores:
                    self._score(score)
                self._text += b"".join(score.token for score in message.scores).decode(errors="replace")
            case Finished():
                self._text += message.text
                reason = message.reason
                self._finish_reason = "length" if reason == "length" else "stop"
            case _:
                if message.score is not None:
                    self._score(message.score)
                self._text += message.text

    def take(self) -> TextChoice:
        scores = self._scores
        taken = TextChoice(self._index, self._text, self._finish_reason, scores)
        self._text, self._finish_reason = "", None
        self._scores = None if scores is None else TextLogprobs()
        return taken

    def _score(self, score: TokenScore) -> None:
        assert self._scores is not None
        token = _show(score.token)
        self._scores.tokens.append(token)
        self._scores.token_logprobs.append(score.logprob)
        top: dict[str, float] | None = None
        if score.logprob is not None:
            top = {}
            for other, value in score.top:
                top.setdefault(_show(other), value)  # likeliest first
            # The chosen token is among them whatever its place, as OpenAI's older shape has it.
            if self._num_top:
                top.setdefault(token, score.logprob)
        self._scores.top_logprobs.append(top)
        self._scores.text_offset.append(self._offset)
        self._offset += len(score.token.decode(errors="replace"))


def _show(token: bytes) -> str:
    """A token as text; one that is only part of a character is written as its bytes, so that no two look the same."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
