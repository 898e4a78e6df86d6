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
from shoal.inference.batching import PrefillPlan, plan_prefill
from shoal.runtime.messages import Delta, Finished, Generate, Message, Progress, Sampling, StageTimes
from shoal.runtime.ring import RingHead
from shoal.text.sampler import Sampler, SamplingParameters
from shoal.text.streaming import StopFilter, TextStream
from shoal.text.template import ChatTemplate
from shoal.text.tokenizer import Tokenizer
from shoal.transport.framing import StageTiming

Reason = Literal["stop", "length", "cancelled"]
Emit = Callable[[Message], None]


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
        self._tokenizer = Tokenizer.from_metadata(metadata)
        self._template = ChatTemplate.from_metadata(metadata, self._tokenizer)
        self._cached_ids: list[int] = []

    def answer(self, request: Generate) -> Finished:
        """Answers one request.

        Raises:
            RequestError: no template, a template that refuses, or a context that is too small.
            LinkError: a device of the ring is gone.
            ValueError: parameters out of range.
        """
        prompt_ids = self._prompt_ids(request)
        plan = plan_prefill(self._cached_ids, prompt_ids, micro_batch=self._micro_batch, context=self._context, num_answer=1)
        sampler = Sampler(_parameters(request.sampling), vocab_size=self._tokenizer.vocab_size, prompt_ids=prompt_ids)
        answer = _Answer(self._tokenizer, sampler, request, prompt_ids, plan.num_kept, emit=self._emit)
        # Until the prefill has ended, only what was there before is surely in every device's cache.
        self._cached_ids = self._cached_ids[: plan.num_kept]
        started_s = time.perf_counter()
        logits_V = self._prefill(prompt_ids, plan)
        prefill_s = time.perf_counter() - started_s
        if logits_V is None:
            return answer.finish("cancelled", prefill_s=prefill_s, decode_s=0.0, times=_StepTimes(0))
        self._cached_ids = list(prompt_ids)
        return self._decode(answer, logits_V, prefill_s)

    def _decode(self, answer: _Answer, logits_V: np.ndarray[Any, np.dtype[np.float32]], prefill_s: float) -> Finished:
        head, ids = self._head, self._cached_ids
        times = _StepTimes(head.num_hops)
        started_s = step_s = time.perf_counter()
        while True:
            token_id, ending = answer.choose(logits_V)
            reason: Reason | None = ending
            if reason is None and len(ids) + 1 >= self._context:
                reason = "length"
            if reason is None and self._is_cancelled():
                reason = "cancelled"
            if reason is not None:
                return answer.finish(reason, prefill_s=prefill_s, decode_s=time.perf_counter() - started_s, times=times)
            logits_V, timings = head.decode(token_id, len(ids), meanwhile=answer.show)
            ids.append(token_id)
            now_s = time.perf_counter()
            times.add(now_s - step_s, timings)
            step_s = now_s

    def _prefill(self, ids: Sequence[int], plan: PrefillPlan) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        def progress(num_done: int) -> bool:
            if len(plan.batches) > 1:
                self._emit(Progress("reading the prompt", num_done, len(ids)))
            return not self._is_cancelled()

        return self._head.prefill(ids, plan.batches, progress=progress)

    def _prompt_ids(self, request: Generate) -> list[int]:
        if request.token_ids is not None:
            return self._checked(request.token_ids)
        if request.messages is None:
            return self._tokenizer.encode(request.prompt or "", add_special=True)
        if self._template is None:
            raise RequestError("this model has no chat template: it continues texts (`--raw`) but holds no conversation")
        messages = [{"role": message.role, "content": message.content} for message in request.messages]
        text = self._template.render(messages, add_generation_prompt=True, **request.template_arguments)
        return self._tokenizer.encode(text, add_special=False)

    def _checked(self, token_ids: Sequence[int]) -> list[int]:
        size = self._tokenizer.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < size:
                raise RequestError(f"token id {token_id} is outside the vocabulary of {size}")
        return list(token_ids)


