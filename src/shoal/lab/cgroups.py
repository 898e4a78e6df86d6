"""Control groups, versions 1 and 2: what a device may use, what it has used, and which processes it consists of.

The two versions differ in files and units only. `Hierarchy` says where the groups are; the tables below say how a limit
is written and a counter is read. Page cache counts towards the memory limit in both.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shoal.errors import LabError

PARENT = "shoal-lab"
"""All groups of all labs are below a group of this name."""

CPU_PERIOD_US = 5000
"""Short, so that a device with half a core is a slow device and not one that stops for 50 ms."""
CORES_MIN = 0.2
"""The kernel's least quota is a millisecond per period."""
MEMORY_BYTES_MIN = 4 << 20
_CONTROLLERS = ("memory", "cpu", "cpuset", "io")
_V1_CONTROLLERS = ("memory", "cpu", "cpuacct", "cpuset", "blkio", "freezer")
_REMOVE_TIMEOUT_S = 5.0
_PAGE_BYTES = 4096


class Limits(msgspec.Struct, frozen=True):
    """What a device may use; None is no limit.

    `core_set` is a list such as "0-1,4"; `disk_read_bytes_s` holds on the block device `disk` ("major:minor").
    """

    memory_bytes: int | None = None
    cores: float | None = None
    core_set: str | None = None
    disk_read_bytes_s: int | None = None
    disk: str | None = None


class Usage(msgspec.Struct, frozen=True):
    """What a device has used since it was made.

    `pinned_bytes` of the memory are no page cache: programs' own (`anonymous_bytes`), shared and the kernel's. `page_ins`
    counts faults that had to wait for the disk; `bytes_read` is what came from block devices; `oom_kills` are processes
    killed at the memory limit; `throttled_s` is time spent waiting for the processor quota.
    """

    memory_bytes: int = 0
    memory_bytes_peak: int = 0
    pinned_bytes: int = 0
    anonymous_bytes: int = 0
    page_ins: int = 0
    bytes_read: int = 0
    cpu_s: float = 0.0
    throttled_s: float = 0.0
    oom_kills: int = 0


@dataclass(frozen=True)
class Hierarchy:
    """Where control groups are mounted.

    `version` 1 has a folder per controller; 2 has one for all. `roots` maps a controller to its folder.
    """

    version: int
    roots: dict[str, Path]

    def folders(self, name: str) -> list[Path]:
        """The folders of one group, parents first for none: one per hierarchy."""
        return sorted({root / PARENT / name for root in self.roots.values()})

    def folder(self, controller: str, name: str) -> Path | None:
        root = self.roots.get(controller)
        return root / PARENT / name if root else None


def detect(mounts: str | None = None) -> Hierarchy:
    """The hierarchy of this machine, from the text of /proc/self/mounts.

    Version 1 is used where it holds the memory controller, as on machines that mount both.

    Raises:
        LabError: there are no control groups that can limit memory.
    """
    text = Path("/proc/self/mounts").read_text() if mounts is None else mounts
    version_1: dict[str, Path] = {}
    version_2: Path | None = None
    for line in text.splitlines():
        _, folder, kind, options, *_ = line.split(" ")
        if kind == "cgroup":
            version_1 |= {name: Path(folder) for name in options.split(",") if name in _V1_CONTROLLERS}
        elif kind == "cgroup2":
            version_2 = Path(folder)
    if "memory" in version_1:
        return Hierarchy(1, version_1)
    if version_2 is not None:
        return Hierarchy(2, dict.fromkeys(_CONTROLLERS, version_2))
    raise LabError("control groups are not mounted, so memory cannot be limited: mount cgroup2 on /sys/fs/cgroup")


def prepare(hierarchy: Hierarchy, name: str) -> None:
    """Makes the empty group `name` (a path of one or two parts). Raises LabError."""
    try:
        if hierarchy.version == 2:
            root = hierarchy.roots["memory"]
            _delegate(root)
            parent = root / PARENT
            for part in name.split("/"):
                parent.mkdir(exist_ok=True)
                _delegate(parent)
                parent = parent / part
        for folder in hierarchy.folders(name):
            folder.mkdir(parents=True, exist_ok=True)
        if hierarchy.version == 1:
            _inherit_cpuset(hierarchy, name)
    except OSError as error:
        raise LabError(f"cannot make the control group {name}: {error.strerror} ({error.filename})") from error


def _delegate(folder: Path) -> None:
    """Lets the groups below have every controller that there is."""
    present = (folder / "cgroup.controllers").read_text().split()
    for name in _CONTROLLERS:
        if name in present:
            (folder / "cgroup.subtree_control").write_text(f"+{name}")


