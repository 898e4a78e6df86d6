"""Network namespaces: one per device, with a TUN, an address and a route to each device it can reach, and nothing else.

There is no link to the machine's own network, so no packet can leave. They are named, so that `ip netns exec` works too.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from shoal.errors import LabError
from shoal.lab import kernel
from shoal.lab.shaping import PACKET_BYTES_MAX

FOLDER = Path("/run/netns")
TUN = "shoal0"
NETWORK = "10.77"
"""Addresses are 10.77.x.y; every lab has them to itself."""
_IPV4_HEADER_BYTES, _TCP_HEADER_BYTES = 20, 20


def path_of(name: str) -> Path:
    return FOLDER / name


def create(name: str) -> None:
    """Makes a namespace with a working loopback. Raises LabError."""
    _ip("netns", "add", name)
    _ip("-n", name, "link", "set", "lo", "up")
    settings = {
        "net/ipv6/conf/all/disable_ipv6": "1",  # no stray neighbour discovery in what is measured
        "net/ipv4/ping_group_range": "0 2147483647",
        "net/ipv4/conf/all/promote_secondaries": "1",  # an address that comes must not go with the one before it
        "net/ipv4/tcp_no_metrics_save": "1",  # a connection must not know what an earlier one learned
    }
    with kernel.inside_network(path_of(name)):
        for key, value in settings.items():
            try:
                Path("/proc/sys", key).write_text(value)
            except FileNotFoundError:
                continue  # a kernel without IPv6
            except OSError as error:
                raise LabError(f"cannot set {key} to '{value}' in the namespace {name}: {error.strerror}") from error


def configure(name: str, address: str, packet_bytes: Mapping[str, int], *, congestion_control: str, multicast: bool) -> None:
    """Gives the TUN, which the router has made, its address and its routes.

    Args:
        packet_bytes: the largest packet for each address that can be reached.
        congestion_control: of TCP. It is set by route, because a namespace of its own may not choose every one as default.
    """
    largest = max(packet_bytes.values(), default=PACKET_BYTES_MAX)
    lines = [
        f"addr add {address}/16 dev {TUN} noprefixroute",
        f"link set {TUN} mtu {largest} txqueuelen 4000 up",
        *(_route(other, num_bytes, congestion_control) for other, num_bytes in packet_bytes.items()),
    ]
    if multicast and packet_bytes:
        smallest = min(packet_bytes.values())
        lines += [f"route replace {target} dev {TUN} mtu {smallest}" for target in ("224.0.0.0/4", "255.255.255.255/32")]
    _ip_batch(name, lines)


def set_packet_bytes(name: str, packet_bytes: Mapping[str, int], *, congestion_control: str) -> None:
    """Changes the largest packet for each address that can be reached; connections that stand follow at once."""
    largest = max(packet_bytes.values(), default=0)
    routes = [_route(other, num_bytes, congestion_control) for other, num_bytes in packet_bytes.items()]
    _ip_batch(name, [f"link set {TUN} mtu {largest}", *routes])


def change_address(name: str, old: str, new: str) -> None:
    """Connections of the old address break, as they do on a device that comes back to its network."""
    _ip_batch(name, [f"addr add {new}/16 dev {TUN} noprefixroute", f"addr del {old}/16 dev {TUN}"])


def move_route(name: str, old: str, new: str, num_bytes: int, *, congestion_control: str) -> None:
    """Another device has moved from one address to another."""
    _ip_batch(name, [f"route del {old}/32 dev {TUN}", _route(new, num_bytes, congestion_control)])


def delete(name: str) -> None:
    """Removes a namespace; nothing happens where there is none. Processes in it keep it alive unseen: end them first."""
    if path_of(name).exists():
        with contextlib.suppress(LabError):
            _ip("netns", "del", name)


def identity(name: str) -> tuple[int, int] | None:
    """What the kernel calls the namespace (device and inode); None where there is none."""
    try:
        status = os.stat(path_of(name))
    except OSError:
        return None
    return status.st_dev, status.st_ino


def processes_inside(name: str) -> list[int]:
    """Process ids whose network is this namespace."""
    wanted = identity(name)
    found = []
    for entry in Path("/proc").iterdir() if wanted else ():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                status = os.stat(entry / "ns/net")
                if (status.st_dev, status.st_ino) == wanted:
                    found.append(int(entry.name))
    return found


def _route(address: str, num_bytes: int, congestion_control: str) -> str:
    # `lock`: no path discovery beside it. `advmss`: what the other side may send depends on its own link to us alone.
    segment = PACKET_BYTES_MAX - _IPV4_HEADER_BYTES - _TCP_HEADER_BYTES
    return f"route replace {address}/32 dev {TUN} mtu lock {num_bytes} advmss {segment} congctl {congestion_control}"


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments], None)


def _ip_batch(name: str, lines: list[str]) -> None:
    _run(["ip", "-n", name, "-batch", "-"], "\n".join(lines) + "\n")


def _run(command: list[str], text_in: str | None) -> None:
    try:
        done = subprocess.run(command, input=text_in, capture_output=True, text=True, check=False, timeout=30)
    except FileNotFoundError as error:
        raise LabError("the command `ip` is missing: install iproute2") from error
    if done.returncode:
        raise LabError(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())}")
