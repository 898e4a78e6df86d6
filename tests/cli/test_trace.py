"""A Chrome trace that adds up."""

from __future__ import annotations

import pytest

from shoal.cli.trace import events
from shoal.ids import DeviceId, LayerRange, ModelHash
from shoal.runtime.messages import EngineDescription, Finished, StageDescription, StepTrace


def test_every_moment_of_a_token_is_somewhere() -> None:
    windows = [[LayerRange(0, 1), LayerRange(2, 3)], [LayerRange(1, 2), LayerRange(3, 4)]]
    stages = [
        StageDescription(DeviceId(name), of_stage, num_threads=1, memory_bytes=1, head=name == "b")
        for name, of_stage in zip("ab", windows, strict=True)
    ]
    engine = EngineDescription("m", ModelHash("0"), stages, context=16)
    steps = [StepTrace(0.1, [(0.01, 0.005, 0.02), (0.02, 0.0, 0.02), (0.01, 0.0, 0.01), (0.01, 0.0, 0.01)])] * 2
    finished = Finished("stop", "", 1, 0, [1, 2, 3], prefill_s=1.0, decode_s=0.2, stages=[], trace=steps)
    found = [event for event in events(engine, finished) if event["ph"] == "X"]
    assert [event["name"] for event in found][:9] == [
        "wire", "disk", "layers 0-0", "wire", "layers 1-1", "wire", "layers 2-2", "wire", "layers 3-3",
    ]  # fmt: skip
    assert {event["dur"] for event in found if event["name"] == "wire"} == {10_000.0}
    assert found[0]["ts"] == 1e6
    last = found[-1]
    assert last["ts"] + last["dur"] == pytest.approx(1.2e6)
    assert last["args"] == {"token": 1, "round": 1}
