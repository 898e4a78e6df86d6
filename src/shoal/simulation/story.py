"""What happened, for people: time, who, what."""

from __future__ import annotations

from shoal.effects import Fact
from shoal.membership import group as groups
from shoal.membership import roster as rosters
from shoal.membership.failure import LinkChanged, MemberGone, MemberHere
from shoal.membership.messages import Record
from shoal.membership.presence import Outranked, Woke
from shoal.node.core import FileDamaged

LINES_MAX = 200_000


class Story:
    """Lines in order. Beyond `LINES_MAX` only counted."""

    def __init__(self) -> None:
        self.lines: list[tuple[float, str, str]] = []
        self.num_left_out = 0

    def add(self, at_s: float, who: str, what: str) -> None:
        if len(self.lines) < LINES_MAX:
            self.lines.append((at_s, who, what))
        else:
            self.num_left_out += 1

    def __str__(self) -> str:
        width = max((len(who) for _, who, _ in self.lines), default=0)
        text = "\n".join(f"{at_s:9.3f}  {who or '*':<{width}}  {what}".rstrip() for at_s, who, what in self.lines)
        return text + (f"\n... and {self.num_left_out} lines more" if self.num_left_out else "")


def describe(fact: Fact) -> str:
    """A fact in words; empty where it says nothing a reader needs."""
    kind = type(fact)
    if kind in _SAYINGS:
        return _SAYINGS[kind].format(fact=fact)
    if isinstance(fact, groups.RecordAdopted):
        return f"{fact.group}: {_describe_record(fact.record)}" + ("" if fact.is_member else ", this device not in it")
    if isinstance(fact, groups.LeaderChanged):
        return f"{fact.group}: " + (
            f"{fact.leader} leads term {fact.term}" if fact.leader else f"no leader, term {fact.term}"
        )
    if isinstance(fact, LinkChanged):
        return f"the link from {fact.source} is {'back' if fact.is_up else 'cut'}"
    if isinstance(fact, rosters.InvitationOverused):
        return f"more came by one invitation than it allows: {' '.join(fact.nodes)} wait"
    return ""


_SAYINGS: dict[type[Fact], str] = {
    MemberHere: "{fact.node} is here",
    MemberGone: "{fact.node} is gone",
    Outranked: "others know a later self, number {fact.incarnation}",
    FileDamaged: "{fact.key} is damaged",
    Woke: "woke up: knows nobody any more",
    rosters.MemberAdded: "{fact.node} may be here",
    rosters.MemberRemoved: "{fact.node} may be here no more",
    rosters.Admitted: "admitted",
    rosters.Rejected: "{fact.peer} refuses: {fact.reason}",
    groups.Suspended: "{fact.group}: suspended, no quorum",
    groups.Resumed: "{fact.group}: goes on",
    groups.CheckpointDue: "{fact.group}: writes a checkpoint",
}
_PARTS = {"active": "", "shadow": "?", "witness": "*"}


def _describe_record(record: Record) -> str:
    members = " ".join(f"{member.node}{_PARTS[member.part]}" for member in record.members)
    voters = "" if {*record.voters} == {member.node for member in record.members} else f", voters {' '.join(record.voters)}"
    cuts = "".join(f", not over {source}>{target}" for source, target in record.cut_links)
    return f"epoch {record.epoch} of generation {record.generation >> 32} is [{members}]{voters}{cuts}"
