"""Mapped weights, asked for ahead of their use.

`ReadAhead` reads what stays in memory once, in the order of its use: the devices of a ring read at the same time, each
beside what it computes already, and not one after the other as a first token comes by.

`Prefetch` is prima.cpp's way, kept as a baseline (`--residency mmap`). All weights are mapped and the system decides what
stays. When a device has computed one window, it asks for the next one's pages, which then arrive while the other devices
compute. Where windows are larger than memory, what was asked for pushes out what is needed before it:
`compute/streaming.py` is the way that does not.

Source: Li et al., Prima.cpp (2025), its piped ring with prefetching.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from shoal.compute.gguf import GGUFFile, TensorInfo

_PIECE_BYTES = 1024 * 1024


class ReadAhead:
    """Reads tensors in a thread of its own, in their order, so that the system has them in memory.

    By reading, since what is only asked for (`MADV_WILLNEED`) is cut short: to 8 MB, or 128 KB where the disk is set so.
    """

    def __init__(self, file: GGUFFile, tensors: Sequence[TensorInfo]) -> None:
        self._file, self._tensors = file, tensors
        self._is_closing = False
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        piece = memoryview(bytearray(_PIECE_BYTES))
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # who computes with it will say
            parts = [stack.enter_context(path.open("rb", buffering=0)) for path in self._file.part_paths]
            for tensor in self._tensors:
                if self._is_closing:
                    return
                left = tensor.num_bytes if self._file.missing_bytes([tensor]) else 0
                parts[tensor.part].seek(tensor.offset)
                while left and not self._is_closing and (count := parts[tensor.part].readinto(piece[:left])):
                    left -= count

    def close(self) -> None:
        self._is_closing = True
        self._thread.join()


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
