"""What a device that needs a state asks of whom: it pulls, so that fast sources give more, whatever was believed of them.

Each source has a few requests open. Whoever has room takes the next shard of a common pool; when the pool is empty, an idle
source is asked as well for the shard that would come last. The first sound copy counts, others are ignored. A shard with the
wrong hash is asked of somebody else; two from one source end it. A source that is lost, or stalls, has its shards go back to
the front of the pool. What is there stays there, so a source may come back, and others may come, at any time.

No bytes pass through here: the driver checks hashes and says what it found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from math import ceil

import msgspec

from shoal.ids import NodeId
from shoal.transfer.shards import Source

OPEN_MIN, OPEN_MAX = 2, 16
"""Requests open at one source: enough to fill its link's round trip."""
RATE_WEIGHT = 0.3
"""Of the newest shard in a source's rate."""
STALL_S = 0.5
STALL_TIMES = 4.0
"""A shard that takes so many times what it should, and at least STALL_S, is given to others as well."""
STRIKES_MAX = 3
WRONG_MAX = 2
COPIES_MAX = 2
GAIN = 0.8
"""An idle source is given a shard of another if it would need less than this share of the time."""


# ---- events


class SourceFound(msgspec.Struct, frozen=True):
    """It has the wanted version."""

    source: Source


class SourceLost(msgspec.Struct, frozen=True):
    node: NodeId


class ShardCame(msgspec.Struct, frozen=True):
    """All bytes of a shard that was asked for; `is_sound`: its hash is right."""

    node: NodeId
    shard: int
    is_sound: bool


class TimePassed(msgspec.Struct, frozen=True):
    """`due_s` is here."""


Event = SourceFound | SourceLost | ShardCame | TimePassed

# ---- effects


class Request(msgspec.Struct, frozen=True):
    node: NodeId
    shard: int


class Keep(msgspec.Struct, frozen=True):
    """The shard that just came is the one that counts."""

    node: NodeId
    shard: int


class Quarantine(msgspec.Struct, frozen=True):
    """Nothing more is asked of this source: it sent wrong bytes, or stalled again and again."""

    node: NodeId
    reason: str


class Starved(msgspec.Struct, frozen=True):
    """Nobody is left who could send the rest. Another source mends that."""


class Complete(msgspec.Struct, frozen=True):
    """All shards are there. `num_shards`: from whom those that count; `num_copies`: how many came for nothing."""

    seconds: float
    num_shards: dict[NodeId, int]
    num_copies: int


Effect = Request | Keep | Quarantine | Starved | Complete


class _Peer:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.bytes_per_s = source.bytes_per_s
        self.open: deque[int] = deque()
        self.late: set[int] = set()
        self.head_since_s = 0.0
        self.strikes = self.num_wrong = self.num_kept = 0
        self.is_slow = False


