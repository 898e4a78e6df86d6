"""What this device can do, measured: free memory, and how many threads compute a layer fastest.

Counting cores is not enough: on a busy machine two threads that wait for each other at barriers can be ten times slower
than one, and slow cores can hold back fast ones. So a few layers of the model itself are run and timed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from shoal.compute.backend import Backend
from shoal.compute.model import Model
from shoal.compute.stage import Stage
from shoal.ids import LayerRange
from shoal.runtime.free_memory import available_bytes

MEMORY_SHARE = 0.8
"""Of what is free; the rest is the owner's."""
_PROBE_LAYERS_MAX = 2
_PROBE_CONTEXT = 256
_PREFILL_TOKENS = 32
_BUDGET_PER_COUNT_S = 0.05


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


class ComputeProfile:
    """Seconds per layer for one token at the best thread count, and the counts for decode and prefill."""

    def __init__(self, model: Model, backend: Backend, *, num_threads: int | None, repack: bool) -> None:
        num_layers = min(_PROBE_LAYERS_MAX, model.shape.num_layers)
        candidates = [num_threads] if num_threads else thread_counts(num_physical_cores())
        stage = Stage(
            model,
            [LayerRange(0, num_layers)],
            backend,
            context=_PROBE_CONTEXT,
            micro_batch=_PREFILL_TOKENS,
            repack=repack,
        )
        try:
            rng = np.random.default_rng(0)
            x_BD = rng.standard_normal((_PREFILL_TOKENS, model.shape.hidden_size), dtype=np.float32)
            decode_s = measure(candidates, backend, lambda: stage.forward(x_BD[:1], 0))
            prefill_s = measure(candidates, backend, lambda: stage.forward(x_BD, 0))
        finally:
            stage.close()
        self.num_threads = min(decode_s, key=lambda count: decode_s[count])
        self.num_threads_prefill = min(prefill_s, key=lambda count: prefill_s[count])
        self.layer_s = decode_s[self.num_threads] / num_layers


def thread_counts(num_cores: int) -> list[int]:
    """1, 2, 4, ... and all cores."""
    counts = {num_cores} | {1 << power for power in range(num_cores.bit_length()) if 1 << power <= num_cores}
    return sorted(counts)


def measure(candidates: list[int], backend: Backend, run: Callable[[], object]) -> dict[int, float]:
    """Median seconds of `run` per thread count. The candidates take turns, so that a passing load hits them alike."""
    samples: dict[int, list[float]] = {count: [] for count in candidates}
    for count in candidates:  # builds graphs, reads the weights from disk
        backend.set_threads(count)
        run()
    give_up_s = time.perf_counter() + _BUDGET_PER_COUNT_S * len(candidates)
    while time.perf_counter() < give_up_s or len(samples[candidates[0]]) < 3:
        for count in candidates:
            backend.set_threads(count)
            started_s = time.perf_counter()
            run()
            samples[count].append(time.perf_counter() - started_s)
    return {count: float(np.median(times)) for count, times in samples.items()}
