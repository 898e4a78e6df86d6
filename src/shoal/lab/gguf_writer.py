"""Writes GGUF files piece by piece, so that a file of any size needs little memory.

Source: the GGUF specification, version 3: magic, counts, metadata, tensor descriptions, aligned data; little endian.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

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


def write_gguf(path: str | Path, metadata: Mapping[str, Any], tensors: Sequence[TensorData]) -> int:
    """Writes a model file; it appears at `path` only once it is complete. Returns its size in bytes."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as output:
            _write(output, metadata, tensors)
            size_bytes = output.tell()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return size_bytes


def _write(output: BinaryIO, metadata: Mapping[str, Any], tensors: Sequence[TensorData]) -> None:
    output.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        output.write(_encode_text(key) + _encode_value(value))
    offset = 0
    for tensor in tensors:
        dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        output.write(_encode_text(tensor.name) + dims + struct.pack("<IQ", tensor.ggml_type, offset))
        offset += _aligned(tensor.num_bytes)
    output.write(bytes(_aligned(output.tell()) - output.tell()))
    for tensor in tensors:
        start = output.tell()
        for chunk in tensor.chunks:
            output.write(np.ascontiguousarray(chunk).data)
        written = output.tell() - start
        assert written == tensor.num_bytes, f"{tensor.name}: {written} bytes instead of {tensor.num_bytes}"
        output.write(bytes(_aligned(output.tell()) - output.tell()))


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
