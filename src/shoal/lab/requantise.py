"""Writes a model anew with its matrices in another type: the same network at another size and precision.

Down to fewer bits it makes a small model smaller; up to F16 or F32 it makes one that computes without rounding activations,
or one that is larger than some memory, for trying what that does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.compute import ggml
from shoal.compute.gguf import GGUFFile, TensorInfo
from shoal.errors import UnsupportedModel
from shoal.lab.gguf_writer import TensorData, write_gguf
from shoal.lab.quantisation import WEIGHT_TYPES, quantise

_CHUNK_ELEMENTS = 1 << 22


def requantise(source: Path, target: Path, type_name: str, *, on_progress: Callable[[int, int], None] | None = None) -> int:
    """Writes `source` to `target` with every matrix in `type_name`; vectors stay as they are. Returns its bytes.

    Args:
        on_progress: takes the bytes written so far, and those of the whole file.

    Raises:
        ValueError: no such type.
        BadModelFile, UnsupportedModel: of the source, or rows that the type's blocks do not divide.
        CannotWrite: the disk has no room for it, or the folder takes no file.
    """
    if type_name not in WEIGHT_TYPES:
        raise ValueError(f"no weights have the type '{type_name}': {', '.join(WEIGHT_TYPES)} exist")
    with GGUFFile.open(source) as file:
        metadata = {key: value for key, value in file.metadata.items() if not key.startswith("split.")}
        metadata["general.file_type"] = WEIGHT_TYPES[type_name].file_type
        tensors = [_converted(file, info, type_name) for info in file.tensors.values()]
        return write_gguf(target, metadata, tensors, durable=True, on_progress=on_progress)


def _converted(file: GGUFFile, info: TensorInfo, type_name: str) -> TensorData:
    if len(info.shape) == 1 or info.type_name == type_name:
        same = [np.frombuffer(file.view(info), np.uint8)]
        return TensorData(info.name, info.shape, info.type, info.num_bytes, same)
    kind = WEIGHT_TYPES[type_name]
    if info.shape[0] % ggml.lib.ggml_blck_size(kind.ggml_type):
        raise UnsupportedModel(f"rows of {info.name} have {info.shape[0]} elements, which {type_name} cannot hold")
    num_rows = int(np.prod(info.shape[1:]))
    num_bytes = ggml.lib.ggml_row_size(kind.ggml_type, info.shape[0]) * num_rows
    return TensorData(info.name, info.shape, kind.ggml_type, num_bytes, _rows(file, info, num_rows, type_name))


def _rows(file: GGUFFile, info: TensorInfo, num_rows: int, type_name: str) -> Iterator[npt.NDArray[Any]]:
    row_length, row_bytes = info.shape[0], info.num_bytes // num_rows
    step = max(1, _CHUNK_ELEMENTS // row_length)
    to_float = ggml.lib.ggml_get_type_traits(info.type).contents.to_float
    for first in range(0, num_rows, step):
        count = min(step, num_rows - first)
        address = file.address(info) + first * row_bytes
        values = np.empty((count, row_length), np.float32)
        if info.type == ggml.lib.GGML_TYPE_F32:
            ctypes.memmove(values.ctypes.data, address, values.nbytes)
        else:
            to_float(address, values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)
        yield quantise(values, type_name)
