"""What this device can do, measured: free memory, and how many threads compute a layer fastest.

Counting cores is not enough: on a busy machine two threads that wait for each other at barriers can be ten times slower
than one, and slow cores can hold back fast ones. So a few layers of the model itself are run and timed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import psutil

from shoal.compute.backend import Backend
from shoal.compute.model import Model
from shoal.compute.stage import Stage
from shoal.ids import LayerRange
from shoal.placement.profile import BATCH_TOKENS
from shoal.runtime.free_memory import available_bytes
from shoal.units import MIB

MEMORY_SHARE = 0.8
"""Of what is free; the rest is the owner's."""
_PROBE_LAYERS_FEW = 2
_PROBE_CONTEXT = 256
_PROBE_MEMORY_SHARE = 0.25
"""Of the memory for the model: layers that are timed for a plan are read, and may be copied."""
_COLD_BYTES = 96 * MIB
"""Passed through in a circle, caches of up to as much keep nothing of it."""
_REPETITIONS_MIN = 3
_BUDGET_PER_COUNT_S = 0.05
_STABLE_BUDGET_PER_COUNT_S = 1.0
_STABLE_WITHIN = 0.05


def usable_memory_bytes(limit_bytes: int | None) -> int:
    """For one more worker of this process: what the owner's limit leaves, but never more than is there; without a limit
    a share of what is free now."""
    available = available_bytes()
    if limit_bytes is None:
        return int(available * MEMORY_SHARE)
    return max(0, min(limit_bytes - own_bytes() - _worker_bytes(), available))


def own_bytes() -> int:
    """What this process takes and cannot give back: its memory without mapped files, and the kernel's for it."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem", "VmPTE"))
    except (OSError, KeyError, ValueError):  # no Linux, or an old one
        return int(psutil.Process().memory_info().rss)


def _worker_bytes() -> int:
    """What the workers of this process take already."""
    total = 0
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            total += child.memory_info().rss
    return total


def num_physical_cores() -> int:
    """Cores this process may use; hyper-threads do not count twice where the system tells them apart."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no affinity call
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


class Timing(NamedTuple):
    """Median seconds of repetitions, and how far they lay apart: (longest - shortest) / median. `is_steady`: the middle half
    of them lies close together."""

    seconds: float
    spread: float
    is_steady: bool = True

    def per(self, count: int) -> Timing:
        """Of one of `count` things that were timed together."""
        return self._replace(seconds=self.seconds / count)


class ComputeProfile:
    """How fast this device computes the model, and with how many threads.

    `layer` is a layer for one token, `batch_layer` one for `BATCH_TOKENS`, `output` the output projection of one token; None
    where it was not asked for, or would take more than its part of the memory.

    Args:
        for_plan: time as many layers as no cache holds, over and over until the figures are stable: a token visits every
            layer once, so it finds each as cold. Without it two layers do, which tells thread counts apart.
        head: time the output projection as well, for a plan.
        memory_bytes: what the model may use here; None where there is no limit. A part of it is used.
    """

    def __init__(
        self,
        model: Model,
        backend: Backend,
        *,
        num_threads: int | None,
        repack: bool,
        for_plan: bool = False,
        head: bool = False,
        memory_bytes: int | None = None,
    ) -> None:
        self._model, self._backend, self._repack, self._until_stable = model, backend, repack, for_plan
        candidates = [num_threads] if num_threads else thread_counts(num_physical_cores())
        room_bytes = sys.maxsize if memory_bytes is None else int(memory_bytes * _PROBE_MEMORY_SHARE)
        few = min(_PROBE_LAYERS_FEW, model.shape.num_layers)
        self.num_layers = cold_layers(model.layer_bytes, room_bytes) if for_plan else few
        with self._stage(LayerRange(0, self.num_layers)) as stage:
            decode = self._time(stage, candidates, num_tokens=1)
            if self.num_layers == few:
                prefill = self._time(stage, candidates, num_tokens=BATCH_TOKENS)
        if self.num_layers != few:  # a batch computes long on each weight: where it comes from matters little
            with self._stage(LayerRange(0, few)) as stage:
                prefill = self._time(stage, candidates, num_tokens=BATCH_TOKENS)
        self.num_threads, self.layer = _fastest(decode)
        self.num_threads_prefill, self.batch_layer = _fastest(prefill)
        self.output: Timing | None = None
        if for_plan and head and model.output_bytes <= room_bytes:
            self.output = self._time_output()

    @property
    def is_steady(self) -> bool:
        """Whether this device was left alone while it was measured."""
        return all(timing.is_steady for timing in (self.layer, self.batch_layer, self.output) if timing is not None)

    @property
    def spreads(self) -> dict[str, float]:
        timed = {"layer_s": self.layer, "batch_layer_s": self.batch_layer, "output_s": self.output}
        return {name: timing.spread for name, timing in timed.items() if timing is not None}

    def _time(self, stage: Stage, candidates: list[int], *, num_tokens: int) -> dict[int, Timing]:
        """Of one layer of the stage, by number of threads."""
        x_BD = self._hidden(num_tokens)
        timed = measure(candidates, self._backend, lambda: stage.forward(x_BD, 0), until_stable=self._until_stable)
        return {count: timing.per(len(stage.layers)) for count, timing in timed.items()}

    def _time_output(self) -> Timing:
        num_layers = self._model.shape.num_layers
        with self._stage(LayerRange(num_layers, num_layers), head=True) as stage:
            x_BD = self._hidden(1)
            counts = [self.num_threads]
            timed = measure(counts, self._backend, lambda: stage.forward(x_BD, 0, num_outputs=1), until_stable=True)
        return timed[self.num_threads]

    def _stage(self, layers: LayerRange, *, head: bool = False) -> contextlib.closing[Stage]:
        stage = Stage(
            self._model,
            [layers],
            self._backend,
            context=_PROBE_CONTEXT,
            micro_batch=BATCH_TOKENS,
            head=head,
            repack=self._repack,
        )
        return contextlib.closing(stage)

    def _hidden(self, num_tokens: int) -> npt.NDArray[np.float32]:
        """Hidden states that mean nothing, [num_tokens, hidden_size]."""
        rng = np.random.default_rng(0)
        return rng.standard_normal((num_tokens, self._model.shape.hidden_size), dtype=np.float32)


