"""One stage's place in the ring while it runs: receive, compute, send; and the head's view of a whole pass.

Decode has one frame in flight. Prefill keeps as many micro-batches in flight as there are stages, so that all of them
compute at once; nobody can block for ever, because every outbound link has room for all frames in flight.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from shoal.compute.stage import Stage
from shoal.ids import EngineId
from shoal.inference.batching import MicroBatch
from shoal.transport.framing import StageTiming
from shoal.transport.link import Frame, FrameShape, Inbound, Outbound

FloatArray = np.ndarray[Any, np.dtype[np.float32]]


def _nothing() -> None:
    pass


class ThreadCounts(NamedTuple):
    """Threads for one token at a time, and for many."""

    decode: int
    prefill: int


class RingStage:
    """A stage that is not the head: its frames come from the previous device and go to the next.

    `while_waiting` is called between two frames, when the stage is not computing.
    """

    def __init__(
        self,
        stage: Stage,
        inbound: Inbound,
        outbound: Outbound,
        threads: ThreadCounts,
        *,
        while_waiting: Callable[[], None] = _nothing,
    ) -> None:
        self._stage = stage
        self._while_waiting = while_waiting
        self._inbound = inbound
        self._outbound = outbound
        self._threads = threads

    def run(self) -> None:
        """Serves frames until a link closes.

        Raises:
            LinkError: a neighbour is gone or sent what the protocol forbids.
        """
        frame = self._outbound.free_frame()
        while True:
            self._while_waiting()
            self._inbound.receive(frame)
            arrived_ns = time.perf_counter_ns()
            header = frame.header
            set_threads(self._stage, self._threads, header.num_tokens)
            started_ns = time.perf_counter_ns()
            output_BD = self._stage.forward(frame.hidden_states, header.position)
            ended_ns = time.perf_counter_ns()
            frame.continue_with(output_BD, compute_ns=ended_ns - started_ns, held_ns=ended_ns - arrived_ns)
            frame = self._outbound.send(frame)


class RingHead:
    """The device that took the request: embeds, sends once round the ring, and turns what comes back into logits.

    In a ring of one, `inbound` and `outbound` are None and a pass is one call. `while_waiting` is called for every token,
    while others compute.
    """

    def __init__(
        self,
        stage: Stage,
        engine: EngineId,
        threads: ThreadCounts,
        *,
        num_stages: int,
        inbound: Inbound | None = None,
        outbound: Outbound | None = None,
        while_waiting: Callable[[], None] = _nothing,
    ) -> None:
        self.stage = stage
        self._while_waiting = while_waiting
        self.num_stages = num_stages
        self._engine = engine
        self._threads = threads
        self._inbound = inbound
        self._outbound = outbound
        self._received = Frame(frame_shape(stage, num_stages))
        self._next_frame = outbound.free_frame() if outbound is not None else self._received
        self._next_position = -1
        """Of the single token for which the next frame has its header already."""
        self._compute_s = 0.0

    @property
    def num_hops(self) -> int:
        return self.num_stages if self._outbound is not None else 0

    def decode(self, token_id: int, position: int, *, meanwhile: Callable[[], None] = _nothing) -> FloatArray:
        """Computes one token.

        Args:
            meanwhile: called once, as soon as the token is on its way: work that need not delay it.

        Returns:
            Logits [vocabulary], a view that the next call overwrites.
        """
        frame = self._next_frame
        if position != self._next_position:
            frame.begin(self._engine, position, 1)
        started_s = time.perf_counter()
        x_BD = frame.hidden_states
        self.stage.embed_into((token_id,), x_BD)
        embed_s = time.perf_counter() - started_s
        if self._outbound is not None:
            self._next_frame = self._outbound.send(frame)
        # From here on others compute: what need not be done before is done now.
        meanwhile()
        self._while_waiting()
        set_threads(self.stage, self._threads, 1)
        if self._inbound is not None:
            self._next_frame.begin(self._engine, position + 1, 1)
            self._next_position = position + 1
            self._inbound.receive(self._received)
            x_BD = self._received.hidden_states
        started_s = time.perf_counter()
        logits_BV = self.stage.forward(x_BD, position, num_outputs=1)
        self._compute_s = time.perf_counter() - started_s + embed_s
        logits_V: FloatArray = logits_BV[0]
        return logits_V

    def timings(self) -> list[StageTiming]:
        """What each stage spent on the last decoded token, the head last. Until the next one comes home."""
        of_others = self._received.timings if self._inbound is not None else []
        return [*of_others, StageTiming(compute_s=self._compute_s, held_s=self._compute_s)]

    def prefill(
        self,
        token_ids: Sequence[int],
        batches: Sequence[MicroBatch],
        *,
        progress: Callable[[int], bool],
        scored: Callable[[MicroBatch, FloatArray], None] | None = None,
        wants_hidden: bool = False,
    ) -> FloatArray | None:
        """Computes `batches` of `token_ids`.

        Args:
            progress: told how many tokens of the prompt are done after each micro-batch; answers whether to go on.
            scored: takes every micro-batch with the logits [tokens, vocabulary] of all its tokens, a view that is
                overwritten afterwards; without it only the prompt's last token gets logits.
            wants_hidden: normalised hidden states [tokens, hidden size] are computed instead of logits.

        Returns:
            Logits after the last token, or None where `progress` stopped it. The ring is quiet either way.
        """
        logits_BV: FloatArray | None = None
        num_sent = num_done = 0
        wanted = len(batches)
        while num_done < wanted:
            while num_sent < wanted and num_sent - num_done < self.num_stages:
                self._send_batch(token_ids, batches[num_sent])
                num_sent += 1
            batch = batches[num_done]
            is_last = num_done + 1 == len(batches)
            num_outputs = batch.stop - batch.first if scored is not None else int(is_last)
            logits_BV = self._finish_batch(token_ids, batch, num_outputs, wants_hidden)
            if scored is not None:
                scored(batch, logits_BV)
            num_done += 1
            if not progress(batch.stop):
                wanted = num_sent  # what is under way must come home, or the next pass would meet it
        return logits_BV[-1] if logits_BV is not None and num_done == len(batches) else None

    def _send_batch(self, token_ids: Sequence[int], batch: MicroBatch) -> None:
        if self._outbound is None:
            return
        self._next_position = -1
        x_BD = self._next_frame.begin(self._engine, batch.first, batch.stop - batch.first)
        self.stage.embed_into(token_ids[batch.first : batch.stop], x_BD)
        self._next_frame = self._outbound.send(self._next_frame)

    def _finish_batch(self, token_ids: Sequence[int], batch: MicroBatch, num_outputs: int, wants_hidden: bool) -> FloatArray:
        set_threads(self.stage, self._threads, batch.stop - batch.first)
        if self._inbound is None:
            x_BD = self.stage.embed(token_ids[batch.first : batch.stop])
        else:
            self._inbound.receive(self._received)
            x_BD = self._received.hidden_states
        return self.stage.forward(x_BD, batch.first, num_outputs=num_outputs, wants_hidden=wants_hidden)


def frame_shape(stage: Stage, num_visits: int) -> FrameShape:
    """Of all frames in a stage's ring."""
    return FrameShape(stage.micro_batch, stage.model.shape.hidden_size, num_visits)


def set_threads(stage: Stage, threads: ThreadCounts, num_tokens: int) -> None:
    """Few tokens are bound by memory, many by arithmetic: each has its own best count."""
    wanted = threads.decode if num_tokens == 1 else threads.prefill
    if stage.backend.num_threads != wanted:
        stage.backend.set_threads(wanted)
