"""Decides what the silence of one watched peer means.

A closed connection or silence only raises a doubt. Then others are asked to probe the peer. Who hears it says so, and
then it is the link that is broken, not the peer: **one accuser among several means a link**. If none of those that can
be reached hears it, it is gone. In a pair there is nobody to ask, and the peer's word is all there is.

Source: the indirect probe is SWIM's (Das, Gupta, Motivala, 2002). Differs: a positive answer does not end the doubt
about the link.
"""

from __future__ import annotations

from enum import StrEnum

from shoal.effects import Fact
from shoal.ids import NodeId
from shoal.membership.messages import AskHeard, Probe, Rumours
from shoal.membership.table import Outcome, Table, pairs


class MemberHere(Fact, frozen=True):
    """`node` is here, as `incarnation`."""

    node: NodeId
    incarnation: int


class MemberGone(Fact, frozen=True):
    """`node` is not here any more: it left, or nobody that can be reached hears it."""

    node: NodeId
    incarnation: int


class LinkChanged(Fact, frozen=True):
    """The directed link `source` -> `target` was lost or is back; both devices are here."""

    source: NodeId
    target: NodeId
    is_up: bool


class Peer(StrEnum):
    ABSENT = "absent"
    SOUGHT = "sought"
    HERE = "here"
    DOUBTED = "doubted"
    CUT = "cut"
    GONE = "gone"


_HEARD, _RUMOURED, _DENIED = "heard", "rumoured here", "rumoured gone"
_SILENT, _CLOSED, _MISSED = "silent", "link closed", "missed by a group"
_WITNESSED, _UNHEARD = "a witness hears it", "nobody hears it"
_LEFT, _OUTLIVED, _SLEPT = "left", "outlived", "slept ourselves"
_ASK = (AskHeard, Probe)

PEER = Table(
    "peer",
    Peer.ABSENT,
    {
        (Peer.ABSENT, _HEARD): Outcome(Peer.HERE, announces=(MemberHere,)),
        (Peer.SOUGHT, _HEARD): Outcome(Peer.HERE, announces=(MemberHere,)),
        (Peer.DOUBTED, _HEARD): Outcome(Peer.HERE),
        (Peer.CUT, _HEARD): Outcome(Peer.HERE, announces=(LinkChanged,)),
        (Peer.GONE, _HEARD): Outcome(Peer.HERE, announces=(MemberHere,)),
        (Peer.ABSENT, _RUMOURED): Outcome(Peer.SOUGHT),
        (Peer.GONE, _RUMOURED): Outcome(Peer.SOUGHT),
        # Its own next version is the only thing that convinces the others.
        (Peer.HERE, _DENIED): Outcome(Peer.HERE, sends=(Rumours,)),
        (Peer.SOUGHT, _DENIED): Outcome(Peer.GONE),
        (Peer.DOUBTED, _DENIED): Outcome(Peer.DOUBTED, sends=_ASK),
        (Peer.CUT, _DENIED): Outcome(Peer.CUT, sends=_ASK),
        (Peer.SOUGHT, _SILENT): Outcome(Peer.SOUGHT, sends=_ASK),
        (Peer.HERE, _SILENT): Outcome(Peer.DOUBTED, sends=_ASK),
        (Peer.CUT, _SILENT): Outcome(Peer.CUT, sends=_ASK),
        (Peer.HERE, _CLOSED): Outcome(Peer.DOUBTED, sends=_ASK),
        (Peer.HERE, _MISSED): Outcome(Peer.DOUBTED, sends=_ASK),
        (Peer.SOUGHT, _WITNESSED): Outcome(Peer.CUT, announces=(MemberHere, LinkChanged)),
        (Peer.DOUBTED, _WITNESSED): Outcome(Peer.CUT, announces=(LinkChanged,)),
        (Peer.SOUGHT, _UNHEARD): Outcome(Peer.GONE),
        (Peer.DOUBTED, _UNHEARD): Outcome(Peer.GONE, announces=(MemberGone,)),
        (Peer.CUT, _UNHEARD): Outcome(Peer.GONE, announces=(MemberGone,)),
        (Peer.SOUGHT, _LEFT): Outcome(Peer.ABSENT),
        (Peer.SOUGHT, _OUTLIVED): Outcome(Peer.ABSENT),
        (Peer.SOUGHT, _SLEPT): Outcome(Peer.ABSENT),
        (Peer.GONE, _SLEPT): Outcome(Peer.ABSENT),
        **{
            (peer, event): Outcome(Peer.ABSENT, announces=(MemberGone,))
            for peer in (Peer.HERE, Peer.DOUBTED, Peer.CUT)
            for event in (_LEFT, _OUTLIVED, _SLEPT)
        },
    },
    unmoved=pairs((Peer.HERE,), _HEARD, _WITNESSED, _UNHEARD)
    | pairs((Peer.SOUGHT, Peer.HERE, Peer.DOUBTED, Peer.CUT), _RUMOURED)
    | pairs((Peer.ABSENT, Peer.GONE), _DENIED, _LEFT, _OUTLIVED, _WITNESSED, _UNHEARD)
    | pairs((Peer.ABSENT, Peer.SOUGHT, Peer.DOUBTED, Peer.CUT, Peer.GONE), _CLOSED, _MISSED)
    | pairs((Peer.CUT,), _WITNESSED)
    | pairs((Peer.ABSENT,), _SLEPT),
    # Silence is only listened for where a sound is expected, and a doubt already asks.
    impossible=pairs((Peer.ABSENT, Peer.DOUBTED, Peer.GONE), _SILENT),
    meanings={
        Peer.ABSENT: "not met yet, or left on purpose",
        Peer.SOUGHT: "others say it is here; we have not heard it ourselves",
        Peer.HERE: "heard over our link",
        Peer.DOUBTED: "not heard; witnesses are being asked. It counts as here until they have answered",
        Peer.CUT: "here, as witnesses say, but not over our link",
        Peer.GONE: "nobody that can be reached hears it",
    },
)
_COUNTS_AS_HERE = frozenset({Peer.HERE, Peer.DOUBTED, Peer.CUT})


class Watched:
    """One peer as this device sees it over their link. Times are on this device's clock."""

    __slots__ = (
        "asked_s",
        "denials",
        "heard_s",
        "hears_us_s",
        "is_closed",
        "node",
        "question",
        "relays",
        "state",
        "witnesses",
    )

    def __init__(self, node: NodeId, now_s: float) -> None:
        self.node = node
        self.state = PEER.start
        self.heard_s = now_s
        """When anything last came over the link."""
        self.hears_us_s = now_s
        """When it last said that it hears us."""
        self.is_closed = False
        self.question = 0
        self.asked_s = float("-inf")
        """When witnesses were last asked."""
        self.witnesses: frozenset[NodeId] = frozenset()
        self.denials: set[NodeId] = set()
        self.relays: dict[NodeId, float] = {}
        """Who said when that it hears the peer and is heard by it."""

    @property
    def is_here(self) -> bool:
        """Whether it counts as present: until the doubt is settled, it does."""
        return self.state in _COUNTS_AS_HERE
