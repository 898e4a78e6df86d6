"""Where this device is reached: what it tells the others."""

from __future__ import annotations

import ipaddress
import socket

import psutil

ADDRESSES_MAX = 8
_EVERYWHERE = ("0.0.0.0", "::")


def join_address(host: str, port: int) -> str:
    """HOST:PORT, or [HOST]:PORT for IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def advertised(host: str, port: int) -> tuple[str, ...]:
    """Addresses of a device that listens on `host`: that one, or those of all interfaces that others may reach, IPv4 first.

    A device with none but loopback advertises that, for clusters on one machine.
    """
    if host not in _EVERYWHERE:
        return (join_address(host, port),)
    families = (socket.AF_INET,) if host == "0.0.0.0" else (socket.AF_INET, socket.AF_INET6)
    found: list[tuple[int, str]] = []
    for interface in psutil.net_if_addrs().values():
        for each in interface:
            if each.family in families and "%" not in each.address:
                address = ipaddress.ip_address(each.address)
                if not (address.is_loopback or address.is_link_local or address.is_unspecified):
                    found.append((address.version, str(address)))
    chosen = [text for _, text in sorted(set(found))][:ADDRESSES_MAX] or ["127.0.0.1"]
    return tuple(join_address(text, port) for text in chosen)
