"""Closed inbound ports, as behind a home router: decides which packets from outside reach a device.

Like most home routers: whoever was spoken to first may answer, from that address and port to that port (restricted by
address and port, RFC 4787). A TCP connection that stood before the ports were closed stays. Addresses are not rewritten.
"""

from __future__ import annotations

from collections import OrderedDict

FLOWS_MAX = 16_384
"""The oldest are forgotten beyond it, as a home router does."""

UDP_FLOW_S = 120.0
"""A UDP flow lasts that long after the device last spoke (RFC 4787 asks for two minutes or more)."""

_ICMP, _TCP, _UDP = 1, 6, 17
_SYN, _ACK = 0x02, 0x10
_ECHO_REQUEST = 8
_PORTS_BYTES = 4


class InboundFilter:
    """The state of one device's closed door. Packets are IPv4, from the first byte of their header."""

    def __init__(self) -> None:
        self._flows: OrderedDict[bytes, float] = OrderedDict()
        self.num_refused = 0

    def note_outbound(self, packet: bytes, now_s: float) -> None:
        """The device speaks: who is spoken to may answer."""
        key = _flow(packet, outbound=True)
        if key is not None:
            self._flows[key] = now_s
            self._flows.move_to_end(key)
            if len(self._flows) > FLOWS_MAX:
                self._flows.popitem(last=False)

    def admits(self, packet: bytes, now_s: float) -> bool:
        """Whether a packet to the device is let in; one that is not is counted."""
        if self._admits(packet, now_s):
            return True
        self.num_refused += 1
        return False

    def _admits(self, packet: bytes, now_s: float) -> bool:
        protocol = packet[9]
        header_bytes = (packet[0] & 15) * 4
        if protocol == _ICMP:
            return len(packet) > header_bytes and packet[header_bytes] != _ECHO_REQUEST
        key = _flow(packet, outbound=False)
        if key is None:
            return True  # a later fragment: useless without its first, which was judged
        spoke_s = self._flows.get(key)
        if protocol == _UDP:
            return spoke_s is not None and now_s - spoke_s < UDP_FLOW_S
        if spoke_s is not None:
            return True
        flags = packet[header_bytes + 13] if len(packet) > header_bytes + 13 else _SYN
        return not (flags & _SYN and not flags & _ACK)


def _flow(packet: bytes, *, outbound: bool) -> bytes | None:
    """Protocol, other address, other port, own port; None for what has no ports."""
    header_bytes = (packet[0] & 15) * 4
    protocol = packet[9]
    is_later_fragment = packet[6] & 0x1F or packet[7]
    if protocol not in (_TCP, _UDP) or is_later_fragment or len(packet) < header_bytes + _PORTS_BYTES:
        return None
    source, target = packet[12:16], packet[16:20]
    source_port, target_port = packet[header_bytes : header_bytes + 2], packet[header_bytes + 2 : header_bytes + 4]
    if outbound:
        return bytes((protocol,)) + target + target_port + source_port
    return bytes((protocol,)) + source + source_port + target_port
