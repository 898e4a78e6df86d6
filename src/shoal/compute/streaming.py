"""Weights that do not stay: read from disk into a ring of bytes just ahead of the computation, and forgotten after use.

Which tensor comes next is known for ever (layer after layer, and from the last to the first), so readers run ahead as
far as the ring holds, across layers, tokens and rounds. A tensor's room is free again as soon as it has been used. Reads
go past the page cache: a cyclic scan of more than memory holds would only push out what is worth keeping.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import threading
import time
from bisect import bisect
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec

from shoal.compute import ggml
from shoal.compute.gguf import TensorInfo
from shoal.compute.model import Model, matrix_names
from shoal.compute.weights import describe
from shoal.errors import BadModelFile
from shoal.ids import LayerRange
from shoal.placement.byte_ring import ByteRing

BLOCK_BYTES = 4096
"""What direct reads are aligned to: no disk or file system in use wants more."""
REQUEST_BYTES = 4 * 1024 * 1024
_REQUESTS_MIN = 4
"""Of which a disk's rate is told."""
REQUESTS_IN_FLIGHT = 2
RUN_BYTES = 4 * 1024 * 1024
"""Small enough that a ring of some of them is a few per cent of a small device, large enough for a disk's full rate."""
_ROWS_MULTIPLE = 64
"""Kernels take rows in blocks."""


class Streaming(msgspec.Struct, frozen=True):
    """What a stage streams: the runs of rows of these names (`row_runs`).

    `ring_bytes` of memory hold them while they are needed; more of it bridges longer waits for the disk.
    """

    names: frozenset[str]
    ring_bytes: int
    request_bytes: int = REQUEST_BYTES
    requests_in_flight: int = REQUESTS_IN_FLIGHT


