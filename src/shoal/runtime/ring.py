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
from shoal.transport.framing import FrameHeader, FrameKind, StageTiming
from shoal.transport.link import Frame, Inbound, Outbound

FloatArray = np.ndarray[Any, np.dtype[np.float32]]


def _nothing() -> None:
    pass


class ThreadCounts(NamedTuple):
    """Threads for one token at a time, and for many."""

    decode: int
    prefill: int


class RingStage:
    """A stage that is not the head: its frames come from the previous device and go to the next."""

    def __init__(self, stage: Stage, inbound: Inbound, outbound: Outbound, threads: ThreadCounts, *, spin_s: float) -> None:
        self._stage = stage
        self._inbound = inbound
        self._outbound = outbound
        self._threads = threads
        self._spin_s = spin_s
        self._frame = Frame(micro_batch=stage.micro_batch, hidden_size=stage.model.shape.hidden_size)

    def run(self) -> None:
        """Serves frames until a link closes.

        Raises:
            LinkError: a neighbour is gone or sent what the protocol forbids.
        """
        while True:
            self._inbound.receive(self._frame, spin_s=self._spin_s)
            arrived_s = time.perf_counter()
            header, timings = self._frame.header, self._frame.timings
            set_threads(self._stage, self._threads, header.num_tokens)
            started_s = time.perf_counter()
            output_BD = self._stage.forward(self._frame.hidden_states, header.position)
            ended_s = time.perf_counter()
            timings.append(StageTiming(compute_s=ended_s - started_s, held_s=ended_s - arrived_s))
            self._outbound.send(header, output_BD, timings)


class RingHead:
    """The device that took the request: embeds, sends once round the ring, and turns what comes back into logits.

    In a ring of one, `inbound` and `outbound` are None and a pass is one call.
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
        spin_s: float = 0.0,
    ) -> None:
        self.stage = stage
        self.num_stages = num_stages
        self._engine = engine
        self._threads = threads
        self._inbound = inbound
        self._outbound = outbound
        self._spin_s = spin_s
        self._frame = Frame(micro_batch=stage.micro_batch, hidden_size=stage.model.shape.hidden_size)

    @property
    def num_hops(self) -> int:
        return self.num_stages if self._outbound is not None else 0

    def decode(
        self, token_id: int, position: int, *, meanwhile: Callable[[], None] = _nothing
    ) -> tuple[FloatArray, list[StageTiming]]:
        """Computes one token.

        Args:
            meanwhile: called once, as soon as the token is on its way: work that need not delay it.

        Returns:
            Logits [vocabulary], a view that the next call overwrites, and each stage's time, the head's last.
        """
        set_threads(self.stage, self._threads, 1)
        started_s = time.perf_counter()
        x_BD = self.stage.embed((token_id,))
        embed_s = time.perf_counter() - started_s
        timings: list[StageTiming] = []
        if self._outbound is not None and self._inbound is not None:
            self._send(x_BD, position, num_outputs=1)
            meanwhile()
            self._inbound.receive(self._frame, spin_s=self._spin_s)
            timings, x_BD = self._frame.timings, self._frame.hidden_states
        else:
            meanwhile()
        started_s = time.perf_counter()
        logits_BV = self.stage.forward(x_BD, position, num_outputs=1)
        compute_s = time.perf_counter() - started_s + embed_s
        timings.append(StageTiming(compute_s=compute_s, held_s=compute_s))
        return logits_BV[0], timings

    def prefill(
        self, token_ids: Sequence[int], batches: Sequence[MicroBatch], *, progress: Callable[[int], bool]
    ) -> FloatArray | None:
        """Computes `batches` of `token_ids`.

        Args:
            progress: told how many tokens of the prompt are done after each micro-batch; answers whether to go on.

        Returns:
            Logits after the last token, or None where `progress` stopped it. The ring is quiet either way.
        """
        logits_BV: FloatArray | None = None
        num_sent = num_done = 0
        wanted = len(batches)
        while num_done < wanted:
            while num_sent < wanted and num_sent - num_done < self.num_stages:
                self._send_batch(token_ids, batches[num_sent], is_last=num_sent + 1 == len(batches))
                num_sent += 1
            batch = batches[num_done]
            logits_BV = self._finish_batch(token_ids, batch, is_last=num_done + 1 == len(batches))
            num_done += 1
            if not progress(batch.stop):
                wanted = num_sent  # what is under way must come home, or the next pass would meet it
        return logits_BV if num_done == len(batches) else None

    def _send_batch(self, token_ids: Sequence[int], batch: MicroBatch, *, is_last: bool) -> None:
        if self._outbound is not None:
            self._send(self.stage.embed(token_ids[batch.first : batch.stop]), batch.first, num_outputs=int(is_last))

    def _finish_batch(self, token_ids: Sequence[int], batch: MicroBatch, *, is_last: bool) -> FloatArray:
        set_threads(self.stage, self._threads, batch.stop - batch.first)
        if self._inbound is None:
            x_BD = self.stage.embed(token_ids[batch.first : batch.stop])
        else:
            self._inbound.receive(self._frame)
            x_BD = self._frame.hidden_states
        logits_BV = self.stage.forward(x_BD, batch.first, num_outputs=int(is_last))
        return logits_BV[0] if is_last else logits_BV

    def _send(self, x_BD: FloatArray, position: int, *, num_outputs: int) -> None:
        assert self._outbound is not None
        header = FrameHeader(FrameKind.FORWARD, 0, self._engine, position, len(x_BD), num_outputs, 0)
        self._outbound.send(header, x_BD, [])


def set_threads(stage: Stage, threads: ThreadCounts, num_tokens: int) -> None:
    """Few tokens are bound by memory, many by arithmetic: each has its own best count."""
    wanted = threads.decode if num_tokens == 1 else threads.prefill
    if stage.backend.num_threads != wanted:
        stage.backend.set_threads(wanted)
