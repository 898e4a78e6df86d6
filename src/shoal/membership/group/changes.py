"""What the leader of a group knows and the record does not show yet, and the record that would show it."""

from __future__ import annotations

import msgspec

from shoal.ids import NodeId
from shoal.membership.group.ballot import record_hash
from shoal.membership.messages import Attachment, GroupHeartbeatAck, Member, Part, Record

VOTERS_MAX = 64
"""Beyond it a decision costs more than it is worth; further members follow without a vote."""


class Changes:
    """Wishes and findings since the committed record. Every member keeps some of them, since it may lead next."""

    def __init__(self, me: NodeId) -> None:
        self.me = me
        self.joins: dict[NodeId, tuple[Member, int]] = {}
        """Who asks to be taken in, and the last step whose state it still has, -1 for none."""
        self.leaves: dict[NodeId, int] = {}
        """Which incarnation asks to be let go."""
        self.ready: dict[NodeId, int] = {}
        """Which incarnation of a shadow has caught up."""
        self.steps: dict[NodeId, int] = {}
        self.heard: set[NodeId] = set()
        """Who reported in the present term, as the incarnation that is listed."""
        self.links: dict[tuple[NodeId, NodeId], bool] = {}
        self.attachments: dict[str, Attachment] = {}
        self.gone: dict[NodeId, int] = {}
        """Whom presence does not find, and as which incarnation it was known last."""
        self.removed: set[NodeId] = set()
        """By the roster."""

    def note_progress(self, peer: NodeId, message: GroupHeartbeatAck, record: Record, listed: Member | None) -> bool:
        """Takes a member's report; returns whether a shadow became ready by it."""
        if listed is not None and listed.incarnation == message.incarnation:
            self.heard.add(peer)
            self.steps[peer] = max(message.step, self.steps.get(peer, -1))
        # A report on an earlier epoch may be of a former time as a shadow.
        is_ready = (
            message.ready
            and message.scope.epoch == record.epoch
            and listed is not None
            and listed.part == "shadow"
            and self.ready.get(peer) != message.incarnation
        )
        if is_ready:
            self.ready[peer] = message.incarnation
        return is_ready

    def settle(self, record: Record) -> None:
        """What the record shows need not be proposed again."""
        members = {member.node: member for member in record.members}
        self.joins = {
            node: join
            for node, join in self.joins.items()
            if node not in members or members[node].incarnation < join[0].incarnation
        }
        self.leaves = {node: incarnation for node, incarnation in self.leaves.items() if node in members}
        self.ready = {
            node: incarnation
            for node, incarnation in self.ready.items()
            if node in members and members[node].incarnation == incarnation and members[node].part == "shadow"
        }
        cuts = set(record.cut_links)
        self.links = {link: is_up for link, is_up in self.links.items() if (link in cuts) == is_up}
        self.attachments = {
            name: attachment for name, attachment in self.attachments.items() if attachment not in record.attachments
        }
        self.steps = {node: step for node, step in self.steps.items() if node in members}

    def next_record(self, old: Record, term: int) -> Record | None:
        """The child of `old` that the present knowledge asks for; None where the record already says it all."""
        if self._is_shown(old):
            return None
        touched = self._touched()
        members = self._next_members(old, touched) if touched else old.members
        is_same = members == old.members and not self.gone and len(old.voters) == min(len(members), VOTERS_MAX)
        voters = old.voters if is_same else self._next_voters(old, members)
        cut_links = self._next_cuts(old, {member.node for member in members})
        attachments = old.attachments
        if self.attachments:
            merged = {attachment.capability: attachment for attachment in old.attachments} | self.attachments
            attachments = tuple(merged[name] for name in sorted(merged))
        wanted = (members, voters, cut_links, attachments)
        if wanted == (old.members, old.voters, old.cut_links, old.attachments) or (members and not voters):
            return None
        actives = [member.node for member in members if member.part == "active"]
        first_step = 1 + max((self.steps.get(node, -1) for node in actives), default=old.first_step - 1)
        return Record(
            old.group,
            old.generation,
            old.epoch + 1,
            record_hash(old),
            term,
            self.me,
            members,
            voters,
            max(0, first_step),
            cut_links,
            attachments,
        )

    def _is_shown(self, old: Record) -> bool:
        """Whether there is plainly nothing to propose: a leader asks ten times a second."""
        if self.joins or self.leaves or self.links or self.attachments or self.gone or self.ready:
            return False
        return len(old.voters) == min(len(old.members), VOTERS_MAX) and (
            not self.removed or not any(member.node in self.removed for member in old.members)
        )

    def _touched(self) -> set[NodeId]:
        """Whose place in the record may change. A decision waits for this, so nobody else is looked at."""
        return {*self.joins, *self.leaves, *self.ready, *self.gone, *self.removed}

    def _next_members(self, old: Record, touched: set[NodeId]) -> tuple[Member, ...]:
        members = []
        for member in old.members:
            wanted = self._next_member(old, member) if member.node in touched else member
            if wanted is not None:
                members.append(wanted)
        listed = {member.node for member in old.members}
        for node, (member, _) in self.joins.items():
            if node not in listed and node not in self.removed:
                part: Part = "shadow" if member.part == "active" else member.part
                members.append(msgspec.structs.replace(member, part=part))
        # State must survive: without anyone who has it, absent members stay listed until one of them returns.
        if not any(member.part == "active" for member in members):
            kept = {member.node for member in members}
            members += [
                member
                for member in old.members
                if member.part == "active" and member.node not in kept and not self._has_left(member)
            ]
        return tuple(members)

    def _next_member(self, old: Record, member: Member) -> Member | None:
        """What becomes of a listed member, None if it goes."""
        if self._has_left(member):
            return None if member.node in self.removed or self._is_dispensable(old, member) else member
        join = self.joins.get(member.node)
        if join is not None and join[0].incarnation > member.incarnation:
            return self._next_self(old, member, *join)
        if self.is_gone(member):
            return None
        if member.part == "shadow" and self.ready.get(member.node) == member.incarnation:
            return msgspec.structs.replace(member, part="active")
        return member

    def _next_self(self, old: Record, member: Member, wanted: Member, state_step: int) -> Member:
        """What becomes of a member that came back as a later incarnation.

        Was it active, and nobody is ahead of the state that it still has, then it goes on: nothing was committed without
        it. That is known when all others that are here have reported, or have come back themselves.
        """
        if member.part != "active" or wanted.part != "active" or state_step < 0:
            part: Part = "shadow" if wanted.part == "active" else wanted.part
            return msgspec.structs.replace(wanted, part=part)
        for other in old.members:
            if other.node == member.node or self.is_gone(other) or self._has_left(other):
                continue
            join = self.joins.get(other.node)
            if join is not None and join[0].incarnation > other.incarnation:
                other_step = join[1] if other.part == "active" else -1
            elif other.node != self.me and other.node not in self.heard:
                return member
            else:
                has_state = other.part == "active" or self.ready.get(other.node) == other.incarnation
                other_step = self.steps.get(other.node, -1) if has_state else -1
            if other_step > state_step:
                return msgspec.structs.replace(wanted, part="shadow")
        return wanted

    def _next_voters(self, old: Record, members: tuple[Member, ...]) -> tuple[NodeId, ...]:
        """All that can be reached, the steadiest first; among equals, who has been a voter keeps its place."""
        position = {voter: index for index, voter in enumerate(old.voters)}
        reachable = [member for member in members if not self.is_gone(member)]
        reachable.sort(key=lambda member: (-member.steadiness, position.get(member.node, VOTERS_MAX), member.node))
        return tuple(member.node for member in reachable[:VOTERS_MAX])

    def _next_cuts(self, old: Record, nodes: set[NodeId]) -> tuple[tuple[NodeId, NodeId], ...]:
        cuts = {link for link in old.cut_links if link[0] in nodes and link[1] in nodes}
        for link, is_up in self.links.items():
            if is_up:
                cuts.discard(link)
            elif link[0] in nodes and link[1] in nodes:
                cuts.add(link)
        return tuple(sorted(cuts))

    def _is_dispensable(self, old: Record, member: Member) -> bool:
        """Whether those who stay have the state that the epoch started from. Until then a leaver stays as their donor."""
        staying = [
            self.steps.get(other.node, -1)
            for other in old.members
            if other.part == "active" and not self._has_left(other) and not self.is_gone(other)
        ]
        return member.part != "active" or not staying or max(staying) >= old.first_step - 1

    def _has_left(self, member: Member) -> bool:
        return member.node in self.removed or self.leaves.get(member.node, -1) >= member.incarnation

    def is_gone(self, member: Member) -> bool:
        """Whether it is known to be away."""
        return member.node in self.gone and member.node != self.me