class Pull:
    """One transfer at its receiver.

    Args:
        num_shards: at least 1, each of `shard_bytes` (the last may be shorter).
        have: shards that are here already, of an earlier attempt.
    """

    def __init__(self, num_shards: int, shard_bytes: int, *, now_s: float, have: frozenset[int] = frozenset()) -> None:
        if num_shards < 1:
            raise ValueError(f"a transfer of {num_shards} shards: at least 1")
        self.num_shards, self.shard_bytes = num_shards, shard_bytes
        self.have = set(have)
        self.num_copies = 0
        self._pool = deque(shard for shard in range(num_shards) if shard not in have)
        self._peers: dict[NodeId, _Peer] = {}
        self._banned: set[NodeId] = set()
        self._kept: dict[NodeId, int] = {}
        self._began_s = now_s
        self._is_complete = False
        self._was_starved = False

    @property
    def is_complete(self) -> bool:
        return len(self.have) == self.num_shards

    def due_s(self) -> float | None:
        """When `TimePassed` is to be told; None: not until something else happens."""
        times = [self._stall_s(peer) for peer in self._peers.values() if peer.open]
        return min(times, default=None)

    def step(self, event: Event, now_s: float) -> list[Effect]:
        """Takes an event."""
        effects: list[Effect] = []
        if isinstance(event, SourceFound):
            node = event.source.node
            if node not in self._banned and node not in self._peers:
                self._peers[node] = _Peer(event.source)
                self._was_starved = False
        elif isinstance(event, SourceLost):
            self._lose(event.node)
        elif isinstance(event, ShardCame):
            effects += self._came(event, now_s)
        for node in list(self._peers):
            effects += self._check_stall(self._peers[node], now_s)
        if self.is_complete:
            if not self._is_complete:
                self._is_complete = True
                effects.append(Complete(now_s - self._began_s, dict(self._kept), self.num_copies))
            return effects
        effects += self._ask(now_s)
        if not self._peers and not self._was_starved:
            self._was_starved = True
            effects.append(Starved())
        return effects

    def _lose(self, node: NodeId) -> None:
        peer = self._peers.pop(node, None)
        if peer is not None:
            self._back(shard for shard in reversed(peer.open) if shard not in peer.late)

    def _back(self, shards: Iterable[int]) -> None:
        """To the front of the pool, unless somebody else is at it."""
        for shard in shards:
            if shard not in self.have and shard not in self._pool and not self._copies(shard):
                self._pool.appendleft(shard)

    def _copies(self, shard: int) -> int:
        return sum(shard in peer.open and shard not in peer.late for peer in self._peers.values())

    def _came(self, event: ShardCame, now_s: float) -> list[Effect]:
        peer = self._peers.get(event.node)
        if peer is None or event.shard not in peer.open:
            return []
        is_head = peer.open[0] == event.shard
        peer.open.remove(event.shard)
        peer.late.discard(event.shard)
        if is_head:
            seconds = max(now_s - peer.head_since_s, 1e-6)
            peer.bytes_per_s += RATE_WEIGHT * (self.shard_bytes / seconds - peer.bytes_per_s)
        peer.head_since_s = now_s
        if not event.is_sound:
            peer.num_wrong += 1
            self._back([event.shard])
            if peer.num_wrong >= WRONG_MAX:
                return [self._ban(event.node, f"{peer.num_wrong} shards with wrong bytes")]
            return []
        peer.is_slow = False
        if event.shard in self.have:
            self.num_copies += 1
            return []
        self.have.add(event.shard)
        if event.shard in self._pool:
            self._pool.remove(event.shard)
        self._kept[event.node] = self._kept.get(event.node, 0) + 1
        return [Keep(event.node, event.shard)]

    def _ban(self, node: NodeId, reason: str) -> Quarantine:
        self._lose(node)
        self._banned.add(node)
        return Quarantine(node, reason)

    def _stall_s(self, peer: _Peer) -> float:
        expected_s = peer.source.latency_s + self.shard_bytes / peer.bytes_per_s
        return peer.head_since_s + max(STALL_S, STALL_TIMES * expected_s) * 2.0**peer.strikes

    def _check_stall(self, peer: _Peer, now_s: float) -> list[Effect]:
        if not peer.open or now_s < self._stall_s(peer):
            return []
        node = peer.source.node
        peer.strikes += 1
        peer.is_slow = True
        if peer.strikes >= STRIKES_MAX:
            return [self._ban(node, f"stalled {peer.strikes} times")]
        shards = [shard for shard in reversed(peer.open) if shard not in peer.late]
        peer.late.update(peer.open)
        peer.head_since_s = now_s
        self._back(shards)
        return []

    def _room(self, peer: _Peer) -> int:
        if peer.is_slow:
            return 1 - len(peer.open)
        wanted = 1 + ceil(peer.bytes_per_s * peer.source.latency_s / self.shard_bytes)
        return min(max(wanted, OPEN_MIN), OPEN_MAX) - len(peer.open)

    def _ask(self, now_s: float) -> list[Effect]:
        effects: list[Effect] = []
        # Who would be ready first is asked first; each gets one at a time, so that none hoards.
        while self._pool:
            free = [peer for peer in self._peers.values() if self._room(peer) > 0]
            if not free:
                return effects
            peer = min(free, key=lambda peer: (self._finish_s(peer, len(peer.open), now_s), peer.source.node))
            effects.append(self._request(peer, self._pool.popleft(), now_s))
        for peer in self._peers.values():
            shard = None if peer.open else self._last_shard(peer, now_s)
            if shard is not None:
                effects += [self._request(peer, shard, now_s)]
        return effects

    def _request(self, peer: _Peer, shard: int, now_s: float) -> Request:
        if not peer.open:
            peer.head_since_s = now_s
        peer.open.append(shard)
        return Request(peer.source.node, shard)

    def _finish_s(self, peer: _Peer, place: int, now_s: float) -> float:
        """When the source would have sent the shard at `place` of its queue."""
        each_s = self.shard_bytes / peer.bytes_per_s
        if not peer.open:
            return now_s + peer.source.latency_s + (place + 1) * each_s
        return max(now_s, peer.head_since_s + each_s) + place * each_s

    def _last_shard(self, idle: _Peer, now_s: float) -> int | None:
        """The shard that would come last, where the idle source would clearly be faster."""
        last: tuple[float, int] | None = None
        for peer in self._peers.values():
            for place, shard in enumerate(peer.open):
                if shard not in self.have and self._copies(shard) < COPIES_MAX:
                    last = max(last or (0.0, -1), (self._finish_s(peer, place, now_s) - now_s, shard))
        if last is None:
            return None
        own_s = idle.source.latency_s + self.shard_bytes / idle.bytes_per_s
        return last[1] if own_s < GAIN * last[0] else None
