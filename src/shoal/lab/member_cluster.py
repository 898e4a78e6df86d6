"""Several `member_device` processes on loopback: started, told what to do, and listened to."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import LabError

Line = dict[str, Any]
START_S = 20.0


class MemberProcess:
    """One device. `lines` is all that it has told, in order; `node` its id.

    Args:
        arguments: more of `member_device`.
        way_in: words before its command, such as those of a lab.
    """

    def __init__(self, folder: Path, name: str, *arguments: str, way_in: Sequence[str] = ()) -> None:
        self.folder, self.name = folder, name
        self.lines: list[Line] = []
        self._arrived = threading.Condition()
        self.process = subprocess.Popen(
            [*way_in, sys.executable, "-m", "shoal.lab.member_device", str(folder), name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        here = self.wait_for(lambda line: line["is"] == "here", within_s=START_S)
        self.node: str = here["node"]
        self.incarnation: int = here["incarnation"]

    def say(self, *words: str) -> None:
        """Gives it a line."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(msgspec.json.encode(words) + b"\n")
            self.process.stdin.flush()

    def wait_for(self, is_it: Callable[[Line], bool], *, within_s: float = 10.0, since: int = 0) -> Line:
        """The first line from number `since` on that is it.

        Raises:
            LabError: none came in time.
        """
        end_s = time.monotonic() + within_s
        with self._arrived:
            while True:
                for line in self.lines[since:]:
                    if is_it(line):
                        return line
                since = len(self.lines)
                left_s = end_s - time.monotonic()
                if left_s <= 0 or (self.process.poll() is not None and not self._reader.is_alive()):
                    raise LabError(f"{self.name} did not say so within {within_s:g} s; its last words: {self.lines[-3:]}")
                self._arrived.wait(min(left_s, 0.5))

    def ask(self, *words: str, answer: str, within_s: float = 10.0) -> Line:
        """Says a line, and waits for the answer to it.

        Raises:
            LabError: it failed, or took too long.
        """
        since = len(self.lines)
        self.say(*words)
        line = self.wait_for(lambda line: line["is"] in (answer, "failed"), within_s=within_s, since=since)
        if line["is"] == "failed" and answer != "failed":
            raise LabError(f"{self.name}: {words[0]}: {line['text']}")
        return line

    def told(self, kind: str, *, since: int = 0, **fields: Any) -> list[Line]:
        """All lines of a kind with these fields."""
        return [
            line
            for line in self.lines[since:]
            if line["is"] == kind and all(line.get(name) == value for name, value in fields.items())
        ]

    def kill(self) -> None:
        """Ends its process at once."""
        self.process.kill()

    def stop(self) -> None:
        """Lets it leave politely; ends it if it does not."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(5.0)
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            line = msgspec.json.decode(text)
            with self._arrived:
                self.lines.append(line)
                self._arrived.notify_all()


@contextlib.contextmanager
def member_cluster(folder: Path, num_devices: int, *arguments: str) -> Iterator[list[MemberProcess]]:
    """So many devices that are one cluster and all know each other; the first one invited the others.

    Raises:
        LabError: they did not become one.
    """
    devices: list[MemberProcess] = []
    try:
        devices += [MemberProcess(folder / f"device-{index}", f"device-{index}", *arguments) for index in range(num_devices)]
        make_cluster(devices)
        yield devices
    finally:
        for device in devices:
            device.stop()


def make_cluster(devices: Sequence[MemberProcess]) -> None:
    """The first invites the others; returns when all know each other.

    Raises:
        LabError: they did not become one.
    """
    token = devices[0].ask("invite", str(max(1, len(devices) - 1)), answer="invitation")["token"]
    for device in devices[1:]:
        if "devices" not in (joined := device.ask("join", token, answer="joined")):
            raise LabError(f"{device.name} cannot join: {joined['text']}")
    for device in devices:
        for other in devices:
            if other is not device:
                device.wait_for(lambda line, node=other.node: line["is"] == "MemberHere" and line["node"] == node)  # type: ignore[misc]


def make_group(devices: list[MemberProcess], group: str) -> None:
    """Has the first device create a group, and all others taken in as active members.

    Raises:
        LabError: it did not come about.
    """
    devices[0].say("create", group)
    devices[0].wait_for(lambda line: line["is"] == "RecordAdopted")
    for device in devices[1:]:
        device.say("enter", group)
    for device in devices:
        wait_active(device, group, devices)


def wait_active(device: MemberProcess, group: str, members: list[MemberProcess], *, since: int = 0) -> Line:
    """Waits until `device` knows a record in which exactly these are active."""
    nodes = {member.node for member in members}
    return device.wait_for(
        lambda line: line["is"] == "RecordAdopted" and line["group"] == group and set(line["active"]) == nodes,
        within_s=20.0,
        since=since,
    )
