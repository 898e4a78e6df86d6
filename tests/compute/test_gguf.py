"""The reader of model files: what it reads, what it refuses and in which words, and that no bytes can hurt it."""

from __future__ import annotations

import ctypes
import random
import struct
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest

from shoal.compute.gguf import HEADER_BYTES_MAX, GGUFFile, type_layout
from shoal.errors import BadModelFile, ModelNotFound, UnsupportedModel
from shoal.lab.random_model import write_random_model
from shoal.lab.shapes import SHAPES

U8, U32, BOOL, TEXT, ARRAY, U64 = 0, 4, 7, 8, 9, 10
F32, Q4_K = 0, 12
PEAK_BYTES_MAX = 256 << 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, value_type: int, data: bytes) -> bytes:
    return text(name) + struct.pack("<I", value_type) + data


def array(element_type: int, count: int, data: bytes) -> bytes:
    return struct.pack("<IQ", element_type, count) + data


def tensor(name: str, shape: Sequence[int], type_id: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", type_id, offset)


KEYS = [
    key("general.architecture", TEXT, text("llama")),
    key("a.flag", BOOL, b"\x01"),
    key("a.number", U32, struct.pack("<I", 7)),
    key("a.real", 6, struct.pack("<f", 0.5)),
    key("a.big", U64, struct.pack("<Q", 1 << 60)),
    key("a.words", ARRAY, array(TEXT, 3, text("one") + text("two") + text(b"\xff\xfe"))),
    key("a.numbers", ARRAY, array(5, 3, struct.pack("<3i", 1, -2, 3))),
    key("a.nested", ARRAY, array(ARRAY, 2, array(U8, 2, b"\x01\x02") + array(TEXT, 1, text("x")))),
]
TENSORS = [tensor("first", (4, 2), F32, 0), tensor("second", (256, 1), Q4_K, 32), tensor("third", (3,), F32, 192)]
DATA = bytes(range(204))


def model(
    keys: Sequence[bytes] = KEYS,
    tensors: Sequence[bytes] = TENSORS,
    data: bytes = DATA,
    *,
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
) -> bytes:
    counts = (len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys)
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def refusal(path: Path, data: bytes, kind: type[Exception] = BadModelFile) -> str:
    """The one line with which the file is refused."""
    path.write_bytes(data)
    with pytest.raises(kind) as caught:
        GGUFFile.open(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


# What it reads


@pytest.mark.parametrize("version", [2, 3])
def test_it_reads_keys_and_tensors(path: Path, version: int) -> None:
    path.write_bytes(model(version=version))
    with GGUFFile.open(path) as file:
        assert (file.version, file.size_bytes, file.num_parts) == (version, path.stat().st_size, 1)
        metadata = dict(file.metadata)
        assert metadata.pop("a.numbers").tolist() == [1, -2, 3]
        numbers, words = metadata.pop("a.nested")
        assert (numbers.tolist(), words) == ([1, 2], ["x"])
        assert metadata == {
            "general.architecture": "llama",
            "a.flag": True,
            "a.number": 7,
            "a.real": 0.5,
            "a.big": 1 << 60,
            "a.words": ["one", "two", "\ufffd\ufffd"],
        }
        assert type(metadata["a.flag"]) is bool
        assert type(metadata["a.number"]) is int
        assert list(file.tensors) == ["first", "second", "third"]
        second = file.tensors["second"]
        assert (second.shape, second.type, second.type_name, second.num_bytes) == ((256, 1), Q4_K, "Q4_K", 144)
        assert second.offset == file.data_offset + 32
        for info in file.tensors.values():
            expected = DATA[info.offset - file.data_offset :][: info.num_bytes]
            assert file.view(info).tobytes() == expected
            assert ctypes.string_at(file.address(info), info.num_bytes) == expected


def test_it_agrees_with_an_independent_reader(path: Path) -> None:
    write_random_model(path, SHAPES["tiny"], quantisation="Q4_K_M")
    reader = gguf.GGUFReader(path)
    with GGUFFile.open(path) as file:
        assert set(file.tensors) == {tensor.name for tensor in reader.tensors}
        for met in reader.tensors:
            info = file.tensors[met.name]
            assert (info.offset, info.num_bytes, info.type_name) == (met.data_offset, met.n_bytes, met.tensor_type.name)
            assert info.shape == tuple(met.shape.tolist())
        for name, field in reader.fields.items():
            if not name.startswith("GGUF."):
                np.testing.assert_array_equal(file.metadata[name], field.contents())


def test_a_view_outlives_close_and_a_closed_file_gives_none(path: Path) -> None:
    path.write_bytes(model())
    file = GGUFFile.open(path)
    info = file.tensors["first"]
    view = file.view(info)
    assert view.readonly
    file.release(info)
    file.close()
    file.close()
    assert view.tobytes() == DATA[:32]
    view.release()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.view(info)
    with pytest.raises(ValueError, match="closed"):
        file.address(info)


def test_released_pages_are_read_again(path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint8).tobytes()
    path.write_bytes(model(tensors=[tensor("wide", (1 << 14,), F32, 0)], data=data))
    with GGUFFile.open(path) as file:
        file.release(file.tensors["wide"])
        assert file.view(file.tensors["wide"]) == data


def test_a_vocabulary_alone_is_a_sound_file(path: Path) -> None:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(KEYS)) + b"".join(KEYS))
    with GGUFFile.open(path) as file:
        assert not file.tensors