class _Answer:
    """One answer in the making: what was chosen, what was shown, and whether it is complete."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampler: Sampler,
        request: Generate,
        prompt_ids: Sequence[int],
        num_cached: int,
        *,
        emit: Emit,
    ) -> None:
        self._tokenizer = tokenizer
        self._sampler = sampler
        self._request = request
        self._num_prompt = len(prompt_ids)
        self._num_cached = num_cached
        self._emit = emit
        self._text = TextStream(tokenizer, continues_text=request.messages is None)
        self._stops = StopFilter(request.stop)
        self._ids: list[int] = []
        self._best_ids: list[int] = []
        self._best_gaps: list[float] = []
        self._digest = hashlib.blake2b(digest_size=16) if request.digest else None
        self._stopped = False
        self._unread: int | None = None
        self._unshown: Delta | None = None

    def choose(self, logits_V: np.ndarray[Any, np.dtype[np.float32]]) -> tuple[int, Literal["stop", "length"] | None]:
        """The next token, and why the answer ends with it, if it does."""
        request = self._request
        if self._digest is not None:
            self._digest.update(logits_V.tobytes())
        if request.forced_ids:
            token_id = self._follow(logits_V)
        else:
            token_id = self._sampler.sample(logits_V)
        self._sampler.accept(token_id)
        if token_id in self._tokenizer.eog_ids and not request.ignore_end and not request.forced_ids:
            return token_id, "stop"
        self._ids.append(token_id)
        self._unread = token_id
        if request.stop:
            # Only a stop string needs the text before the next token is under way.
            self._read()
            if self._stopped:
                return token_id, "stop"
        limit = len(request.forced_ids) or request.max_tokens
        return token_id, "length" if limit is not None and len(self._ids) >= limit else None

    def _follow(self, logits_V: np.ndarray[Any, np.dtype[np.float32]]) -> int:
        second, best = np.argpartition(logits_V, -2)[-2:]
        self._best_ids.append(int(np.argmax(logits_V)))
        self._best_gaps.append(float(logits_V[best] - logits_V[second]))
        return self._request.forced_ids[len(self._ids)]

    def _read(self) -> None:
        """Turns the last token into text."""
        if self._unread is not None:
            text, self._stopped = self._stops.push(self._text.push(self._unread))
            self._unshown = Delta(text=text, token_id=self._unread)
            self._unread = None

    def show(self) -> None:
        """Tells the client of the last token, while the next one is computed elsewhere."""
        self._read()
        if self._unshown is not None:
            self._emit(self._unshown)
            self._unshown = None

    def finish(self, reason: Reason, *, prefill_s: float, decode_s: float, times: _StepTimes) -> Finished:
        self.show()
        text = ""
        if not self._stopped:
            text, stopped = self._stops.push(self._text.flush())
            text += "" if stopped else self._stops.flush()
        return Finished(
            reason=reason,
            text=text,
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
        )


class _StepTimes:
    """The time of every decode step, from one token's choice to the next, and where each stage spent it."""

    def __init__(self, num_hops: int) -> None:
        self._num_hops = num_hops
        self._token_s: list[float] = []
        self._stages: list[list[StageTiming]] = []

    def add(self, token_s: float, stages: list[StageTiming]) -> None:
        self._token_s.append(token_s)
        self._stages.append(stages)

    def stages(self) -> list[StageTimes]:
        """Medians per stage, the head last."""
        if not self._token_s:
            return []
        token_s = np.array(self._token_s)
        compute_s = np.array([[stage.compute_s for stage in step] for step in self._stages])
        held_s = np.array([[stage.held_s for stage in step] for step in self._stages])
        # What no stage held a frame for, it spent between two of them.
        hop_s = (token_s - held_s.sum(axis=1)) / max(1, self._num_hops)
        wire_s = hop_s[:, None] + held_s - compute_s if self._num_hops else np.zeros_like(compute_s)
        wait_s = token_s[:, None] - compute_s - wire_s
        return [
            StageTimes(*(max(0.0, float(np.median(part[:, index]))) for part in (compute_s, wait_s, wire_s)))
            for index in range(compute_s.shape[1])
        ]

    def hop_us(self) -> list[float]:
        if not self._num_hops:
            return []
        return [
            (token_s - sum(stage.compute_s for stage in step)) / self._num_hops * 1e6
            for token_s, step in zip(self._token_s, self._stages, strict=True)
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
