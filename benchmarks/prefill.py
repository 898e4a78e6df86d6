"""A prompt over two devices with a core each: several micro-batches in flight against one. `memory.py` prints the figure.

Two processes, each bound to a core of its own, hold half of the layers each and are linked over loopback. Ours are cut and
kept in flight as the engine of two devices has them. With one in flight every size is tried, and the best one counts.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from shoal import __version__
from shoal.compute.backend import Backend
from shoal.compute.model import Model
from shoal.compute.stage import Stage
from shoal.errors import LinkError
from shoal.ids import EngineId, LayerRange
from shoal.inference.batching import micro_batches
from shoal.runtime.question import MICRO_BATCH_RING
from shoal.runtime.ring import RingHead, RingStage, ThreadCounts, frame_shape
from shoal.transport.link import Inbound, Outbound, RingListener, dial

PROMPT_TOKENS = 1024
SIZES = (128, 256, 512, 1024)
"""Of the micro-batches of one in flight."""
_ENGINE = EngineId(1)
_THREADS = ThreadCounts(1, 1)
_NUM_STAGES = 2


def measure_prefill(path: Path, *, rounds: int) -> dict[str, float]:
    """Seconds for a prompt of 1,024 tokens, medians over rounds, and how much faster several in flight are."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    other = multiprocessing.get_context("spawn").Process(target=_serve_first_half, args=(path, theirs), daemon=True)
    other.start()
    theirs.close()
    _bind(0)
    model = Model(path)
    try:
        stage = _half(model, head=True)
        inbound, outbound = _connect(stage, ours)
        found = _measure(stage, inbound, outbound, rounds)
        outbound.close()
        inbound.close()
        stage.close()
        stage.backend.close()
    finally:
        model.close()
        other.join(20)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
    return found


def _measure(stage: Stage, inbound: Inbound, outbound: Outbound, rounds: int) -> dict[str, float]:
    head = RingHead(stage, _ENGINE, _THREADS, num_stages=_NUM_STAGES, inbound=inbound, outbound=outbound)
    token_ids = [(7 * index) % 1000 for index in range(PROMPT_TOKENS)]

    def prefill_s(num_in_flight: int | None, micro_batch: int) -> float:
        batches = micro_batches(0, PROMPT_TOKENS, micro_batch=micro_batch)
        started_s = time.perf_counter()
        head.prefill(token_ids, batches, progress=lambda _: True, num_in_flight=num_in_flight)
        return time.perf_counter() - started_s

    ways = {"ours": (None, MICRO_BATCH_RING), **{str(size): (1, size) for size in SIZES}}
    for way in ways.values():
        prefill_s(*way)  # its graphs are built and its pages touched
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(prefill_s(*way))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min((name for name in medians if name != "ours"), key=medians.__getitem__)
    found = {
        "prefill_ratio": statistics.median(one / ours for one, ours in zip(seconds[best], seconds["ours"], strict=True)),
        "prefill_s": medians["ours"],
        **{f"one_of_{size}_s": medians[str(size)] for size in SIZES},
    }
    print("prefill", {name: round(value, 4) for name, value in found.items()}, file=sys.stderr)
    return found


def _serve_first_half(path: Path, pipe: Connection) -> None:
    _bind(1)
    model = Model(path)
    stage = _half(model, head=False)
    inbound, outbound = _connect(stage, pipe)
    try:
        RingStage(stage, inbound, outbound, _THREADS, num_stages=_NUM_STAGES).run()
    except LinkError:
        pass  # how every ring ends
    finally:
        stage.close()
        stage.backend.close()
        model.close()


def _half(model: Model, *, head: bool) -> Stage:
    num_layers = model.shape.num_layers
    layers = LayerRange(num_layers // 2, num_layers) if head else LayerRange(0, num_layers // 2)
    return Stage(model, [layers], Backend(num_threads=1), context=PROMPT_TOKENS, micro_batch=PROMPT_TOKENS, head=head)


def _connect(stage: Stage, pipe: Connection) -> tuple[Inbound, Outbound]:
    listener = RingListener("127.0.0.1", engine=_ENGINE, version=__version__)
    pipe.send(listener.port)
    with ThreadPoolExecutor(1) as pool:
        accepting = pool.submit(listener.accept, timeout_s=60.0)
        sock = dial("127.0.0.1", pipe.recv(), engine=_ENGINE, version=__version__)
        inbound = accepting.result()
    listener.close()
    return inbound, Outbound(sock, frame_shape(stage, _NUM_STAGES), frames_max=_NUM_STAGES + 1)


def _bind(core: int) -> None:
    """This process, and all threads it will start, on one core: a device that has no more."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
