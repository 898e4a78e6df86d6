"""What one voter of a group remembers, and what that allows it to promise: the part that must survive a restart.

A voter votes once per term, acknowledges at most one record per term, and neither below the highest term it has
promised. It says so only after the file with it is on disk. A restarted device votes for its former self only if its
file is there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache

import msgspec

from shoal.errors import DamagedFile
from shoal.ids import GroupId, NodeId
from shoal.membership.messages import Member, Record


class GroupFile(msgspec.Struct, frozen=True, array_like=True):
    """What a voter must not forget."""

    committed: Record
    promised: int
    voted_for: NodeId | None
    accepted_term: int
    accepted: Record | None
    voter_incarnation: int
    wants: Member | None


_encoder = msgspec.msgpack.Encoder()
_file_decoder = msgspec.msgpack.Decoder(GroupFile)
_CHECKSUM_BYTES = 8


def _checksum(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=_CHECKSUM_BYTES).digest()


def write_file(file: GroupFile) -> bytes:
    """What goes on disk: a checksum first, since a promise with one bit changed is another promise."""
    payload = _encoder.encode(file)
    return _checksum(payload) + payload


def read_file(data: bytes) -> GroupFile:
    """What `write_file` wrote.

    Raises:
        DamagedFile: it is not that. Nothing in it may be believed.
    """
    checksum, payload = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
    if _checksum(payload) != checksum:
        raise DamagedFile(f"{len(data)} bytes that do not match their checksum")
    try:
        return _file_decoder.decode(payload)
    except msgspec.DecodeError as error:
        raise DamagedFile(f"no file of a group of this version: {error}") from error


@lru_cache(maxsize=64)
def record_hash(record: Record) -> str:
    """Names a record by its contents, 16 hexadecimal digits. Kept: a leader wants its parent's while a decision waits."""
    return hashlib.blake2b(_encoder.encode(record), digest_size=8).hexdigest()


def is_quorum(record: Record, voters: Iterable[NodeId]) -> bool:
    """Whether `voters` (each once) may decide the child of `record`: more than half, or exactly half with the first.

    Source: Jajodia and Mutchler, dynamic-linear voting (1990).
    """
    chosen = record.voters
    agreed = set(chosen).intersection(voters)
    twice = 2 * len(agreed)
    return twice > len(chosen) or (twice == len(chosen) and twice > 0 and chosen[0] in agreed)


def quorum_since(record: Record, heard_s: Mapping[NodeId, float]) -> float:
    """The latest time since which a quorum of the voters of `record` was heard; minus infinity if none ever was."""
    times_s = sorted((heard_s.get(voter, -math.inf) for voter in record.voters), reverse=True)
    half, is_odd = divmod(len(times_s), 2)
    if not times_s:
        return -math.inf
    since_s = times_s[half]
    if not is_odd:
        # The first and half - 1 others: times_s[half - 1], unless the first itself is later in the order.
        since_s = max(since_s, min(times_s[half - 1], heard_s.get(record.voters[0], -math.inf)))
    return since_s


def generation_of(number: int, owner: NodeId, incarnation: int) -> int:
    """Generations are counted; of two made at once by owners who did not know of each other, one must outrank the other.

    The incarnation is in it, since a device that lost its disk does not know that it made one before.
    """
    seal = hashlib.blake2b(f"{owner}/{incarnation}".encode(), digest_size=4).digest()
    return number << 32 | int.from_bytes(seal)


class Ballot:
    """A voter's memory. `committed` is the last record known to be agreed on, `accepted` the last one acknowledged."""

    def __init__(self, group: GroupId, me: NodeId, incarnation: int) -> None:
        self.me = me
        self.incarnation = incarnation
        self.committed = Record(group, 0, 0, "", 0, me, (), (), 0)
        self.promised = 0
        """The highest term this voter has given its word in: it refuses what comes from a lower one."""
        self.voted_for: NodeId | None = None
        """Whom it voted for, or followed, in that term; None: nobody yet."""
        self.accepted_term = 0
        self.accepted: Record | None = None
        self.voter_incarnation = incarnation
        """As whom this device may vote."""
        self._members: dict[NodeId, Member] = {}

    def restore(self, data: bytes) -> Member | None:
        """Reads the file of a former life; returns what that wanted to be in the group.

        Raises:
            DamagedFile: the voter is as one that lost its file.
        """
        file = read_file(data)
        self.promised, self.voted_for = file.promised, file.voted_for
        self.accepted_term, self.accepted, self.voter_incarnation = file.accepted_term, file.accepted, file.voter_incarnation
        self._set_committed(file.committed)
        return file.wants

    def file(self, wants: Member | None) -> bytes:
        """What goes on disk."""
        file = GroupFile(
            self.committed,
            self.promised,
            self.voted_for,
            self.accepted_term,
            self.accepted,
            self.voter_incarnation,
            wants,
        )
        return write_file(file)

    def member(self, node: NodeId) -> Member | None:
        """Its entry in the committed record."""
        return self._members.get(node)

    def own_member(self) -> Member | None:
        """This incarnation's entry in the committed record."""
        member = self._members.get(self.me)
        return member if member is not None and member.incarnation == self.incarnation else None

    def can_vote(self) -> bool:
        """Whether this device is a voter of the present epoch, by its file or by being listed as it is now."""
        member = self._members.get(self.me)
        return member is not None and member.incarnation == self.voter_incarnation and self.me in self.committed.voters

    def promise(self, term: int, candidate: NodeId | None) -> None:
        """Gives the word. The caller has seen to it that `term` is not below `promised`, and writes before it speaks."""
        self.promised, self.voted_for = term, candidate

    def accept(self, term: int, record: Record, leader: NodeId) -> None:
        """Takes `record` for the child of the present epoch, in `term`. The caller writes before it acknowledges."""
        if term > self.promised:
            self.promise(term, leader)
        self.accepted_term, self.accepted = term, record

    def is_child(self, record: Record) -> bool:
        """Whether `record` would follow the committed one."""
        return (record.generation, record.epoch) == (self.committed.generation, self.committed.epoch + 1)

    def unfinished(self) -> Record | None:
        """An acknowledged child of the present epoch: perhaps others committed it already."""
        return self.accepted if self.accepted is not None and self.is_child(self.accepted) else None

    def adopt(self, record: Record, term: int) -> None:
        """`record` is agreed on, as is known from somebody in `term`. It settles what was acknowledged for its epoch.

        Its leader goes on in the new epoch without asking for votes again, so knowing the record is a vote for it: otherwise
        voters that had no say before could make another leader of the same term.
        """
        if record.term > self.promised:
            self.promise(record.term, record.leader)
        if term > self.promised:
            self.promise(term, None)
        accepted = self.accepted
        is_ahead = accepted is not None and accepted.generation == record.generation and accepted.epoch > record.epoch
        if not is_ahead:
            self.accepted_term, self.accepted = 0, None
        self._set_committed(record)
        if self.own_member() is not None:
            self.voter_incarnation = self.incarnation

    def _set_committed(self, record: Record) -> None:
        self.committed = record
        self._members = {member.node: member for member in record.members}
