"""What members say to each other about being members.

Arrays with a short tag in front, so that one of them costs a few microseconds and some ten bytes. Fields are only ever
appended, with a default; the tests hold golden bytes.

Group messages carry a `Scope`. What comes from an older generation, epoch or term than the receiver's is dropped, and
answered by `Stale`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.effects import Message
from shoal.ids import GroupId, NodeId

# ---- roster: who may be here

StatementKind = Literal["found", "add", "remove", "address", "invite", "confirm"]


class Statement(msgspec.Struct, frozen=True, array_like=True):
    """One signed sentence of the roster. `signature` is the signer's over all other fields.

    found    the signer starts a cluster: `subject` is the signer, `public_key` its key
    add      `subject` may be here, with `public_key`; `invitation` is how it came, if by invitation
    remove   `subject` may not, for ever; `keeps` are the keys of those of its own statements that go on counting
    address  the signer is reached at `addresses`; the highest `at_s` counts
    invite   who proves the secret whose hash is `invitation` may be added until `expires_s`, at most `uses` times
    confirm  of the devices that came by the overused `invitation`, `subject` is a right one
    """

    kind: StatementKind
    signer: NodeId
    subject: NodeId
    at_s: float
    """Seconds since 1970, by the signer's clock."""
    public_key: bytes = b""
    name: str = ""
    addresses: tuple[str, ...] = ()
    invitation: str = ""
    expires_s: float = 0.0
    uses: int = 0
    keeps: tuple[str, ...] = ()
    signature: bytes = b""


class Stamp(msgspec.Struct, frozen=True, array_like=True):
    """`signer` held `subject` for a member at `at_s` (since 1970). Its signature is over all other fields.

    Not `is_sure`: the signer's roster lists it, but nobody had vouched for it lately (all slept long). One such stamp
    proves little.
    """

    signer: NodeId
    subject: NodeId
    at_s: float
    is_sure: bool = True
    signature: bytes = b""


class Greeting(Message, frozen=True, tag="hi"):
    """First thing on every link, and again when a peer turns out to be another incarnation. Answered by the same."""

    cluster: str
    incarnation: int
    roster_digest: int
    stamps: tuple[Stamp, ...]
    is_answer: bool
    protocol: int = 1


class RosterKeys(Message, frozen=True, tag="rk"):
    """The keys of all statements held: send me what is missing here, and say what you have and I lack."""

    keys: tuple[str, ...]
    is_answer: bool


class RosterStatements(Message, frozen=True, tag="rs"):
    """Statements that the receiver may lack. `more` follow."""

    statements: tuple[Statement, ...]
    more: bool = False


class StampGiven(Message, frozen=True, tag="st"):
    """A stamp about the receiver, to show to others."""

    stamp: Stamp


class Refused(Message, frozen=True, tag="no"):
    """The receiver is not welcome; `text` is one line for its owner."""

    reason: Literal["removed", "unknown", "unstamped", "clone", "cluster", "invitation"]
    text: str
    incarnation: int = 0
    """Which of two that use one key is meant, where it matters."""


# ---- joining by invitation


class JoinHello(Message, frozen=True, tag="jh"):
    """A device without a roster asks to be admitted."""

    invitation: str
    public_key: bytes
    nonce: bytes


class JoinChallenge(Message, frozen=True, tag="jc"):
    """The admitting member's half."""

    invitation: str
    public_key: bytes
    nonce: bytes


class JoinProof(Message, frozen=True, tag="jp"):
    """`proof` shows the secret, `signature` the key."""

    invitation: str
    public_key: bytes
    name: str
    addresses: tuple[str, ...]
    proof: bytes
    signature: bytes


# ---- presence: who is here


class Rumour(msgspec.Struct, frozen=True, array_like=True):
    """What is said of a device: the higher (incarnation, version) counts, and of equals, that it is gone."""

    node: NodeId
    incarnation: int
    version: int
    here: bool


class Heartbeat(Message, frozen=True, tag="hb"):
    """I am here, and hear `heard`: so a link's two directions are watched apart. The same message goes to all watched
    peers."""

    incarnation: int
    version: int
    sequence: int
    heard: tuple[NodeId, ...]
    digest: int
    """Of the roster and of all that the sender believes about presence; equal digests need no exchange."""
    rumours: tuple[Rumour, ...] = ()
    is_answer: bool = False
    """To a probe, or to a beat of somebody whom the sender does not watch; not answered in turn."""


class Rumours(Message, frozen=True, tag="ru"):
    """What the sender believes, all of it where digests differ for long; then with its roster's digest, otherwise 0."""

    rumours: tuple[Rumour, ...]
    is_answer: bool
    roster_digest: int = 0


class AskHeard(Message, frozen=True, tag="ah"):
    """Do you hear `subject`?"""

    subject: NodeId
    question: int


