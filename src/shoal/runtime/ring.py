"""One stage's place in the ring while it runs: receive, compute, send; and the head's view of a whole pass.

A token goes round as many times as each stage has windows; which one a frame is for, the number of its visits says. Decode
has one frame in flight. Prefill keeps as many micro-batches in flight as there are stages, so that all of them compute
at once; nobody can block for ever, because every outbound link has room for all frames in flight. Where a window's streamed
weights stay, all micro-batches of a group pass through a window before the next round, so that each is read once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from shoal.compute.split import AnyStage
from shoal.ids import EngineId
from shoal.inference.batching import MicroBatch
from shoal.transport.framing import FrameKind, StageTiming
from shoal.transport.link import Frame, FrameShape, Inbound, Outbound

FloatArray = np.ndarray[Any, np.dtype[np.float32]]


_GROUP_BYTES_MAX = 16 * 1024 * 1024
"""Hidden states that the head keeps between two rounds of a prefill: some of a worker's head-room."""


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
        stage: AnyStage,
        inbound: Inbound,
        outbound: Outbound,
        threads: ThreadCounts,
        *,
        num_stages: int,
        while_waiting: Callable[[], None] = _nothing,
    ) -> None:
        self._stage = stage
        self._num_stages = num_stages
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
            waited_ns = self._stage.disk_wait_ns
            started_ns = time.perf_counter_ns()
            output_BD = self._stage.forward(
                frame.hidden_states,
                header.position,
                window=header.num_records // self._num_stages,
                more=header.kind == FrameKind.FORWARD_MORE,
            )
            ended_ns = time.perf_counter_ns()
            disk_ns = self._stage.disk_wait_ns - waited_ns
            compute_ns = ended_ns - started_ns - disk_ns
            frame.continue_with(output_BD, compute_ns=compute_ns, disk_ns=disk_ns, held_ns=ended_ns - arrived_ns)
            frame = self._outbound.send(frame)


