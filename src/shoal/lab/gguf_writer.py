"""Writes GGUF files piece by piece, so that a file of any size needs little memory.

Source: the GGUF specification, version 3: magic, counts, metadata, tensor descriptions, aligned data; little endian.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil

from shoal.errors import CannotWrite
from shoal.units import format_bytes

ALIGNMENT = 32

Chunk = npt.NDArray[Any]
_ELEMENT_TYPES = {
    np.dtype(np.uint8): 0, np.dtype(np.int8): 1, np.dtype(np.uint16): 2, np.dtype(np.int16): 3,
    np.dtype(np.uint32): 4, np.dtype(np.int32): 5, np.dtype(np.float32): 6, np.dtype(np.bool_): 7,
    np.dtype(np.uint64): 10, np.dtype(np.int64): 11, np.dtype(np.float64): 12,
}  # fmt: skip


class TensorData(NamedTuple):
    """A tensor to write: its shape in ggml's order (fastest first), and its bytes in pieces that add up to `num_bytes`."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    num_bytes: int
    chunks: Iterable[Chunk]


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[TensorData],
    *,
    durable: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes a model file; it appears at `path` only once it is complete. Returns its size in bytes.

    A thread writes one chunk while the next one is made, so a chunk must stay as it is until the next but one is asked for.

    Args:
        durable: return only once everything is on the disk.
        on_progress: takes the bytes written so far, and those of the whole file.

    Raises:
        CannotWrite: the disk has no room for it, or the folder takes no file.
    """
    path = Path(path)
    header = _header(metadata, tensors)
    size_bytes = len(header) + sum(_aligned(tensor.num_bytes) for tensor in tensors)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    _remove_abandoned(path)
    try:
        _check_room(path, size_bytes)
        with partial.open("wb") as output:
            written = _write(output, header, tensors, lambda done: on_progress and on_progress(done, size_bytes))
            assert written == size_bytes, f"{path}: {written} bytes instead of {size_bytes}"
            if durable:
                output.flush()
                os.fsync(output.fileno())
        partial.replace(path)
    except OSError as error:
        raise CannotWrite(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return size_bytes


def _remove_abandoned(path: Path) -> None:
    """Parts of this file by writers that were killed."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.partial-*"):
        pid = partial.name.rpartition("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            with contextlib.suppress(OSError):
                partial.unlink()


def _check_room(path: Path, size_bytes: int) -> None:
    free_bytes = shutil.disk_usage(path.parent).free
    if size_bytes > free_bytes:
        raise CannotWrite(
            f"{path} takes {format_bytes(size_bytes)}, and its disk has {format_bytes(free_bytes)} free: "
            f"free {format_bytes(size_bytes - free_bytes)} more, name another disk, or make the model smaller"
        )


def _header(metadata: Mapping[str, Any], tensors: Sequence[TensorData]) -> bytes:
    parts = [b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    parts += [_encode_text(key) + _encode_value(value) for key, value in metadata.items()]
    offset = 0
    for tensor in tensors:
        dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        parts.append(_encode_text(tensor.name) + dims + struct.pack("<IQ", tensor.ggml_type, offset))
        offset += _aligned(tensor.num_bytes)
    header = b"".join(parts)
    return header.ljust(_aligned(len(header)), b"\0")


def _write(output: BinaryIO, header: bytes, tensors: Sequence[TensorData], on_progress: Callable[[int], object]) -> int:
    position = output.write(header)
    with ThreadPoolExecutor(1, thread_name_prefix="gguf-writer") as writer:
        pending: Future[int] | None = None
        for tensor in tensors:
            end = position + tensor.num_bytes
            for data in _padded(tensor):
                if pending is not None:
                    pending.result()
                    on_progress(position)
                position += len(data)
                pending = writer.submit(output.write, data)
            assert position == _aligned(end), f"{tensor.name}: {position - end} bytes more than {tensor.num_bytes}"
        if pending is not None:
            pending.result()
    on_progress(position)
    return position


def _padded(tensor: TensorData) -> Iterator[memoryview]:
    """The bytes of a tensor and what aligns the next one."""
    for chunk in tensor.chunks:
        yield np.ascontiguousarray(chunk).data.cast("B")
    padding = _aligned(tensor.num_bytes) - tensor.num_bytes
    if padding:
        yield memoryview(bytes(padding))


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _encode_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encode_value(value: Any) -> bytes:
    """A value with its type: 4 uint32, 5 int32, 6 float32, 7 bool, 8 text, 9 array, 10 uint64."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int() if value < 0:
            return struct.pack("<Ii", 5, value)
        case int():
            return struct.pack("<II", 4, value) if value < 1 << 32 else struct.pack("<IQ", 10, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _encode_text(value)
        case np.ndarray():
            return struct.pack("<IIQ", 9, _ELEMENT_TYPES[value.dtype], len(value)) + value.tobytes()
        case list() if all(isinstance(item, str) for item in value):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_encode_text, value))
        case list():
            return _encode_value(np.array(value, np.float32 if isinstance(value[0], float) else np.int32))
    raise ValueError(f"GGUF has no value like {value!r}")
