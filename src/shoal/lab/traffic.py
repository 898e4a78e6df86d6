"""A plain TCP workload: what the links between devices really carry, for anybody's comparison with the scenario.

`agent` runs on every device: it takes connections, and does what the coordinator tells it over a local socket. `coordinate`
runs beside the lab, on no device: it has every path filled and every round trip timed, and prints one JSON object. `watch`
runs on a device and notes when it could not reach others. Devices use the standard library only, so that an agent is small.

A rate is what arrived in the second half of a transfer, by the receiver's clock: no slow start, no buffers that fill.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PORT = 5201
_FILL, _ECHO = b"F", b"E"
_MESSAGE_BYTES = 64
_BUFFER_BYTES = 1 << 18
_WAKE_BYTES = 1 << 16
_WINDOW_BYTES = 1 << 22
"""1 Gbit/s over 30 ms, and what most systems grant at most. The kernel's own tuning stays at 30 kB now and then."""
_REPORT = struct.Struct("!QdQ")
_PACE_S = 0.001
_CONNECT_TIMEOUT_S = 10.0
_START_TIMEOUT_S = 30.0
_WATCH_TIMEOUT_S = 1.0
_WATCH_PAUSE_S = 0.1
_OUTAGE_S = 0.5
_REAL_TIME_PRIORITY = 1
"""Below the router's."""


# ---- on the devices


def agent(control: Path) -> None:
    """Serves the coordinator on the socket `control` until it is killed."""
    listener = socket.create_server(("0.0.0.0", PORT), backlog=128)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _WINDOW_BYTES)  # what it accepts has it too
    threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    control.unlink(missing_ok=True)  # of an agent that was killed
    with _short_path(control) as name:
        server.bind(name)
    server.listen(128)
    while True:
        connection, _ = server.accept()
        threading.Thread(target=_obey, args=(connection,), daemon=True).start()


def _accept(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_receive, args=(connection,), daemon=True).start()


def _receive(connection: socket.socket) -> None:
    """The other end of a transfer or of round trips."""
    with connection, contextlib.suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        kind = connection.recv(1)
        if kind == _ECHO:
            _go_first()
            while message := connection.recv(_MESSAGE_BYTES, socket.MSG_WAITALL):
                connection.sendall(message)
            return
        first_s = time.monotonic()
        half_s = first_s + struct.unpack("!d", connection.recv(8, socket.MSG_WAITALL))[0] / 2
        # Woken for every packet, the receivers would take the processor from what they measure.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _WAKE_BYTES)
        buffer = bytearray(_BUFFER_BYTES)
        total = before_half = 0
        began_half_s = last_s = first_s
        while count := connection.recv_into(buffer):
            last_s = time.monotonic()
            total += count
            if last_s < half_s:
                before_half, began_half_s = total, last_s
        connection.sendall(_REPORT.pack(total, last_s - began_half_s, total - before_half))


def _obey(connection: socket.socket) -> None:
    with connection, connection.makefile("rwb") as file:
        for line in file:
            order = json.loads(line)
            try:
                reply = _fill(**order["fill"]) if "fill" in order else _echo(**order["echo"])
            except OSError as error:
                reply = {"problem": error.strerror or str(error)}
            file.write(json.dumps(reply).encode() + b"\n")
            file.flush()


def _fill(address: str, seconds: float, bytes_per_s: float | None = None) -> dict[str, Any]:
    """Sends as much as goes, or at a pace, and asks the receiver what arrived."""
    with _connect(address, seconds) as connection:
        connection.sendall(_FILL + struct.pack("!d", seconds))
        data = memoryview(bytes(_BUFFER_BYTES))
        began_s = time.monotonic()
        sent = 0
        while (spent_s := time.monotonic() - began_s) < seconds:
            if bytes_per_s is None:
                connection.send(data)
                continue
            # The kernel's own pacing sends what two of its ticks are worth at once: milliseconds of queue on a fast link.
            sent += connection.send(data[: max(0, int(spent_s * bytes_per_s) - sent)])
            time.sleep(_PACE_S)
        connection.shutdown(socket.SHUT_WR)
        total, half_s, half_bytes = _REPORT.unpack(connection.recv(_REPORT.size, socket.MSG_WAITALL))
    return {"bytes": total, "rate_mbit_s": half_bytes * 8e-6 / half_s if half_s > 0 else 0.0}


