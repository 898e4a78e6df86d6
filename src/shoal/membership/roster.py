"""Decides who may be here: a set of signed statements, the same on every member's disk.

Merging two rosters is a set union, so the order in which members meet does not matter, nobody has to be asked, and no
two rosters conflict. What a set of statements *means* is a function of the set alone:

* the founder is in, and whoever an `add` by someone who was ever in names; **a removal wins**, for ever: a device that
  comes back makes a new key. What a removed device itself had signed counts only as far as all its removals list it
  (`keeps`): what it signs afterwards is nothing, but for removals, so that of two that remove each other in a cut
  network neither stays;
* an invitation admits `uses` devices until `expires_s`. If two parts of a cut network admitted more, all of that
  invitation wait until a member that did not come by it confirms one. A removal voids all invitations made before it:
  the removed device knew their secrets' hashes;
* of a device's addresses, its latest counts.

Signatures are checked by a function that is passed in; ids are hashes of public keys by another.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any, NamedTuple, Protocol, get_args

import msgspec

from shoal.effects import (
    Announce,
    Command,
    Commanded,
    Effect,
    Event,
    Fact,
    Hangup,
    Received,
    Send,
    SetTimer,
    Store,
    TimerFired,
)
from shoal.ids import NodeId
from shoal.membership.messages import (
    JoinChallenge,
    JoinHello,
    JoinProof,
    Refused,
    RosterKeys,
    RosterStatements,
    Stamp,
    StampGiven,
    Statement,
    StatementKind,
)
from shoal.membership.timing import Timing

INVITATION_S_MAX = 86400.0
STATEMENTS_PER_MESSAGE = 256
STATEMENTS_MAX = 100_000
"""A roster beyond it is refused: no household has so many devices, and memory is bounded."""
STAMPS_SHOWN = 8
STAMPS_SHOWN_UNSURE = 64
TIMER = "roster"
_CHALLENGES_MAX = 64
_UNPROVEN_MAX = 4 * STATEMENTS_PER_MESSAGE
_CLOCK_TOLERANCE_S = 300.0

_encoder = msgspec.msgpack.Encoder()
_statement_decoder = msgspec.msgpack.Decoder(Statement)
_met_decoder = msgspec.msgpack.Decoder(dict[NodeId, float])
_stamps_decoder = msgspec.msgpack.Decoder(dict[NodeId, Stamp])


class Keys(Protocol):
    """This device's key, and how to judge those of others. Pure: the same answer to the same question."""

    public_key: bytes

    def identify(self, public_key: bytes) -> NodeId:
        """The id that goes with a public key: a hash of it."""

    def sign(self, text: bytes) -> bytes:
        """By this device's private key."""

    def verify(self, public_key: bytes, text: bytes, signature: bytes) -> bool:
        """Whether the owner of `public_key` signed `text`."""


class MemberAdded(Fact, frozen=True):
    """A device may be here."""

    node: NodeId


class MemberRemoved(Fact, frozen=True):
    """A device may not be here any more; or waits for a confirmation."""

    node: NodeId


class InvitationOverused(Fact, frozen=True):
    """More devices came by one invitation than it allows (a cut network). They wait until the owner confirms."""

    invitation: str
    nodes: tuple[NodeId, ...]


class Admitted(Fact, frozen=True):
    """This device, which had no roster, is a member now."""

    cluster: str


class Rejected(Fact, frozen=True):
    """A peer refused this device; `text` is for the owner."""

    peer: NodeId
    reason: str
    text: str


class RosterGrew(Fact, frozen=True):
    """These statements are new here."""

    statements: tuple[Statement, ...]


class RosterExchanged(Fact, frozen=True):
    """All that `peer` knows of the roster is known here."""

    peer: NodeId


# ---- what the owner may want


class Found(Command, frozen=True):
    """Start a cluster of one."""

    name: str = ""


class Invite(Command, frozen=True):
    """Let devices in that prove the secret whose hash this is. The secret is made, and printed, by the caller."""

    invitation: str
    expires_s: float
    uses: int = 1


class Remove(Command, frozen=True):
    """This device may be here no more."""

    node: NodeId


