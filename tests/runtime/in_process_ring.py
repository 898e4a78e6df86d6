"""A ring inside one process: real stages, real links on loopback, a thread per device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shoal.compute.backend import Backend
from shoal.compute.model import Model
from shoal.compute.stage import Stage
from shoal.errors import LinkError
from shoal.ids import EngineId, LayerRange
from shoal.runtime.ring import RingHead, RingStage, ThreadCounts, frame_shape
from shoal.transport.link import Inbound, Outbound, RingListener, dial

ENGINE = EngineId(99)


@contextmanager
def ring(
    path: Path, counts: list[int], *, threads: int = 1, context: int = 1024, micro_batch: int = 512, repack: bool = True
) -> Iterator[RingHead]:
    """A ring whose stages hold `counts` layers, in ring order; the last is the head."""
    model = Model(path)
    stages, first = [], 0
    for index, count in enumerate(counts):
        stages.append(
            Stage(
                model,
                LayerRange(first, first + count),
                Backend(num_threads=threads),
                context=context,
                micro_batch=micro_batch,
                head=index == len(counts) - 1,
                repack=repack,
            )
        )
        first += count
    links = _connect(stages) if len(stages) > 1 else [(None, None)]
    running = []
    thread_counts = ThreadCounts(threads, threads)
    for stage, (inbound, outbound) in zip(stages[:-1], links[:-1], strict=True):
        assert inbound is not None
        assert outbound is not None
        serving = threading.Thread(target=_serve, args=(RingStage(stage, inbound, outbound, thread_counts),))
        serving.start()
        running.append(serving)
    inbound, outbound = links[-1]
    try:
        yield RingHead(stages[-1], ENGINE, thread_counts, num_stages=len(stages), inbound=inbound, outbound=outbound)
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
