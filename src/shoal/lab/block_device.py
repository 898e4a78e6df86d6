"""Which block device a file lies on: throttling reads needs its number."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from shoal.errors import LabError


def disk_of(path: Path) -> str:
    """'major:minor' of the whole disk under a file or folder.

    Raises:
        LabError: there is none, as on tmpfs; the text says where the lab's files could be instead.
    """
    status = os.stat(path)
    major, minor = os.major(status.st_dev), os.minor(status.st_dev)
    if major == 0:
        source = _mount_source(path.resolve(), Path("/proc/self/mountinfo").read_text().splitlines())
        if not source.startswith("/dev/"):
            raise LabError(
                f"{path} is on {source or 'no block device'}, whose reads cannot be slowed: "
                "let SHOAL_LAB_FOLDER name a folder on a disk"
            )
        number = os.stat(source).st_rdev
        major, minor = os.major(number), os.minor(number)
    return _whole_disk(Path(f"/sys/dev/block/{major}:{minor}"), f"{major}:{minor}")


def read_ahead_bytes(disk: str) -> int:
    """How much the kernel reads from 'major:minor' beyond what is asked for; 0 where it does not say."""
    try:
        return int(Path(f"/sys/dev/block/{disk}/queue/read_ahead_kb").read_text()) * 1024
    except OSError:
        return 0


def _whole_disk(entry: Path, number: str) -> str:
    """A partition cannot be throttled, the disk it is a part of can."""
    if (entry / "partition").exists():
        return (entry.resolve().parent / "dev").read_text().strip()
    return number


def _mount_source(path: Path, mountinfo: Iterable[str]) -> str:
    """The source of the mount that `path` is on, by the longest mount point; of overlays, that of the upper folder."""
    best, found = -1, ""
    lines = list(mountinfo)
    for line in lines:
        left, _, right = line.partition(" - ")
        mount_point = left.split(" ")[4]
        kind, source, options = (*right.split(" "), "", "", "")[:3]
        if path.is_relative_to(mount_point) and len(mount_point) >= best:
            best, found = len(mount_point), source
            upper = next((part.removeprefix("upperdir=") for part in options.split(",") if part.startswith("upperdir=")), "")
            if kind == "overlay":
                others = [other for other in lines if other is not line]
                found = _mount_source(Path(upper), others) if upper else "overlay"
    return found
