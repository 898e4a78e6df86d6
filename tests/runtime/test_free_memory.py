"""What is free for us: the machine's, or what a control group leaves."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from shoal.runtime.free_memory import available_bytes, unused_bytes

MB = 1_000_000


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def free(tmp_path: Path, line: str) -> int:
    membership = tmp_path / "membership"
    membership.write_text(f"3:cpuset:/\n{line}\n")
    return available_bytes(membership=membership, groups=tmp_path)


@pytest.mark.parametrize("is_parent_tighter", [False, True])
def test_version_1_counts_cache_as_free(tmp_path: Path, is_parent_tighter: bool) -> None:
    stat = f"cache 9\ntotal_active_file {20 * MB}\ntotal_inactive_file {10 * MB}\nactive_file 1"
    own, above = tmp_path / "memory/home/shoal", tmp_path / "memory/home"
    group(own, memory__limit_in_bytes=200 * MB, memory__usage_in_bytes=90 * MB, memory__stat=stat)
    group(above, memory__limit_in_bytes=(100 if is_parent_tighter else 500) * MB, memory__usage_in_bytes=90 * MB)
    assert free(tmp_path, "4:memory:/home/shoal") == (10 if is_parent_tighter else 140) * MB


def test_version_2_and_a_group_without_limit(tmp_path: Path) -> None:
    group(tmp_path / "home/shoal", memory__max="max", memory__current=90 * MB)
    group(tmp_path / "home", memory__max=100 * MB, memory__current=95 * MB, memory__stat=f"active_file {4 * MB}")
    assert free(tmp_path, "0::/home/shoal") == 9 * MB
    assert unused_bytes(membership=tmp_path / "membership", groups=tmp_path) == 5 * MB


def test_more_than_the_limit_leaves_nothing(tmp_path: Path) -> None:
    group(tmp_path / "memory", memory__limit_in_bytes=50 * MB, memory__usage_in_bytes=60 * MB)
    assert free(tmp_path, "4:memory:/not/seen/from/here") == 0


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    found = available_bytes(membership=tmp_path / "none", groups=tmp_path)
    assert 0 < found <= psutil.virtual_memory().total
