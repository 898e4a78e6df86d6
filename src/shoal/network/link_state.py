"""Decides in which state a directed link is; the table is the specification.

Both ends keep the state of a link. Who receives decides `measured`, `slowed` and `recovered`, because it measures; who
sends learns them from its reports. An idle link that is measured on purpose stays what it is.

Source: link states of elastic training at the edge (arXiv 2505.12815, whose body names no states; the cut is ours).
"""

from __future__ import annotations

from enum import StrEnum

from shoal.membership.table import Outcome, Table, pairs

SLOWED_SHARE = 0.5
"""A link is degraded below this share of its usual rate ..."""
RECOVERED_SHARE = 0.7
"""... and well again above this one. The gap is what keeps a link at the border from flapping."""


class LinkState(StrEnum):
    UNKNOWN = "unknown"
    PROBING = "probing"
    UP = "up"
    DEGRADED = "degraded"
    DOWN = "down"


_UNKNOWN, _PROBING, _UP, _DEGRADED, _DOWN = LinkState
CONNECTED, LOST = "connected", "lost"
PROBE_SENT, PROBE_EXPIRED = "probe sent", "probe expired"
MEASURED, SLOWED, RECOVERED = "measured", "slowed", "recovered"

LINK = Table(
    "link",
    _UNKNOWN,
    {
        (_UNKNOWN, PROBE_SENT): Outcome(_PROBING),
        (_UNKNOWN, MEASURED): Outcome(_UP),
        (_UNKNOWN, LOST): Outcome(_DOWN),
        (_PROBING, MEASURED): Outcome(_UP),
        (_PROBING, PROBE_EXPIRED): Outcome(_UNKNOWN),
        (_PROBING, LOST): Outcome(_DOWN),
        (_UP, SLOWED): Outcome(_DEGRADED),
        (_UP, LOST): Outcome(_DOWN),
        (_DEGRADED, RECOVERED): Outcome(_UP),
        (_DEGRADED, LOST): Outcome(_DOWN),
        (_DOWN, CONNECTED): Outcome(_UNKNOWN),
    },
    meanings={
        _UNKNOWN: "connected, not measured since",
        _PROBING: "its first measurement is under way",
        _UP: "measured, and as fast as usual",
        _DEGRADED: "slower than half of what it usually is",
        _DOWN: "the connection is lost, or this direction is cut",
    },
    unmoved=pairs((_UNKNOWN, _PROBING, _UP, _DEGRADED), CONNECTED)
    | pairs((_PROBING, _UP, _DEGRADED), PROBE_SENT)
    | pairs((_UNKNOWN, _UP, _DEGRADED), PROBE_EXPIRED)
    | pairs((_UP, _DEGRADED), MEASURED)
    | pairs((_DEGRADED,), SLOWED)
    | pairs((_UP,), RECOVERED)
    # What was on the way when a link went down may still arrive.
    | pairs((_DOWN,), LOST, MEASURED, SLOWED, RECOVERED, PROBE_EXPIRED),
    # Only what is connected is probed; slow or well again is what was measured.
    impossible=pairs((_DOWN,), PROBE_SENT) | pairs((_UNKNOWN, _PROBING), SLOWED, RECOVERED),
)


def next_state(state: LinkState, event: str) -> LinkState:
    """The state after the event."""
    return LINK[state, event].state
