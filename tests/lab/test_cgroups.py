"""Control groups of both versions, on folders that stand for the kernel's: what is written where. No lab is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import LabError
from shoal.lab import cgroups

V1 = "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu,cpuacct 0 0\n"
V2 = "cgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n"
LIMITS = cgroups.Limits(memory_bytes=64 << 20, cores=0.5, core_set="0-1", disk_read_bytes_s=5_000_000, disk="8:0")


def folder_with(root: Path, *files: str) -> Path:
    folder = root / cgroups.PARENT / "lab" / "one"
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text("")
    return folder


def test_the_version_with_the_memory_controller_is_used() -> None:
    assert cgroups.detect(V1).version == 1
    assert cgroups.detect(V1).roots["cpuacct"] == Path("/sys/fs/cgroup/cpu")
    assert cgroups.detect(V2).version == 2
    assert cgroups.detect(V1 + V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")).version == 1
    with pytest.raises(LabError, match="control groups are not mounted"):
        cgroups.detect("proc /proc proc rw 0 0\n")


def test_limits_of_version_2(tmp_path: Path) -> None:
    hierarchy = cgroups.Hierarchy(2, dict.fromkeys(("memory", "cpu", "cpuset", "io"), tmp_path))
    folder = folder_with(tmp_path, "memory.max", "memory.swap.max", "cpu.max", "cpuset.cpus", "io.max")
    cgroups.limit(hierarchy, "lab/one", LIMITS)
    written = {path.name: path.read_text() for path in folder.iterdir()}
    assert written == {
        "memory.max": str(64 << 20),
        "memory.swap.max": "0",
        "cpu.max": "2500 5000",
        "cpuset.cpus": "0-1",
        "io.max": "8:0 rbps=5000000",
    }


def test_usage_of_version_2(tmp_path: Path) -> None:
    hierarchy = cgroups.Hierarchy(2, dict.fromkeys(("memory", "cpu", "cpuset", "io"), tmp_path))
    folder = folder_with(tmp_path)
    (folder / "memory.current").write_text("100\n")
    (folder / "memory.peak").write_text("300\n")
    (folder / "memory.stat").write_text("anon 7\npgmajfault 5\n")
    (folder / "memory.events").write_text("max 9\noom_kill 2\n")
    (folder / "cpu.stat").write_text("usage_usec 1500000\nthrottled_usec 250000\n")
    (folder / "io.stat").write_text("8:0 rbytes=4096 wbytes=1 rios=1\n8:16 rbytes=904 wbytes=0\n")
    assert cgroups.usage(hierarchy, "lab/one") == cgroups.Usage(
        memory_bytes=100,
        memory_bytes_peak=300,
        pinned_bytes=7,
        anonymous_bytes=7,
        page_ins=5,
        bytes_read=5000,
        cpu_s=1.5,
        throttled_s=0.25,
        oom_kills=2,
    )


def test_a_limit_that_the_kernel_does_not_know_is_named(tmp_path: Path) -> None:
    hierarchy = cgroups.Hierarchy(2, dict.fromkeys(("memory", "cpu", "cpuset", "io"), tmp_path))
    folder_with(tmp_path, "memory.max", "cpu.max", "cpuset.cpus")
    with pytest.raises(LabError, match=r"^this machine cannot limit disk reads: its control groups lack io \(io.max\)$"):
        cgroups.limit(hierarchy, "lab/one", LIMITS)
