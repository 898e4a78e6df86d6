"""Whose messages reach the cores: the specification of what a peer is to this device over one link.

A link has proven the peer's key, no more. A `Greeting` brings its stamps, and the roster judges. Until then nothing
counts but greetings, joining, statements by which an unknown peer shows that it belongs, and removals by which a
member shows why it refuses. Trust ends with the link, with a removal, and with a long sleep of this device, after which
it knows nothing any more about who may be here.
"""

from __future__ import annotations

from enum import StrEnum

from shoal.effects import Fact
from shoal.ids import NodeId
from shoal.membership.messages import Greeting, Refused, RosterKeys, RosterStatements, StampGiven
from shoal.membership.table import Outcome, Table, pairs


class Trusted(Fact, frozen=True):
    """From now on `peer`, as `incarnation`, is listened to."""

    peer: NodeId
    incarnation: int


class Trust(StrEnum):
    STRANGER = "stranger"
    REFUSED = "refused"
    TRUSTED = "trusted"


OPENED, SPOKE = "link opened", "it speaks ungreeted"
UNKNOWN, REJECTED, ACCEPTED = "greets, unknown here", "greets, not to be trusted", "greets, to be trusted"
ENDED = "link closed, left, removed, or slept ourselves"
_JUDGED = {
    UNKNOWN: Outcome(Trust.REFUSED, sends=(RosterKeys, Refused, RosterStatements)),
    REJECTED: Outcome(Trust.REFUSED, sends=(Refused, RosterStatements, StampGiven)),
    ACCEPTED: Outcome(Trust.TRUSTED, sends=(RosterKeys, StampGiven), announces=(Trusted,)),
}

TRUST = Table(
    "trust",
    Trust.STRANGER,
    {
        **{(trust, event): outcome for trust in Trust for event, outcome in _JUDGED.items()},
        **{(trust, OPENED): Outcome(trust, sends=(Greeting,)) for trust in Trust},
        (Trust.STRANGER, SPOKE): Outcome(Trust.STRANGER, sends=(Greeting,)),
        (Trust.REFUSED, SPOKE): Outcome(Trust.REFUSED, sends=(Greeting,)),
        (Trust.REFUSED, ENDED): Outcome(Trust.STRANGER),
        (Trust.TRUSTED, ENDED): Outcome(Trust.STRANGER),
    },
    unmoved=pairs((Trust.STRANGER,), ENDED),
    impossible=pairs((Trust.TRUSTED,), SPOKE),
    meanings={
        Trust.STRANGER: "nothing is known but its key",
        Trust.REFUSED: "it greeted, and its roster entry or its stamps do not do; looked at again when the roster grows",
        Trust.TRUSTED: "a member, vouched for; all its messages count",
    },
)