def test_type_layouts() -> None:
    assert type_layout(F32) == ("F32", 1, 4)
    assert type_layout(Q4_K) == ("Q4_K", 256, 144)
    assert type_layout(4) is None  # Q4_2, removed
    assert type_layout(31) is None  # Q4_0_4_4, removed
    assert type_layout(1000) is None
    assert type_layout(-1) is None
    for known, sizes in gguf.GGML_QUANT_SIZES.items():
        if known.name != "Q8_1":  # never in files, and the package has its old layout
            assert type_layout(known) in (None, (known.name, *sizes))


# What it refuses, and in which words


def test_what_is_no_model(path: Path, tmp_path: Path) -> None:
    assert "is empty" in refusal(path, b"")
    assert "begins with b'PK" in refusal(path, b"PK\x03\x04" + bytes(100))
    assert "git lfs pull" in refusal(path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "older than GGUF" in refusal(path, b"tjgg" + bytes(100))
    assert "big endian" in refusal(path, b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    assert "version 1, and 2 and 3 are read" in refusal(path, model(version=1))
    assert "update shoal" in refusal(path, model(version=4), UnsupportedModel)
    for missing in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelNotFound, match="there is no model file"):
            GGUFFile.open(missing)


def test_a_truncated_tensor_is_named(path: Path) -> None:
    whole = model()
    message = refusal(path, whole[:-1])
    assert message == (
        f"model.gguf is truncated: tensor third ends at byte {len(whole)} but the file has {len(whole) - 1}: "
        "download it again"
    )


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([tensor("a", (4,), F32, 0), tensor("a", (4,), F32, 32)], "the tensor a twice"),
        ([tensor("a", (16,), F32, 0), tensor("b", (4,), F32, 32)], "tensors a and b overlap"),
        ([tensor("b", (4,), F32, 32), tensor("a", (16,), F32, 0)], "tensors a and b overlap"),
        ([tensor("a", (4,), F32, 8)], "begins at 8, not at a multiple of 32"),
        ([tensor("a", (0, 4), F32, 0)], "cannot have the shape (0, 4)"),
        ([tensor("a", ((1 << 64) - 1,), F32, 0)], "cannot have the shape"),
        ([tensor("a", (1 << 40, 1 << 40), F32, 0)], "cannot have the shape"),
        ([tensor("a", (1 << 62,), F32, 0)], "is truncated: tensor a ends at"),
        ([tensor("a", (1, 1, 1, 1, 1), F32, 0)], "has 5 dimensions"),
        ([tensor("a", (), F32, 0)], "has 0 dimensions"),
        ([tensor("a", (100,), Q4_K, 0)], "rows of tensor a have 100 elements, blocks of Q4_K have 256"),
        ([tensor("a" * 64, (4,), F32, 0)], "a tensor name has 64 bytes"),
        ([tensor("a", (4,), F32, 1 << 63)], "is truncated"),
        ([tensor("a\n\x1b[31m", (4,), F32, 8)], r"tensor a\n\x1b[31m begins"),
    ],
)
def test_bad_tensors_are_refused(path: Path, tensors: list[bytes], expected: str) -> None:
    assert expected in refusal(path, model(tensors=tensors))


