"""What a device measures of itself: thread counts for a start, and figures that a plan can rest on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoal.compute.backend import Backend
from shoal.compute.model import Model
from shoal.runtime.profile import ComputeProfile, cold_layers, measure
from shoal.units import MIB

TinyModel = Callable[[str, str], Path]


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend(num_threads=1)
    yield backend
    backend.close()


@pytest.fixture
def model(tiny_model: TinyModel) -> Iterator[Model]:
    model = Model(tiny_model("qwen3", "Q8_0"))
    yield model
    model.close()


@pytest.mark.parametrize(
    ("layer_mib", "room_mib", "count"),
    [
        ([30] * 80, 10_000, 4),  # 120 MiB are more than caches hold
        ([400] * 80, 10_000, 2),
        ([400] * 80, 500, 1),  # a second would not fit
        ([400] * 80, 100, 1),  # one is timed all the same
        ([1] * 24, 10_000, 24),  # a small model is cached when it runs, too
        ([30] * 80, 70, 2),
    ],
)
def test_layers_are_timed_as_cold_as_a_token_finds_them(layer_mib: list[int], room_mib: int, count: int) -> None:
    assert cold_layers([mib * MIB for mib in layer_mib], room_mib * MIB) == count


def test_a_plan_is_told_prefill_output_and_spreads(model: Model, backend: Backend) -> None:
    profile = ComputeProfile(model, backend, num_threads=1, repack=True, for_plan=True, head=True)
    assert profile.num_layers == 3
    assert profile.output is not None
    assert 0 < profile.output.seconds < 1
    # A batch shares the reading of weights: dearer than one token, cheaper than one by one.
    assert profile.layer.seconds < profile.batch_layer.seconds < 32 * profile.layer.seconds * 1.5
    assert profile.spreads.keys() == {"layer_s", "batch_layer_s", "output_s"}
    assert all(spread >= 0 for spread in profile.spreads.values())


def test_an_engine_starts_without_what_only_a_plan_needs(model: Model, backend: Backend) -> None:
    profile = ComputeProfile(model, backend, num_threads=1, repack=True)
    assert profile.num_layers == 2
    assert profile.output is None


def test_the_output_is_not_timed_where_it_would_fill_the_memory(model: Model, backend: Backend) -> None:
    limit_bytes = model.output_bytes * 3
    profile = ComputeProfile(model, backend, num_threads=1, repack=True, for_plan=True, head=True, memory_bytes=limit_bytes)
    assert profile.output is None
    assert "output_s" not in profile.spreads


@pytest.mark.parametrize(("jitter", "longest"), [(0.0, 12), (10.0, 10_000)])
def test_measuring_goes_on_until_times_agree(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, jitter: float, longest: int
) -> None:
    """A clock of our own: each run takes 10 ms, or every other one eleven times as long."""
    now_s, runs = 0.0, 0

    def run() -> None:
        nonlocal now_s, runs
        runs += 1
        now_s += 0.01 * (1 + jitter * (runs % 2))

    monkeypatch.setattr("shoal.runtime.profile.time.perf_counter", lambda: now_s)
    timing = measure([1], backend, run, until_stable=True)[1]
    assert 4 <= runs <= longest
    assert (now_s >= 0.5) == bool(jitter)
    assert (timing.spread > 1) == bool(jitter)
    assert timing.seconds >= 0.0099