def _inherit_cpuset(hierarchy: Hierarchy, name: str) -> None:
    """A group of version 1 has no cores until it is told."""
    root = hierarchy.roots.get("cpuset")
    if root is None:
        return
    above, folder = root, root / PARENT
    for part in ("", *name.split("/")):
        folder = folder / part if part else folder
        for file in ("cpuset.cpus", "cpuset.mems"):
            if not (folder / file).read_text().strip():
                (folder / file).write_text((above / file).read_text())
        above = folder


def limit(hierarchy: Hierarchy, name: str, limits: Limits) -> None:
    """Writes a device's limits. Raises LabError, which names the limit that this machine does not know."""
    for controller, file, value, what in _writes(hierarchy.version, limits):
        folder = hierarchy.folder(controller, name)
        if folder is None or not (folder / file).exists():
            if what is None:
                continue
            raise LabError(f"this machine cannot limit {what}: its control groups lack {controller} ({file})")
        try:
            (folder / file).write_text(value)
        except OSError as error:
            raise LabError(f"cannot limit {what}: '{value}' to {folder / file}: {error.strerror}") from error


def count_reads(hierarchy: Hierarchy, name: str, disk: str) -> None:
    """Makes the kernel count what a device without a limit reads of 'major:minor'.

    Version 1 counts no reads of a disk on which no group was ever throttled; a limit that is taken back is enough.
    """
    folder = hierarchy.folder("blkio", name)
    if hierarchy.version != 1 or folder is None:
        return
    with contextlib.suppress(OSError):  # without throttling in the kernel, nothing is counted
        for bytes_s in (1 << 50, 0):
            (folder / "blkio.throttle.read_bps_device").write_text(f"{disk} {bytes_s}")


def _writes(version: int, limits: Limits) -> Iterable[tuple[str, str, str, str | None]]:
    """(controller, file, value, what is limited); None for what is only there to make another limit tight."""
    if limits.memory_bytes is not None:
        if version == 1:
            yield "memory", "memory.limit_in_bytes", str(limits.memory_bytes), "memory"
            yield "memory", "memory.memsw.limit_in_bytes", str(limits.memory_bytes), None
        else:
            yield "memory", "memory.max", str(limits.memory_bytes), "memory"
            yield "memory", "memory.swap.max", "0", None
    if limits.cores is not None:
        quota_us = max(1000, round(limits.cores * CPU_PERIOD_US))
        if version == 1:
            yield "cpu", "cpu.cfs_period_us", str(CPU_PERIOD_US), "processor time"
            yield "cpu", "cpu.cfs_quota_us", str(quota_us), "processor time"
        else:
            yield "cpu", "cpu.max", f"{quota_us} {CPU_PERIOD_US}", "processor time"
    if limits.core_set is not None:
        yield "cpuset", "cpuset.cpus", limits.core_set, "the cores"
    if limits.disk_read_bytes_s is not None and limits.disk is not None:
        if version == 1:
            yield "blkio", "blkio.throttle.read_bps_device", f"{limits.disk} {limits.disk_read_bytes_s}", "disk reads"
        else:
            yield "io", "io.max", f"{limits.disk} rbps={limits.disk_read_bytes_s}", "disk reads"


def squeeze_memory(hierarchy: Hierarchy, name: str, memory_bytes: int) -> int:
    """Lowers (or raises) the memory limit of a running device.

    Returns:
        The limit that holds now. Version 2 kills at the limit; version 1 refuses what it cannot reclaim, and the lowest
        limit that it takes is set.
    """
    folder = hierarchy.folder("memory", name)
    assert folder is not None
    if hierarchy.version == 2:
        (folder / "memory.max").write_text(str(memory_bytes))
        return memory_bytes
    wanted = memory_bytes
    for _ in range(20):
        if _set_v1_memory(folder, wanted):
            return wanted
        in_use = int((folder / "memory.usage_in_bytes").read_text())
        wanted = max(memory_bytes, in_use + (1 << 20))
    raise LabError(f"the memory of {name} cannot be limited to {memory_bytes} bytes: it is in use and cannot be reclaimed")


def _set_v1_memory(folder: Path, memory_bytes: int) -> bool:
    """The limit with swap may never be below the one without, so which is written first depends on the direction."""
    files = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
    if not (folder / files[1]).exists():
        files.pop()
    if memory_bytes > int((folder / files[0]).read_text()):
        files.reverse()
    try:
        for file in files:
            (folder / file).write_text(str(memory_bytes))
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EINVAL):
            return False
        raise
    return True


def freeze(hierarchy: Hierarchy, name: str, *, frozen: bool) -> None:
    """Stops every process of a device where it stands, or lets them go on. Raises LabError."""
    if hierarchy.version == 2:
        folder, file, value = hierarchy.folder("memory", name), "cgroup.freeze", "1" if frozen else "0"
    else:
        folder, file, value = hierarchy.folder("freezer", name), "freezer.state", "FROZEN" if frozen else "THAWED"
    if folder is None:
        raise LabError("this machine cannot freeze devices: its control groups lack the freezer")
    (folder / file).write_text(value)