class Confirm(Command, frozen=True):
    """Of the devices that came by an overused invitation, this one is right."""

    node: NodeId


class SetAddresses(Command, frozen=True):
    """Where this device is reached now."""

    addresses: tuple[str, ...]


class UseInvitation(Command, frozen=True):
    """Join by a token. `peer` is the member to ask, whose key the token named and the link has proven; `nonce` is fresh
    chance."""

    peer: NodeId
    secret: bytes
    nonce: bytes
    name: str = ""
    addresses: tuple[str, ...] = ()


def signed_text(value: Statement | Stamp) -> bytes:
    """What a signature is over: everything else."""
    return _encoder.encode(msgspec.structs.replace(value, signature=b""))


def statement_key(statement: Statement) -> str:
    """Names a statement by its contents, 16 hexadecimal digits."""
    return hashlib.blake2b(signed_text(statement), digest_size=8).hexdigest()


def invitation_of(secret: bytes) -> str:
    """The public name of a secret: its hash, 64 hexadecimal digits."""
    return hashlib.sha256(b"shoal invitation" + secret).hexdigest()


def proof_of(invitation: str, joiner_key: bytes, member_key: bytes, joiner_nonce: bytes, member_nonce: bytes) -> bytes:
    """Shows that the joiner knows the secret, for these two keys and this conversation only."""
    text = b"".join((joiner_key, member_key, joiner_nonce, member_nonce))
    return hmac.new(bytes.fromhex(invitation), text, hashlib.sha256).digest()


class Device(NamedTuple):
    """One entry of what a roster means."""

    node: NodeId
    public_key: bytes
    name: str
    addresses: tuple[str, ...]
    added_by: NodeId
    added_s: float
    """Since 1970, by the clock of who added it."""


