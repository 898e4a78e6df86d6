"""What stays, what is streamed, and how long a token takes."""

from __future__ import annotations

import itertools
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InfeasiblePlacement
from shoal.placement.byte_ring import ByteRing
from shoal.placement.window import TensorLoad, choose_residency, token_time_s

MB = 1_000_000


def loads(count: int, *, num_bytes: int = 25 * MB, compute_s: float = 0.02) -> list[TensorLoad]:
    return [TensorLoad(f"layer {index}", num_bytes, compute_s) for index in range(count)]


def test_what_fits_stays() -> None:
    residency = choose_residency([loads(10)], available_bytes=250 * MB, read_bytes_per_s=1e9)
    assert residency.streamed == ()
    assert residency.ring_bytes == 0
    assert residency.token_s == pytest.approx(0.2)


def test_streamed_bytes_are_what_does_not_fit_and_the_ring() -> None:
    tensors = loads(60, num_bytes=8 * MB, compute_s=0.001)
    residency = choose_residency([tensors], available_bytes=400 * MB, read_bytes_per_s=600e6)
    assert residency.streamed_bytes >= 480 * MB - (400 * MB - residency.ring_bytes)
    assert residency.streamed_bytes < 480 * MB - (400 * MB - residency.ring_bytes) + 8 * MB
    # The disk is the bound: what cannot stay, at its rate; the ring's share comes on top.
    assert 80e6 / 600e6 <= residency.token_s <= (80e6 + residency.ring_bytes + 8e6) / 600e6 + 0.05


def test_a_fast_disk_hides_behind_computing() -> None:
    residency = choose_residency([loads(60)], available_bytes=750 * MB, read_bytes_per_s=2e9)
    assert residency.token_s <= 60 * 0.02 * 1.05


def test_streamed_tensors_are_spread_among_the_others() -> None:
    residency = choose_residency([loads(64)], available_bytes=32 * 25 * MB, read_bytes_per_s=2e9)
    indices = [int(name.split()[1]) for name in residency.streamed]
    gaps = {later - earlier for earlier, later in itertools.pairwise(indices)}
    assert gaps <= {1, 2}


def test_too_little_memory_says_what_is_missing() -> None:
    with pytest.raises(InfeasiblePlacement, match=r"one tensor alone takes 25.*raise --memory by 15"):
        choose_residency([loads(4)], available_bytes=10 * MB, read_bytes_per_s=1e9)


def test_the_recurrence_by_hand() -> None:
    tensors = loads(2, num_bytes=100, compute_s=1.0)
    # One slot: nothing is read while the slot is in use, so reading (2 s) and computing (1 s) take turns.
    assert token_time_s([tensors], {"layer 0", "layer 1"}, ring_bytes=100, read_bytes_per_s=50) == pytest.approx(6.0)
    # Two slots: the disk never rests.
    assert token_time_s([tensors], {"layer 0", "layer 1"}, ring_bytes=200, read_bytes_per_s=50) == pytest.approx(4.0)
    # Waiting for others hides as much reading as the ring holds.
    assert token_time_s([tensors], {"layer 0", "layer 1"}, ring_bytes=200, read_bytes_per_s=50, idle_s=10) == pytest.approx(
        12.0
    )


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    available=st.integers(50, 900),
    rate=st.floats(1, 1000),
    idle_s=st.floats(0, 10),
)
def test_the_choice_fits_and_is_no_better_than_the_bound(
    sizes: list[int], available: int, rate: float, idle_s: float
) -> None:
    tensors = [TensorLoad(f"t{index}", size, size / 100) for index, size in enumerate(sizes)]
    residency = choose_residency([tensors], available_bytes=available, read_bytes_per_s=rate, idle_s=idle_s)
    streamed = set(residency.streamed)
    resident_bytes = sum(t.num_bytes for t in tensors if t.name not in streamed)
    assert resident_bytes + residency.ring_bytes <= available
    compute_s = sum(t.compute_s for t in tensors)
    bound_s = max(compute_s + (idle_s if streamed else 0), max(0, sum(sizes) - available) / rate)
    assert residency.token_s >= bound_s * (1 - 1e-9)


@given(ring_bytes=st.integers(10, 100), sizes=st.lists(st.integers(1, 10), max_size=200), free_first=st.lists(st.booleans()))
def test_pieces_in_a_ring_never_overlap(ring_bytes: int, sizes: list[int], free_first: list[bool]) -> None:
    ring, taken = ByteRing(ring_bytes), deque[tuple[int, int]]()
    for index, size in enumerate(sizes):
        if taken and index < len(free_first) and free_first[index]:
            ring.free()
            taken.popleft()
        while (begin := ring.take(size)) is None:
            assert taken, "an empty ring takes any piece that fits it"
            ring.free()
            taken.popleft()
        assert begin >= 0
        assert begin + size <= ring_bytes
        assert all(begin + size <= other or stop <= begin for other, stop in taken)
        taken.append((begin, begin + size))