def entry_files(hierarchy: Hierarchy, name: str) -> list[str]:
    """Files into which a process writes "0" to become part of the device."""
    return [str(folder / "cgroup.procs") for folder in hierarchy.folders(name)]


def processes(hierarchy: Hierarchy, name: str) -> list[int]:
    """Process ids of a device; none where it is gone."""
    found: set[int] = set()
    for folder in hierarchy.folders(name):
        with contextlib.suppress(OSError):
            found |= {int(line) for line in (folder / "cgroup.procs").read_text().split()}
    return sorted(found - {0})


def usage(hierarchy: Hierarchy, name: str) -> Usage:
    """What the device has used; 0 for what this machine does not count."""
    read = _Reader(hierarchy, name)
    if hierarchy.version == 1:
        memory = read.table("memory", "memory.stat")
        throttle = read.table("cpu", "cpu.stat")
        return Usage(
            memory_bytes=read.number("memory", "memory.usage_in_bytes"),
            memory_bytes_peak=read.number("memory", "memory.max_usage_in_bytes"),
            # Version 1 counts kernel memory within its usage.
            pinned_bytes=read.number("memory", "memory.usage_in_bytes") - memory.get("cache", 0) + memory.get("shmem", 0),
            anonymous_bytes=memory.get("rss", 0),
            page_ins=memory.get("pgmajfault", 0),
            bytes_read=_sum_reads_v1(read.text("blkio", "blkio.throttle.io_service_bytes")),
            cpu_s=read.number("cpuacct", "cpuacct.usage") * 1e-9,
            throttled_s=throttle.get("throttled_time", 0) * 1e-9,
            oom_kills=read.table("memory", "memory.oom_control").get("oom_kill", 0),
        )
    cpu, memory = read.table("cpu", "cpu.stat"), read.table("memory", "memory.stat")
    return Usage(
        memory_bytes=read.number("memory", "memory.current"),
        memory_bytes_peak=read.number("memory", "memory.peak"),
        pinned_bytes=sum(memory.get(part, 0) for part in ("anon", "shmem", "kernel")),
        anonymous_bytes=memory.get("anon", 0),
        page_ins=memory.get("pgmajfault", 0),
        bytes_read=_sum_reads_v2(read.text("io", "io.stat")),
        cpu_s=cpu.get("usage_usec", 0) * 1e-6,
        throttled_s=cpu.get("throttled_usec", 0) * 1e-6,
        oom_kills=read.table("memory", "memory.events").get("oom_kill", 0),
    )


class _Reader:
    def __init__(self, hierarchy: Hierarchy, name: str) -> None:
        self._folder: Callable[[str], Path | None] = lambda controller: hierarchy.folder(controller, name)

    def text(self, controller: str, file: str) -> str:
        folder = self._folder(controller)
        try:
            return (folder / file).read_text() if folder else ""
        except OSError:
            return ""

    def number(self, controller: str, file: str) -> int:
        text = self.text(controller, file).strip()
        return int(text) if text.isdigit() else 0

    def table(self, controller: str, file: str) -> dict[str, int]:
        """Lines of a word and a number."""
        pairs = (line.split() for line in self.text(controller, file).splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _sum_reads_v1(text: str) -> int:
    """Lines such as '254:0 Read 4096'."""
    return sum(int(parts[2]) for line in text.splitlines() if len(parts := line.split()) == 3 and parts[1] == "Read")


def _sum_reads_v2(text: str) -> int:
    """Lines such as '254:0 rbytes=4096 wbytes=0 ...'."""
    words = (word for line in text.splitlines() for word in line.split())
    return sum(int(word.removeprefix("rbytes=")) for word in words if word.startswith("rbytes="))


def remove(hierarchy: Hierarchy, name: str) -> None:
    """Removes a group without processes; nothing happens where there is none. Raises LabError."""
    for folder in hierarchy.folders(name):
        give_up_s = time.monotonic() + _REMOVE_TIMEOUT_S
        while folder.exists():
            try:
                folder.rmdir()
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.ENOENT) or time.monotonic() > give_up_s:
                    raise LabError(f"cannot remove the control group {folder}: {error.strerror}") from error
                time.sleep(0.02)  # a process that has ended is still being taken apart


def remove_parent(hierarchy: Hierarchy) -> None:
    """Removes the group above all labs, where no lab is left in it."""
    for root in set(hierarchy.roots.values()):
        with contextlib.suppress(OSError):
            os.rmdir(root / PARENT)
