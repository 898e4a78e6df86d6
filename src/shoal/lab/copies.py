"""A device's own copy of a file: own inode, so that its page cache is its own, and cold.

Processes that map one file share its pages, and whoever touched a page first pays for it: with copies, each device pays
for what it reads. A copy of some layers of a model is sparse: as long as the original, with only the header, the tensors
of no layer (embedding, output) and those layers on disk; the rest reads as zeros.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

from shoal.errors import LabError
from shoal.ids import LayerRange

_CHUNK_BYTES = 8 << 20
_LAYER_NAME = re.compile(r"blk\.(\d+)\.")
Extent = tuple[int, int]
"""[first byte, stop)."""


def copy_file(source: Path, target: Path, *, layers: LayerRange | None = None) -> int:
    """Copies a file, or what `layers` need of a model file, and leaves none of it in the page cache.

    Returns:
        Bytes that were copied.

    Raises:
        LabError: the file is not there, or the disk is full.
        BadModelFile: `layers` of what is no model file.
    """
    try:
        size = source.stat().st_size
        extents = [(0, size)] if layers is None else model_extents(source, layers)
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as reading, target.open("xb") as writing:
            os.truncate(writing.fileno(), size)
            for first, stop in extents:
                _copy_extent(reading.fileno(), writing.fileno(), first, stop)
            os.fsync(writing.fileno())
            for descriptor in (reading.fileno(), writing.fileno()):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.utime(target, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))
    except OSError as error:
        raise LabError(f"cannot copy {source} to {target.parent}: {error.strerror}") from error
    return sum(stop - first for first, stop in extents)


def make_cold(folder: Path) -> None:
    """Drops the page cache of every file below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def model_extents(source: Path, layers: LayerRange) -> list[Extent]:
    """The bytes of a GGUF file that a device with these layers may read, in order and merged.

    Raises:
        LabError: it has several parts, or fewer layers.
    """
    from shoal.compute.gguf import GGUFFile  # brings ggml along, which a plain copy does not need

    with GGUFFile.open(source) as file:
        if file.num_parts > 1:
            raise LabError(f"{source.name} has {file.num_parts} parts: layers can be picked from a model of one file only")
        wanted: list[Extent] = [(0, file.data_offset)]
        num_layers = 0
        for info in file.tensors.values():
            match = _LAYER_NAME.match(info.name)
            layer = int(match[1]) if match else None
            num_layers = max(num_layers, layer + 1 if layer is not None else 0)
            if layer is None or layers.first <= layer < layers.stop:
                wanted.append((info.offset, info.offset + info.num_bytes))
    if layers.stop > num_layers:
        raise LabError(f"{source.name} has {num_layers} layers, so it has no layers {layers}")
    return _merged(wanted)


def _merged(extents: Iterable[Extent]) -> list[Extent]:
    merged: list[Extent] = []
    for first, stop in sorted(extents):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((first, stop))
    return merged


def _copy_extent(source: int, target: int, first: int, stop: int) -> None:
    position = first
    in_kernel = hasattr(os, "copy_file_range")
    while position < stop:
        count = min(_CHUNK_BYTES, stop - position)
        if in_kernel:
            try:
                copied = os.copy_file_range(source, target, count, position, position)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                in_kernel = False
                continue
        else:
            copied = os.pwrite(target, os.pread(source, count, position), position)
        if copied == 0:
            raise OSError(errno.EIO, "it became shorter while it was copied")
        position += copied
