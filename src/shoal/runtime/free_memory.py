"""How much memory there is for us: what the machine has free, or less where a control group sets a limit.

A container or a service may be allowed far less than the machine has, and whoever takes more is killed. Page cache counts
there, but gives way, so it counts as free.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import psutil

try:
    import resource
except ImportError:  # Windows, which does not tell them apart from others
    resource = None  # type: ignore[assignment]

_GROUPS = Path("/sys/fs/cgroup")


class PageFaults:
    """What this process has waited for page by page: of the map, what was lost and came back."""

    def __init__(self) -> None:
        self._seen = _major_faults()

    def since_last_bytes(self) -> int:
        """Since it was asked before; a page each, so that what came along by read-ahead is not counted."""
        seen, self._seen = self._seen, _major_faults()
        return (self._seen - seen) * mmap.PAGESIZE


def _major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt if resource is not None else 0


def available_bytes(*, membership: Path = Path("/proc/self/cgroup"), groups: Path = _GROUPS) -> int:
    """What could be taken now without pushing anybody out of memory.

    Args:
        membership: says which control groups this process is in.
        groups: where control groups are mounted, version 1 or 2.
    """
    free = int(psutil.virtual_memory().available)
    return max(0, min([free, *(unused + cached for unused, cached in _left_in_groups(membership, groups))]))


def unused_bytes(*, membership: Path = Path("/proc/self/cgroup"), groups: Path = _GROUPS) -> int:
    """As `available_bytes`, but without what is page cache now."""
    free = int(psutil.virtual_memory().free)
    return max(0, min([free, *(unused for unused, _ in _left_in_groups(membership, groups))]))


def _left_in_groups(membership: Path, groups: Path) -> Iterator[tuple[int, int]]:
    """What the group of this process leaves unused and what of its use is page cache, and so each group above it."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "memory":
            root, limit_file, usage_file = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        elif not controllers:
            root, limit_file, usage_file = groups, "memory.max", "memory.current"
        else:
            continue
        folder = root / name.strip("/")
        while True:
            limit, usage = _number(folder / limit_file), _number(folder / usage_file)
            if limit is not None and usage is not None:
                yield limit - usage, _cache_bytes(folder / "memory.stat")
            if folder == root:
                break
            folder = folder.parent


def _number(path: Path) -> int | None:
    """None where there is no such group, as seen from a container, or no limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cache_bytes(path: Path) -> int:
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    # Version 1 counts the groups below in names of their own.
    return sum(int(fields.get(f"total_{part}", fields.get(part, 0))) for part in ("active_file", "inactive_file"))
