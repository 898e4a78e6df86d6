"""How long the protocols wait. One value per cluster kind; every figure has its reason beside it."""

from __future__ import annotations

import msgspec


class Timing(msgspec.Struct, frozen=True):
    """All in seconds. The defaults are for a LAN; `for_round_trip` stretches what a slow network needs longer."""

    heartbeat_s: float = 0.5
    """Presence, per watched link and direction."""
    silence_s: float = 1.75
    """A link is doubted after this: three heartbeats may be lost and a fourth late."""
    witness_s: float = 0.3
    """Witnesses that have not answered by then count as unreachable."""
    rumour_sends: int = 6
    """How often one device passes one rumour on, per neighbour set; together with digests it reaches everyone."""
    digest_patience_s: float = 3.0
    """Digests that differ for so long are settled by exchanging everything."""
    stamp_every_s: float = 3600.0
    """How often a neighbour's stamp is renewed."""
    stamp_valid_s: float = 7 * 86400.0
    """A peer that nobody vouched for within this is not trusted."""
    stranger_s: float = 60.0
    """A device that slept longer knows nothing any more about who is here."""

    lead_every_s: float = 0.1
    """The leader's heartbeat."""
    lease_s: float = 0.4
    """Without the leader for so long, a member may vote for another; without a quorum, a leader steps down."""
    widen_s: float = 0.002
    """A proposal goes to a quorum first. The other voters are asked after so long, if it is still not decided then."""
    stagger_s: float = 0.05
    """The second voter in line stands so much later than the first, the third twice."""
    suspend_s: float = 1.0
    """Without a leader that has a quorum for so long, a member stops at the next step: two leases, room for one election."""
    hold_s: float = 300.0
    """How long a suspended member keeps its state in memory; its checkpoint is due before."""
    retry_s: float = 0.5
    """Requests to join, to leave and reports of links are repeated until the record shows them."""
    link_hold_s: float = 2.0
    """A link that came back is used again after it held for so long."""

    @classmethod
    def for_round_trip(cls, round_trip_p99_s: float) -> Timing:
        """For links whose round trips are mostly below `round_trip_p99_s`: the lease is `max(1 s, 4 x p99)` beyond a
        LAN's."""
        if round_trip_p99_s <= 0.02:
            return cls()
        lease_s = max(1.0, 4 * round_trip_p99_s)
        return cls(
            silence_s=max(1.75, 1.5 + 2 * round_trip_p99_s),
            witness_s=max(0.3, 2.5 * round_trip_p99_s),
            lead_every_s=lease_s / 4,
            widen_s=round_trip_p99_s,
            lease_s=lease_s,
            stagger_s=max(0.05, round_trip_p99_s),
            suspend_s=2.5 * lease_s,
            retry_s=max(0.5, 2 * round_trip_p99_s),
        )