def row_runs(info: TensorInfo, *, bytes_max: int = RUN_BYTES) -> list[TensorInfo]:
    """A matrix as runs of whole rows, `bytes_max` or less each where a row allows: what is streamed, or stays, as one."""
    num_rows = info.shape[1]
    row_bytes = info.num_bytes // num_rows
    rows_max = max(1, bytes_max // row_bytes // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
    if num_rows <= rows_max:
        return [info]
    num_runs = -(-num_rows // rows_max)
    rows_per_run = -(-num_rows // num_runs // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
    runs = []
    for first in range(0, num_rows, rows_per_run):
        rows = min(rows_per_run, num_rows - first)
        runs.append(
            msgspec.structs.replace(
                info,
                name=f"{info.name}[{first}:{first + rows}]",
                shape=(info.shape[0], rows),
                offset=info.offset + first * row_bytes,
                num_bytes=rows * row_bytes,
            )
        )
    return runs


class UncachedFile:
    """A file that is read past the page cache, in the best way that works for it, found by trying.

    `mode` is "direct" where the file system takes direct reads; "nocache" on macOS; else "dontneed": plain reads whose
    pages are given back at once, where the system knows how.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self.mode = "direct"
        direct = getattr(os, "O_DIRECT", 0)
        try:
            if not direct:
                raise OSError("no direct reads on this system")
            self.descriptor = os.open(path, os.O_RDONLY | direct)
            try:
                with mmap.mmap(-1, BLOCK_BYTES) as block:
                    self.read_into(memoryview(block), 0)
            except OSError:
                os.close(self.descriptor)
                raise
        except OSError:
            self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self.mode = "nocache" if self._turn_off_cache() else "dontneed"

    def _turn_off_cache(self) -> bool:
        try:
            import fcntl

            fcntl.fcntl(self.descriptor, fcntl.F_NOCACHE, 1)  # type: ignore[attr-defined]
        except (ImportError, AttributeError, OSError):
            return False
        return True

    @property
    def num_bytes(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read_into(self, target: memoryview, offset: int) -> int:
        """Reads at most `len(target)` bytes at `offset`, both multiples of `BLOCK_BYTES`; returns how many there were.

        Raises:
            OSError: the disk failed.
        """
        if hasattr(os, "preadv"):
            count = os.preadv(self.descriptor, [target], offset)
        else:
            with self._lock:
                os.lseek(self.descriptor, offset, os.SEEK_SET)
                data = os.read(self.descriptor, len(target))
            target[: len(data)] = data
            count = len(data)
        if self.mode == "dontneed" and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, offset, count, os.POSIX_FADV_DONTNEED)
        return count

    def close(self) -> None:
        os.close(self.descriptor)


def _huge_pages(num_bytes: int) -> mmap.mmap:
    """Memory that direct reads need not pin page by page, and that is given back quickly when the process ends."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, num_bytes)
    # Private: shared memory gets no huge pages on most systems.
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class _Piece:
    """One tensor's bytes on their way or here, the `number`th of all. `address` is where the tensor begins."""

    __slots__ = ("address", "begin", "end_offset", "next_offset", "num_pending", "number", "part", "stop_offset")

    def __init__(self, info: TensorInfo, begin: int, base: int, *, number: int) -> None:
        self.number = number
        self.part = info.part
        start = info.offset // BLOCK_BYTES * BLOCK_BYTES
        self.begin = begin - start  # file offset -> ring offset
        self.next_offset = start
        self.end_offset = info.offset + info.num_bytes
        self.stop_offset = -(-self.end_offset // BLOCK_BYTES) * BLOCK_BYTES
        self.num_pending = 0
        self.address = base + self.begin + info.offset

    @property
    def is_here(self) -> bool:
        return self.next_offset >= self.stop_offset and not self.num_pending


def measure_read_rate(path: Path, *, seconds: float = 0.75, warm_up_s: float = 0.1) -> float:
    """Bytes per second of reads past the page cache, evenly over the file. Takes `seconds`, and at least four requests."""
    file = UncachedFile(path)
    try:
        request_bytes = min(REQUEST_BYTES, max(BLOCK_BYTES, file.num_bytes // BLOCK_BYTES * BLOCK_BYTES))
        num_places = max(1, file.num_bytes // request_bytes)
        elapsed_s, done = [0.0], [0]
        place = 0
        with mmap.mmap(-1, request_bytes) as memory, memoryview(memory) as target:
            started_s = time.perf_counter()
            while elapsed_s[-1] < seconds or len(done) <= _REQUESTS_MIN:
                # Far apart, so that a file in several pieces shows their mean.
                place = (place + max(1, num_places * 5 // 13)) % num_places
                done.append(done[-1] + file.read_into(target, place * request_bytes))
                elapsed_s.append(time.perf_counter() - started_s)
        return steady_rate(elapsed_s, done, warm_up_s=warm_up_s)
    finally:
        file.close()


def steady_rate(elapsed_s: Sequence[float], num_bytes: Sequence[int], *, warm_up_s: float) -> float:
    """Bytes per second where `num_bytes` have arrived in all after `elapsed_s`, both increasing, four of each at least.

    Shared disks serve in lumps: what a quiet reader has saved up comes at once, and then a whole slice of time's worth after
    each slice. So what comes in `warm_up_s` does not count where enough comes later, and a line through the rest gives the
    rate; bytes by seconds are off by up to a lump at either end.
    """
    first = min(bisect(elapsed_s, warm_up_s), len(num_bytes) - _REQUESTS_MIN)
    return statistics.linear_regression(elapsed_s[first:], num_bytes[first:]).slope


def read_mode(path: Path) -> str:
    """How `UncachedFile` reads this file."""
    file = UncachedFile(path)
    file.close()
    return file.mode


def ring_bytes_min(model: Model) -> int:
    """The least memory through which any of a model's matrices can be streamed: one run is computed, the next is read."""
    (names,) = matrix_names(model, [LayerRange(0, model.shape.num_layers)], head=True)
    return 2 * max(room_bytes(run) for name in names for run in row_runs(model.file.tensors[name]))


def room_bytes(info: TensorInfo) -> int:
    """What a tensor takes in the ring: whole blocks of the file."""
    start = info.offset // BLOCK_BYTES * BLOCK_BYTES
    return -(-(info.offset + info.num_bytes - start) // BLOCK_BYTES) * BLOCK_BYTES


class StreamedTensors:
    """Tensors of one model that take turns in a ring of bytes. One thread uses them, in order, round and round.

    `tensors[name]` may be used in a graph from the return of `acquire(name)` until `release(name)`.

    Args:
        paths: of the model's parts.
        infos: in the order of use. None may be larger than the ring.
        streaming: sizes of the ring and of reads; what reads are best depends on the disk.

    Raises:
        ValueError: the ring cannot hold the largest tensor.
    """

    def __init__(self, paths: Sequence[Path], infos: Sequence[TensorInfo], streaming: Streaming) -> None:
        ring_bytes = streaming.ring_bytes // BLOCK_BYTES * BLOCK_BYTES
        largest = max(infos, key=room_bytes)
        if room_bytes(largest) > ring_bytes:
            raise ValueError(
                f"a ring of {ring_bytes} bytes cannot hold {largest.name}: at least {room_bytes(largest)} are needed"
            )
        self._paths = list(paths)
        self._infos = list(infos)
        self._index_of = {info.name: index for index, info in enumerate(infos)}
        self._request_bytes = -(-streaming.request_bytes // BLOCK_BYTES) * BLOCK_BYTES
        self._files = {part: UncachedFile(self._paths[part]) for part in sorted({info.part for info in infos})}
        self._memory = _huge_pages(ring_bytes)
        self._view = memoryview(self._memory)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._ring = ByteRing(ring_bytes)
        self._buffer = ggml.lib.ggml_backend_cpu_buffer_from_ptr(self._base, ring_bytes)
        self._context = ggml.new_context(len(infos))
        self.tensors: dict[str, ggml.Tensor] = {}
        for info in infos:
            tensor = describe(self._context, info)
            tensor.contents.buffer = self._buffer
            tensor.contents.data = self._base
            self.tensors[info.name] = tensor
        # Two conditions, one lock: every thread that is woken for nothing takes its time from the computation.
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._freed = threading.Condition(self._lock)
        self._pieces: deque[_Piece] = deque()
        self._num_used = 0
        """Turns completed so far, which is also the number of the oldest piece."""
        self._num_placed = 0
        self._awaited: int | None = None
        """The number of the piece that the computation waits for."""
        self._failure: Exception | None = None
        self._is_seeking = False
        self._is_closed = False
        self.bytes_read = 0
        self.waited_ns = 0
        self._readers = [
            threading.Thread(target=self._read, name=f"weights-{index}", daemon=True)
            for index in range(streaming.requests_in_flight)
        ]
        for reader in self._readers:
            reader.start()

    @property
    def names(self) -> list[str]:
        """In the order of use."""
        return list(self.tensors)

    @property
    def ring_bytes(self) -> int:
        return self._ring.num_bytes

    @property
    def turn_bytes(self) -> int:
        """What is read for every turn: each tensor once."""
        return sum(map(room_bytes, self._infos))

    def num_bytes(self, name: str) -> int:
        """What the tensor takes in the ring."""
        return room_bytes(self._infos[self._index_of[name]])

    @property
    def read_mode(self) -> str:
        return ", ".join(sorted({file.mode for file in self._files.values()}))

    def seek(self, name: str) -> None:
        """Makes `name` the next in order, which costs what was read ahead; nothing where it is the next already."""
        index = self._index_of[name]
        with self._lock:
            if self._num_used % len(self._infos) == index:
                return
            self._is_seeking = True
            while not self._failure and any(piece.num_pending for piece in self._pieces):
                self._arrived.wait()
            self._pieces.clear()
            self._ring = ByteRing(self._ring.num_bytes)
            self._num_used = self._num_placed = index
            self._is_seeking = False
            self._freed.notify_all()

    def acquire(self, name: str) -> None:
        """Waits until the tensor's bytes are here, and points it at them.

        Raises:
            BadModelFile: the disk failed, or the file became shorter.
        """
        ahead = (self._index_of[name] - self._num_used) % len(self._infos)
        with self._lock:
            started_ns = time.perf_counter_ns()
            while not self._failure and not (ahead < len(self._pieces) and self._pieces[ahead].is_here):
                self._awaited = self._num_used + ahead
                self._arrived.wait()
            self._awaited = None
            self.waited_ns += time.perf_counter_ns() - started_ns
            if self._failure:
                raise self._failure
            self.tensors[name].contents.data = self._pieces[ahead].address

    def release(self, name: str) -> None:
        """The tensor has been used; tensors are released in their order."""
        with self._lock:
            assert self._index_of[name] == self._num_used % len(self._infos), f"{name} is not the oldest"
            self._pieces.popleft()
            self._ring.free()
            self._num_used += 1
            self._freed.notify()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._freed.notify_all()
        for reader in self._readers:
            reader.join()
        for file in self._files.values():
            file.close()
        ggml.lib.ggml_backend_buffer_free(self._buffer)
        ggml.lib.ggml_free(self._context)
        self.tensors.clear()
        self._view.release()

    # ---- readers

    def _read(self) -> None:
        while (request := self._next_request()) is not None:
            piece, offset, num_bytes = request
            try:
                self._fill(piece, offset, num_bytes)
            except OSError as error:
                self._fail(
                    BadModelFile(f"{self._paths[piece.part]}: reading at byte {offset} failed: {error.strerror or error}")
                )
                return
            with self._lock:
                piece.num_pending -= 1
                self.bytes_read += num_bytes
                if self._is_seeking or (piece.is_here and piece.number == self._awaited):
                    self._arrived.notify()

    def _next_request(self) -> tuple[_Piece, int, int] | None:
        """The next bytes to read, as soon as there is room for them; None at the end."""
        with self._lock:
            while not self._is_closed and self._failure is None:
                if self._is_seeking:
                    self._freed.wait()
                    continue
                piece = self._pieces[-1] if self._pieces else None
                if piece is None or piece.next_offset >= piece.stop_offset:
                    piece = self._place_next()
                if piece is not None:
                    offset = piece.next_offset
                    num_bytes = min(self._request_bytes, piece.stop_offset - offset)
                    piece.next_offset += num_bytes
                    piece.num_pending += 1
                    if piece.next_offset < piece.stop_offset or self._place_next() is not None:
                        self._freed.notify()  # there is work for another reader
                    return piece, offset, num_bytes
                self._freed.wait()
        return None

    def _place_next(self) -> _Piece | None:
        info = self._infos[self._num_placed % len(self._infos)]
        # A tensor that is still here from the turn before is not read a second time beside itself.
        begin = self._ring.take(room_bytes(info)) if len(self._pieces) < len(self._infos) else None
        if begin is None:
            return None
        piece = _Piece(info, begin, self._base, number=self._num_placed)
        self._pieces.append(piece)
        self._num_placed += 1
        return piece

    def _fill(self, piece: _Piece, offset: int, num_bytes: int) -> None:
        """Reads all of it, but for what is behind the file's end. Raises OSError."""
        target = self._view[piece.begin + offset : piece.begin + offset + num_bytes]
        done = 0
        while done < num_bytes:
            count = self._files[piece.part].read_into(target[done:], offset + done)
            if count == 0:
                if offset + done < min(piece.end_offset, offset + num_bytes):
                    raise OSError(f"the file ends at byte {offset + done}: it was changed while in use")
                break
            done += count

    def _fail(self, failure: Exception) -> None:
        with self._lock:
            self._failure = self._failure or failure
            self._arrived.notify_all()
            self._freed.notify_all()
