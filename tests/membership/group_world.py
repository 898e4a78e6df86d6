"""Group cores in one world, each checked at every step against its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from shoal.effects import Announce, Commanded, Effect, Event, Fact, Message, Received, Send, TimerFired
from shoal.ids import GroupId, NodeId
from shoal.membership.failure import MemberGone, MemberHere
from shoal.membership.group.ballot import is_quorum
from shoal.membership.group.core import GroupCore
from shoal.membership.group.facts import CreateGroup, JoinGroup, Recover, ReportProgress
from shoal.membership.group.table import LEADERS, RECEPTIONS, ROLE, STANDING, Role, Standing
from shoal.membership.messages import (
    AskJoin,
    AskLeave,
    AskRecord,
    Commit,
    GroupHeartbeat,
    GroupMessage,
    LinkReport,
    Part,
    Propose,
    Stale,
)
from shoal.membership.timing import Timing
from tests.membership.world import World

RUN = GroupId("run")
KEY = f"group/{RUN}"
TIMING = Timing()
_DUTIES: set[type[Message]] = {GroupHeartbeat, Propose, AskJoin, AskLeave, LinkReport, Commit}
"""What goes out by the clock: signs of life, news for those outside, and what is said again until it is answered."""
_BY_SCOPE: set[type[Message]] = {Stale, AskRecord}

visited: set[tuple[Role, str]] = set()
"""Every (role, event) of the table that any test came through."""


class CheckedGroupCore(GroupCore):
    """A group core that compares what it did with what its tables say."""

    def step(self, event: Event, now_s: float) -> list[Effect]:
        self._taken: list[tuple[Role, str]] = []
        standing = self.standing
        effects = super().step(event, now_s)
        sent: set[type[Message]] = {type(each.message) for each in effects if isinstance(each, Send)}
        told: set[type[Fact]] = {type(each.fact) for each in effects if isinstance(each, Announce)}
        outcomes = [ROLE[pair] for pair in self._taken]
        visited.update(self._taken)
        for outcome in outcomes:
            silent = [kind for kind in outcome.sends if kind not in sent and self._has_listeners(kind)]
            assert not silent, (self._taken, "does not send", silent)
        answers: set[type[Message]] = set()
        if isinstance(event, Received) and isinstance(event.message, GroupMessage):
            answers = {*RECEPTIONS[type(event.message)].answers, *_BY_SCOPE}
        allowed = answers.union(_DUTIES, *(outcome.sends for outcome in outcomes), _BY_SCOPE)
        allowed |= self._unwritten_kinds
        if isinstance(event, Commanded) and type(event.command) is Recover:
            allowed.add(Commit)  # the owner's word, not a decision
        assert sent <= allowed, (self.role, event, self._taken, "sends", sent - allowed)
        if standing is not self.standing:
            moves = [key for key in STANDING.entries if key[0] is standing and STANDING[key].state is self.standing]
            kinds = {kind for key in moves for kind in STANDING[key].announces}
            assert kinds & told or Standing.SAVED in (standing, self.standing), (standing, self.standing, told)
        return effects

    _taken: list[tuple[Role, str]]
    _unwritten_kinds: set[type[Message]]

    def _has_listeners(self, kind: type[Message]) -> bool:
        if kind is Propose and is_quorum(self.committed, [self.me]):
            return False  # nobody else needs to be asked
        others = {*self.committed.voters, *(member.node for member in self.committed.members)} - {self.me}
        return bool(others) and kind not in (AskJoin, GroupHeartbeat)

    def _become(self, event: str) -> None:
        self._taken.append((self.role, event))
        super()._become(event)

    def _on_stored(self, number: int) -> None:
        self._unwritten_kinds = {type(message) for _, _, message in self._unwritten}
        super()._on_stored(number)


CheckedGroupCore._unwritten_kinds = set()


class Group(World[CheckedGroupCore]):
    """Devices that may form a group, and believe each other to be here unless they are told otherwise."""

    def __init__(self, *names: str) -> None:
        self.names = tuple(NodeId(name) for name in names)
        super().__init__({name: self.new_core(name) for name in self.names})
        for name in self.names:
            self.learn(name, *(MemberHere(other, 1) for other in self.names if other != name))

    def new_core(
        self, name: NodeId, incarnation: int = 1, stored: bytes | None = None, now_s: float = 0.0
    ) -> CheckedGroupCore:
        return CheckedGroupCore(RUN, name, incarnation=incarnation, timing=TIMING, now_s=now_s, stored=stored)

    def __getitem__(self, name: str) -> CheckedGroupCore:
        return self.cores[NodeId(name)]

    def create(self, name: str, **fields: int) -> None:
        self.command(NodeId(name), CreateGroup(RUN, **fields))  # type: ignore[arg-type]
        self.command(NodeId(name), ReportProgress(RUN, 0, has_state=True))
        self.run(0.3)

    def join(self, name: str, part: Part = "active", *, is_ready: bool = True, steadiness: int = 0) -> None:
        self.command(NodeId(name), JoinGroup(RUN, part, steadiness))
        self.wait(lambda: self[name].own_member() is not None)
        if is_ready and part == "active":
            self.command(NodeId(name), ReportProgress(RUN, 0, has_state=True, ready=True))
            self.wait(lambda: self.parts(name)[name] == "active")

    def wait(self, until: Callable[[], bool], seconds: float = 5.0) -> float:
        """Lets time pass until something holds; returns how long it took."""
        start_s = self.now_s
        while not until():
            assert self.now_s < start_s + seconds, f"not within {seconds} s"
            self.run(0.01)
        return self.now_s - start_s

    @classmethod
    def of(cls, *names: str) -> Group:
        """A group in which all of them are active; the first leads, and is the first voter."""
        made = cls(*names)
        made.create(names[0])
        for name in names[1:]:
            made.join(name)
        made.run(0.5)
        assert [member.node for member in made[names[0]].committed.members] == list(names)
        assert made.leaders() == [names[0]]
        made.facts.clear()
        made.sent.clear()
        return made

    def leaders(self) -> list[str]:
        return [name for name, core in self.cores.items() if core.role in LEADERS and name not in self.stopped]

    def running(self) -> list[str]:
        return [name for name, core in self.cores.items() if name not in self.stopped and core.is_running(self.now_s)]

    def epochs(self, *names: str) -> list[int]:
        return [self[name].committed.epoch for name in names or self.cores]

    def parts(self, name: str) -> dict[str, str]:
        """Who is what, by this device's record."""
        return {member.node: member.part for member in self[name].committed.members}

    def lose(self, name: str, by: Iterable[str] | None = None) -> None:
        """Presence finds it gone."""
        for other in by if by is not None else [each for each in self.cores if each != name]:
            self.learn(NodeId(other), MemberGone(NodeId(name), 1))

    def kill(self, name: str) -> None:
        """Its process ends; the others hear of it from presence a little later. Its disk stays."""
        self.close(NodeId(name))
        self.run(0.01)
        self.lose(name)

    def restart(self, name: str, incarnation: int, *, keeps_disk: bool = True) -> None:
        stored = self.disks[NodeId(name)].get(KEY) if keeps_disk else None
        self.cores[NodeId(name)] = self.new_core(NodeId(name), incarnation, stored, self.now_s)
        for other in self.cores:
            if other != name:
                self.learn(NodeId(name), MemberHere(other, self.cores[other].incarnation))
                self.learn(other, MemberHere(NodeId(name), incarnation))
        self.tell(NodeId(name), TimerFired(KEY))

    def split(self, *sides: str) -> None:
        """Cuts the network between the sides; presence of each finds the other gone."""
        for side in sides:
            for other in sides:
                if side != other:
                    for one in side:
                        for two in other:
                            self.cuts.add((NodeId(one), NodeId(two)))
        self.run(1.8)
        for side in sides:
            for other in sides:
                if side != other:
                    for two in other:
                        self.lose(two, by=side)

    def heal(self) -> None:
        self.cuts.clear()
        for name, core in self.cores.items():
            self.learn(name, *(MemberHere(other, self.cores[other].incarnation) for other in self.cores if other != name))
            del core
