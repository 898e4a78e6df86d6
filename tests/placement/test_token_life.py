"""The life of a token: against the recurrence of one device, figures known from elsewhere, and what memory holds."""

from __future__ import annotations

import itertools
import random

import pytest

from shoal.errors import InfeasiblePlacement
from shoal.ids import DeviceId, LayerRange
from shoal.placement.profile import Cluster, DeviceProfile, Disk, LayerTimes, ModelProfile, uniform_links
from shoal.placement.token_life import Stage, WindowPlan, live
from shoal.placement.window import TensorLoad, token_time_s

MB = 1_000_000


def model(
    num_layers: int, *, layer_mb: int = 25, unit_mb: int = 25, output_mb: int = 0, micro_batch: int = 512
) -> ModelProfile:
    return ModelProfile(
        name="m",
        layer_bytes=(layer_mb * MB,) * num_layers,
        output_bytes=output_mb * MB,
        cache_bytes_per_token_and_layer=0,
        hidden_bytes=4096,
        unit_bytes=unit_mb * MB,
        micro_batch=micro_batch,
    )


def device(name: str, room_mb: int, *, layer_s: float, read_mb_per_s: float = 600.0) -> DeviceProfile:
    return DeviceProfile(
        id=DeviceId(name),
        free_bytes=10**12,
        limit_bytes=room_mb * MB + (32 << 20),
        times=LayerTimes(layer_s=layer_s, batch_layer_s=layer_s, output_s=0.001),
        disk=Disk(mode="direct", read_bytes_per_s=read_mb_per_s * MB),
    )


def even(num_devices: int, num_layers: int, k: int, ring_mb: int) -> WindowPlan:
    per_window = num_layers // num_devices // k
    stages = []
    for position in range(num_devices):
        windows = tuple(
            LayerRange((r * num_devices + position) * per_window, (r * num_devices + position + 1) * per_window)
            for r in range(k)
        )
        stages.append(
            Stage(
                device=(position + 1) % num_devices,
                windows=windows,
                accelerator_layers=(0,) * k,
                ring_bytes=ring_mb * MB,
            )
        )
    return WindowPlan(num_rounds=k, stages=tuple(stages))


def ring(num_devices: int, room_mb: int, *, layer_s: float, hop_s: float = 0.0, read_mb_per_s: float = 600.0) -> Cluster:
    names = [DeviceId(f"d{index}") for index in range(num_devices)]
    return Cluster(
        devices=tuple(device(name, room_mb, layer_s=layer_s, read_mb_per_s=read_mb_per_s) for name in names),
        links=uniform_links(names, round_trip_s=2 * hop_s, bytes_per_s=1e12),
    )


@pytest.mark.parametrize(("layer_s", "read_mb_per_s"), [(0.02, 600), (0.05, 600), (0.001, 200)])
def test_one_device_is_the_recurrence_of_one_device(layer_s: float, read_mb_per_s: float) -> None:
    plan = even(1, 24, 1, 75)
    life = live(plan, ring(1, 14 * 25, layer_s=layer_s, read_mb_per_s=read_mb_per_s), model(24), prompt_tokens=1)
    (stage,) = life.stages
    assert stage.streamed_bytes == 13 * 25 * MB  # 11 stay beside a ring of three
    # The same units in the same places.
    loads = [TensorLoad(f"{index}", 25 * MB, layer_s) for index in range(24)]
    share, owed, streamed = 13 / 24, 0.0, set()
    for load in loads:
        owed += share
        if owed >= 0.5:
            streamed.add(load.name)
            owed -= 1
    assert len(streamed) == 13
    expected = token_time_s([loads], streamed, ring_bytes=75 * MB, read_bytes_per_s=read_mb_per_s * MB)
    assert life.token_s == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize(("k", "slots", "expected_s"), [(1, 3, 1.27), (2, 6, 0.67), (11, 2, 0.49)])
def test_rounds_hide_reads_behind_the_others(k: int, slots: int, expected_s: float) -> None:
    """Three devices of 22 layers, room for 12, 0.17 s of computing together: times that were simulated independently."""
    cluster = ring(3, 12 * 25, layer_s=0.17 / 66)
    life = live(even(3, 66, k, slots * 25), cluster, model(66), prompt_tokens=1)
    assert life.token_s == pytest.approx(expected_s, rel=0.12)


