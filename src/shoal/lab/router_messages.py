"""What the router is told and asked, and what it answers: one JSON object per line, over a local socket."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from shoal.errors import LabError
from shoal.lab.shaping import LinkShape

ANSWER_TIMEOUT_S = 10.0
_UNIX_PATH_BYTES_MAX = 100


class Port(msgspec.Struct, frozen=True):
    """One device's TUN: its name in which namespace (a path), and the device's address."""

    device: str
    namespace: str
    tun: str
    address: str


class DirectedLink(msgspec.Struct, frozen=True):
    """A link from device or hub `source` to `target`."""

    source: str
    target: str
    shape: LinkShape


class PathPlan(msgspec.Struct, frozen=True):
    """How packets get from one device to another: indices into the list of links."""

    source: str
    target: str
    links: list[int]


class RouterPlan(msgspec.Struct, frozen=True):
    """Everything the router is started with; `multicast` is copied to every device in reach."""

    ports: list[Port]
    links: list[DirectedLink]
    paths: list[PathPlan]
    seed: int
    socket: str
    multicast: bool = False
    closed_inbound: list[str] = []


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The router has its TUN devices and serves; `priority` says which one the system granted."""

    priority: str


class Reshape(msgspec.Struct, frozen=True, tag=True):
    """Links take new shapes, all in the same instant."""

    links: list[DirectedLink]


class Block(msgspec.Struct, frozen=True, tag=True):
    """Packets from one device to another are lost, whatever the links between; or no longer are."""

    source: str
    target: str
    blocked: bool


class CloseInbound(msgspec.Struct, frozen=True, tag=True):
    """A device's ports are closed to the outside, or open."""

    device: str
    closed: bool


class MoveAddress(msgspec.Struct, frozen=True, tag=True):
    """A device has another address from now on."""

    device: str
    address: str


class AskTraffic(msgspec.Struct, frozen=True, tag=True):
    """What has passed?"""


class LinkTraffic(msgspec.Struct, frozen=True):
    """One directed link: its shape now, what was accepted and dropped since the start, and its queue, in seconds."""

    source: str
    target: str
    shape: LinkShape
    num_bytes: int
    num_packets: int
    dropped_by_queue: int
    dropped_by_chance: int
    dropped_while_down: int
    queue_s: float
    queue_s_max: float


class Traffic(msgspec.Struct, frozen=True, tag=True):
    """The router's whole account.

    `at_s` is on the system's monotonic clock; `cpu_s` the router's own processor time. `num_late` packets were delivered
    more than a millisecond after their time, `lateness_s_max` at worst (0 where none was). `unroutable` packets had no path,
    `refused_inbound` met closed ports, `blocked` a cut pair or a device asleep.
    """

    links: list[LinkTraffic]
    at_s: float
    cpu_s: float
    lateness_s_max: float
    num_late: int
    unroutable: int
    refused_inbound: int
    blocked: int


class Done(msgspec.Struct, frozen=True, tag=True):
    """It is as was asked; `problem` says why it is not."""

    problem: str = ""


Request = Reshape | Block | CloseInbound | MoveAddress | AskTraffic
Reply = Ready | Done | Traffic
Answer = TypeVar("Answer", Done, Traffic)

_reply_decoder = msgspec.json.Decoder(Reply)
request_decoder = msgspec.json.Decoder(Request)


class RouterClient:
    """A connection to a router that runs. Any process of the same user may have one."""

    def __init__(self, path: Path) -> None:
        """Raises LabError where no router answers."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(ANSWER_TIMEOUT_S)
            with short_path(path) as name:
                self._socket.connect(name)
        except OSError as error:
            self._socket.close()
            raise LabError(f"the lab's router does not answer at {path} ({error}): see `shoal lab clean`") from error
        self._file = self._socket.makefile("rb")

    def ask(self, request: Request, kind: type[Answer]) -> Answer:
        """Sends a request and returns its answer. Raises LabError."""
        try:
            self._socket.sendall(msgspec.json.encode(request) + b"\n")
            line = self._file.readline()
            reply = _reply_decoder.decode(line)
        except (OSError, msgspec.MsgspecError) as error:
            raise LabError("the lab's router has ended: `shoal lab clean` removes what is left of its lab") from error
        if isinstance(reply, Done) and reply.problem:
            raise LabError(reply.problem)
        assert isinstance(reply, kind)
        return reply

    def traffic(self) -> Traffic:
        return self.ask(AskTraffic(), Traffic)

    def reshape(self, links: Sequence[DirectedLink]) -> None:
        self.ask(Reshape(list(links)), Done)

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name for a local socket: the system allows about a hundred bytes, so long folders go by their descriptor."""
    if len(os.fsencode(path)) <= _UNIX_PATH_BYTES_MAX:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
