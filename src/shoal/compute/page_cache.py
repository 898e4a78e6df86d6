"""Which parts of a mapped file stay in memory, where the system lets us say so.

A page fault brings its neighbourhood along (megabytes, where the disk's read-ahead is set so). Where only some of a file
fits, those neighbours push out what should stay, which then faults in turn: so what shall stay is brought in at once, and
the rest is told to come page by page. Linux does as told; elsewhere the system decides for itself.

Source: measured; see docs/log.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14; older ones refuse it, and pages come with their first use."""
_CHUNK_BYTES = 2 * 1024 * 1024
_ATTEMPTS = 3
"""What is brought in last may push out what came first, as long as something else is in the way."""

Extent = tuple[int, int]
"""[first byte, stop)."""


def keep_resident(path: Path, mapped: mmap.mmap, wanted: Iterable[Extent]) -> None:
    """Brings `wanted` of a mapped file into memory, and takes the rest of it out.

    Raises:
        OSError: the file cannot be opened again.
    """
    if sys.platform != "linux":
        return
    extents = _whole_pages(wanted, num_bytes=len(mapped))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _take_out_others(descriptor, mapped, extents)
        mapped.madvise(mmap.MADV_RANDOM)
        # As with the map: nothing beyond what is asked for.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for _ in range(_ATTEMPTS):
            missing = [extent for extent in _chunks(extents) if missing_bytes(mapped, [extent])]
            for first, stop in missing:
                os.pread(descriptor, stop - first, first)
                _populate(mapped, (first, stop))
            if not missing:
                break
        for extent in _chunks(extents):
            _populate(mapped, extent)  # what was in the cache already
    finally:
        os.close(descriptor)


def take_out_others(path: Path, mapped: mmap.mmap, wanted: Iterable[Extent]) -> None:
    """Takes what nobody has mapped of a file out of memory, but for `wanted`: pages that were used often before, such as
    layers of another plan, would push out those that are new.

    Raises:
        OSError: the file cannot be opened again.
    """
    if sys.platform != "linux":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _take_out_others(descriptor, mapped, _whole_pages(wanted, num_bytes=len(mapped)))
    finally:
        os.close(descriptor)


def _take_out_others(descriptor: int, mapped: mmap.mmap, extents: Sequence[Extent]) -> None:
    # Pages that are mapped cannot be dropped from the cache.
    mapped.madvise(mmap.MADV_DONTNEED)
    for first, stop in _between(extents, num_bytes=len(mapped)):
        os.posix_fadvise(descriptor, first, stop - first, os.POSIX_FADV_DONTNEED)


def missing_bytes(mapped: mmap.mmap, wanted: Iterable[Extent]) -> int:
    """How much of `wanted` is not in memory; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    address = np.frombuffer(mapped, np.uint8).ctypes.data
    mincore = ctypes.CDLL(None).mincore
    num_missing = 0
    for first, stop in _whole_pages(wanted, num_bytes=len(mapped)):
        pages = np.empty(-(-(stop - first) // mmap.PAGESIZE), np.uint8)
        if mincore(ctypes.c_void_p(address + first), ctypes.c_size_t(stop - first), pages.ctypes.data_as(ctypes.c_void_p)):
            return 0
        num_missing += int(np.count_nonzero(pages & 1 == 0))
    return num_missing * mmap.PAGESIZE


def will_need(mapped: mmap.mmap, wanted: Iterable[Extent]) -> None:
    """Asks for pages to be read soon, where the system takes such hints. May wait for the disk; other threads go on."""
    if not hasattr(mmap, "MADV_WILLNEED"):
        return
    address = np.frombuffer(mapped, np.uint8).ctypes.data
    madvise = ctypes.CDLL(None).madvise  # `mapped.madvise` would keep Python's lock meanwhile
    for first, stop in _whole_pages(wanted, num_bytes=len(mapped)):
        madvise(ctypes.c_void_p(address + first), ctypes.c_size_t(stop - first), ctypes.c_int(mmap.MADV_WILLNEED))


def _populate(mapped: mmap.mmap, extent: Extent) -> None:
    """Maps pages, which also tells the system that they are used."""
    first, stop = extent
    with contextlib.suppress(OSError):
        mapped.madvise(_POPULATE_READ, first, -(-(stop - first) // mmap.PAGESIZE) * mmap.PAGESIZE)


def _chunks(extents: Iterable[Extent]) -> list[Extent]:
    return [
        (begin, min(stop, begin + _CHUNK_BYTES)) for first, stop in extents for begin in range(first, stop, _CHUNK_BYTES)
    ]


def _whole_pages(extents: Iterable[Extent], *, num_bytes: int) -> list[Extent]:
    """In order, merged where they touch, and widened to pages."""
    merged: list[Extent] = []
    for first, stop in sorted(extents):
        begin = first // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(num_bytes, -(-stop // mmap.PAGESIZE) * mmap.PAGESIZE)
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _between(extents: Sequence[Extent], *, num_bytes: int) -> list[Extent]:
    """What of a file lies outside."""
    edges = [0, *(edge for extent in extents for edge in extent), num_bytes]
    return [(first, stop) for first, stop in zip(edges[::2], edges[1::2], strict=True) if first < stop]