class Roster:
    """An immutable set of verified statements, and what it means.

    `members` are those who may be here; `waiting` came by an overused invitation; `removed` never may again. `digest` is
    equal for equal sets.
    """

    def __init__(self, statements: Mapping[str, Statement]) -> None:
        self.statements = statements
        self.digest = 0
        for key in statements:
            self.digest ^= int(key, 16)
        self.cluster = ""
        self.members: dict[NodeId, Device] = {}
        self.removed: frozenset[NodeId] = frozenset()
        self.waiting: dict[str, tuple[NodeId, ...]] = {}
        """By invitation; who came by it and is neither confirmed nor removed."""
        self.invitations: dict[str, Statement] = {}
        self.last_removal_s = float("-inf")
        self._work_out()

    def _work_out(self) -> None:
        """A function of the set: everything is taken in the order of its keys."""
        by_kind: dict[str, list[tuple[str, Statement]]] = {kind: [] for kind in get_args(StatementKind)}
        for key in sorted(self.statements):
            statement = self.statements[key]
            by_kind[statement.kind].append((key, statement))
        if not by_kind["found"]:
            return
        self.cluster, founding = by_kind["found"][0]
        adds = by_kind["add"]
        ever = self._closure(founding, adds, lambda _key, _add: True)
        removals: dict[NodeId, list[Statement]] = {}
        for _, removal in by_kind["remove"]:
            if removal.signer in ever:
                removals.setdefault(removal.subject, []).append(removal)
                self.last_removal_s = max(self.last_removal_s, removal.at_s)
        self.removed = frozenset(removals)

        def counts(key: str, statement: Statement) -> bool:
            """Whether what its signer said stands, whatever became of the signer."""
            return statement.signer in ever and all(key in removal.keeps for removal in removals.get(statement.signer, ()))

        uses: dict[str, int] = {}
        for key, invite in by_kind["invite"]:
            if counts(key, invite):
                uses[invite.invitation] = min(invite.uses, uses.get(invite.invitation, invite.uses))
                if invite.at_s > self.last_removal_s:
                    self.invitations.setdefault(invite.invitation, invite)
        overused = self._overused(adds, uses, ever.keys() - {founding.subject} - removals.keys())
        doubtful = {node for nodes in overused.values() for node in nodes}
        sure = self._closure(founding, adds, lambda key, add: counts(key, add) and add.subject not in doubtful)
        confirmed = {
            (confirm.invitation, confirm.subject)
            for key, confirm in by_kind["confirm"]
            if confirm.signer in sure and counts(key, confirm)
        }
        for invitation, nodes in overused.items():
            unconfirmed = tuple(node for node in nodes if (invitation, node) not in confirmed)
            if unconfirmed:
                self.waiting[invitation] = unconfirmed
        held_back = {node for nodes in self.waiting.values() for node in nodes}
        allowed = self._closure(founding, adds, lambda key, add: counts(key, add) and add.subject not in held_back)
        addresses: dict[NodeId, Statement] = {}
        for _, address in by_kind["address"]:
            known = addresses.get(address.signer)
            if known is None or (address.at_s, address.addresses) > (known.at_s, known.addresses):
                addresses[address.signer] = address
        for node, add in allowed.items():
            if node not in self.removed:
                where = addresses[node].addresses if node in addresses else add.addresses
                self.members[node] = Device(node, add.public_key, add.name, where, add.signer, add.at_s)

    @staticmethod
    def _closure(
        founding: Statement, adds: list[tuple[str, Statement]], admits: Callable[[str, Statement], bool]
    ) -> dict[NodeId, Statement]:
        """Everyone that is in by `adds`, each by the least statement that names it."""
        by_signer: dict[NodeId, list[tuple[str, Statement]]] = {}
        for key, add in sorted(adds, key=lambda item: item[0]):
            by_signer.setdefault(add.signer, []).append((key, add))
        found = {founding.subject: founding}
        fringe = [founding.subject]
        while fringe:
            for key, add in by_signer.get(fringe.pop(), ()):
                if add.subject not in found and admits(key, add):
                    found[add.subject] = add
                    fringe.append(add.subject)
        return found

    @staticmethod
    def _overused(
        adds: list[tuple[str, Statement]], uses: Mapping[str, int], nodes: Set[NodeId]
    ) -> dict[str, tuple[NodeId, ...]]:
        """By invitation, those of `nodes` that came by one that admitted more than it may; removing the wrong ones
        settles it.
        """
        came: dict[str, set[NodeId]] = {}
        for _, add in adds:
            if add.invitation and add.subject in nodes:
                came.setdefault(add.invitation, set()).add(add.subject)
        return {name: tuple(sorted(those)) for name, those in came.items() if name in uses and len(those) > uses[name]}

    def with_statements(self, new: Mapping[str, Statement]) -> Roster:
        """This roster and more."""
        return Roster({**self.statements, **new})

    def keys_signed_by(self, node: NodeId) -> tuple[str, ...]:
        """What a removal of `node` keeps: all that it is known to have signed."""
        return tuple(sorted(key for key, statement in self.statements.items() if statement.signer == node))

    def __contains__(self, node: object) -> bool:
        return node in self.members


EMPTY = Roster({})


