"""Members on the same network find each other by multicast DNS, whatever their addresses are today.

A device says: I am NODE, a member of the cluster whose tag is TAG, at these addresses. That says no more than a scan of the
network would; whoever is dialled proves itself by TLS as always, so that a liar costs an attempt and nothing else.

Everything here happens on threads of its own: joining multicast groups may block, and is refused on some systems.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from shoal.errors import ShoalError
from shoal.ids import NodeId
from shoal.runtime.channel import split_address
from shoal.runtime.node.addresses import join_address
from shoal.runtime.node.links import DEFAULT_PORT

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf

SERVICE = "_shoal._tcp.local."
_ADDRESSES_MAX = 8
_RESOLVE_MS = 2000


class Sighting(NamedTuple):
    """A device that spoke up nearby. `tag` is of its cluster, '' if it belongs to none."""

    node: NodeId
    tag: str
    addresses: tuple[str, ...]


def cluster_tag(cluster: str) -> str:
    """What a cluster is called on a network: enough to know one's own, too little to learn another's id."""
    return hashlib.sha256(f"shoal discovery {cluster}".encode()).hexdigest()[:16] if cluster else ""


class Discovery:
    """Listens from `start` on, and speaks after `announce`.

    Args:
        on_sighting: told of devices, this one included, on a thread of this object; must not block.
    """

    def __init__(self, on_sighting: Callable[[Sighting], None]) -> None:
        self.problem = ""
        """Why nothing can be heard or said, if so."""
        self._on_sighting = on_sighting
        self._wishes: queue.SimpleQueue[tuple[NodeId, str, tuple[str, ...]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="agent-discovery", daemon=True)

    def start(self) -> None:
        """Begins to listen, soon."""
        self._thread.start()

    def announce(self, node: NodeId, cluster: str, addresses: tuple[str, ...]) -> None:
        """Says from now on that this device is there; without addresses, nothing any more."""
        self._wishes.put((node, cluster_tag(cluster), addresses))

    def close(self) -> None:
        """Says goodbye and ends, soon; does not wait for it."""
        self._wishes.put(None)

    def _run(self) -> None:
        try:
            from zeroconf import IPVersion, ServiceBrowser, ServiceStateChange, Zeroconf

            with contextlib.closing(Zeroconf(ip_version=IPVersion.V4Only)) as zeroconf:

                def changed(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
                    if state_change is not ServiceStateChange.Removed:
                        self._resolve(zeroconf, service_type, name)

                browser = ServiceBrowser(zeroconf, SERVICE, handlers=[changed])
                self._speak(zeroconf)
                browser.cancel()
        except Exception as error:
            # No multicast, no permission, no such library: devices still find each other by the addresses they know.
            self.problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

    def _speak(self, zeroconf: Zeroconf) -> None:
        said: ServiceInfo | None = None
        while (wish := self._wishes.get()) is not None:
            info = _service(*wish)
            if said is not None:
                zeroconf.unregister_service(said)
            if info is not None:
                zeroconf.register_service(info, allow_name_change=True)
            said = info
        if said is not None:
            zeroconf.unregister_service(said)

    def _resolve(self, zeroconf: Zeroconf, service_type: str, name: str) -> None:
        info = zeroconf.get_service_info(service_type, name, timeout=_RESOLVE_MS)
        if info is not None and (sighting := read(info)) is not None:
            self._on_sighting(sighting)


def _service(node: NodeId, tag: str, addresses: tuple[str, ...]) -> ServiceInfo | None:
    """What is said: one port, for the addresses that have it. None where there is nothing to say."""
    from zeroconf import ServiceInfo

    found: list[tuple[str, int]] = []
    for address in addresses:
        with contextlib.suppress(ShoalError, ValueError):
            host, port = split_address(address, default_port=DEFAULT_PORT)
            if ipaddress.ip_address(host).version == 4:
                found.append((host, port))
    if not found:
        return None
    port = found[0][1]
    return ServiceInfo(
        SERVICE,
        f"{node[:32]}.{SERVICE}",
        port=port,
        parsed_addresses=[host for host, its in found if its == port][:_ADDRESSES_MAX],
        properties={"node": node, "cluster": tag},
        server=f"shoal-{node[:32]}.local.",
    )


def read(info: ServiceInfo) -> Sighting | None:
    """What somebody said, if it makes sense: anybody may say anything."""
    try:
        words = {key.decode(): (value or b"").decode("ascii") for key, value in info.properties.items()}
        node, tag = words["node"], words["cluster"]
        hosts = info.parsed_addresses()[:_ADDRESSES_MAX]
    except (KeyError, UnicodeDecodeError, ValueError):
        return None
    port = info.port or 0
    if not (0 < port < 65536 and hosts and len(tag) in (0, 16) and 0 < len(node) <= 128 and node.isalnum()):
        return None
    return Sighting(NodeId(node), tag, tuple(join_address(host, port) for host in hosts))