def _echo(address: str, count: int, pause_s: float = 0.0) -> dict[str, Any]:
    """Round trips of a small message, in milliseconds."""
    times = []
    _go_first()
    with _connect(address, 60.0) as connection:
        connection.sendall(_ECHO)
        message = bytes(_MESSAGE_BYTES)
        for _ in range(count + 2):
            began_s = time.perf_counter()
            connection.sendall(message)
            if len(connection.recv(_MESSAGE_BYTES, socket.MSG_WAITALL)) < _MESSAGE_BYTES:
                raise OSError("the connection ended")
            times.append((time.perf_counter() - began_s) * 1e3)
            if pause_s:
                time.sleep(pause_s)
    return {"round_trips_ms": times[2:]}  # the first ones are the connection's own warming up


def _go_first() -> None:
    """Round trips shall tell of the link and not of who else wants the processor: this thread goes first, where it may."""
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_REAL_TIME_PRIORITY))


@contextlib.contextmanager
def _connect(address: str, seconds: float) -> Iterator[socket.socket]:
    with socket.create_connection((address, PORT), timeout=_CONNECT_TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(seconds + 30.0)
        yield connection


def watch(peers: list[str], seconds: float) -> dict[str, Any]:
    """Sends each peer a small message ten times a second, by name, connecting again where need be.

    Returns:
        Per peer: `answered`, `rtt_ms_p50` and `outages`, a list of [from, to] in seconds without an answer.
    """
    began_s = time.monotonic()
    with ThreadPoolExecutor(max(1, len(peers))) as pool:
        return dict(zip(peers, pool.map(lambda peer: _watch_one(peer, began_s, began_s + seconds), peers), strict=True))


def _watch_one(peer: str, began_s: float, stop_s: float) -> dict[str, Any]:
    times: list[float] = []
    outages: list[list[float]] = []
    answered_s = began_s
    while (now_s := time.monotonic()) < stop_s:
        with contextlib.suppress(OSError), socket.create_connection((peer, PORT), timeout=_WATCH_TIMEOUT_S) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(_ECHO)
            while (now_s := time.monotonic()) < stop_s:
                connection.sendall(bytes(_MESSAGE_BYTES))
                if len(connection.recv(_MESSAGE_BYTES, socket.MSG_WAITALL)) < _MESSAGE_BYTES:
                    break
                times.append((time.monotonic() - now_s) * 1e3)
                if time.monotonic() - answered_s > _OUTAGE_S:
                    outages.append([round(answered_s - began_s, 2), round(time.monotonic() - began_s, 2)])
                answered_s = time.monotonic()
                time.sleep(_WATCH_PAUSE_S)
        time.sleep(_WATCH_PAUSE_S)
    if now_s - answered_s > _OUTAGE_S:
        outages.append([round(answered_s - began_s, 2), round(now_s - began_s, 2)])
    return {
        "answered": len(times),
        "rtt_ms_p50": round(statistics.median(times), 3) if times else None,
        "outages": outages,
    }


# ---- beside them


class Agents:
    """The coordinator's line to every agent.

    Args:
        controls: the control socket of each device's agent.
        addresses: each device's address in the lab.
    """

    def __init__(self, controls: dict[str, Path], addresses: dict[str, str]) -> None:
        self._controls = controls
        self._addresses = addresses

    def wait_ready(self) -> None:
        """Raises TimeoutError when an agent does not come up."""
        for device in self._controls:
            give_up_s = time.monotonic() + _START_TIMEOUT_S
            while True:
                try:
                    self._dial(device).close()
                    break
                except OSError:
                    if time.monotonic() > give_up_s:
                        raise TimeoutError(f"the traffic agent on {device} does not answer") from None
                    time.sleep(0.02)

    def fill(self, source: str, target: str, *, seconds: float, rate_mbit_s: float | None = None) -> dict[str, Any]:
        """`bytes` and `rate_mbit_s` of one transfer; `problem` where there was none."""
        bytes_per_s = rate_mbit_s * 1e6 / 8 if rate_mbit_s is not None else None
        order = {"address": self._addresses[target], "seconds": seconds, "bytes_per_s": bytes_per_s}
        return self._order(source, {"fill": order}, timeout_s=seconds + 60)

    def echo(self, source: str, target: str, *, count: int, pause_s: float = 0.0) -> dict[str, Any]:
        """`round_trips_ms`, one for each; `problem` where there was none."""
        order = {"address": self._addresses[target], "count": count, "pause_s": pause_s}
        return self._order(source, {"echo": order}, timeout_s=count * (1.0 + pause_s) + 60)

    def _dial(self, device: str) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with _short_path(self._controls[device]) as name:
                connection.connect(name)
        except BaseException:
            connection.close()
            raise
        return connection

    def _order(self, device: str, order: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        with self._dial(device) as connection, connection.makefile("rwb") as file:
            connection.settimeout(timeout_s)
            file.write(json.dumps(order).encode() + b"\n")
            file.flush()
            line = file.readline()
        reply: dict[str, Any] = json.loads(line) if line else {"problem": "its traffic agent has ended"}
        return reply


Expected = Callable[[str, str], dict[str, Any]]


def measure(
    agents: Agents,
    pairs: list[tuple[str, str]],
    *,
    seconds: float,
    num_round_trips: int,
    at_once: bool,
    expected: Expected,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """One row per pair: `from`, `to`, `rate_mbit_s`, `rtt_ms_p50`, `rtt_ms_p99`, or `problem`.

    Args:
        expected: called for a pair as its turn comes; what it returns is part of the row.
        say: takes one line on how far it is.
    """

    def trips(pair: tuple[str, str]) -> dict[str, Any]:
        return agents.echo(*pair, count=num_round_trips) if num_round_trips else {}

    def fill(pair: tuple[str, str]) -> dict[str, Any]:
        return agents.fill(*pair, seconds=seconds)

    if at_once:
        with ThreadPoolExecutor(max(1, len(pairs))) as pool:
            found = [(expected(*pair), trips(pair)) for pair in pairs]
            say(f"filling all {len(pairs)} directions at once for {seconds:g} s")
            return [
                _row(pair, *before, filled) for pair, before, filled in zip(pairs, found, pool.map(fill, pairs), strict=True)
            ]
    rows = []
    for number, pair in enumerate(pairs, start=1):
        say(f"measuring {number} of {len(pairs)}: {pair[0]} to {pair[1]}")
        rows.append(_row(pair, expected(*pair), trips(pair), fill(pair)))
    return rows


def _row(pair: tuple[str, str], expected: dict[str, Any], trip: dict[str, Any], fill: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"from": pair[0], "to": pair[1], **expected}
    if problem := trip.get("problem") or fill.get("problem"):
        row["problem"] = problem
    if "rate_mbit_s" in fill:
        row["rate_mbit_s"] = round(fill["rate_mbit_s"], 2)
    if times := sorted(trip.get("round_trips_ms", [])):
        row["rtt_ms_p50"] = round(statistics.median(times), 3)
        row["rtt_ms_p99"] = round(times[min(len(times) - 1, len(times) * 99 // 100)], 3)
    return row


def _scenario_of(router: Path, paths: dict[tuple[str, str], list[tuple[str, str]]]) -> Expected:
    """What the links of a pair are like as its turn comes, by the router's word."""
    from shoal.lab.paths import path_delay_s, path_rate_bit_s
    from shoal.lab.router_messages import RouterClient

    client = RouterClient(router)

    def expected(source: str, target: str) -> dict[str, Any]:
        shapes = {(link.source, link.target): link.shape for link in client.traffic().links}
        there, back = paths[source, target], paths.get((target, source), [])
        rate = path_rate_bit_s(there, shapes)
        return {
            "scenario_rate_mbit_s": round(rate * 1e-6, 3) if rate is not None else None,
            "scenario_rtt_ms": round((path_delay_s(there, shapes) + path_delay_s(back, shapes)) * 1e3, 3),
        }

    return expected


@contextlib.contextmanager
def _short_path(path: Path) -> Iterator[str]:
    """As `router_messages.short_path`, which would bring a library along."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m shoal.lab.traffic", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    on_device = verbs.add_parser("agent")
    on_device.add_argument("control", type=Path)
    beside = verbs.add_parser("coordinate")
    beside.add_argument("plan", help="JSON, as `run.py` writes it")
    looking = verbs.add_parser("watch")
    looking.add_argument("seconds", type=float)
    looking.add_argument("peers", nargs="+")
    arguments = parser.parse_args()
    if arguments.verb == "watch":
        json.dump(watch(arguments.peers, arguments.seconds), sys.stdout)
        return
    if arguments.verb == "agent":
        agent(arguments.control)
        return
    plan = json.loads(arguments.plan)
    agents = Agents({name: Path(path) for name, path in plan["controls"].items()}, plan["addresses"])
    agents.wait_ready()
    paths = {(source, target): [(start, stop) for start, stop in path] for source, target, path in plan["paths"]}
    rows = measure(
        agents,
        [pair for pair in paths if pair[::-1] in paths],
        seconds=plan["seconds"],
        num_round_trips=plan["num_round_trips"],
        at_once=plan["at_once"],
        expected=_scenario_of(Path(plan["router"]), paths),
        say=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
    )
    json.dump({"pairs": rows}, sys.stdout)


if __name__ == "__main__":
    main()