class RingHead:
    """The device that took the request: embeds, sends once round the ring, and turns what comes back into logits.

    In a ring of one, `inbound` and `outbound` are None and a pass is one call. `while_waiting` is called for every token,
    while others compute.

    Args:
        holds_windows: whether every stage does (`Stage.holds_windows`).
    """

    def __init__(
        self,
        stage: AnyStage,
        engine: EngineId,
        threads: ThreadCounts,
        *,
        num_stages: int,
        holds_windows: bool = True,
        inbound: Inbound | None = None,
        outbound: Outbound | None = None,
        while_waiting: Callable[[], None] = _nothing,
    ) -> None:
        self.stage = stage
        self._while_waiting = while_waiting
        self.num_stages = num_stages
        self.rounds = len(stage.windows)
        group_tokens = _GROUP_BYTES_MAX // (4 * stage.model.shape.hidden_size)
        self._group_batches = max(1, group_tokens // stage.micro_batch) if holds_windows and self.rounds > 1 else 1
        self._engine = engine
        self._threads = threads
        self._inbound = inbound
        self._outbound = outbound
        self._received = Frame(frame_shape(stage, num_stages))
        """What came home last, in the last round."""
        self._next_frame = outbound.free_frame() if outbound is not None else self._received
        self._next_position = -1
        """Of the single token for which the next frame has its header already."""
        self._last_visit = StageTiming(0.0, 0.0, 0.0)

    @property
    def num_hops(self) -> int:
        """Per token."""
        return self.num_stages * self.rounds if self._outbound is not None else 0

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
            for window in range(self.rounds - 1):
                self._pass_on(window, position)
            self._inbound.receive(self._received)
            x_BD = self._received.hidden_states
        waited_ns = self.stage.disk_wait_ns
        started_s = time.perf_counter()
        logits_BV = self.stage.forward(x_BD, position, window=self.rounds - 1, num_outputs=1)
        held_s = time.perf_counter() - started_s + embed_s
        disk_s = (self.stage.disk_wait_ns - waited_ns) * 1e-9
        self._last_visit = StageTiming(held_s - disk_s, disk_s, held_s)
        logits_V: FloatArray = logits_BV[0]
        return logits_V

    def _pass_on(self, window: int, position: int) -> None:
        """The head's part of a round that is not the last."""
        assert self._inbound is not None
        assert self._outbound is not None
        frame = self._received
        self._inbound.receive(frame)
        waited_ns = self.stage.disk_wait_ns
        started_ns = time.perf_counter_ns()
        output_BD = self.stage.forward(frame.hidden_states, position, window=window)
        held_ns = time.perf_counter_ns() - started_ns
        disk_ns = self.stage.disk_wait_ns - waited_ns
        frame.continue_with(output_BD, compute_ns=held_ns - disk_ns, disk_ns=disk_ns, held_ns=held_ns)
        self._received = self._outbound.send(frame)

    def visits(self) -> list[StageTiming]:
        """What the last decoded token's visits took, round after round, the head last in each. Until the next one comes
        home."""
        of_others = self._received.timings if self._inbound is not None else []
        return [*of_others, self._last_visit]

    def prefill(
        self,
        token_ids: Sequence[int],
        batches: Sequence[MicroBatch],
        *,
        progress: Callable[[int], bool],
        scored: Callable[[MicroBatch, FloatArray], None] | None = None,
        wants_hidden: bool = False,
        num_in_flight: int | None = None,
    ) -> FloatArray | None:
        """Computes `batches` of `token_ids`.

        Args:
            progress: told how many tokens of the prompt are done after each micro-batch; answers whether to go on.
            scored: takes every micro-batch with the logits [tokens, vocabulary] of all its tokens, a view that is
                overwritten afterwards; without it only the prompt's last token gets logits.
            wants_hidden: normalised hidden states [tokens, hidden size] are computed instead of logits.
            num_in_flight: most micro-batches under way at a time; None is one per stage, which is as many as may be.

        Returns:
            Logits after the last token, or None where `progress` stopped it. The ring is quiet either way.
        """
        logits_BV: FloatArray | None = None
        passes = self._passes(batches)
        between: dict[int, FloatArray] = {}
        """Hidden states that wait for their next round, by the number of their pass."""
        num_sent = num_done = 0
        num_in_flight = num_in_flight or self.num_stages
        wanted = len(passes)
        done_tokens = 0.0
        while num_done < wanted:
            while num_sent < wanted and num_sent - num_done < num_in_flight and passes[num_sent].after < num_done:
                self._start(token_ids, passes[num_sent], between)
                num_sent += 1
            current = passes[num_done]
            batch = current.batch
            ends = current.window + 1 == self.rounds
            num_outputs = batch.stop - batch.first if scored is not None else int(batch is batches[-1])
            output_BD = self._finish(token_ids, current, num_outputs, wants_hidden and ends)
            if not ends:
                between[num_done] = output_BD.copy()
            else:
                logits_BV = output_BD
                if scored is not None:
                    scored(batch, logits_BV)
            num_done += 1
            done_tokens += (batch.stop - batch.first) / self.rounds
            if not progress(batches[0].first + round(done_tokens)):
                wanted = num_sent  # what is under way must come home, or the next request would meet it
        return logits_BV[-1] if logits_BV is not None and num_done == len(passes) else None

    def reads_per_prompt(self, batches: Sequence[MicroBatch]) -> int:
        """How often streamed weights are read for these micro-batches."""
        return -(-len(batches) // self._group_batches)

    def _passes(self, batches: Sequence[MicroBatch]) -> list[_Pass]:
        passes: list[_Pass] = []
        for at in range(0, len(batches), self._group_batches):
            group = batches[at : at + self._group_batches]
            for window in range(self.rounds):
                for index, batch in enumerate(group):
                    after = len(passes) - len(group) if window else -1
                    passes.append(_Pass(batch, window, after, more=index + 1 < len(group)))
        return passes

    def _start(self, token_ids: Sequence[int], started: _Pass, between: dict[int, FloatArray]) -> None:
        """Sends a micro-batch on its way round."""
        if self._outbound is None:
            return
        batch, window, after, more = started
        self._next_position = -1
        num_tokens = batch.stop - batch.first
        x_BD = self._next_frame.begin(self._engine, batch.first, num_tokens, num_visits=window * self.num_stages, more=more)
        if window:
            x_BD[...] = between.pop(after)
        else:
            self.stage.embed_into(token_ids[batch.first : batch.stop], x_BD)
        self._next_frame = self._outbound.send(self._next_frame)

    def _finish(self, token_ids: Sequence[int], finished: _Pass, num_outputs: int, wants_hidden: bool) -> FloatArray:
        """Takes a micro-batch that has come home through the head's own window."""
        batch, window, _, more = finished
        set_threads(self.stage, self._threads, batch.stop - batch.first)
        if self._inbound is None:
            x_BD = self.stage.embed(token_ids[batch.first : batch.stop])
        else:
            self._inbound.receive(self._received)
            x_BD = self._received.hidden_states
        return self.stage.forward(
            x_BD, batch.first, window=window, more=more, num_outputs=num_outputs, wants_hidden=wants_hidden
        )


class _Pass(NamedTuple):
    """A micro-batch once round the ring, for one window of each stage.

    `after` is the number of the pass before it, -1 in the first round; with `more` the next pass is for the same window.
    """

    batch: MicroBatch
    window: int
    after: int
    more: bool


def frame_shape(stage: AnyStage, num_stages: int) -> FrameShape:
    """Of all frames in a stage's ring."""
    return FrameShape(stage.micro_batch, stage.model.shape.hidden_size, num_stages * len(stage.windows))


def set_threads(stage: AnyStage, threads: ThreadCounts, num_tokens: int) -> None:
    """Few tokens are bound by memory, many by arithmetic: each has its own best count."""
    wanted = threads.decode if num_tokens == 1 else threads.prefill
    if stage.backend.num_threads != wanted:
        stage.backend.set_threads(wanted)