def played_s(plan: WindowPlan, cluster: Cluster, shape: ModelProfile, streamed: list[list[set[int]]], hop_s: float) -> float:
    """The same life played event by event, with readers as processes of their own; units are layers, a ring counts them.

    Args:
        streamed: per stage and window, which of the window's layers are.
    """
    unit = shape.layer_bytes[0]
    layer_s = cluster.devices[0].times.layer_s
    rate = 6e8
    slots = [stage.ring_bytes // unit for stage in plan.stages]
    num_read, num_used = [0] * len(slots), [0] * len(slots)
    reading_until: list[float | None] = [None] * len(slots)
    walk = [(stage, window) for window in range(plan.num_rounds) for stage in range(len(slots))]
    now_s, token_ends = 0.0, []

    def start_readers() -> None:
        for stage, until in enumerate(reading_until):
            if until is None and any(any(w) for w in streamed[stage]) and num_read[stage] - num_used[stage] < slots[stage]:
                reading_until[stage] = now_s + unit / rate

    def wait_until(deadline_s: float | None, stage: int | None) -> None:
        """Lets time pass to the deadline, or until the stage has its next unit."""
        nonlocal now_s
        while True:
            start_readers()
            if stage is not None and num_read[stage] > num_used[stage]:
                return
            ends = [until for until in reading_until if until is not None]
            next_s = min([*ends, *([] if deadline_s is None else [deadline_s])])
            now_s = max(now_s, next_s)
            for index, until in enumerate(reading_until):
                if until is not None and until <= now_s + 1e-15:
                    reading_until[index] = None
                    num_read[index] += 1
            if deadline_s is not None and now_s >= deadline_s - 1e-15:
                start_readers()
                return

    for _ in range(12):
        for stage, window in walk:
            wait_until(now_s + hop_s, None)
            for layer in range(len(plan.stages[stage].windows[window])):
                is_streamed = layer in streamed[stage][window]
                if is_streamed:
                    wait_until(None, stage)
                wait_until(now_s + layer_s, None)
                if is_streamed:
                    num_used[stage] += 1
        wait_until(now_s + 0.001, None)  # the output
        token_ends.append(now_s)
    return token_ends[-1] - token_ends[-2]


@pytest.mark.parametrize("seed", range(20))
def test_the_recurrence_is_what_readers_and_stages_do(seed: int) -> None:
    chance = random.Random(seed)
    k, num_devices = chance.choice([1, 2, 3]), chance.choice([2, 3])
    per_window, slots, hop_s = chance.choice([4, 5, 8]), chance.choice([2, 3]), chance.choice([0.001, 0.03])
    num_layers = num_devices * k * per_window
    num_resident = chance.randrange(0, per_window * k - slots)
    room_mb = 25 * (num_resident + slots)
    layer_s = chance.choice([0.005, 0.03, 0.06])
    cluster = ring(num_devices, room_mb, layer_s=layer_s, hop_s=hop_s)
    shape = model(num_layers)
    plan = even(num_devices, num_layers, k, 25 * slots)
    life = live(plan, cluster, shape, prompt_tokens=1)
    # The units that stream are dealt as evenly as `live` deals them.
    streamed = []
    num_streamed = life.stages[0].streamed_bytes // (25 * MB)
    for _ in range(num_devices):
        owed = 0.0
        chosen: list[int] = []
        for index in range(per_window * k):
            owed += num_streamed / (per_window * k)
            left = per_window * k - index - 1
            if len(chosen) < num_streamed and (owed >= 0.5 or num_streamed - len(chosen) > left):
                chosen.append(index)
                owed -= 1
        streamed.append([{i - w * per_window for i in chosen if i // per_window == w} for w in range(k)])
    assert life.token_s == pytest.approx(played_s(plan, cluster, shape, streamed, hop_s), rel=0.01)


def test_what_stays_what_streams_and_the_ring_fill_the_room() -> None:
    life = live(even(3, 66, 2, 60), ring(3, 300, layer_s=0.001), model(66, unit_mb=4), prompt_tokens=1)
    for stage in life.stages:
        assert stage.resident_bytes + stage.streamed_bytes == 22 * 25 * MB
        assert 0 <= stage.memory_left_bytes < 4 * MB
        assert stage.resident_bytes + stage.ring_bytes + stage.memory_left_bytes == 300 * MB


def test_hops_are_counted_and_empty_windows_are_none() -> None:
    cluster = ring(3, 3000, layer_s=0.001, hop_s=0.01)
    full = live(even(3, 66, 2, 0), cluster, model(66), prompt_tokens=1)
    assert full.num_hops == 6
    assert full.token_s == pytest.approx(0.066 + 0.001 * 0 + 0.06, abs=0.002)
    first, second, head = even(3, 66, 1, 0).stages
    stages = (
        Stage(device=1, windows=(LayerRange(0, 40), LayerRange(40, 50)), accelerator_layers=(0, 0)),
        Stage(device=2, windows=(LayerRange(40, 40), LayerRange(50, 50)), accelerator_layers=(0, 0)),
        Stage(device=0, windows=(LayerRange(40, 40), LayerRange(50, 66)), accelerator_layers=(0, 0)),
    )
    assert (first.device, second.device, head.device) == (1, 2, 0)
    skipped = live(WindowPlan(num_rounds=2, stages=stages), cluster, model(66), prompt_tokens=1)
    assert skipped.num_hops == 2


def test_a_prompt_reads_once_where_a_window_fits_the_ring() -> None:
    cluster = ring(2, 300, layer_s=0.0001)
    shape = model(40, unit_mb=4, micro_batch=64)
    few = live(even(2, 40, 1, 20), cluster, shape, prompt_tokens=256)
    many = live(even(2, 40, 10, 100), cluster, shape, prompt_tokens=256)
    assert few.reads_per_prompt == 4
    assert many.reads_per_prompt == 1
    assert many.first_token_s < few.first_token_s / 2


def test_the_output_projection_stays_where_layers_can_go() -> None:
    shape = model(20, unit_mb=5, output_mb=100)
    life = live(even(1, 20, 1, 50), ring(1, 400, layer_s=0.001), shape, prompt_tokens=1)
    assert life.stages[0].streamed_bytes == 250 * MB
    tight = live(even(1, 20, 1, 50), ring(1, 100, layer_s=0.001), shape, prompt_tokens=1)
    assert tight.stages[0].streamed_bytes == 550 * MB


def test_what_does_not_fit_names_the_device() -> None:
    with pytest.raises(InfeasiblePlacement, match=r"d1 lacks .* a ring to stream through"):
        live(even(3, 66, 1, 20), ring(3, 15, layer_s=0.001), model(66, unit_mb=4), prompt_tokens=1)


def test_more_memory_is_never_slower() -> None:
    chance = random.Random(5)
    for _ in range(10):
        k, layer_s = chance.choice([1, 2, 11]), chance.choice([0.001, 0.01])
        times = [
            live(even(3, 66, k, 50), ring(3, room, layer_s=layer_s), model(66, unit_mb=5), prompt_tokens=1).token_s
            for room in (200, 300, 400, 600)
        ]
        assert all(later <= earlier * 1.01 for earlier, later in itertools.pairwise(times))
