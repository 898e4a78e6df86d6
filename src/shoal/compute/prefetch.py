"""Mapped weights, asked for ahead of their use: prima.cpp's way, kept as a baseline (`--residency mmap`).

All weights are mapped and the system decides what stays. When a device has computed one window, it asks for the next
one's pages, which then arrive while the other devices compute. Where windows are larger than memory, what was asked
for pushes out what is needed before it: `compute/streaming.py` is the way that does not.

Source: Li et al., Prima.cpp (2025), its piped ring with prefetching.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from shoal.compute.gguf import GGUFFile, TensorInfo


class Prefetch:
    """Asks for pages in a thread of its own, because the system may make whoever asks wait for the disk.

    Args:
        windows: tensors of each window, in order.
    """

    def __init__(self, file: GGUFFile, windows: Sequence[Sequence[TensorInfo]]) -> None:
        self._file = file
        self._windows = windows
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._asking: Future[None] | None = None

    def after(self, window: int) -> None:
        """The window was computed: the next one, which follows the last, is asked for unless the thread is still at it."""
        if self._asking is None or self._asking.done():
            wanted = self._windows[(window + 1) % len(self._windows)]
            self._asking = self._pool.submit(self._file.will_need, wanted)

    def close(self) -> None:
        self._pool.shutdown()
