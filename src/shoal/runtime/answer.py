"""From a request to its answer, on the head: template, tokens, prefill, and one token after the other.

Text and token ids are here and nowhere else: what leaves for the other devices are hidden states.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from shoal.errors import RequestError
from shoal.inference.batching import MicroBatch, PrefillPlan, plan_prefill
from shoal.runtime.messages import (
    Accepted,
    Delta,
    Embed,
    Embedded,
    Finished,
    Generate,
    Message,
    Progress,
    PromptScores,
    Sampling,
    StageTimes,
    StepTrace,
    TokenScore,
    ToolCallDelta,
)
from shoal.runtime.ring import RingHead
from shoal.runtime.texts import ModelTexts, PromptIds
from shoal.text.answer_parser import AnswerParser, Parts
from shoal.text.grammar import GrammarEngine, GrammarState, GrammarWriter
from shoal.text.pooling import Pooling
from shoal.text.sampler import Sampler, SamplingParameters, logprobs
from shoal.text.streaming import StopFilter, TextStream
from shoal.text.tokenizer import Tokenizer
from shoal.transport.framing import StageTiming

Reason = Literal["stop", "length", "tool_calls", "cancelled"]
Emit = Callable[[Message], None]
Logits = np.ndarray[Any, np.dtype[np.float32]]

SCORED_BYTES_MAX = 64 << 20
"""Logits of one micro-batch when every token of the prompt is scored; its size is chosen so."""


class Conversation:
    """Answers requests one after the other over one ring, and keeps the last one's cache.

    Args:
        emit: takes `Progress` and `Delta` as they come.
        is_cancelled: asked at every micro-batch and every token.
    """

    def __init__(
        self,
        head: RingHead,
        metadata: Any,
        *,
        micro_batch: int,
        emit: Emit,
        is_cancelled: Callable[[], bool],
    ) -> None:
        self._head = head
        self._context = head.stage.context
        self._micro_batch = micro_batch
        self._emit = emit
        self._is_cancelled = is_cancelled
        self._texts = ModelTexts(metadata)
        self._tokenizer = self._texts.tokenizer
        self._grammars = GrammarEngine(self._tokenizer)
        self._metadata = metadata
        self._cached_ids: list[int] = []

    def answer(self, request: Generate) -> Finished:
        """Answers one request.

        Raises:
            RequestError: no template, a template that refuses, a schema that cannot be enforced, a context too small.
            LinkError: a device of the ring is gone.
            ValueError: parameters out of range.
        """
        prompt = self._texts.read_prompt(request)
        plan = self._plan(request, prompt.ids)
        sampler = Sampler(_parameters(request.sampling), vocab_size=self._tokenizer.vocab_size, prompt_ids=prompt.ids)
        grammar = self._grammar(request, prompt)
        answer = _Answer(self._texts, sampler, request, prompt, plan.num_kept, grammar=grammar, emit=self._emit)
        self._emit(
            Accepted(
                prompt_tokens=len(prompt.ids),
                cached_tokens=plan.num_kept,
                prompt_text=self._tokenizer.decode(prompt.ids) if request.echo else "",
            )
        )
        # Until the prefill has ended, only what was there before is surely in every device's cache.
        self._cached_ids = self._cached_ids[: plan.num_kept]
        answer.reads_per_prompt = self._head.reads_per_prompt(plan.batches)
        started_s = time.perf_counter()
        logits_V = self._prefill(prompt.ids, plan, top_scored=request.prompt_logprobs)
        prefill_s = time.perf_counter() - started_s
        if logits_V is None:
            return answer.finish("cancelled", prefill_s=prefill_s, decode_s=0.0, times=_StepTimes(self._head))
        self._cached_ids = list(prompt.ids)
        if request.max_tokens == 0:
            return answer.finish("length", prefill_s=prefill_s, decode_s=0.0, times=_StepTimes(self._head))
        return self._decode(answer, logits_V, prefill_s)

    def embed(self, request: Embed) -> Embedded:
        """Turns a text into a vector.

        Raises:
            RequestError: the model gives none, or the text is longer than the context.
            LinkError: a device of the ring is gone.
        """
        pooling = Pooling.from_metadata(self._metadata)
        if pooling is None:
            raise RequestError(
                "model: this model's file names no pooling (pooling_type), so it was not made for embeddings: "
                "use one that was, such as Qwen3-Embedding"
            )
        if request.token_ids is not None:
            ids = self._texts.check(request.token_ids, field="input")
        else:
            ids = self._tokenizer.encode(request.text or "", add_special=True)
        plan = plan_prefill([], ids, micro_batch=self._micro_batch, context=self._context, num_answer=0)
        self._cached_ids = []
        sums = pooling.start()
        done = self._head.prefill(
            ids,
            plan.batches,
            progress=lambda _: not self._is_cancelled(),
            scored=lambda batch, hidden_BD: sums.add(hidden_BD, is_last=batch.stop == len(ids)),
            wants_hidden=True,
        )
        if done is None:
            raise RequestError("the request was cancelled")
        self._cached_ids = ids
        return Embedded(sums.vector().astype("<f4").tobytes(), len(ids))

    def _plan(self, request: Generate, ids: Sequence[int]) -> PrefillPlan:
        num_answer = 0 if request.max_tokens == 0 else 1
        if request.prompt_logprobs is None:
            kept, micro_batch = self._cached_ids, self._micro_batch
        else:
            # Every token is computed, in pieces whose logits fit.
            rows = SCORED_BYTES_MAX // (4 * self._tokenizer.vocab_size)
            kept, micro_batch = [], max(1, min(self._micro_batch, rows))
        return plan_prefill(kept, ids, micro_batch=micro_batch, context=self._context, num_answer=num_answer)

    def _grammar(self, request: Generate, prompt: PromptIds) -> GrammarState | None:
        calls = bool(request.tools) and request.tool_choice != "none"
        if not calls and not request.json_schema:
            return None
        writer = GrammarWriter(self._tokenizer, self._texts.dialect, in_reasoning=prompt.in_reasoning)
        if request.json_schema:
            return self._grammars.start(writer.json(request.json_schema))
        return self._grammars.start(
            writer.calls(
                request.tools,
                is_required=request.tool_choice == "required",
                name=request.tool_name,
                parallel=request.parallel_tool_calls,
            )
        )

    def _decode(self, answer: _Answer, logits_V: Logits, prefill_s: float) -> Finished:
        head, ids = self._head, self._cached_ids
        times = _StepTimes(head)
        started_s = times.start()

        is_cancelled = self._is_cancelled()

        def meanwhile() -> None:
            nonlocal is_cancelled
            answer.show()
            times.read()
            is_cancelled = self._is_cancelled()

        while True:
            token_id, ending = answer.choose(logits_V)
            reason: Reason | None = ending
            if reason is None and len(ids) + 1 >= self._context:
                reason = "length"
            if reason is None and is_cancelled:
                reason = "cancelled"
            if reason is not None:
                return answer.finish(reason, prefill_s=prefill_s, decode_s=time.perf_counter() - started_s, times=times)
            logits_V = head.decode(token_id, len(ids), meanwhile=meanwhile)
            times.end_step()
            ids.append(token_id)

    def _prefill(self, ids: Sequence[int], plan: PrefillPlan, *, top_scored: int | None) -> Logits | None:
        def progress(num_done: int) -> bool:
            if len(plan.batches) > 1:
                self._emit(Progress("reading the prompt", num_done, len(ids)))
            return not self._is_cancelled()

        def score(batch: MicroBatch, logits_BV: Logits) -> None:
            # A row's logits are the next token's; the first token of all has none.
            scores = [] if batch.first else [TokenScore(self._tokenizer.token_bytes(ids[0]), None)]
            following = ids[batch.first + 1 : batch.stop + 1]
            rows = zip(logits_BV, following, strict=False)  # nothing follows the last row
            scores += [_score(self._tokenizer, row_V, token_id, top_scored or 0) for row_V, token_id in rows]
            self._emit(PromptScores(scores))

        scored = None if top_scored is None else score
        return self._head.prefill(ids, plan.batches, progress=progress, scored=scored)


def _score(tokenizer: Tokenizer, logits_V: Logits, token_id: int, top: int) -> TokenScore:
    logprob, best = logprobs(logits_V, token_id, top)
    return TokenScore(tokenizer.token_bytes(token_id), logprob, [(tokenizer.token_bytes(i), value) for i, value in best])


class _Answer:
    """One answer in the making: what was chosen, what was shown, and whether it is complete."""

    def __init__(
        self,
        texts: ModelTexts,
        sampler: Sampler,
        request: Generate,
        prompt: PromptIds,
        num_cached: int,
        *,
        grammar: GrammarState | None,
        emit: Emit,
    ) -> None:
        self._tokenizer = texts.tokenizer
        self._sampler = sampler
        self._request = request
        self._num_prompt = len(prompt.ids)
        self._num_cached = num_cached
        self._grammar = grammar
        self._emit = emit
        self._parser: AnswerParser | None = None
        with_tools = bool(request.tools) and request.tool_choice != "none"
        if request.structured and (texts.dialect.reasoning is not None or with_tools):
            self._parser = AnswerParser(texts.dialect, in_reasoning=prompt.in_reasoning, with_tools=with_tools)
        shown_ids = texts.mark_ids if self._parser is not None else frozenset()
        self._text = TextStream(texts.tokenizer, continues_text=request.messages is None, shown_ids=shown_ids)
        self._stops = StopFilter(request.stop)
        self._ids: list[int] = []
        self._best_ids: list[int] = []
        self._best_gaps: list[float] = []
        self._num_reasoning = 0
        self._digest = hashlib.blake2b(digest_size=16) if request.digest else None
        self._stopped = False
        limits = (len(request.forced_ids), request.max_tokens)
        self._num_max = next((limit for limit in limits if limit), None)
        ends = not request.ignore_end and not request.forced_ids
        self._end_ids = texts.tokenizer.eog_ids if ends else frozenset()
        self._unread: int | None = None
        self._unshown: Delta | None = None
        self._logits_V: Logits | None = None
        self.reads_per_prompt = 0

    def choose(self, logits_V: Logits) -> tuple[int, Literal["stop", "length"] | None]:
        """The next token, and why the answer ends with it, if it does."""
        request = self._request
        if self._digest is not None:
            self._digest.update(logits_V.tobytes())
        if request.forced_ids:
            token_id = self._follow(logits_V)
        elif self._grammar is None:
            token_id = self._sampler.sample(logits_V)
        else:
            token_id = self._sampler.sample(logits_V, allowed=self._grammar.allowed())
        self._sampler.accept(token_id)
        if token_id in self._end_ids:
            return token_id, "stop"
        self._ids.append(token_id)
        self._unread = token_id
        self._logits_V = logits_V
        if self._grammar is not None:
            self._grammar.accept(token_id)
            if self._grammar.is_complete:
                return token_id, "stop"
        if request.stop:
            # Only a stop string needs the text before the next token is under way.
            self._read()
            if self._stopped:
                return token_id, "stop"
        return token_id, "length" if self._num_max is not None and len(self._ids) >= self._num_max else None

    def _follow(self, logits_V: Logits) -> int:
        second, best = np.argpartition(logits_V, -2)[-2:]
        self._best_ids.append(int(np.argmax(logits_V)))
        self._best_gaps.append(float(logits_V[best] - logits_V[second]))
        return self._request.forced_ids[len(self._ids)]

    def _read(self) -> None:
        """Turns the last token into text."""
        if self._unread is None:
            return
        token_id, self._unread = self._unread, None
        text, self._stopped = self._stops.push(self._text.push(token_id))
        score = None
        if self._request.logprobs is not None and self._logits_V is not None:
            score = _score(self._tokenizer, self._logits_V, token_id, self._request.logprobs)
        if self._parser is None:
            self._unshown = Delta(text=text, token_id=token_id, score=score)
            return
        self._num_reasoning += self._parser.is_reasoning
        parts = self._parser.push(text)
        self._unshown = Delta(parts.content, token_id, parts.reasoning, _call_deltas(parts), score)

    def show(self) -> None:
        """What can be done while the next token is computed elsewhere: tell the client of the last one."""
        self._read()
        if self._unshown is not None:
            self._emit(self._unshown)
            self._unshown = None
        if self._grammar is not None:
            self._grammar.prepare()

    def finish(self, reason: Reason, *, prefill_s: float, decode_s: float, times: _StepTimes) -> Finished:
        self._grammar = None
        self.show()
        rest = Parts()
        if not self._stopped:
            rest.content, stopped = self._stops.push(self._text.flush())
            rest.content += "" if stopped else self._stops.flush()
        if self._parser is not None:
            rest = self._close(self._parser, rest.content)
            if reason == "stop" and self._parser.num_calls:
                reason = "tool_calls"
        return Finished(
            reason=reason,
            text=rest.content,
            prompt_tokens=self._num_prompt,
            cached_tokens=self._num_cached,
            token_ids=self._ids,
            prefill_s=prefill_s,
            decode_s=decode_s,
            stages=times.stages(),
            hop_us=times.hop_us(),
            best_ids=self._best_ids,
            best_gaps=self._best_gaps,
            logits_digest=self._digest.hexdigest() if self._digest is not None else "",
            reasoning=rest.reasoning,
            tool_calls=_call_deltas(rest),
            reasoning_tokens=self._num_reasoning,
            reads_per_prompt=self.reads_per_prompt,
            trace=times.trace() if self._request.trace else [],
        )

    def _close(self, parser: AnswerParser, text: str) -> Parts:
        pushed, flushed = parser.push(text), parser.flush()
        return Parts(pushed.content + flushed.content, pushed.reasoning + flushed.reasoning, [*pushed.calls, *flushed.calls])


def _call_deltas(parts: Parts) -> list[ToolCallDelta]:
    return [ToolCallDelta(piece.index, piece.name, piece.arguments) for piece in parts.calls]


class _StepTimes:
    """The time of every decode step, from one token's choice to the next, and where each stage spent it."""

    def __init__(self, head: RingHead) -> None:
        self._head = head
        self._num_hops = head.num_hops
        self._last_s = 0.0
        self._token_s: list[float] = []
        self._visits: list[list[StageTiming]] = []

    def start(self) -> float:
        self._last_s = time.perf_counter()
        return self._last_s

    def end_step(self) -> None:
        now_s = time.perf_counter()
        self._token_s.append(now_s - self._last_s)
        self._last_s = now_s

    def read(self) -> None:
        """Takes the stages' times of the step that has ended: not before the next token is on its way."""
        if len(self._visits) < len(self._token_s):
            self._visits.append(self._head.visits())

    def stages(self) -> list[StageTimes]:
        """Medians per stage, the head last."""
        self.read()
        if not self._token_s:
            return []
        token_s = np.array(self._token_s)
        by_round = np.array(self._visits).reshape(len(token_s), self._head.rounds, self._head.num_stages, 3)
        compute_s, disk_s, held_s = np.moveaxis(by_round.sum(axis=1), -1, 0)
        # What no stage held a frame for, it spent between two of them.
        hop_s = (token_s - held_s.sum(axis=1)) / max(1, self._num_hops) * self._head.rounds
        wire_s = hop_s[:, None] + held_s - compute_s - disk_s if self._num_hops else np.zeros_like(compute_s)
        wait_s = token_s[:, None] - compute_s - disk_s - wire_s
        return [
            StageTimes(*(max(0.0, float(np.median(part[:, index]))) for part in (compute_s, wait_s, wire_s, disk_s)))
            for index in range(self._head.num_stages)
        ]

    def hop_us(self) -> list[float]:
        if not self._num_hops:
            return []
        return [
            (token_s - sum(visit.compute_s + visit.disk_s for visit in step)) / self._num_hops * 1e6
            for token_s, step in zip(self._token_s, self._visits, strict=True)
        ]

    def trace(self) -> list[StepTrace]:
        """Every step."""
        self.read()
        steps = zip(self._token_s, self._visits, strict=True)
        return [
            StepTrace(token_s, [(visit.compute_s, visit.disk_s, visit.held_s) for visit in visits])
            for token_s, visits in steps
        ]


def _parameters(sampling: Sampling) -> SamplingParameters:
    return SamplingParameters(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        seed=sampling.seed,
    )
