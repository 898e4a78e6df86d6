"""Which links towards this device the group should (not) use: disconnect-link at once, connect-link when it has held."""

from __future__ import annotations

from shoal.ids import NodeId
from shoal.membership.messages import Record


class IncomingLinks:
    """The directed links that end here, as presence found them, against what the record says."""

    def __init__(self, me: NodeId, link_hold_s: float) -> None:
        self.me = me
        self._link_hold_s = link_hold_s
        self._down: set[NodeId] = set()
        self._up_at_s: dict[NodeId, float] = {}
        """From when a link that came back counts as up."""

    def change(self, source: NodeId, *, is_up: bool, now_s: float) -> None:
        if is_up:
            self._down.discard(source)
            self._up_at_s[source] = now_s + self._link_hold_s
        else:
            self._down.add(source)
            self._up_at_s.pop(source, None)

    def forget(self, source: NodeId) -> None:
        """It is gone: that is no matter of links."""
        self._down.discard(source)

    def reports(self, record: Record, now_s: float) -> list[tuple[NodeId, bool]]:
        """(source, whether it is up) where the record says otherwise than presence, and it is time to say so."""
        if not self._down and not record.cut_links:
            return []
        cuts = set(record.cut_links)
        found = [
            (member.node, False)
            for member in record.members
            if member.node in self._down and (member.node, self.me) not in cuts
        ]
        for source, target in record.cut_links:
            if target != self.me or source in self._down:
                continue
            if now_s >= self._up_at_s.setdefault(source, now_s + self._link_hold_s):
                found.append((source, True))
        return found

    def due_s(self, record: Record, now_s: float) -> float | None:
        """When the next report is due; None if none is in sight."""
        if self.reports(record, now_s):
            return now_s
        waiting = [
            self._up_at_s[source] for source, target in record.cut_links if target == self.me and source not in self._down
        ]
        return min(waiting) if waiting else None
