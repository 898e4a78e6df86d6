"""The few calls of the Linux kernel that Python 3.11 has no name for: namespaces, mounts, TUN devices.

Everything is looked up when it is called, so that importing this does no harm on other systems.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWNET = 0x4000_0000

_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x4_0000
_PR_SET_TIMERSLACK = 29

_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x4004_54CA, 0x4004_54D0, 0x4004_54D8
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM = 0x01

TUN_HEADER_BYTES = 10
"""The virtio header before every packet: it says that a checksum is still to be filled in."""


def set_namespace(descriptor: int, kind: int) -> None:
    """Moves this thread into the namespace behind an open file. Raises OSError."""
    _check(_libc().setns(descriptor, kind), "setns")


def unshare(kinds: int) -> None:
    """Gives this thread namespaces of its own. Raises OSError."""
    _check(_libc().unshare(kinds), "unshare")


@contextlib.contextmanager
def inside_network(namespace: Path) -> Iterator[None]:
    """Runs the body in a network namespace; this thread comes back whatever happens."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        other = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            set_namespace(other, CLONE_NEWNET)
        finally:
            os.close(other)
        try:
            yield
        finally:
            set_namespace(own, CLONE_NEWNET)
    finally:
        os.close(own)


def make_mounts_private() -> None:
    """What this mount namespace mounts from now on is seen by nobody else."""
    _check(_libc().mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "mount")


def bind_mount(source: Path, target: Path) -> None:
    """Shows the file `source` at the path of `target`."""
    _check(_libc().mount(os.fsencode(source), os.fsencode(target), None, _MS_BIND, None), f"mount on {target}")


def set_hostname(name: str) -> None:
    encoded = name.encode()
    _check(_libc().sethostname(encoded, len(encoded)), "sethostname")


def set_timer_slack(nanoseconds: int) -> None:
    """How late the kernel may wake this thread to save power. Does nothing where it cannot be set."""
    _libc().prctl(_PR_SET_TIMERSLACK, nanoseconds, 0, 0, 0)


def open_tun(name: str) -> int:
    """Makes a TUN device in this thread's network namespace; it goes when the descriptor is closed.

    Packets come with a virtio header and, among devices of one machine, without checksums.
    """
    import fcntl

    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        request = struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR)
        fcntl.ioctl(descriptor, _TUNSETIFF, request)
        fcntl.ioctl(descriptor, _TUNSETVNETHDRSZ, struct.pack("i", TUN_HEADER_BYTES))
        # Checksums only: with segmentation offload the kernel would hand over lumps of 64 KB whatever the link's rate.
        fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _TUN_F_CSUM)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
