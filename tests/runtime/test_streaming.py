"""Devices whose memory holds less than the model give the answer of one that holds all of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.cli.run import Answer
from shoal.lab.random_model import write_random_model
from shoal.lab.shapes import SHAPES
from shoal.runtime.messages import EngineOptions
from tests.runtime.cluster import cluster, request

LAYER_BYTES = 4 * 512 * (2 * 256 + 2 * 128 + 3 * 1536)
"""Matrices of one layer."""
OPTIONS = EngineOptions(num_threads=1, repack=False, context=256, micro_batch=128)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """94 MB in eight layers."""
    path = tmp_path_factory.mktemp("models") / "larger.gguf"
    shape = msgspec.structs.replace(SHAPES["tiny"], num_layers=8, hidden_size=512, feed_forward_size=1536)
    write_random_model(path, shape, quantisation="F32")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_model_larger_than_memory_answers_the_same(model: Path, num_devices: int) -> None:
    async def answer(memory: str) -> tuple[list[int], str, list[int]]:
        async with cluster(num_devices, model.parent, f"--memory={memory}") as devices:
            counts = [8 // num_devices] * num_devices if num_devices > 1 else None
            options = msgspec.structs.replace(OPTIONS, layer_counts=counts)
            answer = await devices.ask(request(model, tokens=12, options=options, digest=True))
            streamed = [stage.streamed_bytes for stage in answer.engine.stages]
            return answer.finished.token_ids, answer.finished.logits_digest, streamed

    roomy_ids, roomy_bits, nothing = asyncio.run(answer("4GB"))
    tight_ids, tight_bits, streamed = asyncio.run(answer("150MB"))
    assert sum(nothing) == 0
    assert len(streamed) == num_devices
    assert sum(streamed) > 10e6
    assert (tight_ids, tight_bits) == (roomy_ids, roomy_bits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "streams"),
    [
        ({"rounds": 4}, False),
        ({"residency": "mmap", "rounds": 2}, False),
        ({"residency": "window", "window_layers": 2}, True),
        ({"residency": "window", "window_layers": 1, "rounds": 4}, True),
    ],
)
def test_every_residency_gives_the_same_answer(model: Path, options: dict[str, Any], streams: bool) -> None:
    async def answer(num_devices: int, wanted: EngineOptions) -> Answer:
        async with cluster(num_devices, model.parent) as devices:
            return await devices.ask(request(model, tokens=8, options=wanted, digest=True))

    plain = asyncio.run(answer(1, OPTIONS))
    # By hand: a device that is busy when it is measured would get fewer layers than there are rounds.
    other = asyncio.run(answer(2, msgspec.structs.replace(OPTIONS, layer_counts=[4, 4], **options)))
    assert other.finished.logits_digest == plain.finished.logits_digest
    assert all(len(stage.windows) == options.get("rounds", 1) for stage in other.engine.stages)
    streamed = sum(stage.streamed_bytes for stage in other.engine.stages)
    assert streamed >= 8 * LAYER_BYTES if streams else streamed == 0


@pytest.mark.slow
def test_memory_for_a_window_is_two_layers_and_no_more(model: Path) -> None:
    async def held() -> list[int]:
        async with cluster(1, model.parent) as devices:
            wanted = msgspec.structs.replace(OPTIONS, residency="window", window_layers=2)
            answer = await devices.ask(request(model, tokens=2, options=wanted))
            return [stage.memory_bytes for stage in answer.engine.stages]

    (memory_bytes,) = asyncio.run(held())
    assert 2 * LAYER_BYTES < memory_bytes < 2 * LAYER_BYTES + 8e6
