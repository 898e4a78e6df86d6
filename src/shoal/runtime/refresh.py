"""Measures this device anew while it has nothing to do, so that plans rest on fresh figures of a quiet device and nobody
waits for them.

What was measured beside other work is kept for ten minutes only, and every profile ends after a week
(`kept_profiles.py`). What this device was asked since its agent began is measured again before that: as soon as it is quiet
where it was not, else once a day. A measurement takes seconds, and ends at once when somebody needs the device.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import psutil

from shoal.errors import ShoalError
from shoal.runtime.kept_profiles import KeptProfiles, key_of_start
from shoal.runtime.messages import StartWorker, WorkerReport
from shoal.runtime.power import is_on_mains
from shoal.runtime.worker_process import WorkerProcess

LOOK_EVERY_S = 60.0
_BUSY_PERCENT = 20.0
"""Of all processors, between two looks: the owner is using them."""
_STARTS_MAX = 16
_MEASURED_WITHIN_S = 120.0


def is_quiet() -> bool:
    """Whether its processors had little to do since this was asked last, and it is not on battery."""
    return psutil.cpu_percent() < _BUSY_PERCENT and is_on_mains() is not False


async def measure(start: StartWorker) -> None:
    """Has a worker measure this device, and keep what it finds. Raises ShoalError."""
    worker = await WorkerProcess.start()
    try:
        await worker.send(start)
        await worker.expect(WorkerReport, timeout_s=_MEASURED_WITHIN_S)
    finally:
        await worker.stop()


class ProfileRefresh:
    """What workers were started with here, and measuring for that again in quiet moments.

    Args:
        is_free: whether nobody uses this device's workers, and its owner lends it.
        memory_bytes: what a model may use here now.
        is_quiet: as the function of that name.
    """

    def __init__(
        self,
        *,
        is_free: Callable[[], bool],
        memory_bytes: Callable[[], int],
        is_quiet: Callable[[], bool] = is_quiet,
        measure: Callable[[StartWorker], Awaitable[None]] = measure,
        kept: KeptProfiles | None = None,
    ) -> None:
        self._is_free, self._memory_bytes, self._is_quiet, self._measure = is_free, memory_bytes, is_quiet, measure
        self._kept = kept or KeptProfiles()
        self._starts: dict[str, StartWorker] = {}
        """By the key of their profile, the latest last."""
        self._measuring: asyncio.Task[None] | None = None

    def note(self, start: StartWorker) -> None:
        """A worker is about to start with this: what is being measured would disturb it."""
        if self._measuring is not None:
            self._measuring.cancel()
        with contextlib.suppress(OSError):  # then the worker will say so
            key = key_of_start(start, Path(start.model_path))
            self._starts.pop(key, None)
            self._starts[key] = start
            while len(self._starts) > _STARTS_MAX:
                del self._starts[next(iter(self._starts))]

    async def run(self) -> None:
        """Looks every minute, for ever."""
        self._is_quiet()  # from now on
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self.look()

    async def look(self) -> bool:
        """Measures for one start whose profile is due, if this is a moment for it; whether it did."""
        is_quiet = self._is_quiet()  # in any case: it counts from one call to the next
        if not is_quiet or not self._is_free():
            return False
        due = next((key for key in reversed(self._starts) if self._kept.is_due(key, now_s=time.time())), None)
        if due is None:
            return False
        start = self._starts[due]
        memory_bytes = self._memory_bytes()
        if start.memory_bytes is not None:
            memory_bytes = min(start.memory_bytes, memory_bytes)
        start = msgspec.structs.replace(start, for_plan=True, fresh=True, memory_bytes=memory_bytes)
        measuring = self._measuring = asyncio.ensure_future(self._measure(start))
        try:
            await asyncio.wait({measuring})
        finally:
            self._measuring = None
            measuring.cancel()  # where this was, itself
            await asyncio.wait({measuring})
        if measuring.cancelled():  # somebody needs the device
            return False
        if isinstance(measuring.exception(), ShoalError):
            del self._starts[due]  # whoever asks next hears why
            return False
        measuring.result()
        return True