@pytest.mark.parametrize("type_id", [4, 5, 31, 36, 42, 255, 0xFFFFFFFF])
def test_unknown_types_are_named(path: Path, type_id: int) -> None:
    message = refusal(path, model(tensors=[tensor("blk.0.x", (256,), type_id, 0)]), UnsupportedModel)
    assert f"tensor blk.0.x of model.gguf has type {type_id}" in message


DEEP = array(ARRAY, 1, array(ARRAY, 1, array(ARRAY, 1, array(U8, 1, b"\x01"))))


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (KEYS[0], "the metadata key general.architecture twice"),
        (key("k", 13, bytes(8)), "unknown value type 13"),
        (key("k", ARRAY, array(99, 1, bytes(8))), "unknown value type 99"),
        (key("k", ARRAY, DEEP), "more than 3 deep"),
        (key("k", ARRAY, array(TEXT, 1 << 40, b"")), "it claims"),
        (key("k", ARRAY, array(ARRAY, 1 << 22, b"")), "it claims"),
        (key("k", ARRAY, array(U64, 1 << 61, b"")), "needs"),
        (key("k", ARRAY, array(U8, 1 << 63, b"")), "needs"),
        (key("k", TEXT, struct.pack("<Q", (1 << 64) - 1)), "at most"),
        (key("k", TEXT, struct.pack("<Q", 1 << 20)), "remain"),
        (key("k" * 65536, U8, b"\x01"), "a metadata key has 65536 bytes"),
        (key("general.alignment", U32, struct.pack("<I", 48)), "aligns tensors to '48' bytes"),
        (key("general.alignment", U32, struct.pack("<I", 0)), "aligns tensors to '0' bytes"),
        (key("general.alignment", U32, struct.pack("<I", 1 << 31)), "aligns tensors"),
        (key("general.alignment", TEXT, text("32")), "aligns tensors"),
    ],
)
def test_bad_metadata_is_refused(path: Path, entry: bytes, expected: str) -> None:
    assert expected in refusal(path, model(keys=[*KEYS, entry]))


