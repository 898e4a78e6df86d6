"""An all-reduce as a workload: every device is a member, connected to its neighbours by plain sockets. No torch.

`member` runs on a device and prints one JSON object; `run` starts it on all devices of a lab, and says how long each
all-reduce took from the first member's start to the last one's end: all devices of a lab have this machine's clock.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from shoal.errors import LabError
from shoal.exchange.runner import CHUNK_BYTES, Exchange
from shoal.exchange.wire import SocketWire
from shoal.ids import NodeId
from shoal.lab.cluster import Lab
from shoal.lab.run import read_output
from shoal.topology.paths import links_of
from shoal.topology.tree import Plan

PORT = 5202
_CONNECT_S = 30.0
_NAME_BYTES = 32


class Settings(msgspec.Struct, frozen=True):
    """What every member is told.

    Attributes:
        addresses: of every device.
        plans: one epoch each, in turn, in each of `num_rounds` rounds.
        num_bytes: of each member's contribution; a multiple of 4.
        seconds_max: of one all-reduce.
    """

    addresses: dict[NodeId, str]
    plans: list[Plan]
    num_bytes: int
    num_rounds: int
    seconds_max: float
    chunk_bytes: int = CHUNK_BYTES


class Turn(msgspec.Struct, frozen=True):
    """One all-reduce at one member: when it began and ended, and what came out of it."""

    policy: str
    began_s: float
    ended_s: float
    digest: str


class Measured(msgspec.Struct, frozen=True):
    """One all-reduce of all members."""

    policy: str
    seconds: float


def member(me: NodeId, settings: Settings) -> list[Turn]:
    """Takes part in all rounds.

    Raises:
        LinkError, TimeoutError: an all-reduce failed.
    """
    routes = [route for plan in settings.plans for tree in plan.trees for route in (*tree.up, *tree.down)]
    links = [link for route in routes for link in links_of(route) if me in (link.source, link.target)]
    peers = {end for link in links for end in (link.source, link.target)} - {me}
    rng = np.random.default_rng(list(me.encode()))
    x = rng.standard_normal(settings.num_bytes // 4, dtype=np.float32)
    turns = []
    with Exchange(me, _connect(me, peers, settings.addresses), chunk_bytes=settings.chunk_bytes) as exchange:
        for number in range(settings.num_rounds * len(settings.plans)):
            plan = settings.plans[number % len(settings.plans)]
            exchange.enter(number, plan)
            exchange.all_reduce(x[:1], timeout_s=settings.seconds_max)  # all begin together
            began_s = time.monotonic()
            total = exchange.all_reduce(x, timeout_s=settings.seconds_max)
            turns.append(Turn(plan.policy, began_s, time.monotonic(), hashlib.sha256(total.tobytes()).hexdigest()))
    return turns


def _connect(me: NodeId, peers: set[NodeId], addresses: dict[NodeId, str]) -> dict[NodeId, SocketWire]:
    """A wire to every peer: of two members, the one with the lesser name dials."""
    found: dict[NodeId, socket.socket] = {}
    with socket.create_server((addresses[me], PORT), backlog=64) as listener:
        for peer in sorted(peer for peer in peers if me < peer):
            found[peer] = _dial(addresses[peer])
            found[peer].sendall(me.encode().ljust(_NAME_BYTES))
        listener.settimeout(_CONNECT_S)
        while len(found) < len(peers):
            sock, _ = listener.accept()
            sock.settimeout(_CONNECT_S)
            found[NodeId(sock.recv(_NAME_BYTES, socket.MSG_WAITALL).decode().strip())] = sock
    return {peer: SocketWire(sock) for peer, sock in found.items()}


def _dial(address: str) -> socket.socket:
    give_up_s = time.monotonic() + _CONNECT_S
    while True:
        with contextlib.suppress(OSError):
            return socket.create_connection((address, PORT), timeout=_CONNECT_S)
        if time.monotonic() > give_up_s:
            raise TimeoutError(f"no member answers at {address}:{PORT}")
        time.sleep(0.05)


def run(lab: Lab, plans: Sequence[Plan], *, num_bytes: int, num_rounds: int, seconds_max: float) -> list[Measured]:
    """All rounds on all devices of an open lab.

    Raises:
        LabError: a member failed, or their results are not the same bits; the text has what it said last.
    """
    addresses = {NodeId(name): lab.address(name) for name in lab.devices}
    settings = Settings(addresses, list(plans), num_bytes, num_rounds, seconds_max)
    file = lab.folder / "exchange.json"
    file.write_bytes(msgspec.json.encode(settings))
    command = [sys.executable, "-m", "shoal.lab.exchange_workload", "{device}", str(file)]
    processes = [lab.start(name, command) for name in lab.devices]
    give_up_s = time.monotonic() + _CONNECT_S + seconds_max * num_rounds * len(plans)
    members = []
    for process in processes:
        try:
            status = process.wait(max(0.0, give_up_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise LabError(f"the member on {process.device} did not come to its end") from None
        if status != 0:
            said = process.stderr.read_text(errors="replace").strip().splitlines()
            raise LabError(f"the member on {process.device} failed: {said[-1] if said else f'status {status}'}")
        members.append(msgspec.convert(read_output(process.stdout), list[Turn]))
    measured = []
    for turns in zip(*members, strict=True):
        if len({turn.digest for turn in turns}) != 1:
            raise LabError(f"the members' sums by '{turns[0].policy}' are not the same bits")
        seconds = max(turn.ended_s for turn in turns) - min(turn.began_s for turn in turns)
        measured.append(Measured(turns[0].policy, seconds))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m shoal.lab.exchange_workload", description=__doc__)
    parser.add_argument("me")
    parser.add_argument("settings", type=Path)
    arguments = parser.parse_args()
    turns = member(NodeId(arguments.me), msgspec.json.decode(arguments.settings.read_bytes(), type=Settings))
    sys.stdout.write(msgspec.json.encode(turns).decode())


if __name__ == "__main__":
    main()