class RosterCore:
    """Keeps this device's roster and stamps, and exchanges them.

    Args:
        roster: what is known at the start; `stored` adds what is on this device's disk.
        since_1970_s: how to read the wall clock: `now_s` plus this.
    """

    def __init__(
        self,
        me: NodeId,
        keys: Keys,
        *,
        timing: Timing,
        since_1970_s: float,
        roster: Roster = EMPTY,
        stored: Mapping[str, bytes] | None = None,
    ) -> None:
        self.me = me
        self.roster = roster
        self.stamps: dict[NodeId, Stamp] = {}
        """About this device, by whom."""
        self.met_s: dict[NodeId, float] = {}
        """When this device itself last held a peer for a member, since 1970."""
        self.clock_s = since_1970_s
        self._keys = keys
        self._timing = timing
        self._effects: list[Effect] = []
        self._now_s = 0.0
        self._writes = 0
        self._challenges: dict[NodeId, tuple[JoinHello, bytes]] = {}
        self._joining: UseInvitation | None = None
        self._parts: tuple[Statement, ...] = ()
        self._unproven: dict[str, Statement] = {}
        """Statements that came before their signers' keys; a long roster comes in parts, in any order."""
        self.damaged: list[str] = []
        """Files that could not be read."""
        self._is_incomplete = False
        """Statements were lost, perhaps a removal, and no member has shown since what it has."""
        self._load(stored or {})

    def _load(self, stored: Mapping[str, bytes]) -> None:
        """What can be read. A device that lost a statement is as one that slept when it was made: it has met nobody."""
        found = {}
        for file, value in stored.items():
            kind, _, key = file.partition("/")
            try:
                if kind == "roster":
                    statement = _statement_decoder.decode(value)
                    if statement_key(statement) != key:
                        raise msgspec.DecodeError("another statement than its name says")
                    found[key] = statement
                elif kind == "stamps":
                    self.stamps = _stamps_decoder.decode(value)
                elif kind == "met":
                    self.met_s = _met_decoder.decode(value)
            except msgspec.DecodeError:
                self.damaged.append(file)
                self._is_incomplete = self._is_incomplete or kind == "roster"
        if self._is_incomplete:
            self.met_s = {}
        if found.keys() - self.roster.statements.keys():
            self.roster = self.roster.with_statements(found)

    # ---- trust

    def is_member(self, node: NodeId) -> bool:
        return node in self.roster.members

    def judge(self, peer: NodeId, stamps: Iterable[Stamp], wall_s: float) -> Refused | None:
        """Whether `peer` is to be trusted; if not, what to tell it.

        A third member must have held it for a member within `stamp_valid_s`, or this device itself: so a removed device
        cannot for long greet one that slept through its removal.
        """
        if peer in self.roster.removed:
            return Refused(
                "removed", "this device was removed from the cluster: join again with a new key and a new invitation"
            )
        if peer not in self.roster.members:
            return Refused("unknown", "this device is not in the cluster's roster: ask a member for `shoal invite`")
        valid_from_s = wall_s - self._timing.stamp_valid_s
        if self._is_pair() or self.met_s.get(peer, float("-inf")) >= valid_from_s:
            return None
        vouchers = dict(self._vouchers(self.roster, peer, stamps, wall_s))
        vouchers.pop(peer, None)
        # All may have slept. What more than half of the others still have in their rosters is all that anyone can know.
        num_lists = len(vouchers.keys() | {self.me}) - self._is_incomplete
        if any(vouchers.values()) or 2 * num_lists > len(self.roster.members) - 1:
            return None
        text = (
            "no third member has vouched for this device within the last days: meet another member first, "
            "or remove members that are no more"
        )
        return Refused("unstamped", text)

    def _is_pair(self) -> bool:
        """Whether there is no third member to vouch for anybody, and the own word is all there is."""
        return len(self.roster.members) <= 2 and not self._is_incomplete

    def _vouchers(
        self, roster: Roster, peer: NodeId, stamps: Iterable[Stamp], wall_s: float
    ) -> Iterator[tuple[NodeId, bool]]:
        """Members of this device's own roster that held `peer` for a member lately, and whether surely; the sure ones last.

        To add it was to vouch for it.
        """
        valid_from_s, valid_to_s = wall_s - self._timing.stamp_valid_s, wall_s + _CLOCK_TOLERANCE_S
        device = roster.members[peer]
        for stamp in sorted(stamps, key=lambda stamp: stamp.is_sure):
            signer = self.roster.members.get(stamp.signer)
            if signer is None or stamp.subject != peer or not valid_from_s <= stamp.at_s <= valid_to_s:
                continue
            if self._keys.verify(signer.public_key, signed_text(stamp), stamp.signature):
                yield stamp.signer, stamp.is_sure
        if device.added_by in self.roster.members and valid_from_s <= device.added_s <= valid_to_s:
            yield device.added_by, True

    def consider_offer(
        self, peer: NodeId, statements: tuple[Statement, ...], stamps: Iterable[Stamp], wall_s: float
    ) -> list[Effect]:
        """Takes statements by which an unknown `peer` shows that it was added, if a member that was met lately vouches
        for it.

        Without the last condition a removed device could add a new key of its own and come back as that to one that slept.
        """
        effects: list[Effect] = []
        self._effects = effects
        self._now_s = wall_s - self.clock_s
        new = {statement_key(statement): statement for statement in statements}
        offered = self.roster.with_statements(self._verified(new)[0])
        if peer in offered.members:
            valid_from_s = wall_s - self._timing.stamp_valid_s
            for voucher, is_sure in self._vouchers(offered, peer, stamps, wall_s):
                is_met = voucher == self.me or self.met_s.get(voucher, float("-inf")) >= valid_from_s
                if is_sure and (is_met or self._is_pair()):
                    self._merge(statements)
                    break
        return effects

    def removals_for(self, peer: NodeId) -> tuple[Statement, ...]:
        """What shows a refused `peer` why: its own removals, or, where it is unknown, all (who added it may be removed)."""
        is_removed = peer in self.roster.removed
        removals = [
            each
            for each in self.roster.statements.values()
            if each.kind == "remove" and (each.subject == peer or not is_removed)
        ]
        return tuple(sorted(removals, key=lambda each: (-each.at_s, each.subject))[:STATEMENTS_PER_MESSAGE])

    def consider_removals(
        self, peer: NodeId, statements: tuple[Statement, ...], stamps: Iterable[Stamp], wall_s: float
    ) -> list[Effect]:
        """Takes the removals by which `peer`, a member here, shows why it refuses this device.

        It does not greet whom it refuses, so no link of ours has made it trusted; it must be one that would be.
        """
        effects: list[Effect] = []
        self._effects = effects
        self._now_s = wall_s - self.clock_s
        if self.judge(peer, stamps, wall_s) is None:
            self._merge(each for each in statements if each.kind == "remove")
        return effects

    def is_asked_to_admit(self, peer: NodeId) -> bool:
        """Whether this device uses an invitation there: its owner named that member, whatever the roster here says."""
        return self._joining is not None and self._joining.peer == peer

    def shown_stamps(self, wall_s: float) -> tuple[Stamp, ...]:
        """The best stamps about this device, for a greeting; many if none is sure."""
        best = sorted(self.stamps.values(), key=lambda stamp: (not stamp.is_sure, -stamp.at_s, stamp.signer))
        if best and best[0].is_sure and best[0].at_s >= wall_s - self._timing.stamp_valid_s:
            return tuple(best[:STAMPS_SHOWN])
        best.sort(key=lambda stamp: (-stamp.at_s, stamp.signer))
        return tuple(best[:STAMPS_SHOWN_UNSURE])

    # ---- the one way in

    def step(self, event: Event, now_s: float) -> list[Effect]:
        """Takes an event; messages are from peers that proved their keys, members or not."""
        self._now_s = now_s
        effects: list[Effect] = []
        self._effects = effects
        if isinstance(event, Received):
            self._receive(event.peer, event.message)
        elif isinstance(event, Commanded):
            self._obey(event.command)
        elif isinstance(event, TimerFired):
            self._say_hello()
        return effects

    def _receive(self, peer: NodeId, message: Any) -> None:
        if type(message) is Refused:
            if message.reason == "invitation" and self.is_asked_to_admit(peer):
                self._joining = None
            self._effects.append(Announce(Rejected(peer, message.reason, message.text)))
        elif type(message) is JoinHello:
            self._on_join_hello(peer, message)
        elif type(message) is JoinChallenge:
            self._on_join_challenge(peer, message)
        elif type(message) is JoinProof:
            self._on_join_proof(peer, message)
        elif type(message) is RosterStatements:
            self._on_statements(peer, message)
        elif not self.is_member(peer):
            return
        elif type(message) is RosterKeys:
            self._on_keys(peer, message)
        elif type(message) is StampGiven:
            self._on_stamp(peer, message.stamp)

    def exchange(self, peer: NodeId) -> Send:
        """What starts an exchange with a peer whose digest differs."""
        return Send((peer,), RosterKeys(tuple(self.roster.statements), is_answer=False))

    def note_complete(self) -> None:
        """All that a trusted peer knows is known here."""
        self._is_incomplete = False

    def give_stamp(self, peer: NodeId, wall_s: float, *, is_sure: bool) -> list[Effect]:
        """Vouches for a member. `is_sure`: it is trusted, which counts later as a stamp of our own."""
        effects: list[Effect] = []
        self._effects = effects
        if is_sure:
            self.met_s[peer] = wall_s
            self._put("met", _encoder.encode(self.met_s))
        stamp = Stamp(self.me, peer, wall_s, is_sure)
        effects.append(
            Send((peer,), StampGiven(msgspec.structs.replace(stamp, signature=self._keys.sign(signed_text(stamp)))))
        )
        return effects

    def _on_stamp(self, peer: NodeId, stamp: Stamp) -> None:
        if stamp.subject != self.me or stamp.signer != peer:
            return
        before = self.stamps.get(peer)
        if before is None or stamp.at_s > before.at_s or (stamp.is_sure and not before.is_sure):
            self.stamps[peer] = stamp
            self.stamps = {by: each for by, each in self.stamps.items() if by in self.roster.members}
            self._put("stamps", _encoder.encode(self.stamps))

    def _put(self, key: str, value: bytes) -> None:
        self._writes += 1
        self._effects.append(Store(key, self._writes, value))

    # ---- exchange

    def _on_keys(self, peer: NodeId, message: RosterKeys) -> None:
        theirs = set(message.keys)
        missing = [statement for key, statement in self.roster.statements.items() if key not in theirs]
        for start in range(0, len(missing), STATEMENTS_PER_MESSAGE):
            batch = tuple(missing[start : start + STATEMENTS_PER_MESSAGE])
            more = start + STATEMENTS_PER_MESSAGE < len(missing)
            self._effects.append(Send((peer,), RosterStatements(batch, more=more)))
        if not message.is_answer and theirs - self.roster.statements.keys():
            self._effects.append(Send((peer,), RosterKeys(tuple(self.roster.statements), is_answer=True)))
        elif not theirs - self.roster.statements.keys():
            self._effects.append(Announce(RosterExchanged(peer)))

    def _on_statements(self, peer: NodeId, message: RosterStatements) -> None:
        if peer in self.roster.removed:
            return
        if not self.roster.cluster:
            self._be_admitted(peer, message)
        else:
            self._merge(message.statements)
            if self.is_asked_to_admit(peer) and not message.more and {self.me, peer} <= self.roster.members.keys():
                self._joining = None
                self._note_admission(peer)

    def _be_admitted(self, peer: NodeId, message: RosterStatements) -> None:
        """Takes over the roster of the member that admits, if its cluster made the invitation. It may come in several
        parts."""
        if self._joining is None or self._joining.peer != peer:
            return
        self._parts = (*self._parts, *message.statements)[:STATEMENTS_MAX]
        invitation = invitation_of(self._joining.secret)
        keys = {statement_key(statement): statement for statement in self._parts}
        offered = Roster(self._verified(keys)[0])
        if self.me in offered.members and any(
            each.invitation == invitation for each in self._parts if each.kind == "invite"
        ):
            self._joining, parts = None, self._parts
            self._parts = ()
            self._merge(parts)
            self._note_admission(peer)

    def _note_admission(self, peer: NodeId) -> None:
        self.met_s[peer] = self._now_s + self.clock_s
        self._effects.append(Announce(Admitted(self.roster.cluster)))

    def _merge(self, statements: Iterable[Statement]) -> None:
        new = self._unproven
        for statement in statements:
            key = statement_key(statement)
            if key not in self.roster.statements and len(self.roster.statements) + len(new) < STATEMENTS_MAX:
                new[key] = statement
        verified, unproven = self._verified(new)
        self._unproven = dict(itertools.islice(unproven.items(), _UNPROVEN_MAX))
        if not verified:
            return
        before = self.roster
        self.roster = self._joined(before, verified)
        for key, statement in verified.items():
            self._put(f"roster/{key}", _encoder.encode(statement))
        self._effects.append(Announce(RosterGrew(tuple(verified.values()))))
        self._announce_changes(before)

    def _joined(self, roster: Roster, new: Mapping[str, Statement]) -> Roster:
        return roster.with_statements(new)

    def _announce_changes(self, before: Roster) -> None:
        after = self.roster
        for node in sorted(after.members.keys() - before.members.keys()):
            self._effects.append(Announce(MemberAdded(node)))
        for node in sorted(before.members.keys() - after.members.keys()):
            self._effects.append(Announce(MemberRemoved(node)))
            if node in after.removed and node != self.me:
                self._effects.append(Hangup(node, "removed from the cluster"))
        for invitation, nodes in after.waiting.items():
            if before.waiting.get(invitation) != nodes:
                self._effects.append(Announce(InvitationOverused(invitation, nodes)))

    def _verified(self, new: Mapping[str, Statement]) -> tuple[dict[str, Statement], dict[str, Statement]]:
        """Those whose signatures are right, and those whose signers' keys are neither here nor among them."""
        keys: dict[NodeId, bytes] = {}
        self._collect_keys(keys, new.values())
        members = self.roster.members
        for statement in new.values():
            if statement.signer in members:
                keys.setdefault(statement.signer, members[statement.signer].public_key)
        if any(statement.signer not in keys for statement in new.values()):
            self._collect_keys(keys, self.roster.statements.values())  # a removed member's, or one that waits
        good, unproven = {}, {}
        for key, statement in new.items():
            if statement.kind == "found" and self.roster.cluster and self.roster.cluster != key:
                continue  # another cluster's: two clusters never merge by accident
            public_key = keys.get(statement.signer)
            if public_key is None:
                unproven[key] = statement
                continue
            names_key = statement.kind not in ("add", "found") or keys.get(statement.subject) == statement.public_key
            names_key = names_key and (statement.kind != "found" or statement.signer == statement.subject)
            if names_key and self._keys.verify(public_key, signed_text(statement), statement.signature):
                good[key] = statement
        return good, unproven

    def _collect_keys(self, keys: dict[NodeId, bytes], statements: Iterable[Statement]) -> None:
        for statement in statements:
            if statement.public_key and self._keys.identify(statement.public_key) == statement.subject:
                keys.setdefault(statement.subject, statement.public_key)

    # ---- what the owner wants

    def _say(self, statement: Statement) -> None:
        self._merge((msgspec.structs.replace(statement, signature=self._keys.sign(signed_text(statement))),))

    def _obey(self, command: Command) -> None:
        wall_s, me = self._now_s + self.clock_s, self.me
        if isinstance(command, Found):
            if not self.roster.statements:
                self._say(Statement("found", me, me, wall_s, public_key=self._keys.public_key, name=command.name))
        elif isinstance(command, UseInvitation):
            self._joining = command
            self._say_hello()
        elif me not in self.roster.members:
            if isinstance(command, Invite | Remove | Confirm):
                # A stranger's word would count from the day it is admitted, even against who admits it.
                text = "this device is not in the cluster, so it has no say in who is: join by an invitation first"
                self._effects.append(Announce(Rejected(me, "unknown", text)))
        elif isinstance(command, Invite):
            expires_s = min(command.expires_s, wall_s + INVITATION_S_MAX)
            made_s = max(wall_s, math.nextafter(self.roster.last_removal_s, math.inf))  # whose clock may be ahead of ours
            self._say(
                Statement("invite", me, me, made_s, invitation=command.invitation, expires_s=expires_s, uses=command.uses)
            )
        elif isinstance(command, Remove):
            keeps = self.roster.keys_signed_by(command.node)
            self._say(Statement("remove", me, command.node, wall_s, keeps=keeps))
        elif isinstance(command, Confirm):
            for invitation, nodes in self.roster.waiting.items():
                if command.node in nodes:
                    self._say(Statement("confirm", me, command.node, wall_s, invitation=invitation))
                    break
        elif isinstance(command, SetAddresses):
            said = [each.at_s for each in self.roster.statements.values() if each.kind == "address" and each.signer == me]
            at_s = max([wall_s, *(math.nextafter(each_s, math.inf) for each_s in said)])
            self._say(Statement("address", me, me, at_s, addresses=command.addresses))

    # ---- joining

    def _say_hello(self) -> None:
        """Asks to be admitted, until it is or is refused: messages get lost."""
        joining = self._joining
        if joining is not None:
            hello = JoinHello(invitation_of(joining.secret), self._keys.public_key, joining.nonce)
            self._effects.append(Send((joining.peer,), hello))
            self._effects.append(SetTimer(TIMER, self._now_s + 2 * self._timing.retry_s))

    def _refuse(self, peer: NodeId, text: str) -> None:
        self._effects.append(Send((peer,), Refused("invitation", text)))

    def _on_join_hello(self, peer: NodeId, hello: JoinHello) -> None:
        if self.me not in self.roster.members:
            return
        problem = self._invitation_problem(hello.invitation, peer)
        if self._keys.identify(hello.public_key) != peer or peer in self.roster.removed:
            problem = "this key cannot join: make a new one"
        if problem:
            self._refuse(peer, problem)
            return
        before = self._challenges.get(peer)
        if before is not None and before[0] == hello:  # asked again: the answer was lost, or is on its way
            self._effects.append(Send((peer,), JoinChallenge(hello.invitation, self._keys.public_key, before[1])))
            return
        while len(self._challenges) >= _CHALLENGES_MAX:
            del self._challenges[next(iter(self._challenges))]
        # Unpredictable to all but this device: nobody else can sign this.
        seed = b"nonce" + hello.nonce + repr(self._now_s).encode()
        nonce = hashlib.sha256(self._keys.sign(seed)).digest()[:16]
        self._challenges[peer] = (hello, nonce)
        self._effects.append(Send((peer,), JoinChallenge(hello.invitation, self._keys.public_key, nonce)))

    def _invitation_problem(self, invitation: str, peer: NodeId) -> str:
        invite = self.roster.invitations.get(invitation)
        if invite is None:
            return "no such invitation here: it is wrong, void since a device was removed, or not known to this member yet"
        if self._now_s + self.clock_s > invite.expires_s:
            return "the invitation has expired: ask for a new one"
        came = {
            statement.subject
            for statement in self.roster.statements.values()
            if statement.kind == "add" and statement.invitation == invitation
        }
        if peer not in came and len(came) >= invite.uses:
            return "the invitation has been used: ask for a new one"
        return ""

    def _on_join_challenge(self, peer: NodeId, challenge: JoinChallenge) -> None:
        joining = self._joining
        if joining is None or peer != joining.peer or self._keys.identify(challenge.public_key) != peer:
            return
        invitation, key = invitation_of(joining.secret), self._keys.public_key
        proof = proof_of(invitation, key, challenge.public_key, joining.nonce, challenge.nonce)
        signature = self._keys.sign(b"join" + peer.encode() + joining.nonce + challenge.nonce)
        self._effects.append(Send((peer,), JoinProof(invitation, key, joining.name, joining.addresses, proof, signature)))

    def _on_join_proof(self, peer: NodeId, message: JoinProof) -> None:
        hello, nonce = self._challenges.get(peer, (None, b""))
        if hello is None or (message.invitation, message.public_key) != (hello.invitation, hello.public_key):
            return
        expected = proof_of(hello.invitation, hello.public_key, self._keys.public_key, hello.nonce, nonce)
        text = b"join" + self.me.encode() + hello.nonce + nonce
        problem = self._invitation_problem(hello.invitation, peer)
        if not hmac.compare_digest(expected, message.proof):
            problem = "the token's secret is wrong: copy the whole token"
        elif not self._keys.verify(hello.public_key, text, message.signature):
            problem = "the signature is not by the key that was shown"
        if problem:
            self._refuse(peer, problem)
            return
        self.met_s[peer] = self._now_s + self.clock_s
        if peer not in self.roster.members:
            self._say(
                Statement(
                    "add",
                    self.me,
                    peer,
                    self._now_s + self.clock_s,
                    public_key=hello.public_key,
                    name=message.name,
                    addresses=message.addresses,
                    invitation=hello.invitation,
                )
            )
        # Kept until here, so that a repeated proof (a lost answer) is answered again.
        statements = tuple(self.roster.statements.values())
        for start in range(0, len(statements), STATEMENTS_PER_MESSAGE):
            batch = statements[start : start + STATEMENTS_PER_MESSAGE]
            self._effects.append(
                Send((peer,), RosterStatements(batch, more=start + STATEMENTS_PER_MESSAGE < len(statements)))
            )
