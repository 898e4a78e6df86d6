"""Published ways to split layers, behind one interface: a function from a cluster and a model to layers per device.

What a baseline decides is who holds how many layers, where, and in how many rounds. What streams and how is left to the
same runtime that our own plans use, so that comparisons are between plans and not between programs.

Source of the memory-proportional way: exo's `RingMemoryWeightedPartitioningStrategy` and `map_partitions_to_shards`
(2024), and prima.cpp's ablation of the same idea (arXiv 2504.08791v2, appendix A.10: 'MemSched').
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from shoal.errors import InfeasiblePlacement
from shoal.placement.halda import halda
from shoal.placement.profile import Cluster, ModelProfile

BaselineName = Literal["halda", "proportional"]


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """Layers by index of device, the head first: on the CPU and on the accelerator, in all rounds together."""

    num_rounds: int
    num_layers: tuple[int, ...]
    num_accelerator_layers: tuple[int, ...]

    @property
    def totals(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(self.num_layers, self.num_accelerator_layers, strict=True)))


Baseline = Callable[[Cluster, ModelProfile], Split]


def split_by_halda(cluster: Cluster, model: ModelProfile) -> Split:
    """Halda as published. Raises InfeasiblePlacement where it finds nothing."""
    found = halda(cluster, model)
    if found is None:
        raise InfeasiblePlacement("Halda finds no placement: its sets of devices admit none")
    return Split(
        num_rounds=found.num_rounds,
        num_layers=tuple(
            found.num_rounds * (window - on_accelerator)
            for window, on_accelerator in zip(found.windows, found.accelerator_windows, strict=True)
        ),
        num_accelerator_layers=tuple(found.num_rounds * window for window in found.accelerator_windows),
    )


def split_by_memory(cluster: Cluster, model: ModelProfile) -> Split:
    """Layers in proportion to memory, one round, by exo's rounding: boundaries are cut down to whole layers, in the order of
    falling memory, and the last device takes the rest. On each device as many on the accelerator as fit."""
    num_layers = model.num_layers
    memories = [
        device.memory_bytes
        + (device.accelerator.memory_bytes if device.accelerator and not device.accelerator.shares_memory else 0)
        for device in cluster.devices
    ]
    order = sorted(range(len(memories)), key=lambda index: (-memories[index], cluster.devices[index].id))
    counts = [0] * len(memories)
    share, first = 0.0, 0
    for position, index in enumerate(order):
        share = round(share + memories[index] / sum(memories), 5)
        stop = num_layers if position == len(order) - 1 else int(share * num_layers)
        counts[index] = stop - first
        first = stop
    on_accelerators = []
    for device, count in zip(cluster.devices, counts, strict=True):
        fits = 0
        if device.accelerator is not None:
            fits = int(device.accelerator.memory_bytes / (model.mean_layer_bytes + model.cache_bytes_per_layer))
        on_accelerators.append(min(count, fits))
    return Split(
        num_rounds=1,
        num_layers=tuple(count - fast for count, fast in zip(counts, on_accelerators, strict=True)),
        num_accelerator_layers=tuple(on_accelerators),
    )


BASELINES: dict[BaselineName, Baseline] = {"halda": split_by_halda, "proportional": split_by_memory}
