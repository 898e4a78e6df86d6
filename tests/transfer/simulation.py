"""Sources that send shards at their own, changing pace, die, stall and lie; and one that pulls."""

from __future__ import annotations

import random
from heapq import heappop, heappush

from shoal.ids import NodeId
from shoal.transfer.pull import (
    Complete,
    Event,
    Keep,
    Pull,
    Quarantine,
    Request,
    ShardCame,
    SourceLost,
    Starved,
    TimePassed,
)
from shoal.transfer.shards import Source


class Transfer:
    """One transfer of `num_shards` of `shard_bytes` from sources whose true rates are `sources`."""

    def __init__(self, sources: list[Source], num_shards: int, shard_bytes: int, *, seed: int) -> None:
        self.rng = random.Random(seed)
        self.true = {source.node: source for source in sources}
        self.shard_bytes = shard_bytes
        self.core = Pull(num_shards, shard_bytes, now_s=0.0)
        self.now_s = 0.0
        self.kept: dict[int, NodeId] = {}
        self.num_sent = 0
        self.complete: Complete | None = None
        self.quarantined: list[NodeId] = []
        self.num_starved = 0
        self.lies: set[NodeId] = set()
        self.stopped: set[NodeId] = set()
        self._free_s: dict[NodeId, float] = {}
        self._queue: list[tuple[float, int, Event]] = []
        self._count = 0

    def later(self, at_s: float, event: Event) -> None:
        self._count += 1
        heappush(self._queue, (at_s, self._count, event))

    def play(self, *, seconds_max: float = 1e4) -> None:
        while self.complete is None and self.now_s < seconds_max:
            due_s = self.core.due_s()
            if not self._queue and due_s is None:
                return
            if not self._queue or (due_s is not None and due_s < self._queue[0][0]):
                assert due_s is not None
                self.now_s, event = max(due_s, self.now_s), TimePassed()
            else:
                self.now_s, _, event = heappop(self._queue)  # type: ignore[assignment]
            if isinstance(event, ShardCame) and (event.node not in self.true or event.node in self.stopped):
                continue
            if isinstance(event, SourceLost):
                self.true.pop(event.node, None)
            self.tell(event)

    def tell(self, event: Event) -> None:
        for effect in self.core.step(event, self.now_s):
            if isinstance(effect, Request):
                self._send(effect)
            elif isinstance(effect, Keep):
                assert effect.shard not in self.kept, "a shard was kept twice"
                assert isinstance(event, ShardCame)
                assert event.is_sound
                self.kept[effect.shard] = effect.node
            elif isinstance(effect, Quarantine):
                self.quarantined.append(effect.node)
            elif isinstance(effect, Starved):
                self.num_starved += 1
            else:
                self.complete = effect

    def _send(self, request: Request) -> None:
        source = self.true[request.node]
        began_s = max(self.now_s + source.latency_s, self._free_s.get(request.node, 0.0))
        ended_s = self._free_s[request.node] = began_s + self.shard_bytes / source.bytes_per_s
        self.num_sent += 1
        is_sound = not (request.node in self.lies and self.rng.random() < 0.5)
        self.later(ended_s, ShardCame(request.node, request.shard, is_sound))


def sources_of(seed: int) -> list[Source]:
    rng = random.Random(f"sources/{seed}")
    return [
        Source(NodeId(f"s{index}"), 2e6 * 20 ** rng.random(), rng.uniform(0.005, 0.08)) for index in range(rng.randint(2, 6))
    ]