def cold_layers(layer_bytes: Sequence[int], room_bytes: int) -> int:
    """How many of the first layers are more than a processor's caches hold: two at least, as long as there are as many and
    `room_bytes` lasts, which one layer may exceed."""
    total_bytes = 0
    for index, num_bytes in enumerate(layer_bytes):
        is_enough = index >= _PROBE_LAYERS_FEW and total_bytes >= _COLD_BYTES
        if index and (is_enough or total_bytes + num_bytes > room_bytes):
            return index
        total_bytes += num_bytes
    return len(layer_bytes)


def _fastest(timed: dict[int, Timing]) -> tuple[int, Timing]:
    return min(timed.items(), key=lambda item: item[1].seconds)


def thread_counts(num_cores: int) -> list[int]:
    """1, 2, 4, ... and all cores."""
    counts = {num_cores} | {1 << power for power in range(num_cores.bit_length()) if 1 << power <= num_cores}
    return sorted(counts)


def measure(
    candidates: list[int], backend: Backend, run: Callable[[], object], *, until_stable: bool = False
) -> dict[int, Timing]:
    """Times `run` per thread count. The candidates take turns, so that a passing load hits them alike.

    Args:
        until_stable: go on, for a second per candidate at most, until the middle half of the fastest's times lies
            within 5 %.
    """
    samples: dict[int, list[float]] = {count: [] for count in candidates}
    for count in candidates:  # builds graphs, reads the weights from disk
        backend.set_threads(count)
        run()
    began_s = time.perf_counter()
    while True:
        elapsed_s = time.perf_counter() - began_s
        if len(samples[candidates[0]]) >= _REPETITIONS_MIN and elapsed_s >= _BUDGET_PER_COUNT_S * len(candidates):
            patience_s = _STABLE_BUDGET_PER_COUNT_S * len(candidates)
            if not until_stable or elapsed_s >= patience_s or _is_stable(samples):
                break
        for count in candidates:
            backend.set_threads(count)
            started_s = time.perf_counter()
            run()
            samples[count].append(time.perf_counter() - started_s)
    return {count: _timing(times) for count, times in samples.items()}


def _is_stable(samples: dict[int, list[float]]) -> bool:
    return _timing(min(samples.values(), key=np.median)).is_steady


def _timing(times: list[float]) -> Timing:
    low, median, high = (float(each) for each in np.percentile(times, (25, 50, 75)))
    return Timing(median, (max(times) - min(times)) / median, high - low <= _STABLE_WITHIN * median)