class Heard(Message, frozen=True, tag="ha"):
    """`hears`: something came from `subject` since the question. `reaches`: it hears the witness as well."""

    subject: NodeId
    question: int
    hears: bool
    reaches: bool


class Probe(Message, frozen=True, tag="pr"):
    """Answer at once by a heartbeat: somebody asks whether you are there."""

    incarnation: int


class Goodbye(Message, frozen=True, tag="bye"):
    """The sender leaves on purpose."""

    incarnation: int


class Relay(Message, frozen=True, tag="re"):
    """Pass `message` on to `target`: the direct link is cut. One hop only."""

    source: NodeId
    target: NodeId
    message: bytes


# ---- groups: who acts as one

Part = Literal["active", "shadow", "witness"]


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One incarnation in a record. `steadiness` orders the voters: mains power and uptime count."""

    node: NodeId
    incarnation: int
    part: Part
    steadiness: int = 0
    address: str = ""


class Attachment(msgspec.Struct, frozen=True, array_like=True):
    """What another capability wants agreed on (sync policy, batch plan, manifest). Membership never reads `value`."""

    capability: str
    hash: str
    value: bytes


class Record(msgspec.Struct, frozen=True, array_like=True):
    """The one thing a group agrees on: an epoch. `voters` decide its only child; the first counts double in a tie.

    `first_step` is the lowest step that can be the epoch's first. `cut_links` are (source, target) that are not to be used.
    """

    group: GroupId
    generation: int
    epoch: int
    parent: str
    term: int
    leader: NodeId
    members: tuple[Member, ...]
    voters: tuple[NodeId, ...]
    first_step: int
    cut_links: tuple[tuple[NodeId, NodeId], ...] = ()
    attachments: tuple[Attachment, ...] = ()


class Scope(msgspec.Struct, frozen=True, array_like=True):
    """What a group message belongs to: `epoch` is the last one the sender knows to be committed."""

    group: GroupId
    generation: int
    epoch: int
    term: int


class GroupMessage(Message, frozen=True):
    """Base of all messages of groups."""

    scope: Scope


class GroupHeartbeat(GroupMessage, frozen=True, tag="gh"):
    """The leader is there. It reached a quorum `quorum_age_s` ago, by its clock: nobody's belief rests on less."""

    sequence: int
    quorum_age_s: float = 0.0


class GroupHeartbeatAck(GroupMessage, frozen=True, tag="ga"):
    """So am I. `step` is the last step applied; `ready`: the shadow has caught up.

    `is_voter` is False where the sender may not vote (it lost its file): then no lease rests on it.
    """

    sequence: int
    incarnation: int
    step: int
    ready: bool
    is_voter: bool = True


class VoteRequest(GroupMessage, frozen=True, tag="vr"):
    """Would you (`is_trial`), or do you, take the sender for leader of the scope's term?"""

    is_trial: bool


class Vote(GroupMessage, frozen=True, tag="vo"):
    """The answer. A real vote names the unfinished record that the voter acknowledged last, if any."""

    is_trial: bool
    granted: bool
    accepted_term: int = 0
    accepted: Record | None = None


class Propose(GroupMessage, frozen=True, tag="pp"):
    """Put this child of the scope's epoch on disk and acknowledge it."""

    record: Record


class Acknowledge(GroupMessage, frozen=True, tag="ac"):
    """It is on disk."""

    record_hash: str


class Commit(GroupMessage, frozen=True, tag="co"):
    """The record is agreed on. A quorum was reached `quorum_age_s` ago, as far as the sender knows."""

    record: Record
    quorum_age_s: float = 0.0


class Stale(GroupMessage, frozen=True, tag="sl"):
    """What you said is of the past; the scope is the present, `record` its epoch."""

    record: Record
    leader: NodeId | None = None


class AskRecord(GroupMessage, frozen=True, tag="ar"):
    """You know a later epoch: what is it? Answered by `Commit`."""


class AskJoin(GroupMessage, frozen=True, tag="aj"):
    """Take me in. `state_step` is the last step whose state the sender still has from being active, -1 for none."""

    member: Member
    state_step: int


class AskLeave(GroupMessage, frozen=True, tag="al"):
    """Let me go at the next boundary."""

    incarnation: int


class LinkReport(GroupMessage, frozen=True, tag="lr"):
    """The directed link `source` -> `target` can (not) be used; reported by its target."""

    source: NodeId
    target: NodeId
    is_up: bool


MembershipMessage = (
    Greeting | RosterKeys | RosterStatements | StampGiven | Refused | JoinHello | JoinChallenge | JoinProof | Heartbeat |
    Rumours | AskHeard | Heard | Probe | Goodbye | Relay | GroupHeartbeat | GroupHeartbeatAck | VoteRequest | Vote | Propose
    | Acknowledge | Commit | Stale | AskRecord | AskJoin | AskLeave | LinkReport
)  # fmt: skip
