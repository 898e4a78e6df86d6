"""Becoming a process of a device: into its control groups and namespaces, then the command itself.

`python -m shoal.lab.enter PLACE COMMAND...` is how the lab starts processes; PLACE is JSON. It runs alone in a fresh
process, so nothing of the lab's own process, its threads or its descriptors, is around when namespaces change.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from shoal.lab import kernel

EXIT_CANNOT_ENTER = 126
EXIT_NO_COMMAND = 127


class Place(msgspec.Struct, frozen=True):
    """A device, from the inside.

    Attributes:
        network: path of its network namespace.
        groups: files that take "0" to make the writer part of the device.
        hostname: what the device is called.
        files: (own, system's): files of the device that are seen in place of the system's, such as /etc/hosts.
        folder: where commands start.
        environment: variables on top of the caller's.
    """

    network: str
    groups: list[str]
    hostname: str
    files: list[tuple[str, str]]
    folder: str
    environment: dict[str, str]


def enter(place: Place) -> None:
    """Makes this process part of the device. Raises OSError."""
    network = os.open(place.network, os.O_RDONLY | os.O_CLOEXEC)
    kernel.set_namespace(network, kernel.CLONE_NEWNET)
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS)
    kernel.make_mounts_private()
    kernel.set_hostname(place.hostname)
    for own, system in place.files:
        if Path(system).exists():
            kernel.bind_mount(Path(own), Path(system))
    os.chdir(place.folder)
    os.environ.update(place.environment)
    # Last, so that little of what Python needed to get here is charged to the device.
    for file in place.groups:
        Path(file).write_text("0")


def become(place: Place, command: list[str]) -> None:
    """Enters the device and replaces this process by `command`; returns only by ending the process."""
    try:
        enter(place)
    except OSError as error:
        _fail(f"cannot enter the device {place.hostname}: {error}", EXIT_CANNOT_ENTER)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        _fail(f"cannot run '{command[0]}': {error.strerror}", EXIT_NO_COMMAND)


def _fail(text: str, status: int) -> None:
    print(f"shoal lab: {text}", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(status)


if __name__ == "__main__":
    become(msgspec.json.decode(sys.argv[1], type=Place), sys.argv[2:])
