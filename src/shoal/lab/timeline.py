"""When faults are due: decides from the scenario's timeline and the time, and knows neither clocks nor devices."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from shoal.lab.paths import Pair
from shoal.lab.scenario import Change, Fault, Redraw
from shoal.lab.shaping import LinkShape


class Executed(msgspec.Struct, frozen=True):
    """One fault as it happened: when it was due and when it was done, in seconds from the start, and what came of it."""

    at_s: float
    done_s: float
    do: str
    what: dict[str, Any]
    problem: str = ""


class Timeline:
    """Hands out faults when they are due; those with `every_s` come again and again."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._waiting = [(fault.at_s, index, fault) for index, fault in enumerate(faults)]
        heapq.heapify(self._waiting)

    @property
    def next_s(self) -> float | None:
        """When the next one is due; None after the last."""
        return self._waiting[0][0] if self._waiting else None

    def due(self, now_s: float) -> list[tuple[float, Fault]]:
        """(due time, fault) of everything up to now, in order."""
        found = []
        while self._waiting and self._waiting[0][0] <= now_s:
            at_s, index, fault = heapq.heappop(self._waiting)
            found.append((at_s, fault))
            if fault.every_s is not None:
                heapq.heappush(self._waiting, (at_s + fault.every_s, index, fault))
        return found


def describe(fault: Fault) -> dict[str, Any]:
    """What a fault says beyond its kind and time."""
    fields: dict[str, Any] = msgspec.to_builtins(fault)
    return {key: value for key, value in fields.items() if key not in ("do", "at_s", "every_s") and value is not None}


def changed_shapes(fault: Change | Redraw, shapes: Mapping[Pair, LinkShape], *, rng: random.Random) -> dict[Pair, LinkShape]:
    """The new shapes of the links that a fault means."""
    pairs: Iterable[Pair] = fault.pairs or sorted(shapes)
    if isinstance(fault, Redraw):
        low, high = fault.rate_mbit_s
        return {pair: msgspec.structs.replace(shapes[pair], rate_bit_s=rng.uniform(low, high) * 1e6) for pair in pairs}
    changes: dict[str, Any] = {}
    if fault.rate_mbit_s is not None:
        changes["rate_bit_s"] = fault.rate_mbit_s * 1e6
    if fault.delay_ms is not None:
        changes["delay_s"] = fault.delay_ms * 1e-3
    if fault.jitter_ms is not None:
        changes["jitter_s"] = fault.jitter_ms * 1e-3
    if fault.loss is not None:
        changes["loss"] = fault.loss
    if fault.queue_kb is not None:
        changes["queue_bytes"] = int(fault.queue_kb * 1000)
    return {pair: msgspec.structs.replace(shapes[pair], **changes) for pair in pairs}
