"""What the owner may ask of a group, and what a group announces."""

from __future__ import annotations

from shoal.effects import Command, Fact
from shoal.ids import GroupId, NodeId
from shoal.membership.messages import Attachment, Part, Record


class GroupCommand(Command, frozen=True):
    group: GroupId


class CreateGroup(GroupCommand, frozen=True):
    """Start a group with this device as its only member."""

    part: Part = "active"
    steadiness: int = 0
    address: str = ""


class JoinGroup(GroupCommand, frozen=True):
    """Ask to be taken in, until it is done."""

    part: Part = "active"
    steadiness: int = 0
    address: str = ""


class LeaveGroup(GroupCommand, frozen=True):
    """Ask to be let go, until it is done."""


class ReportProgress(GroupCommand, frozen=True):
    """`step` is the last one applied here; `has_state` whether it may be built on; `ready` whether a shadow has caught
    up."""

    step: int
    has_state: bool
    ready: bool = False


class Attach(GroupCommand, frozen=True):
    """Have the group agree on this. Only the leader proposes; elsewhere it changes nothing."""

    attachment: Attachment


class Recover(GroupCommand, frozen=True):
    """The owner's last resort: go on without a quorum, in a generation that outranks all epochs before."""


class GroupFact(Fact, frozen=True):
    group: GroupId


class RecordAdopted(GroupFact, frozen=True):
    """This device knows `record` to be committed. `is_member`: it is in it, with this incarnation."""

    record: Record
    is_member: bool


class Decided(GroupFact, frozen=True):
    """At the leader: `decide_s` from the event that made it propose to the quorum's last acknowledgement."""

    epoch: int
    decide_s: float


class LeaderChanged(GroupFact, frozen=True):
    """`leader` leads in `term`, as far as this device knows; None: nobody."""

    leader: NodeId | None
    term: int


class Suspended(GroupFact, frozen=True):
    """No quorum: no update, no admission from the next step boundary on. State is held until `hold_until_s`."""

    hold_until_s: float


class CheckpointDue(GroupFact, frozen=True):
    """A suspended member's hold time is about to end: write its state to disk."""


class Resumed(GroupFact, frozen=True):
    """There is a quorum again."""


class Doubted(GroupFact, frozen=True):
    """The leader misses `node`: presence should find out what it is."""

    node: NodeId
