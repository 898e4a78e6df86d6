"""Whether this machine can be a lab, and what it lacks."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from shoal.errors import LabError, LabUnavailable
from shoal.lab import cgroups


def missing() -> list[str]:
    """What this machine lacks, in words; nothing if a lab can be made."""
    if sys.platform != "linux":
        return [f"Linux (this is {sys.platform}): use a Linux machine or a virtual one"]
    lacks = []
    if os.geteuid() != 0:
        lacks.append("root: use sudo")
    if not Path("/proc/self/ns/net").exists():
        lacks.append("network namespaces in the kernel")
    if not Path("/dev/net/tun").exists():
        lacks.append("the device /dev/net/tun: `modprobe tun`, or in a container `--device /dev/net/tun`")
    if shutil.which("ip") is None:
        lacks.append("the command ip: install iproute2")
    if os.geteuid() == 0 and not _may_administrate():
        lacks.append("the capabilities CAP_SYS_ADMIN and CAP_NET_ADMIN: in a container use `--privileged`")
    try:
        cgroups.detect()
    except (LabError, OSError) as error:
        lacks.append(str(error))
    return lacks


def require() -> None:
    """Raises LabUnavailable, which names what is missing."""
    lacks = missing()
    if lacks:
        raise LabUnavailable(f"this machine cannot be a lab; it lacks {'; '.join(lacks)}")


def _may_administrate() -> bool:
    wanted = 1 << 21 | 1 << 12  # CAP_SYS_ADMIN, CAP_NET_ADMIN
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16) & wanted == wanted
    return False
