"""Layers in proportion to speed, never beyond memory, and a shortage that says what is missing."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InfeasiblePlacement
from shoal.ids import DeviceId, LayerRange
from shoal.placement.contiguous import place_by_hand, place_layers
from shoal.placement.device import Device, ModelSize

MB = 10**6
MODEL = ModelSize(layer_bytes=(10 * MB,) * 30, output_bytes=20 * MB, cache_bytes_per_layer=MB, overhead_bytes=50 * MB)

STREAMED = msgspec.structs.replace(MODEL, ring_bytes=4 * MB)


def device(name: str, *, layer_ms: float = 1.0, memory_mb: int = 10_000, read_mb_s: float = 0.0) -> Device:
    return Device(DeviceId(name), layer_ms * 1e-3, memory_mb * MB, read_mb_s * MB)


def test_equal_devices_share_equally_and_the_head_is_last() -> None:
    placement = place_layers([device("head"), device("a"), device("b")], MODEL)
    assert [(stage.device, *stage.windows) for stage in placement.stages] == [
        ("a", LayerRange(0, 10)),
        ("b", LayerRange(10, 20)),
        ("head", LayerRange(20, 30)),
    ]
    assert placement.head.needed_bytes == 10 * 11 * MB + 50 * MB + 20 * MB


def test_a_device_twice_as_fast_holds_twice_as_much() -> None:
    placement = place_layers([device("head", layer_ms=2), device("fast", layer_ms=1)], MODEL)
    assert [stage.num_layers for stage in placement.stages] == [20, 10]
    assert placement.token_s == pytest.approx(20e-3 + 20e-3 + 4e-3)  # the output projection is as large as two layers


def test_what_does_not_fit_goes_to_the_others() -> None:
    placement = place_layers([device("head"), device("small", memory_mb=50 + 44), device("large")], MODEL)
    assert [stage.num_layers for stage in placement.stages] == [4, 13, 13]


def test_a_device_without_room_is_left_out_and_named() -> None:
    placement = place_layers([device("head"), device("tiny", memory_mb=40)], MODEL)
    assert [stage.device for stage in placement.stages] == ["head"]
    assert placement.left_out[0][0] == "tiny"


def test_the_head_stays_even_without_layers() -> None:
    placement = place_layers([device("head", memory_mb=71), device("large")], MODEL)
    assert [(stage.device, stage.num_layers) for stage in placement.stages] == [("large", 30), ("head", 0)]


def test_a_shortage_names_the_missing_bytes_and_what_helps() -> None:
    with pytest.raises(InfeasiblePlacement, match=r"10 of 30 layers \(110\.0 MB\) fit nowhere.*smaller quantisation"):
        place_layers([device("head", memory_mb=50 + 20 + 110), device("b", memory_mb=50 + 110)], MODEL)


def test_layers_that_fit_nowhere_are_streamed_by_the_faster_disk() -> None:
    slow, fast = device("slow", memory_mb=160, read_mb_s=100), device("fast", memory_mb=180, read_mb_s=1000)
    placement = place_layers([slow, fast], STREAMED)
    fast_stage, slow_stage = placement.stages
    fast_layers = fast_stage.num_layers
    assert fast_layers + slow_stage.num_layers == 30
    assert fast_layers > 2 * slow_stage.num_layers
    assert fast_stage.weights_bytes == (180 - 50 - fast_layers) * MB
    assert fast_stage.needed_bytes == 180 * MB
    # What does not stay, and what the ring takes, is read for each token.
    streamed = fast_layers * 10 - (130 - fast_layers) + 4
    assert placement.token_s >= streamed / 1000


def test_a_head_too_small_for_its_output_projection_streams_it() -> None:
    placement = place_layers([device("head", memory_mb=65, read_mb_s=500), device("large")], STREAMED)
    assert [(stage.device, stage.num_layers) for stage in placement.stages] == [("large", 30), ("head", 0)]
    assert placement.head.weights_bytes == 15 * MB
    assert placement.stages[0].weights_bytes is None


HOME = ModelSize((25 * MB,) * 66, output_bytes=MB, cache_bytes_per_layer=0, overhead_bytes=0, ring_bytes=8 * MB)


def three_starved() -> list[Device]:
    """550 MB of layers each, room for 300, 600 MB/s, 0.17 s of computing in all."""
    return [device(name, layer_ms=170 / 66, memory_mb=301, read_mb_s=600) for name in "abc"]


def test_more_rounds_hide_reading_behind_the_computing_of_others() -> None:
    by_rounds = {rounds: place_layers(three_starved(), HOME, rounds=rounds).token_s for rounds in (1, 2, 11)}
    assert by_rounds[1] > 1.2
    assert by_rounds[1] > 1.7 * by_rounds[2] > 2.5 * by_rounds[11]
    chosen = place_layers(three_starved(), HOME)
    assert chosen.rounds > 2
    # 250 MB are read at 600 MB/s, whatever the rounds.
    assert 250 / 600 < chosen.token_s < 0.6
    far_apart = place_layers(three_starved(), HOME, hop_s=0.02)
    assert 1 < far_apart.rounds < chosen.rounds


def test_windows_follow_each_other_round_the_ring() -> None:
    stages = place_layers([device("head"), device("a")], MODEL, rounds=4).stages
    by_round = [window for windows in zip(*(stage.windows for stage in stages), strict=True) for window in windows]
    assert by_round[0].first == 0
    assert by_round[-1].stop == 30
    assert all(before.stop == after.first for before, after in itertools.pairwise(by_round))
    assert {len(window) for window in by_round} <= {3, 4}


def test_one_round_where_nothing_is_streamed() -> None:
    assert place_layers([device("head"), device("a")], MODEL).rounds == 1


def test_more_rounds_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="11 rounds: 1 to 10 are possible"):
        place_by_hand([device("head"), device("a")], MODEL, [10, 20], rounds=11)


def test_what_fits_is_not_streamed() -> None:
    placement = place_layers([device("a", read_mb_s=500), device("b", read_mb_s=500)], STREAMED)
    assert [stage.weights_bytes for stage in placement.stages] == [None, None]


def test_a_cache_without_room_cannot_be_streamed() -> None:
    with pytest.raises(InfeasiblePlacement):
        place_layers([device("head", memory_mb=70, read_mb_s=500)], STREAMED)


def test_counts_by_hand_must_add_up() -> None:
    placement = place_by_hand([device("head"), device("a")], MODEL, [10, 20])
    assert [stage.num_layers for stage in placement.stages] == [20, 10]
    with pytest.raises(ValueError, match="layer counts 10,10 do not fit 2 devices and 30 layers"):
        place_by_hand([device("head"), device("a")], MODEL, [10, 10])


@given(
    speeds=st.lists(st.floats(0.1, 50.0), min_size=1, max_size=8),
    memories=st.lists(st.integers(0, 600), min_size=8, max_size=8),
)
def test_every_layer_is_placed_once_and_nobody_is_overfilled(speeds: list[float], memories: list[int]) -> None:
    devices = [
        device(f"d{index}", layer_ms=speed, memory_mb=memory)
        for index, (speed, memory) in enumerate(zip(speeds, memories, strict=False))
    ]
    try:
        placement = place_layers(devices, MODEL)
    except InfeasiblePlacement:
        room = [max(0, (d.memory_bytes - 50 * MB - (20 * MB if d is devices[0] else 0)) // (11 * MB)) for d in devices]
        assert sum(room) < 30
        return
    at = 0
    for stage in placement.stages:
        assert stage.windows[0].first == at
        at = stage.windows[0].stop
        memory = next(d.memory_bytes for d in devices if d.id == stage.device)
        assert stage.needed_bytes <= memory or not stage.num_layers
    assert at == 30
    assert placement.head.device == devices[0].id
