"""The router of a lab: one process, one loop, one TUN device in every namespace.

A packet is read from its device's TUN, offered to the first link of its path, waits in a heap for the time the link said,
goes on to the next link, and is written to the other device's TUN, its virtio header untouched. Links decide everything
(`shaping.py`); this loop only keeps their times.

What made it fast enough in Python, by measurement (docs/log.md): packets as large as a millisecond of the link, so that
there are few; `epoll`, which costs the same for any number of devices, and one read for each that is ready, since longer
batches cost jitter; buffers no larger than a packet; no checksums; no garbage collector; one core to stay on, and
real-time priority where it is granted. It never spins: a real-time process that does is halted by the kernel for 50 ms in
every second.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import os
import random
import select
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from shoal.lab import kernel
from shoal.lab.inbound import InboundFilter
from shoal.lab.router_messages import (
    AskTraffic,
    Block,
    CloseInbound,
    DirectedLink,
    Done,
    LinkTraffic,
    MoveAddress,
    Ready,
    Reply,
    Request,
    Reshape,
    RouterPlan,
    Traffic,
    request_decoder,
    short_path,
)
from shoal.lab.shaping import DROPPED, PACKET_BYTES_MAX, LinkShape, ShapedLink, packet_bytes_max

_SOURCE_OFFSET = kernel.TUN_HEADER_BYTES + 12
_TARGET_OFFSET, _TARGET_STOP = kernel.TUN_HEADER_BYTES + 16, kernel.TUN_HEADER_BYTES + 20
_PACKET_BYTES_MIN = 28
_BACKLOG_PACKETS_MAX = 200_000
"""Most packets under way at once: 26 links of 500 Mbit/s with 100 ms each have 20,000."""
_LATE_S = 1e-3
_EVENTS_MAX = 128
_REAL_TIME_PRIORITY = 10
_BROADCAST = b"\xff\xff\xff\xff"


class Route:
    """Where packets from one device to another go: links in order, then a descriptor to write to."""

    __slots__ = ("blocked", "first", "last", "links", "target", "tun")

    def __init__(self, links: list[ShapedLink], target: str, tun: int) -> None:
        self.links = links
        self.first = links[0]
        self.last = len(links) - 1
        self.target = target
        self.tun = tun
        self.blocked = False


_Entry = tuple[float, int, bytes, Route, int]
"""When a packet is at its link's end, a number that keeps equals in order, the packet, its route, and which link of that."""


