"""The ring computes what one device computes, to the bit, however the layers are cut."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from shoal.compute.streaming import Streaming
from shoal.inference.batching import micro_batches
from shoal.lab.random_model import write_random_model
from shoal.lab.shapes import SHAPES
from shoal.runtime.ring import RingHead
from shoal.units import MIB
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
        assert len(head.visits()) == head.num_stages * head.rounds
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


@pytest.fixture(scope="module")
def eight_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "eight.gguf"
    write_random_model(path, msgspec.structs.replace(SHAPES["tiny"], num_layers=8), quantisation="F16")
    return path


def half(names: list[str]) -> Streaming:
    return Streaming(frozenset(names[::2]), ring_bytes=5 * MIB)


def everything(names: list[str]) -> Streaming:
    return Streaming(frozenset(names), ring_bytes=4 * MIB)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [None, half, everything])
@pytest.mark.parametrize(("counts", "rounds"), [([8], 1), ([3, 5], 1), ([3, 5], 3), ([2, 2, 2, 2], 2), ([4, 4, 0], 4)])
def test_bits_are_equal_for_any_number_of_rounds(
    eight_layers: Path, counts: list[int], rounds: int, streaming: Callable[[list[str]], Streaming] | None
) -> None:
    rng = np.random.default_rng(9)
    prompt, steps = rng.integers(0, 500, 150).tolist(), rng.integers(0, 500, 6).tolist()
    together = ring(eight_layers, counts, rounds=rounds, micro_batch=32, repack=False, streaming=streaming)
    with ring(eight_layers, [8], micro_batch=32, repack=False) as alone, together as head:
        # The second prompt meets what the first left in the rings.
        for _ in range(2):
            assert run(head, prompt, steps, micro_batch=32) == run(alone, prompt, steps, micro_batch=32)


@pytest.mark.slow
def test_a_prompt_is_read_once_where_windows_stay(eight_layers: Path) -> None:
    batches = micro_batches(0, 150, micro_batch=32)
    prompt = list(range(150))

    def read_for_prompt(counts: list[int], rounds: int) -> tuple[int, float]:
        with ring(eight_layers, counts, rounds=rounds, micro_batch=32, repack=False, streaming=half) as head:
            streamed = head.stage.streamed
            assert streamed is not None
            assert head.prefill(prompt, batches, progress=lambda _: True) is not None
            return head.reads_per_prompt(batches), streamed.bytes_read / streamed.turn_bytes

    # What is read ahead for the next turn is as much as the ring holds.
    once, bytes_once = read_for_prompt([4, 4], 4)
    every_time, bytes_every_time = read_for_prompt([4, 4], 1)
    assert (once, every_time) == (1, len(batches))
    assert 1 <= bytes_once < 2.5
    assert len(batches) <= bytes_every_time < len(batches) + 1.5


def _noted(done: list[int]) -> Callable[[int], bool]:
    def note(num_done: int) -> bool:
        done.append(num_done)
        return True

    return note


def _next(answers: Iterator[bool], _num_done: int) -> bool:
    return next(answers)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [None, half])
def test_a_prefill_stopped_between_rounds_leaves_a_quiet_ring(
    eight_layers: Path, streaming: Callable[[list[str]], Streaming] | None
) -> None:
    prompt = list(range(150))
    batches = micro_batches(0, len(prompt), micro_batch=32)
    with ring(eight_layers, [8], micro_batch=32, repack=False) as alone:
        expected = run(alone, prompt, [5, 6], micro_batch=32)
    with ring(eight_layers, [4, 4], rounds=4, micro_batch=32, repack=False, streaming=streaming) as head:
        for wanted in (1, 7, 12):
            goes_on = itertools.chain(itertools.repeat(True, wanted - 1), itertools.repeat(False))
            assert head.prefill(prompt, batches, progress=functools.partial(_next, goes_on)) is None
            assert run(head, prompt, [5, 6], micro_batch=32) == expected


@pytest.mark.slow
def test_progress_is_told_in_tokens_whatever_the_rounds(eight_layers: Path) -> None:
    with ring(eight_layers, [4, 4], rounds=2, micro_batch=32) as head:
        done: list[int] = []
        batches = micro_batches(64, 150, micro_batch=32)
        head.prefill(list(range(150)), micro_batches(0, 64, micro_batch=32), progress=lambda _: True)
        head.prefill(list(range(150)), batches, progress=_noted(done))
        assert done == sorted(done)
        assert done[-1] == 150
        assert len(done) == 2 * len(batches)
