"""The specification of a group on one device: its roles, whether it may act, who acts on which message, and the five
events."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

from shoal.effects import Message
from shoal.membership.group.facts import CheckpointDue, Decided, LeaderChanged, RecordAdopted, Resumed, Suspended
from shoal.membership.messages import (
    Acknowledge,
    AskJoin,
    AskLeave,
    AskRecord,
    Commit,
    GroupHeartbeat,
    GroupHeartbeatAck,
    GroupMessage,
    LinkReport,
    Propose,
    Stale,
    Vote,
    VoteRequest,
)
from shoal.membership.table import Outcome, Table, pairs


class Role(StrEnum):
    OUTSIDE = "outside"
    JOINING = "joining"
    FOLLOWING = "following"
    ASKING = "asking"
    STANDING = "standing"
    RECOVERING = "recovering"
    LEADING = "leading"
    PROPOSING = "proposing"


ALL = tuple(Role)
LEADERS = (Role.RECOVERING, Role.LEADING, Role.PROPOSING)
CAMPAIGN = (Role.ASKING, Role.STANDING)
NOT_IN = (Role.OUTSIDE, Role.JOINING)


def _all_but(*roles: Role) -> tuple[Role, ...]:
    return tuple(role for role in Role if role not in roles)


_ADOPTED = (RecordAdopted,)
_LED = (LeaderChanged,)

ROLE = Table(
    "role",
    Role.OUTSIDE,
    {
        (Role.OUTSIDE, "wants in"): Outcome(Role.JOINING, sends=(AskJoin,)),
        (Role.JOINING, "gives up"): Outcome(Role.OUTSIDE),
        (Role.OUTSIDE, "in the record"): Outcome(Role.FOLLOWING, announces=_ADOPTED),
        (Role.JOINING, "in the record"): Outcome(Role.FOLLOWING, announces=_ADOPTED),
        (Role.FOLLOWING, "in the record"): Outcome(Role.FOLLOWING, announces=_ADOPTED),
        (Role.RECOVERING, "in the record"): Outcome(Role.RECOVERING, announces=_ADOPTED),
        (Role.PROPOSING, "in the record"): Outcome(Role.PROPOSING, announces=_ADOPTED),
        (Role.OUTSIDE, "not in the record"): Outcome(Role.OUTSIDE, announces=_ADOPTED),
        (Role.JOINING, "not in the record"): Outcome(Role.JOINING, announces=_ADOPTED),
        (Role.FOLLOWING, "not in the record"): Outcome(Role.OUTSIDE, announces=_ADOPTED),
        (Role.RECOVERING, "not in the record"): Outcome(Role.OUTSIDE, announces=_ADOPTED),
        (Role.PROPOSING, "not in the record"): Outcome(Role.OUTSIDE, announces=_ADOPTED),
        (Role.FOLLOWING, "lease ran out"): Outcome(Role.ASKING, sends=(VoteRequest,), announces=_LED),
        (Role.ASKING, "trial won"): Outcome(Role.STANDING, sends=(VoteRequest,)),
        (Role.ASKING, "vote lost"): Outcome(Role.FOLLOWING),
        (Role.STANDING, "vote lost"): Outcome(Role.FOLLOWING),
        (Role.STANDING, "elected"): Outcome(Role.LEADING, sends=(GroupHeartbeat,), announces=_LED),
        (Role.STANDING, "elected, record unfinished"): Outcome(Role.RECOVERING, sends=(Propose, GroupHeartbeat)),
        (Role.LEADING, "change wanted"): Outcome(Role.PROPOSING, sends=(Propose,)),
        (Role.PROPOSING, "committed"): Outcome(Role.LEADING, sends=(Commit,), announces=(Decided,)),
        # Others may have known that record to be committed, and gone on from it: it asks for votes of the new epoch.
        (Role.RECOVERING, "committed"): Outcome(Role.STANDING, sends=(Commit, VoteRequest), announces=(Decided,)),
        **{(role, "committed"): Outcome(role, sends=(Commit,), announces=(Decided,)) for role in NOT_IN},
        (Role.LEADING, "no voter any more"): Outcome(Role.FOLLOWING, announces=_LED),
        (Role.STANDING, "no voter any more"): Outcome(Role.FOLLOWING, announces=_LED),
        **{(role, "quorum lost"): Outcome(Role.FOLLOWING, announces=_LED) for role in LEADERS},
        **{(role, "leader or epoch heard"): Outcome(Role.FOLLOWING, announces=_LED) for role in (*CAMPAIGN, *LEADERS)},
    },
    unmoved=pairs(_all_but(Role.OUTSIDE), "wants in")
    | pairs(_all_but(Role.JOINING), "gives up")
    | pairs((*NOT_IN, Role.FOLLOWING), "leader or epoch heard")
    | pairs(_all_but(*CAMPAIGN), "vote lost"),
    # Whoever learns of a record that it did not propose itself, has heard of another leader first.
    impossible=pairs((*CAMPAIGN, Role.LEADING), "in the record", "not in the record")
    | pairs(_all_but(Role.FOLLOWING), "lease ran out")
    | pairs(_all_but(Role.ASKING), "trial won")
    | pairs(_all_but(Role.STANDING), "elected", "elected, record unfinished")
    | pairs(_all_but(Role.LEADING), "change wanted")
    | pairs(_all_but(Role.PROPOSING, Role.RECOVERING, *NOT_IN), "committed")
    | pairs(_all_but(Role.LEADING, Role.STANDING), "no voter any more")
    | pairs(_all_but(*LEADERS), "quorum lost"),
    meanings={
        Role.OUTSIDE: "not in the record, and does not want to be",
        Role.JOINING: "not in the record, and asks to be, until it is",
        Role.FOLLOWING: "in the record; another leads, or nobody",
        Role.ASKING: "asks whether a quorum would vote for it, without any promise (pre-vote)",
        Role.STANDING: "asks for votes of its term",
        Role.RECOVERING: "elected to finish what its predecessor proposed; it leads when the next epoch's voters elect it",
        Role.LEADING: "leads; nothing to decide",
        Role.PROPOSING: "leads; a record waits for its quorum",
    },
)


class Standing(StrEnum):
    RUNNING = "running"
    SUSPENDED = "suspended"
    SAVED = "saved"


STANDING = Table(
    "standing",
    Standing.RUNNING,
    {
        (Standing.RUNNING, "no quorum"): Outcome(Standing.SUSPENDED, announces=(Suspended,)),
        (Standing.SUSPENDED, "hold time nearly over"): Outcome(Standing.SAVED, announces=(CheckpointDue,)),
        (Standing.SUSPENDED, "quorum"): Outcome(Standing.RUNNING, announces=(Resumed,)),
        (Standing.SAVED, "quorum"): Outcome(Standing.RUNNING, announces=(Resumed,)),
    },
    unmoved=pairs((Standing.SUSPENDED, Standing.SAVED), "no quorum")
    | pairs((Standing.RUNNING, Standing.SAVED), "hold time nearly over")
    | pairs((Standing.RUNNING,), "quorum"),
    meanings={
        Standing.RUNNING: "a leader with a quorum was heard lately, or this device is one",
        Standing.SUSPENDED: "no quorum: no update, no admission; the state is held in memory",
        Standing.SAVED: "still none; the state was to be written to disk",
    },
)


class Reception(msgspec.Struct, frozen=True):
    """What becomes of a message: acted on in `roles`; elsewhere answered by `Stale`, or let go.

    `answers` are the kinds of messages that may come back when it is acted on.
    """

    roles: tuple[Role, ...]
    otherwise: Literal["stale", "ignored"]
    answers: tuple[type[Message], ...]
    effect: str


RECEPTIONS: dict[type[GroupMessage], Reception] = {
    GroupHeartbeat: Reception(
        ALL, "ignored", (GroupHeartbeatAck, Stale, AskRecord), "follows the leader: the lease begins anew"
    ),
    GroupHeartbeatAck: Reception(LEADERS, "ignored", (), "the sender is reached; progress is noted"),
    VoteRequest: Reception(ALL, "ignored", (Vote, Stale, AskRecord), "a vote, on disk first; none while a lease holds"),
    Vote: Reception(CAMPAIGN, "ignored", (VoteRequest, GroupHeartbeat, Propose), "counted; a quorum of them elects"),
    Propose: Reception(ALL, "ignored", (Acknowledge, Stale, AskRecord), "written down, then acknowledged"),
    Acknowledge: Reception(
        (Role.RECOVERING, Role.PROPOSING), "ignored", (Commit, VoteRequest), "counted; a quorum of them commits"
    ),
    Commit: Reception(ALL, "ignored", (), "a later record is adopted"),
    Stale: Reception(ALL, "ignored", (), "a later record is adopted; a later term ends what was under way"),
    AskRecord: Reception(ALL, "ignored", (Commit, VoteRequest), "the record is sent, and a request for a vote repeated"),
    AskJoin: Reception(LEADERS, "stale", (Stale, Propose), "the sender is in the next record"),
    AskLeave: Reception(LEADERS, "stale", (Stale, Propose), "the sender is not in the next record"),
    LinkReport: Reception(LEADERS, "stale", (Stale, Propose), "the next record says whether the link may be used"),
}
"""Who acts on what. Before it, scopes are compared: what is of a lower generation is answered by `Stale`, and of a later
epoch than the
receiver knows, the record is asked for first (`AskRecord`)."""


class GroupEvent(msgspec.Struct, frozen=True):
    """One of the five events of a group: what it changes, who says it to whom, and what comes of it."""

    name: str
    transition: str
    message: str
    effect: str


GROUP_EVENTS = (
    GroupEvent(
        "scale-out",
        "outside -> joining -> following; LEADING -> PROPOSING -> LEADING, twice",
        "AskJoin to the leader; later `ready` in GroupHeartbeatAck",
        "a record with the joiner as shadow (a witness at once as witness); when ready, one with it active",
    ),
    GroupEvent(
        "scale-in",
        "LEADING -> PROPOSING -> LEADING; the leaver: following -> outside",
        "AskLeave to the leader, repeated until a record is without the sender",
        "a record without the leaver, in force at the next step boundary",
    ),
    GroupEvent(
        "failure",
        "LEADING -> PROPOSING -> LEADING",
        "none: presence finds the member gone (`MemberGone`), or its incarnation outlived (`AskJoin` of the next)",
        "a record without it, or with its new incarnation",
    ),
    GroupEvent(
        "connect-link",
        "LEADING -> PROPOSING -> LEADING",
        "LinkReport(is_up) from the link's target, once the link has held for `link_hold_s`",
        "a record with the same members without it among `cut_links`; policies may use it again",
    ),
    GroupEvent(
        "disconnect-link",
        "LEADING -> PROPOSING -> LEADING",
        "LinkReport(not is_up) from the link's target",
        "a record with the same members and it among `cut_links`; policies avoid it, control goes by relay",
    ),
)