class Router:
    """The loop and its state."""

    def __init__(self, plan: RouterPlan) -> None:
        self._plan = plan
        self._links = [
            ShapedLink(
                f"{link.source}>{link.target}", link.shape, rng=random.Random(f"{plan.seed}/{link.source}/{link.target}")
            )
            for link in plan.links
        ]
        self._by_pair = {(spec.source, spec.target): link for spec, link in zip(plan.links, self._links, strict=True)}
        self._tuns: dict[str, int] = {}
        self._addresses: dict[str, bytes] = {}
        self._filters: dict[str, InboundFilter] = {device: InboundFilter() for device in plan.closed_inbound}
        self._read_bytes = _read_bytes(link.shape for link in self._links)
        self._heap: list[_Entry] = []
        self._sequence = 0
        self._paths: dict[tuple[str, str], Route] = {}
        self._routes: dict[int, dict[bytes, Route]] = {}
        self._device_of: dict[int, str] = {}
        self._unroutable = self._blocked = self._refused_before = 0
        self._lateness_s_max = 0.0
        self._num_late = 0
        self._conversations: dict[int, _Conversation] = {}
        self._listener: socket.socket | None = None

    def open(self) -> None:
        """Makes the TUN devices and the control socket. Raises OSError."""
        for port in self._plan.ports:
            with kernel.inside_network(Path(port.namespace)):
                tun = kernel.open_tun(port.tun)
            self._tuns[port.device] = tun
            self._device_of[tun] = port.device
            self._addresses[port.device] = socket.inet_aton(port.address)
        for path in self._plan.paths:
            links = [self._links[index] for index in path.links]
            self._paths[path.source, path.target] = Route(links, path.target, self._tuns[path.target])
        self._rebuild_routes()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.setblocking(False)
        with short_path(Path(self._plan.socket)) as name:
            listener.bind(name)
        listener.listen(8)
        self._listener = listener

    def _rebuild_routes(self) -> None:
        self._routes = {tun: {} for tun in self._device_of}
        for (source, target), path in self._paths.items():
            self._routes[self._tuns[source]][self._addresses[target]] = path

    # ---- the loop

    def serve(self, owner: int) -> None:
        """Until the descriptor `owner`, the lab's end of a pipe, is closed."""
        assert self._listener is not None
        listening = self._listener.fileno()
        with select.epoll() as watched:
            for descriptor in (*self._device_of, listening, owner):
                watched.register(descriptor, select.EPOLLIN)
            waiting = (watched.fileno(),)
            poll, wait, read, now = watched.poll, select.select, os.read, time.monotonic
            heap, push = self._heap, heapq.heappush
            while True:
                ready = poll(0, _EVENTS_MAX)
                now_s = now()
                if not ready and not (heap and heap[0][0] <= now_s):
                    # `poll` rounds its time to milliseconds; `select` does not, but looks at every descriptor anew.
                    wait(waiting, (), (), heap[0][0] - now_s if heap else None)
                    ready, now_s = poll(0, _EVENTS_MAX), now()
                routes = self._routes
                for descriptor, _ in ready:
                    if descriptor in routes:
                        try:
                            packet = read(descriptor, self._read_bytes)
                        except BlockingIOError:
                            continue
                        except OSError:  # its namespace was deleted by somebody
                            watched.unregister(descriptor)
                            continue
                        path = routes[descriptor].get(packet[_TARGET_OFFSET:_TARGET_STOP])
                        if path is None or path.blocked or self._filters:
                            self._accept_unusual(descriptor, packet, now_s)
                            continue
                        due_s = path.first.offer(now_s, len(packet) - 10)
                        if due_s >= 0.0 and len(heap) < _BACKLOG_PACKETS_MAX:
                            self._sequence = sequence = self._sequence + 1
                            push(heap, (due_s, sequence, packet, path, 0))
                    elif descriptor == owner:
                        return
                    elif descriptor == listening:
                        self._welcome(watched)
                    else:
                        self._converse(descriptor, watched)
                if heap and heap[0][0] <= now_s:
                    self._deliver(now_s)

    def _deliver(self, now_s: float) -> None:
        """Passes on or writes whatever is due."""
        heap, pop, push, write = self._heap, heapq.heappop, heapq.heappush, os.write
        while heap and heap[0][0] <= now_s:
            due_s, sequence, packet, path, index = pop(heap)
            if now_s - due_s > _LATE_S:
                self._num_late += 1
                self._lateness_s_max = max(self._lateness_s_max, now_s - due_s)
            link = path.links[index]
            if not link.is_up:
                link.dropped_while_down += 1
            elif index == path.last:
                # A device whose TUN is not up, or that sent what its peer's kernel rejects, loses the packet.
                try:  # noqa: SIM105 - `suppress` makes an object for every packet
                    write(path.tun, packet)
                except OSError:
                    pass
            else:
                due_s = path.links[index + 1].offer(due_s, len(packet) - 10)
                if due_s >= 0.0:
                    push(heap, (due_s, sequence, packet, path, index + 1))

    def _accept_unusual(self, tun: int, packet: bytes, now_s: float) -> None:
        """What takes more than one look: no path, a blocked one, closed ports, copies for many."""
        if len(packet) < kernel.TUN_HEADER_BYTES + _PACKET_BYTES_MIN or packet[kernel.TUN_HEADER_BYTES] >> 4 != 4:
            self._unroutable += 1
            return
        target = packet[_TARGET_OFFSET:_TARGET_STOP]
        device = self._device_of[tun]
        if packet[_SOURCE_OFFSET:_TARGET_OFFSET] != self._addresses[device]:
            self._unroutable += 1  # still speaks from an address that it no longer has
            return
        if self._plan.multicast and (target == _BROADCAST or target[0] >> 4 == 14):
            for path in self._routes[tun].values():
                self._accept(device, packet, path, now_s)
            return
        path_or_none = self._routes[tun].get(target)
        if path_or_none is None:
            self._unroutable += 1
        else:
            self._accept(device, packet, path_or_none, now_s)

    def _accept(self, device: str, packet: bytes, path: Route, now_s: float) -> None:
        if path.blocked:
            self._blocked += 1
            return
        inner = packet[kernel.TUN_HEADER_BYTES :]
        if device in self._filters:
            self._filters[device].note_outbound(inner, now_s)
        if path.target in self._filters and not self._filters[path.target].admits(inner, now_s):
            return
        due_s = path.first.offer(now_s, len(inner))
        if due_s != DROPPED and len(self._heap) < _BACKLOG_PACKETS_MAX:
            self._sequence += 1
            heapq.heappush(self._heap, (due_s, self._sequence, packet, path, 0))

    # ---- control

    def _welcome(self, watched: select.epoll) -> None:
        assert self._listener is not None
        with contextlib.suppress(BlockingIOError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._conversations[connection.fileno()] = _Conversation(connection)
            watched.register(connection.fileno(), select.EPOLLIN)

    def _converse(self, descriptor: int, watched: select.epoll) -> None:
        conversation = self._conversations[descriptor]
        if not conversation.read(self._answer):
            watched.unregister(descriptor)
            del self._conversations[descriptor]
            conversation.close()

    def _answer(self, request: Request) -> Reply:
        try:
            match request:
                case Reshape():
                    for link in request.links:
                        self._reshape(link)
                case Block():
                    self._paths[request.source, request.target].blocked = request.blocked
                case CloseInbound():
                    self._close_inbound(request)
                case MoveAddress():
                    self._addresses[request.device] = socket.inet_aton(request.address)
                    self._rebuild_routes()
                case AskTraffic():
                    return self._traffic()
        except KeyError as error:
            return Done(f"this lab has no {error.args[0]}")
        return Done()

    def _reshape(self, change: DirectedLink) -> None:
        pair = (change.source, change.target)
        if pair not in self._by_pair:
            raise KeyError(f"link from {change.source} to {change.target}")
        # It never shrinks: a device learns after the router that its link has become slower.
        self._read_bytes = max(self._read_bytes, _read_bytes([change.shape]))
        link = self._by_pair[pair]
        on_link: list[_Entry] = []
        others: list[_Entry] = []
        for entry in self._heap:
            (on_link if entry[3].links[entry[4]] is link else others).append(entry)
        on_link.sort()
        arrivals = link.reshape(change.shape, time.monotonic(), [entry[0] for entry in on_link])
        others += [(due_s, *entry[1:]) for due_s, entry in zip(arrivals, on_link, strict=True)]
        heapq.heapify(others)
        self._heap[:] = others

    def _close_inbound(self, request: CloseInbound) -> None:
        if request.device not in self._tuns:
            raise KeyError(f"device {request.device}")
        if request.closed:
            self._filters.setdefault(request.device, InboundFilter())
        elif request.device in self._filters:
            self._refused_before += self._filters.pop(request.device).num_refused

    def _traffic(self) -> Traffic:
        now_s = time.monotonic()
        links = [
            LinkTraffic(
                source=spec.source,
                target=spec.target,
                shape=link.shape,
                num_bytes=link.num_bytes,
                num_packets=link.num_packets,
                dropped_by_queue=link.dropped_by_queue,
                dropped_by_chance=link.dropped_by_chance,
                dropped_while_down=link.dropped_while_down,
                queue_s=link.queued_s(now_s),
                queue_s_max=link.queue_s_max,
            )
            for spec, link in zip(self._plan.links, self._links, strict=True)
        ]
        return Traffic(
            links=links,
            at_s=now_s,
            cpu_s=time.process_time(),
            lateness_s_max=self._lateness_s_max,
            num_late=self._num_late,
            unroutable=self._unroutable,
            refused_inbound=self._refused_before + sum(door.num_refused for door in self._filters.values()),
            blocked=self._blocked,
        )


class _Conversation:
    """One client of the control socket: whole lines in, one line out for each."""

    _BUFFER_BYTES_MAX = 1 << 20

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""

    def read(self, answer: Any) -> bool:
        """Takes what is there and answers whole requests; False once the client is gone or speaks nonsense."""
        try:
            data = self._connection.recv(1 << 16)
            self._buffer += data
            if not data or len(self._buffer) > self._BUFFER_BYTES_MAX:
                return False
            *lines, self._buffer = self._buffer.split(b"\n")
            for line in lines:
                reply: Reply = answer(request_decoder.decode(line))
                self._connection.sendall(msgspec.json.encode(reply) + b"\n")
        except BlockingIOError:
            return True
        except (OSError, msgspec.MsgspecError):
            return False
        return True

    def close(self) -> None:
        self._connection.close()


def _read_bytes(shapes: Iterable[LinkShape]) -> int:
    """What the largest packet of any link needs. More costs: a buffer is made for every read."""
    return kernel.TUN_HEADER_BYTES + max((packet_bytes_max(shape.rate_bit_s) for shape in shapes), default=PACKET_BYTES_MAX)


def raise_priority() -> str:
    """The best priority that the system grants, and its name for the facts."""
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_REAL_TIME_PRIORITY))
        return "real-time"
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
        return "nice -20"
    return "normal"


def stay_on_one_core() -> None:
    """On the last one, where fewest interrupts are served. Being moved about costs half of all jitter."""
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def main() -> None:
    """Reads the plan from the first line of standard input, says `Ready`, and serves until that input ends."""
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=RouterPlan)
    router = Router(plan)
    try:
        router.open()
    except OSError as error:
        print(msgspec.json.encode(Done(f"the router cannot start: {error}")).decode(), flush=True)  # noqa: T201
        sys.exit(1)
    kernel.set_timer_slack(1)
    stay_on_one_core()
    priority = raise_priority()
    gc.collect()
    gc.freeze()
    gc.disable()
    print(msgspec.json.encode(Ready(priority)).decode(), flush=True)  # noqa: T201
    with contextlib.suppress(KeyboardInterrupt):
        router.serve(sys.stdin.fileno())


if __name__ == "__main__":
    main()