@pytest.mark.parametrize("count", [1 << 16, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_huge_counts_take_no_memory(path: Path, count: int) -> None:
    huge = [
        model(num_keys=count),
        model(num_tensors=count),
        model(keys=[key("k", ARRAY, array(TEXT, count, b""))]),
        model(keys=[key("k", ARRAY, array(U64, count, b""))]),
        model(keys=[key("k", TEXT, struct.pack("<Q", count))]),
    ]
    tracemalloc.start()
    try:
        for data in huge:
            refusal(path, data)
            assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES_MAX
    finally:
        tracemalloc.stop()


def test_a_header_of_zeros_in_a_large_file_ends_soon(path: Path) -> None:
    entry = key("k", ARRAY, array(TEXT, 1 << 30, b""))  # zeros are texts of no letters, and there are enough of them
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)
    with path.open("r+b") as sparse:
        sparse.truncate(16 << 30)
    with pytest.raises(BadModelFile, match="it claims"):
        GGUFFile.open(path)
    entry = key("k", ARRAY, array(U64, HEADER_BYTES_MAX // 8, b""))
    with path.open("r+b") as sparse:
        sparse.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)
    with pytest.raises(BadModelFile, match="a header has at most"):
        GGUFFile.open(path)


# Several files


def write_parts(folder: Path, count: int = 3, *, first: dict[str, Any] | None = None) -> list[Path]:
    paths = []
    for index in range(count):
        split = {"split.no": index, "split.count": count} | ((first or {}) if index == 0 else {})
        keys = [key(name, 2, struct.pack("<H", value)) for name, value in split.items()]
        paths.append(folder / f"big-{index + 1:05}-of-{count:05}.gguf")
        paths[-1].write_bytes(model(keys=keys, tensors=[tensor(f"t{index}", (4,), F32, 0)], data=bytes([index]) * 16))
    return paths


def test_parts_open_as_one(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    with GGUFFile.open(paths[0]) as file:
        assert file.num_parts == 3
        assert file.size_bytes == sum(path.stat().st_size for path in paths)
        assert {name: file.view(info)[0] for name, info in file.tensors.items()} == {"t0": 0, "t1": 1, "t2": 2}
        assert ctypes.string_at(file.address(file.tensors["t2"]), 16) == bytes([2]) * 16
        file.release(file.tensors["t2"])


def test_parts_that_are_no_whole(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    with pytest.raises(BadModelFile, match=r"is not the first of 3 parts: open big-00001-of-00003\.gguf"):
        GGUFFile.open(paths[1])
    paths[2].rename(tmp_path / "elsewhere")
    with pytest.raises(BadModelFile, match=r"first of 3 parts, and 1 of them are missing, such as big-00003-of-00003"):
        GGUFFile.open(paths[0])
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(BadModelFile, match=r"big-00003-of-00003\.gguf does not belong"):
        GGUFFile.open(paths[0])
    with pytest.raises(BadModelFile, match="must be named like"):
        GGUFFile.open(paths[0].rename(tmp_path / "renamed.gguf"))


def test_parts_with_one_tensor_twice(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, 2)
    paths[1].write_bytes(paths[1].read_bytes().replace(b"t1", b"t0"))
    with pytest.raises(BadModelFile, match="has tensor t0, as an earlier part has"):
        GGUFFile.open(paths[0])


# No bytes can hurt it


def open_all(path: Path, cases: Iterator[bytes]) -> tuple[int, int]:
    """Opens each case; returns how many were refused and how many read. Any other outcome is an error."""
    refused = read = 0
    messages: set[str] = set()
    tracemalloc.start()
    try:
        for data in cases:
            path.write_bytes(data)
            tracemalloc.reset_peak()
            before_bytes = tracemalloc.get_traced_memory()[0]
            try:
                with GGUFFile.open(path) as file:
                    for info in file.tensors.values():
                        assert len(file.view(info)) == info.num_bytes
                read += 1
            except (BadModelFile, UnsupportedModel) as error:
                refused += 1
                messages.add(str(error))
            assert tracemalloc.get_traced_memory()[1] - before_bytes < PEAK_BYTES_MAX, data
    finally:
        tracemalloc.stop()
    assert not [message for message in messages if not message.isprintable()]
    return refused, read


@pytest.mark.slow
def test_every_truncation_is_refused(path: Path) -> None:
    whole = model()
    assert open_all(path, (whole[:length] for length in range(len(whole)))) == (len(whole), 0)


@pytest.mark.slow
def test_every_flipped_bit(path: Path) -> None:
    whole = model()
    header_bytes = len(whole) - len(DATA)

    def cases() -> Iterator[bytes]:
        for bit in range(header_bytes * 8):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            yield bytes(data)

    refused, read = open_all(path, cases())
    assert refused > read > 0


@pytest.mark.slow
def test_every_field_made_extreme(path: Path) -> None:
    """Four and eight bytes at each place become the numbers that are wrong most often."""
    whole = model()
    values = [0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
    patches = [struct.pack("<Q", value) for value in values] + [struct.pack("<I", value) for value in values[:4]]

    def cases() -> Iterator[bytes]:
        for place in range(len(whole) - len(DATA) - 8):
            for patch in patches:
                yield whole[:place] + patch + whole[place + len(patch) :]

    refused, read = open_all(path, cases())
    assert refused > read > 0


@pytest.mark.slow
def test_random_damage(path: Path) -> None:
    whole = model()
    header_bytes = len(whole) - len(DATA)
    chance = random.Random(7)

    def damage() -> bytes:
        data = bytearray(whole)
        for _ in range(chance.randint(1, 6)):
            begin = chance.randrange(header_bytes)
            end = min(header_bytes, begin + chance.randint(1, 24))
            match chance.randrange(4):
                case 0:
                    data[begin:end] = chance.randbytes(end - begin)
                case 1:
                    del data[begin:end]
                case 2:
                    data[begin:begin] = data[begin:end]
                case 3:
                    other = chance.randrange(header_bytes)
                    data[other : other + end - begin] = data[begin:end]
        return bytes(data)

    refused, read = open_all(path, (damage() for _ in range(4000)))
    assert refused > 3000
    assert read > 0


@pytest.mark.slow
def test_a_large_vocabulary_is_read_quickly(path: Path) -> None:
    shape = msgspec.structs.replace(SHAPES["tiny"], vocab_size=128256)
    write_random_model(path, shape, quantisation="Q8_0")
    began_s = time.perf_counter()
    with GGUFFile.open(path) as file:
        assert len(file.metadata["tokenizer.ggml.tokens"]) == 128256
    assert time.perf_counter() - began_s < 1.0  # 0.1 s when last measured, on a core of its own
