"""The ring computes what one device computes, to the bit, however the layers are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shoal.inference.batching import micro_batches
from shoal.runtime.ring import RingHead
from tests.runtime.in_process_ring import ring

TinyModel = Callable[[str, str], Path]


def run(head: RingHead, prompt: list[int], steps: list[int], *, micro_batch: int) -> list[bytes]:
    """Bits of the logits after the prompt and after each forced step."""
    batches = micro_batches(0, len(prompt), micro_batch=micro_batch)
    logits_V = head.prefill(prompt, batches, progress=lambda _: True)
    assert logits_V is not None
    bits = [logits_V.tobytes()]
    for index, token_id in enumerate(steps):
        logits_V = head.decode(token_id, len(prompt) + index)
        assert len(head.timings()) == head.num_stages
        bits.append(logits_V.tobytes())
    return bits


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("counts", [[1, 2], [1, 1, 1], [1, 1, 1, 0], [3, 0]])
def test_logits_are_bit_equal_to_one_device(tiny_model: TinyModel, architecture: str, counts: list[int]) -> None:
    path = tiny_model(architecture, "Q4_K")
    rng = np.random.default_rng(7)
    prompt, steps = rng.integers(0, 500, 150).tolist(), rng.integers(0, 500, 12).tolist()
    with ring(path, [3], micro_batch=64) as alone, ring(path, counts, micro_batch=64) as together:
        assert run(together, prompt, steps, micro_batch=64) == run(alone, prompt, steps, micro_batch=64)


@pytest.mark.slow
def test_a_stopped_prefill_leaves_a_quiet_ring(tiny_model: TinyModel) -> None:
    path = tiny_model("llama", "Q8_0")
    prompt = list(range(300))
    with ring(path, [1, 1, 1], micro_batch=32) as head:
        asked: list[int] = []
        batches = micro_batches(0, len(prompt), micro_batch=32)

        def stop_at_once(num_done: int) -> bool:
            asked.append(num_done)
            return False

        assert head.prefill(prompt, batches, progress=stop_at_once) is None
        # Three micro-batches were under way and came home; the next pass is right.
        assert asked == [32, 64, 96]
        first = run(head, prompt, [5, 6], micro_batch=32)
    with ring(path, [3], micro_batch=32) as alone:
        assert first == run(alone, prompt, [5, 6], micro_batch=32)
