"""What people are shown of an answer's cost."""

from __future__ import annotations

import io

from rich.console import Console

from shoal.cli.report import breakdown
from shoal.ids import DeviceId, LayerRange, ModelHash
from shoal.runtime.messages import EngineDescription, Finished, StageDescription, StageTimes


def shown(*streamed_bytes: int) -> str:
    stages = [
        StageDescription(
            device=DeviceId(f"device-{index}"),
            windows=[LayerRange(index, index + 1)],
            num_threads=1,
            memory_bytes=5_000_000,
            head=index == 0,
            streamed_bytes=num_bytes,
        )
        for index, num_bytes in enumerate(streamed_bytes)
    ]
    engine = EngineDescription(model="m", model_hash=ModelHash("0"), stages=stages, context=16, left_out=[], hidden_size=8)
    times = [StageTimes(0.001, 0.002, 0.003) for _ in stages]
    finished = Finished(
        reason="stop",
        text="",
        prompt_tokens=1,
        cached_tokens=0,
        token_ids=[1, 2],
        prefill_s=0.1,
        decode_s=0.1,
        stages=times,
        hop_us=[],
    )
    console = Console(file=io.StringIO(), width=120)
    console.print(breakdown(engine, finished))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_what_is_read_from_disk_is_shown_where_anything_is() -> None:
    text = shown(0, 7_000_000)
    header = next(line for line in text.splitlines() if "from disk" in line)
    assert header.index("memory") < header.index("from disk") < header.index("compute")
    assert "7 MB" in next(line for line in text.splitlines() if "device-1" in line).replace("7.0", "7")
    assert "weights read from disk" in text
    assert "from disk" not in shown(0, 0)
