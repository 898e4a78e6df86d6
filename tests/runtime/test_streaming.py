"""Devices whose memory holds less than the model give the answer of one that holds all of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from shoal.lab.random_model import write_random_model
from shoal.lab.shapes import SHAPES
from shoal.runtime.messages import EngineOptions
from tests.runtime.cluster import cluster, request

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
            answer = await devices.ask(request(model, tokens=12, options=OPTIONS, digest=True))
            streamed = [stage.streamed_bytes for stage in answer.engine.stages]
            return answer.finished.token_ids, answer.finished.logits_digest, streamed

    roomy_ids, roomy_bits, nothing = asyncio.run(answer("4GB"))
    tight_ids, tight_bits, streamed = asyncio.run(answer("135MB"))
    assert sum(nothing) == 0
    assert len(streamed) == num_devices
    assert sum(streamed) > 10e6
    assert (tight_ids, tight_bits) == (roomy_ids, roomy_bits)
