"""A graphics processor as a second backend: the same tokens as on the processor, by itself, beside it, and in mixed rings.

With weights of 32 bits: the processor's kernels round what quantised weights are multiplied with to eight bits, a graphics
processor's do not.

`make check-gpu` compiles ggml with Vulkan, which Mesa's software driver serves where there is no graphics processor.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from shoal.cli.demo import demo_model
from shoal.compute.backend import compute_devices
from shoal.lab.requantise import requantise
from shoal.runtime.messages import EngineOptions
from tests.runtime.cluster import cluster, request

GPUS = [device.name for device in compute_devices() if device.kind in ("gpu", "integrated gpu")]
pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not GPUS, reason="this build of ggml finds no graphics processor: see `make check-gpu`"),
]
NUM_TOKENS = 16


def answer(
    path: Path, options: EngineOptions, *, num_devices: int = 1, own: dict[int, list[str]] | None = None
) -> list[int]:
    """Token ids of the model's greedy answer."""

    async def ask() -> list[int]:
        async with cluster(num_devices, path.parent, own=own) as devices:
            found = await devices.ask(request(path, tokens=NUM_TOKENS, options=options))
            return found.finished.token_ids

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as F32, 0.54 GB."""
    path = tmp_path_factory.mktemp("models") / "smollm2-f32.gguf"
    requantise(demo_model(), path, "F32")
    return path


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    found = answer(model, EngineOptions(num_threads=1, compute_device="CPU"))
    assert len(found) == NUM_TOKENS
    return found


def test_a_graphics_processor_alone(model: Path, expected: list[int]) -> None:
    assert answer(model, EngineOptions(num_threads=1, compute_device=GPUS[0])) == expected


@pytest.mark.parametrize("on_gpu", [1, 12, 30])
def test_a_device_with_layers_on_both(model: Path, expected: list[int], on_gpu: int) -> None:
    options = EngineOptions(num_threads=1, layer_counts=[30], accelerator_layers=[on_gpu])
    assert answer(model, options) == expected


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_ring_of_a_mixed_device_and_one_without(model: Path, expected: list[int], rounds: int) -> None:
    options = EngineOptions(num_threads=1, layer_counts=[18, 12], accelerator_layers=[9, 0], rounds=rounds)
    assert answer(model, options, num_devices=2) == expected


def test_a_ring_in_which_another_device_computes_on_its_graphics_processor_only(model: Path, expected: list[int]) -> None:
    own = {1: [f"--models={model.parent}", f"--device={GPUS[0]}"]}
    options = EngineOptions(num_threads=1, layer_counts=[20, 10])
    assert answer(model, options, num_devices=2, own=own) == expected
