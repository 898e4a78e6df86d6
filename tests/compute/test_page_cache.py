"""What shall stay of a mapped file is in memory, the rest is not."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest

from shoal.compute.page_cache import keep_resident, missing_bytes, take_out_others

PAGE = mmap.PAGESIZE


def pages_in_memory(mapped: mmap.mmap) -> list[int]:
    return [page for page in range(64) if not missing_bytes(mapped, [(page * PAGE, page * PAGE + 1)])]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets us say what stays")
def test_exactly_what_is_wanted_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = os.urandom(64 * PAGE)
    with path.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())  # dirty pages cannot be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert mapped[7 * PAGE] == content[7 * PAGE]  # and its neighbourhood
    keep_resident(
        path, mapped, [(3 * PAGE + 100, 5 * PAGE), (40 * PAGE, 41 * PAGE + 1), (5 * PAGE, 6 * PAGE), (62 * PAGE, 64 * PAGE)]
    )
    if len(pages_in_memory(mapped)) == 64:
        pytest.skip("this file system keeps every page")
    assert pages_in_memory(mapped) == [3, 4, 5, 40, 41, 62, 63]
    assert missing_bytes(mapped, [(0, 64 * PAGE)]) == 57 * PAGE
    assert bytes(mapped) == content


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets us say what goes")
def test_others_go_and_what_is_wanted_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = os.urandom(64 * PAGE)
    path.write_bytes(content)
    with path.open("rb") as file:
        os.fsync(file.fileno())  # dirty pages cannot be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)  # one by one, as large folios go as a whole
    assert bytes(mapped) == content
    take_out_others(path, mapped, [(3 * PAGE + 100, 5 * PAGE)])
    if len(pages_in_memory(mapped)) == 64:
        pytest.skip("this file system keeps every page")
    assert pages_in_memory(mapped) == [3, 4]
    assert bytes(mapped) == content
