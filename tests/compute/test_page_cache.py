"""What shall stay of a mapped file is in memory, the rest is not."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest

from shoal.compute.page_cache import keep_resident, missing_bytes

PAGE = mmap.PAGESIZE


def pages_in_memory(mapped: mmap.mmap) -> list[int]:
    return [page for page in range(64) if not missing_bytes(mapped, [(page * PAGE, page * PAGE + 1)])]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets us say what stays")
@pytest.mark.parametrize("is_short", [True, False])
def test_what_is_wanted_stays_and_the_rest_where_there_is_room(tmp_path: Path, *, is_short: bool) -> None:
    path = tmp_path / "file"
    content = os.urandom(64 * PAGE)
    with path.open("wb") as file:
        file.write(content)
        os.fsync(file.fileno())  # dirty pages cannot be dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert mapped[7 * PAGE] == content[7 * PAGE]  # and its neighbourhood
    before = set(pages_in_memory(mapped))
    wanted = [(3 * PAGE + 100, 5 * PAGE), (40 * PAGE, 41 * PAGE + 1), (5 * PAGE, 6 * PAGE), (62 * PAGE, 64 * PAGE)]
    keep_resident(path, mapped, wanted, is_short=is_short)
    if is_short and len(pages_in_memory(mapped)) == 64:
        pytest.skip("this file system keeps every page")
    if is_short:
        assert pages_in_memory(mapped) == [3, 4, 5, 40, 41, 62, 63]
        assert missing_bytes(mapped, [(0, 64 * PAGE)]) == 57 * PAGE
    else:
        assert set(pages_in_memory(mapped)) >= before | {3, 4, 5, 40, 41, 62, 63}
    assert bytes(mapped) == content
