"""Reads GGUF model files: decides what is a sound file, and where its tensors lie.

The file is mapped, never read into memory: `view` and `address` point into the map, whose pages the system loads when
they are touched and drops when memory is short. Only the header is parsed. It comes from strangers, so each length in
it is compared with the bytes that remain before anything is taken or looped over for it, and what has no natural bound
has one here. Whatever is wrong ends in one line for the user.

A model in several files (`name-00001-of-00005.gguf`) opens as one by its first part.

Source: the GGUF specification of ggml (docs/gguf.md), versions 2 and 3, little endian. Stricter than it: no overlapping
tensors, no metadata key twice, arrays in arrays at most three deep.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self

import msgspec
import numpy as np

from shoal.compute.page_cache import Extent, keep_resident, missing_bytes, take_out_others, will_need
from shoal.errors import BadModelFile, ModelNotFound, UnsupportedModel

HEADER_BYTES_MAX = 256 << 20
"""The largest seen is some 20 MB, nearly all of it vocabulary."""

NUM_KEYS_MAX = 1 << 16
NUM_TENSORS_MAX = 1 << 17
NUM_TEXTS_MAX = 1 << 22
"""Texts and arrays within arrays, over the whole header; vocabularies have a quarter of a million, and twice the merges."""

KEY_BYTES_MAX = (1 << 16) - 1
NAME_BYTES_MAX = 63
"""ggml keeps a tensor's name in 64 bytes."""

NUM_DIMENSIONS_MAX = 4
NUM_ELEMENTS_MAX = (1 << 63) - 1
ARRAY_DEPTH_MAX = 3
ALIGNMENT_DEFAULT = 32
ALIGNMENT_MAX = 1 << 16

