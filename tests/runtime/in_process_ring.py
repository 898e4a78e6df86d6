"""A ring inside one process: real stages, real links on loopback, a thread per device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal.compute.backend import Backend
from shoal.compute.model import Model, matrix_names
from shoal.compute.stage import Stage
from shoal.compute.streaming import Streaming, row_runs
from shoal.errors import LinkError
from shoal.ids import EngineId, LayerRange
from shoal.placement.planner import deal_windows
from shoal.runtime.ring import RingHead, RingStage, ThreadCounts, frame_shape
from shoal.transport.link import Inbound, Outbound, RingListener, dial

ENGINE = EngineId(99)


@contextmanager
def ring(
    path: Path,
    counts: list[int],
    *,
    rounds: int = 1,
    threads: int = 1,
    context: int = 1024,
    micro_batch: int = 512,
    repack: bool = True,
    streaming: Callable[[list[str]], Streaming] | None = None,
) -> Iterator[RingHead]:
    """A ring whose stages hold `counts` layers, in ring order; the last is the head.

    Args:
        streaming: what a stage streams, by the names of all runs of rows that it has.
    """
    model = Model(path)
    stages = []
    for index, windows in enumerate(deal_windows(counts, rounds)):
        stages.append(
            Stage(
                model,
                windows,
                Backend(num_threads=threads),
                context=context,
                micro_batch=micro_batch,
                head=index == len(counts) - 1,
                repack=repack,
                streaming=streaming and streaming(_run_names(model, windows, is_head=index == len(counts) - 1)),
            )
        )
    links = _connect(stages) if len(stages) > 1 else [(None, None)]
    running = []
    thread_counts = ThreadCounts(threads, threads)
    for stage, (inbound, outbound) in zip(stages[:-1], links[:-1], strict=True):
        assert inbound is not None
        assert outbound is not None
        serving = threading.Thread(
            target=_serve, args=(RingStage(stage, inbound, outbound, thread_counts, num_stages=len(stages)),)
        )
        serving.start()
        running.append(serving)
    inbound, outbound = links[-1]
    try:
        yield RingHead(
            stages[-1],
            ENGINE,
            thread_counts,
            num_stages=len(stages),
            holds_windows=all(stage.holds_windows for stage in stages),
            inbound=inbound,
            outbound=outbound,
        )
    finally:
        for ends in links:
            for end in ends:
                if end is not None:
                    end.close()
        for serving in running:
            serving.join()
        for stage in stages:
            stage.close()
            stage.backend.close()
        model.close()


def _run_names(model: Model, windows: Sequence[LayerRange], *, is_head: bool) -> list[str]:
    names = matrix_names(model, windows, head=is_head)
    return [run.name for of_window in names for name in of_window for run in row_runs(model.file.tensors[name])]


def _serve(stage: RingStage) -> None:
    with suppress(LinkError):  # how every ring ends
        stage.run()


def _connect(stages: list[Stage]) -> list[tuple[Inbound | None, Outbound | None]]:
    listeners = [RingListener("127.0.0.1", engine=ENGINE, version="test") for _ in stages]
    inbounds: list[Inbound | None] = [None] * len(stages)

    def accept(index: int) -> None:
        inbounds[index] = listeners[index].accept(timeout_s=10.0)

    accepting = [threading.Thread(target=accept, args=(index,)) for index in range(len(stages))]
    for thread in accepting:
        thread.start()
    outbounds = []
    for index, stage in enumerate(stages):
        port = listeners[(index + 1) % len(stages)].port
        outbounds.append(
            Outbound(
                dial("127.0.0.1", port, engine=ENGINE, version="test"),
                frame_shape(stage, len(stages)),
                frames_max=len(stages) + 1,
            )
        )
    for thread in accepting:
        thread.join()
    for listener in listeners:
        listener.close()
    return list(zip(inbounds, outbounds, strict=True))
