"""One device of a cluster, in a process of its own, that obeys lines and tells facts: for measuring what real links, disks
and clocks make of the cores.

    python -m shoal.lab.member_device FOLDER NAME [--listen HOST:PORT] [--realtime] [--link-hold SECONDS] [--retry SECONDS]

A line of JSON on standard input is a list, [verb, argument, ...]:

    invite USES | join TOKEN                      as `shoal invite` and `shoal join`
    create GROUP | enter GROUP | exit GROUP       a group of one; asks to be taken in; asks to be let go
    link GROUP SOURCE up|down                     the link from SOURCE is (not) to be used any more, as presence would find
    status                                        what `shoal status` shows
    skip SECONDS                                  so much time passes for this device alone, as if it had slept
    hold MEGABYTES                                takes that much memory in huge pages, as a worker holds its caches
    quit

Each answer and each fact is a line of JSON on standard output, with the time on the clock that all processes of one
machine share. A member that is taken in as a shadow says at once that it has caught up.
"""

from __future__ import annotations

import argparse
import mmap
import queue
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

from shoal.effects import Fact, Learned
from shoal.errors import ShoalError
from shoal.ids import GroupId, NodeId
from shoal.membership.failure import LinkChanged, MemberGone, MemberHere
from shoal.membership.group import CreateGroup, JoinGroup, LeaveGroup, RecordAdopted, ReportProgress
from shoal.membership.group.facts import Decided, LeaderChanged, Resumed, Suspended
from shoal.membership.roster import MemberAdded, MemberRemoved
from shoal.runtime.channel import split_address
from shoal.runtime.node import clock
from shoal.runtime.node.interpreter import TIMING, Interpreter, NodeOptions
from shoal.runtime.node.owner import AnyAnswer, MakeInvitation, OwnerDesk
from shoal.runtime.node.state import DeviceState

_TOLD = (
    MemberHere, MemberGone, MemberAdded, MemberRemoved, LinkChanged, Decided, LeaderChanged, Suspended, Resumed
)  # fmt: skip


class _Speaker:
    """Lines for standard output, written by a thread of their own: a full pipe must not hold up the links."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def say(self, kind: str, **fields: Any) -> None:
        self._lines.put(msgspec.json.encode({"is": kind, **fields}) + b"\n")

    def close(self) -> None:
        self._lines.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()


class MemberDevice:
    """The device, and what it is told to do."""

    def __init__(self, node: Interpreter, desk: OwnerDesk, speaker: _Speaker) -> None:
        self.node = node
        self.desk = desk
        self._speaker = speaker
        self._memory: list[mmap.mmap] = []
        self._ready: set[tuple[GroupId, int]] = set()
        desk.on_joined = self._on_joined  # type: ignore[method-assign]

    def tell(self, fact: Fact) -> None:
        """Passes a fact on; on the interpreter's thread."""
        if isinstance(fact, RecordAdopted):
            record = fact.record
            self._speaker.say(
                "RecordAdopted",
                at_s=clock.now_s(),
                group=fact.group,
                epoch=record.epoch,
                leader=record.leader,
                active=[member.node for member in record.members if member.part == "active"],
                cut_links=[list(each) for each in record.cut_links],
            )
            self._catch_up(fact)
        elif isinstance(fact, _TOLD):
            self._speaker.say(type(fact).__name__, at_s=clock.now_s(), **msgspec.to_builtins(fact))

    def obey(self, verb: str, *words: str) -> None:
        """Does what a line says; on the interpreter's thread."""
        try:
            getattr(self, f"_do_{verb}")(*words)
        except (ShoalError, ValueError) as error:
            self._speaker.say("failed", verb=verb, text=str(error))

    def _on_joined(self, answer: AnyAnswer) -> None:
        self._speaker.say("joined", **msgspec.to_builtins(answer))

    def _catch_up(self, fact: RecordAdopted) -> None:
        for member in fact.record.members:
            key = (fact.group, fact.record.epoch)
            if member.node == self.node.me and member.part == "shadow" and key not in self._ready:
                self._ready.add(key)
                self.node.command(ReportProgress(fact.group, fact.record.first_step - 1, has_state=True, ready=True))

    def _do_invite(self, uses: str) -> None:
        self._speaker.say("invitation", token=self.desk.invite(MakeInvitation(int(uses))).token)

    def _do_join(self, token: str) -> None:
        self.desk.join(token, None)

    def _do_create(self, group: str) -> None:
        self.node.command(CreateGroup(GroupId(group), steadiness=1))
        self.node.command(ReportProgress(GroupId(group), 0, has_state=True, ready=True))

    def _do_enter(self, group: str) -> None:
        self.node.command(JoinGroup(GroupId(group)))

    def _do_exit(self, group: str) -> None:
        self.node.command(LeaveGroup(GroupId(group)))

    def _do_link(self, group: str, source: str, how: str) -> None:
        core = self.node.core.groups[GroupId(group)]
        fact = LinkChanged(NodeId(source), self.node.me, is_up=how == "up")
        self.node.carry_out(core.step(Learned(fact), clock.now_s()))
        self.node.links.flush()

    def _do_hold(self, megabytes: str) -> None:
        threading.Thread(target=self._hold, args=(megabytes,), daemon=True).start()

    def _hold(self, megabytes: str) -> None:
        """Not on the links' thread: taking memory takes time."""
        num_bytes = int(megabytes) << 20
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, num_bytes, mmap.PAGESIZE):
            memory[offset] = 1
        self._memory.append(memory)
        self._speaker.say("holds", num_bytes=num_bytes)

    def _do_skip(self, seconds: str) -> None:
        now_s = clock.now_s
        skipped_s = float(seconds)
        clock.now_s = lambda: now_s() + skipped_s

    def _do_status(self) -> None:
        self._speaker.say("status", **msgspec.to_builtins(self.desk.status()))


def main() -> None:
    """Runs until told to quit, or until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--link-hold", type=float, default=TIMING.link_hold_s)
    parser.add_argument("--retry", type=float, default=TIMING.retry_s)
    arguments = parser.parse_args()
    speaker = _Speaker()
    options = NodeOptions(
        name=arguments.name,
        listen=split_address(arguments.listen, default_port=0),
        journal=arguments.journal,
        timing=msgspec.structs.replace(TIMING, link_hold_s=arguments.link_hold, retry_s=arguments.retry),
        is_realtime=arguments.realtime,
    )
    told: list[MemberDevice] = []
    node = Interpreter(DeviceState(arguments.folder), options, on_fact=lambda fact: told[0].tell(fact))
    device = MemberDevice(node, OwnerDesk(node), speaker)
    told.append(device)
    node.start()
    speaker.say("here", node=node.me, port=node.port, incarnation=node.core.incarnation)
    try:
        for line in sys.stdin:
            verb, *words = msgspec.json.decode(line, type=list[str])
            if verb == "quit":
                break
            node.post(lambda verb=verb, words=words: device.obey(verb, *words))  # type: ignore[misc]
    finally:
        node.stop()
        speaker.close()


if __name__ == "__main__":
    main()