_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_NUMBER_TYPES = {type_id: np.dtype(code) for type_id, code in _NUMBERS.items()}
_TEXT, _ARRAY = 8, 9
_PART_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class TensorInfo(msgspec.Struct, frozen=True):
    """One tensor of a model file.

    `shape` is in ggml's order, fastest first; `type` is ggml's number and `type_name` its name, like "Q4_K"; `offset`
    is in bytes from the start of its file, which is part `part` of the model, from 0.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    type_name: str
    offset: int
    num_bytes: int
    part: int = 0


@functools.cache
def type_layout(type_id: int) -> tuple[str, int, int] | None:
    """Name, elements per block and bytes per block of a ggml type; None if ggml does not know it, or no longer does."""
    from shoal.compute import ggml  # the library is loaded when the first file is opened

    if not 0 <= type_id < ggml.lib.GGML_TYPE_COUNT:
        return None
    block_elements, block_bytes = ggml.lib.ggml_blck_size(type_id), ggml.lib.ggml_type_size(type_id)
    if block_elements < 1 or block_bytes < 1:
        return None
    return ggml.type_name(type_id), int(block_elements), int(block_bytes)


class GGUFFile:
    """An open model file; use it as a context manager or call `close`.

    Attributes:
        path: the file, or the first of its parts.
        size_bytes: of all parts.
        version: 2 or 3.
        metadata: values as Python's own; arrays of numbers as read-only numpy arrays, arrays of texts as lists. What is
            not UTF-8 is replaced.
        tensors: by name, in the order of the file.
        data_offset: where the data of the (first) file begins, in bytes.
        num_parts: files the model consists of.
    """

    def __init__(self, parts: list[_Part]) -> None:
        """Users call `open`."""
        self._parts = parts
        first = parts[0]
        self.path = first.path
        self.size_bytes = sum(part.size_bytes for part in parts)
        self.version = first.header.version
        self.metadata: Mapping[str, Any] = MappingProxyType(first.header.metadata)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(_merge_tensors(parts))
        self.data_offset = first.header.data_offset
        self.num_parts = len(parts)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Maps a model file and parses its header.

        Raises:
            ModelNotFound: there is no such file.
            BadModelFile: it is not GGUF, truncated or corrupt, or one of its parts is missing.
            UnsupportedModel: it is of a newer version or has a tensor of a type that ggml does not know.
        """
        with contextlib.ExitStack() as opened:
            parts = [_Part(Path(path), index=0)]
            opened.callback(parts[0].close)
            for part_path in _other_parts(parts[0]):
                part = _Part(part_path, index=len(parts))
                opened.callback(part.close)
                _check_part(part, parts[0])
                parts.append(part)
            file = cls(parts)
            opened.pop_all()
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the file; addresses are dangling then. A view that is still held keeps its map until it goes."""
        for part in self._parts:
            part.close()

    def view(self, info: TensorInfo) -> memoryview:
        """The tensor's bytes, read-only and not copied; raises ValueError once the file is closed."""
        return memoryview(self._parts[info.part].open_map)[info.offset : info.offset + info.num_bytes]

    def address(self, info: TensorInfo) -> int:
        """Where the tensor's bytes are in this process's memory; valid until `close`, never to be written."""
        part = self._parts[info.part]
        assert not part.open_map.closed
        return part.address + info.offset

    @property
    def part_paths(self) -> list[Path]:
        """The files the model consists of, in order."""
        return [part.path for part in self._parts]

    def keep_resident(self, infos: Iterable[TensorInfo]) -> None:
        """Brings these tensors into memory and takes everything else out, where the system lets us say so.

        Raises:
            BadModelFile: a file is gone.
        """
        self._with_parts(keep_resident, infos)

    def take_out_others(self, infos: Iterable[TensorInfo]) -> None:
        """Takes everything else that nobody uses out of memory, where the system lets us say so.

        Raises:
            BadModelFile: a file is gone.
        """
        self._with_parts(take_out_others, infos)

    def _with_parts(self, act: Callable[[Path, mmap.mmap, list[Extent]], None], infos: Iterable[TensorInfo]) -> None:
        for part, extents in zip(self._parts, self._extents(infos), strict=True):
            try:
                act(part.path, part.open_map, extents)
            except OSError as error:
                raise BadModelFile(f"{part.path} cannot be read: {error.strerror or error}") from error

    def will_need(self, infos: Iterable[TensorInfo]) -> None:
        """Asks for these tensors to be read soon. May wait for the disk."""
        for part, extents in zip(self._parts, self._extents(infos), strict=True):
            will_need(part.open_map, extents)

    def missing_bytes(self, infos: Iterable[TensorInfo]) -> int:
        """How much of these tensors is not in memory; 0 where the system does not say."""
        return sum(
            missing_bytes(part.open_map, extents) for part, extents in zip(self._parts, self._extents(infos), strict=True)
        )

    def _extents(self, infos: Iterable[TensorInfo]) -> list[list[Extent]]:
        """By part."""
        found: list[list[Extent]] = [[] for _ in self._parts]
        for info in infos:
            found[info.part].append((info.offset, info.offset + info.num_bytes))
        return found

    def release(self, info: TensorInfo) -> None:
        """Tells the system that the tensor's pages will not be needed soon; they stay readable."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return  # Windows: its cache manager finds out by itself
        begin = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (info.offset + info.num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            self._parts[info.part].open_map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class _Header(NamedTuple):
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data_offset: int


class _Part:
    """One mapped file."""

    def __init__(self, path: Path, *, index: int) -> None:
        self.path = path
        self._map, self.size_bytes = _map_file(path)
        try:
            self.address = np.frombuffer(self._map, np.uint8).ctypes.data
            self.header = _parse_header(_Cursor(self._map, path.name), index=index)
        except BaseException:
            self._map.close()
            raise

    @property
    def open_map(self) -> mmap.mmap:
        if self._map.closed:
            raise ValueError(f"{self.path.name} is closed")
        return self._map

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # a view is still held, and the map ends with it
            self._map.close()


def _map_file(path: Path) -> tuple[mmap.mmap, int]:
    try:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if not size_bytes:
                raise BadModelFile(f"{path.name} is empty: download it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), size_bytes
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ModelNotFound(f"there is no model file {path}: give the path of a .gguf file") from error
    except OSError as error:
        raise BadModelFile(f"{path} cannot be read: {error.strerror or error}") from error


# Several files


def _other_parts(first: _Part) -> list[Path]:
    """The paths of the parts after the first, as its name and its metadata have it."""
    count = first.header.metadata.get("split.count", 1)
    index = first.header.metadata.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(index, int) or count <= 1:
        return []
    name = first.path.name
    match = _PART_NAME.search(name)
    if match is None or int(match[2]) != count:
        raise BadModelFile(
            f"{name} is part {index + 1} of a model in {count} files, which must be named like "
            f"model-00001-of-{count:05}.gguf: rename them as they were when downloaded"
        )
    stem = name[: match.start()]
    if index or int(match[1]) != 1:
        raise BadModelFile(f"{name} is not the first of {count} parts: open {stem}-00001-of-{count:05}.gguf")
    paths = [first.path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(2, count + 1)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise BadModelFile(
            f"{name} is the first of {count} parts, and {len(missing)} of them are missing, such as {missing[0]}: "
            "download them into the same folder"
        )
    return paths


def _check_part(part: _Part, first: _Part) -> None:
    met = (part.header.metadata.get("split.no"), part.header.metadata.get("split.count"))
    number = int(part.path.name[-len("00001-of-00001.gguf") :][:5])
    if met != (number - 1, first.header.metadata["split.count"]):
        raise BadModelFile(f"{part.path.name} does not belong to {first.path.name}: download the parts again")


def _merge_tensors(parts: list[_Part]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        for name, info in part.header.tensors.items():
            if name in tensors:
                raise BadModelFile(f"{part.path.name} has tensor {name}, as an earlier part has: download the parts again")
            tensors[name] = info
    return tensors


# The header


class _Cursor:
    """A place in the header that never moves past its end: each read first checks what remains."""

    def __init__(self, data: mmap.mmap, file_name: str) -> None:
        self.data = data
        self.file_name = file_name
        self.position = 0
        self.file_bytes = len(data)
        self._end = min(self.file_bytes, HEADER_BYTES_MAX)
        self._num_texts_left = NUM_TEXTS_MAX

    def bad(self, text: str) -> BadModelFile:
        return BadModelFile(f"{self.file_name} {text}")

    def require(self, num_bytes: int, what: str) -> None:
        """Raises BadModelFile unless as many bytes follow."""
        if num_bytes <= self._end - self.position:
            return
        if self._end < self.file_bytes:
            raise self.bad(
                f"is corrupt: {what} at byte {self.position} needs {num_bytes} bytes, but a header has at most "
                f"{HEADER_BYTES_MAX}: download it again"
            )
        raise self.bad(
            f"is truncated or corrupt: {what} at byte {self.position} needs {num_bytes} bytes and "
            f"{self._end - self.position} remain: download it again"
        )

    def require_count(self, count: int, maximum: int, bytes_each: int, what: str) -> None:
        """Raises BadModelFile unless `count` things of at least `bytes_each` may follow."""
        if count > maximum:
            raise self.bad(f"is corrupt: it claims {count} {what}, at most {maximum} are allowed: download it again")
        self.require(count * bytes_each, f"a list of {count} {what}")

    def numbers(self, layout: str, what: str) -> tuple[Any, ...]:
        num_bytes = struct.calcsize(layout)
        self.require(num_bytes, what)
        values = struct.unpack_from(layout, self.data, self.position)
        self.position += num_bytes
        return values

    def uint32(self, what: str) -> int:
        return int(self.numbers("<I", what)[0])

    def uint64(self, what: str) -> int:
        return int(self.numbers("<Q", what)[0])

    def text(self, what: str, *, bytes_max: int = HEADER_BYTES_MAX) -> str:
        length = self.uint64(f"the length of {what}")
        if length > bytes_max:
            raise self.bad(f"is corrupt: {what} has {length} bytes, at most {bytes_max} are allowed: download it again")
        self.require(length, what)
        begin, self.position = self.position, self.position + length
        return str(self.data[begin : self.position], "utf-8", "replace")

    def value(self, type_id: int, what: str) -> Any:
        if type_id == _TEXT:
            return self.text(what)
        if type_id == _ARRAY:
            return self._array(what, depth=1)
        return self._number_array(type_id, 1, what)[0].item()

    def _array(self, what: str, *, depth: int) -> Any:
        if depth > ARRAY_DEPTH_MAX:
            raise self.bad(f"is corrupt: {what} is an array more than {ARRAY_DEPTH_MAX} deep: download it again")
        type_id, count = self.numbers("<IQ", f"the array {what}")
        if type_id not in (_TEXT, _ARRAY):
            return self._number_array(type_id, count, what)
        self.require_count(count, self._num_texts_left, 8 if type_id == _TEXT else 12, f"entries of {what}")
        self._num_texts_left -= count
        if type_id == _TEXT:
            return self._texts(count, what)
        return [self._array(what, depth=depth + 1) for _ in range(count)]

    def _number_array(self, type_id: int, count: int, what: str) -> Any:
        number_type = _NUMBER_TYPES.get(type_id)
        if number_type is None:
            raise self.bad(f"is corrupt: {what} has the unknown value type {type_id}: download it again")
        self.require(count * number_type.itemsize, what)
        begin, self.position = self.position, self.position + count * number_type.itemsize
        data = self.data[begin : self.position]  # a copy: a view would keep the map from closing
        if type_id == 7:
            return np.frombuffer(data, np.uint8) != 0
        return np.frombuffer(data, number_type)

    def _texts(self, count: int, what: str) -> list[str]:
        """The loop that takes the time of opening a file: 100 000 texts, so it does without `text`."""
        data, position, end = self.data, self.position, self._end
        texts = []
        for _ in range(count):
            begin = position + 8
            next_position = begin + int.from_bytes(data[position:begin], "little")
            if next_position > end:
                self.position = position
                self.require(next_position - position, f"a text of {what}")
            texts.append(str(data[begin:next_position], "utf-8", "replace"))
            position = next_position
        self.position = position
        return texts


def _parse_header(cursor: _Cursor, *, index: int) -> _Header:
    version = _parse_version(cursor)
    num_tensors = cursor.uint64("the number of tensors")
    num_keys = cursor.uint64("the number of metadata keys")
    cursor.require_count(num_keys, NUM_KEYS_MAX, 13, "metadata keys")
    metadata = _parse_metadata(cursor, num_keys)
    alignment = _parse_alignment(cursor, metadata)
    cursor.require_count(num_tensors, NUM_TENSORS_MAX, 32, "tensors")
    described = [_parse_tensor(cursor, index=index) for _ in range(num_tensors)]
    data_offset = -(-cursor.position // alignment) * alignment
    place = functools.partial(_place_tensor, cursor, data_offset=data_offset, alignment=alignment)
    return _Header(version, metadata, _collect_tensors(cursor, described, place), data_offset)


def _parse_version(cursor: _Cursor) -> int:
    start = cursor.data[: min(cursor.file_bytes, 32)]
    if start.startswith(b"version https://git-lfs"):
        raise cursor.bad("is only the pointer that Git LFS leaves in place of the model: run 'git lfs pull'")
    if start[:4] in (b"ggml", b"lmgg", b"fmgg", b"tjgg", b"algg"):
        raise cursor.bad("is of a format older than GGUF: download the model as .gguf")
    if not start.startswith(b"GGUF"[: len(start)]):
        raise cursor.bad(f"is not a GGUF file: it begins with {start[:4]!r}, not with b'GGUF': give a .gguf file")
    cursor.position = 4
    version = cursor.uint32("the version")
    if version and not version & 0xFFFF:
        raise cursor.bad("is big endian, and only little endian is read: download the ordinary .gguf of the model")
    if version < 2:
        raise cursor.bad(f"is GGUF version {version}, and 2 and 3 are read: download a newer .gguf of the model")
    if version > 3:
        raise UnsupportedModel(f"{cursor.file_name} is GGUF version {version}, and 2 and 3 are read: update shoal")
    return version


def _parse_metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text("a metadata key", bytes_max=KEY_BYTES_MAX)
        if key in metadata:
            raise cursor.bad(f"is corrupt: it has the metadata key {_shown(key)} twice: download it again")
        metadata[key] = cursor.value(cursor.uint32("the type of a value"), _shown(key))
    return metadata


def _shown(text: str) -> str:
    """A name out of a file as it may stand in one line of an error."""
    return ascii(text[:80])[1:-1]


def _parse_alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT_DEFAULT)
    if not isinstance(alignment, int) or not 8 <= alignment <= ALIGNMENT_MAX or alignment & (alignment - 1):
        raise cursor.bad(
            f"is corrupt: it aligns tensors to {str(alignment)[:40]!r} bytes, a power of two from 8 to {ALIGNMENT_MAX} is "
            "allowed: download it again"
        )
    return alignment


def _parse_tensor(cursor: _Cursor, *, index: int) -> TensorInfo:
    """One entry as it stands; its offset is still from the start of the data."""
    name = cursor.text("a tensor name", bytes_max=NAME_BYTES_MAX)
    num_dimensions = cursor.uint32("the number of dimensions")
    if not 1 <= num_dimensions <= NUM_DIMENSIONS_MAX:
        raise cursor.bad(
            f"is corrupt: tensor {_shown(name)} has {num_dimensions} dimensions, 1 to {NUM_DIMENSIONS_MAX} are allowed: "
            "download it again"
        )
    shape = cursor.numbers(f"<{num_dimensions}Q", "the shape of a tensor")
    type_id, offset = cursor.numbers("<IQ", "the type and place of a tensor")
    num_elements = math.prod(shape)
    if not 0 < num_elements <= NUM_ELEMENTS_MAX:
        raise cursor.bad(f"is corrupt: tensor {_shown(name)} cannot have the shape {shape}: download it again")
    layout = type_layout(type_id)
    if layout is None:
        raise UnsupportedModel(
            f"tensor {_shown(name)} of {cursor.file_name} has type {type_id}, which ggml does not know or no longer does: "
            "use another quantisation of the model"
        )
    type_name, block_elements, block_bytes = layout
    if shape[0] % block_elements:
        raise cursor.bad(
            f"is corrupt: rows of tensor {_shown(name)} have {shape[0]} elements, blocks of {type_name} have "
            f"{block_elements}: download it again"
        )
    return TensorInfo(name, shape, type_id, type_name, offset, num_elements // block_elements * block_bytes, index)


def _place_tensor(cursor: _Cursor, info: TensorInfo, *, data_offset: int, alignment: int) -> TensorInfo:
    """The same with its offset from the start of the file."""
    if info.offset % alignment:
        raise cursor.bad(
            f"is corrupt: tensor {_shown(info.name)} begins at {info.offset}, not at a multiple of {alignment}: "
            "download it again"
        )
    end = data_offset + info.offset + info.num_bytes
    if end > cursor.file_bytes:
        raise cursor.bad(
            f"is truncated: tensor {_shown(info.name)} ends at byte {end} but the file has {cursor.file_bytes}: "
            "download it again"
        )
    return msgspec.structs.replace(info, offset=data_offset + info.offset)


def _collect_tensors(
    cursor: _Cursor, described: list[TensorInfo], place: Callable[[TensorInfo], TensorInfo]
) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for info in map(place, described):
        if info.name in tensors:
            raise cursor.bad(f"is corrupt: it has the tensor {_shown(info.name)} twice: download it again")
        tensors[info.name] = info
    ordered = sorted(tensors.values(), key=lambda info: info.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.num_bytes > after.offset:
            raise cursor.bad(
                f"is corrupt: tensors {_shown(before.name)} and {_shown(after.name)} overlap: download it again"
            )
    return tensors
