"""Carries out the all-reduce over wires: a thread that receives and one that sends for each neighbour.

Receiving never waits for anything but the lock: a chunk that cannot be added yet stays in memory, at most one per child and
chunk. So no member can hold up another by what it does not need yet. Sending takes what is due first.

An exchange ends as a whole: whatever goes wrong with a wire or a frame shuts all of them, and every member's `all_reduce`
raises. What was contributed is untouched; a new exchange with a later epoch may contribute it again.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from heapq import heappop, heappush
from typing import Any

import numpy as np

from shoal.errors import LinkClosed, RemoteProtocolError, ShoalError
from shoal.exchange.core import (
    Add,
    AllReduce,
    Arrived,
    Contribute,
    Discard,
    Drop,
    Effect,
    Enter,
    Event,
    Finished,
    Send,
    Store,
)
from shoal.exchange.wire import HEADER, Wire, behind, is_behind, pack, pack_goodbye, unpack
from shoal.ids import NodeId
from shoal.topology.tree import Plan

CHUNK_BYTES = 64 * 1024
"""Of one chunk; a multiple of 4."""
CHUNK_BYTES_MAX = 1024 * 1024
RUN_BYTES_MIN = 128 * 1024
"""Fewer say more about buffers than about the link."""
PIECE_S = 0.25
"""A longer run of frames is told of in pieces, since an estimate takes no sample for more than it is."""
_CLOSE_S = 5.0

FloatArray = np.ndarray[Any, np.dtype[np.float32]]


class Exchange:
    """One member's end. Use it as a context manager, or call `close`.

    Args:
        wires: a wire to every device that a plan's routes lead to from here; they belong to the exchange from now on.
        chunk_bytes: until an epoch has others; the same on every member.
        observed: told of what came from a neighbour while it had more to send: bytes, and the seconds they took. Called on
            threads of the exchange; it must not wait.
    """

    def __init__(
        self,
        me: NodeId,
        wires: Mapping[NodeId, Wire],
        *,
        chunk_bytes: int = CHUNK_BYTES,
        observed: Callable[[NodeId, int, float], None] = lambda _peer, _bytes, _seconds: None,
    ) -> None:
        self._chunk_bytes = _checked(chunk_bytes)
        self._observed = observed
        self._core = AllReduce(me)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._failure: ShoalError | None = None
        self._num_slots = self._num_steps = 0
        self._slots: dict[int, FloatArray] = {}
        self._sums: dict[int, FloatArray] = {}
        self._finished: set[int] = set()
        self._num_unsent: defaultdict[int, int] = defaultdict(int)
        """Per step: frames of its own chunks that a sender has not handed over."""
        self._senders = {peer: _Sender(self, wire) for peer, wire in wires.items()}
        self._threads = [threading.Thread(target=sender.run, daemon=True) for sender in self._senders.values()]
        self._threads += [threading.Thread(target=self._receive, args=each, daemon=True) for each in wires.items()]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def enter(self, epoch: int, plan: Plan, *, chunk_bytes: int | None = None) -> None:
        """Begins an epoch, with chunks of another size if it is given, the same on every member; steps count from 0 again.
        No `all_reduce` may be open.

        Raises:
            ValueError: the epoch is not later, a route leads to a neighbour without a wire, or chunks cannot have that size.
            ShoalError: the exchange has failed.
        """
        me = self._core.me
        peers = {link.target for tree in plan.trees for link in tree.links if link.source == me}
        if missing := sorted(peers - set(self._senders)):
            raise ValueError(f"{me} has no wire to {', '.join(missing)}, which the plan '{plan.policy}' needs")
        with self._lock:
            self._raise_failure()
            if chunk_bytes is not None:
                self._chunk_bytes = _checked(chunk_bytes)
            self._num_steps = 0
            self._do(Enter(epoch, plan))

    def all_reduce(self, x: FloatArray, *, timeout_s: float | None = None) -> FloatArray:
        """The sum of every member's `x`, bit by bit the same on all of them. Blocks; one thread at a time.

        Args:
            x: float32 of any shape with at least one element, the same on every member; it is not written to.

        Raises:
            LinkClosed, RemoteProtocolError: the exchange has failed, and is of no more use: close it.
            TimeoutError: the same, because it took longer than `timeout_s`.
        """
        if x.dtype != np.float32 or x.size == 0:
            raise ValueError(f"{x.size} elements of {x.dtype}: an all-reduce takes float32, at least one")
        total = x.reshape(-1).copy()
        with self._lock:
            self._raise_failure()
            step = self._num_steps
            self._num_steps += 1
            self._sums[step] = total
            self._do(Contribute(step, -(-total.nbytes // self._chunk_bytes)))
            ended = self._changed.wait_for(
                lambda: self._failure or (step in self._finished and not self._num_unsent[step]), timeout_s
            )
            if not ended:
                self._fail(LinkClosed(f"an all-reduce took longer than {timeout_s:g} s"))
                raise TimeoutError(str(self._failure))
            self._raise_failure()
            self._finished.remove(step)
            del self._num_unsent[step], self._sums[step]
        return total.reshape(x.shape)

    def abort(self) -> None:
        """Ends the exchange for all its members at once; an `all_reduce` that is open raises. From any thread."""
        with self._lock:
            self._fail(LinkClosed("the exchange was given up"))

    def close(self) -> None:
        """Sends what it still owes to others, says goodbye, and closes the wires."""
        with self._lock:
            if self._failure is None:
                for sender in self._senders.values():
                    sender.end()
                give_up_s = time.monotonic() + _CLOSE_S
                while any(sender.is_busy for sender in self._senders.values()) and time.monotonic() < give_up_s:
                    self._changed.wait(give_up_s - time.monotonic())
            self._fail(LinkClosed("this exchange is closed"))
        # Only now: another thread may not find its socket's number given to somebody else.
        for thread in self._threads:
            thread.join(_CLOSE_S)
        for sender in self._senders.values():
            sender.wire.close()

    # ---- under the lock

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _fail(self, failure: ShoalError) -> None:
        """The first failure counts; all wires are shut, so that every thread here and every neighbour learns of it."""
        if self._failure is None:
            self._failure = failure
        for sender in self._senders.values():
            sender.wire.shut()
            sender.wake()
        self._changed.notify_all()

    def _do(self, event: Event) -> None:
        try:
            for effect in self._core.step(event, time.monotonic()):
                self._carry_out(effect)
        except ShoalError as error:
            self._fail(error)
            raise

    def _carry_out(self, effect: Effect) -> None:
        if isinstance(effect, Send):
            step = None if effect.slot is not None else effect.header.step
            payload = (
                self._chunk(effect.header.step, effect.header.chunk) if effect.slot is None else self._slots[effect.slot]
            )
            if step is not None:
                self._num_unsent[step] += 1
            key = (effect.header.step, effect.header.chunk)
            self._senders[effect.peer].put(key, pack(effect.header, payload.nbytes), payload, step)
        elif isinstance(effect, Add):
            chunk = self._chunk(effect.step, effect.chunk)
            np.add(chunk, self._payload(effect.slot, chunk), out=chunk)
        elif isinstance(effect, Store):
            chunk = self._chunk(effect.step, effect.chunk)
            chunk[...] = self._payload(effect.slot, chunk)
        elif isinstance(effect, Drop):
            del self._slots[effect.slot]
        elif isinstance(effect, Finished):
            self._finished.add(effect.step)
            self._changed.notify_all()
        else:
            assert isinstance(effect, Discard)
            raise AssertionError("an epoch was entered while an all-reduce was open")

    def _chunk(self, step: int, chunk: int) -> FloatArray:
        size = self._chunk_bytes // 4
        return self._sums[step][chunk * size : (chunk + 1) * size]

    def _payload(self, slot: int, chunk: FloatArray) -> FloatArray:
        payload = self._slots.pop(slot)
        if payload.size != chunk.size:
            raise RemoteProtocolError(f"a chunk of {payload.size} elements where this member has {chunk.size}")
        return payload

    # ---- on threads of their own

    def _receive(self, peer: NodeId, wire: Wire) -> None:
        data = bytearray(HEADER.size)
        busy = _Busy(partial(self._observed, peer))
        try:
            while True:
                wire.receive_into(memoryview(data))
                frame = unpack(data, payload_bytes_max=CHUNK_BYTES_MAX)
                if frame is None:
                    return
                header, payload_bytes = frame
                payload = np.empty(payload_bytes // 4, dtype=np.float32)
                wire.receive_into(memoryview(payload).cast("B"))  # type: ignore[arg-type]  # numpy arrays export buffers
                busy.came(HEADER.size + payload_bytes, time.monotonic(), is_behind=is_behind(data))
                with self._lock:
                    if self._failure is not None:
                        return
                    self._num_slots += 1
                    self._slots[self._num_slots] = payload
                    self._do(Arrived(header, self._num_slots))
        except ShoalError as error:
            with self._lock:
                self._fail(error)


def _checked(chunk_bytes: int) -> int:
    if not 4 <= chunk_bytes <= CHUNK_BYTES_MAX or chunk_bytes % 4:
        raise ValueError(f"chunks of {chunk_bytes} bytes: a multiple of 4 up to {CHUNK_BYTES_MAX} is expected")
    return chunk_bytes


class _Busy:
    """Times runs of frames between which the sender was never idle, in pieces of `PIECE_S`."""

    def __init__(self, observed: Callable[[int, float], None]) -> None:
        self._observed = observed
        self._num_bytes = 0
        self._since_s = 0.0
        self._last_s = 0.0

    def came(self, num_bytes: int, now_s: float, *, is_behind: bool) -> None:
        is_behind = is_behind and self._since_s > 0  # the first one is behind nothing
        if is_behind:
            self._num_bytes += num_bytes
        if not is_behind or now_s - self._since_s >= PIECE_S:
            last_s = now_s if is_behind else self._last_s
            if self._num_bytes >= RUN_BYTES_MIN:
                self._observed(self._num_bytes, last_s - self._since_s)
            self._num_bytes, self._since_s = 0, now_s
        self._last_s = now_s


class _Sender:
    """What waits for one wire. All but `run` is called under the exchange's lock."""

    def __init__(self, exchange: Exchange, wire: Wire) -> None:
        self.wire = wire
        self.is_busy = True
        self._exchange = exchange
        self._has_work = threading.Condition(exchange._lock)
        self._waiting: list[tuple[tuple[int, int], int, bytes, FloatArray, int | None]] = []
        self._num_put = 0
        self._is_ending = False

    def put(self, key: tuple[int, int], header: bytes, payload: FloatArray, step: int | None) -> None:
        self._num_put += 1
        heappush(self._waiting, (key, self._num_put, header, payload, step))
        self._has_work.notify()

    def end(self) -> None:
        """After what waits, a goodbye."""
        self._is_ending = True
        self.wake()

    def wake(self) -> None:
        self._has_work.notify()

    def run(self) -> None:
        exchange = self._exchange
        try:
            while True:
                with exchange._lock:
                    is_behind = bool(self._waiting)  # after the last one there was no pause
                    self._has_work.wait_for(lambda: self._waiting or self._is_ending or exchange._failure)
                    if exchange._failure is not None or not self._waiting:
                        break
                    _, _, header, payload, step = heappop(self._waiting)
                self.wire.send(behind(header) if is_behind else header, memoryview(payload).cast("B"))  # type: ignore[arg-type]
                if step is not None:
                    with exchange._lock:
                        exchange._num_unsent[step] -= 1
                        if not exchange._num_unsent[step]:
                            exchange._changed.notify_all()
            if exchange._failure is None:
                self.wire.send(pack_goodbye(), memoryview(b""))
        except ShoalError as error:
            with exchange._lock:
                exchange._fail(error)
        with exchange._lock:
            self.is_busy = False
            exchange._changed.notify_all()
