"""Halda as published: its sets, its program against every window, its known preference for one round, and whom it drops."""

from __future__ import annotations

import itertools
import random

import msgspec
import pytest

from shoal.ids import DeviceId
from shoal.placement.baselines import BASELINES, split_by_memory
from shoal.placement.halda import DeviceSet, _coefficients, _Device, _solve, _thresholds, halda, schedule, valid_rounds
from shoal.placement.profile import Cluster, DeviceProfile, Disk, LayerTimes, ModelProfile, uniform_links
from shoal.placement.scenario import draw_scenario

MB = 1_000_000
MODEL = ModelProfile(
    name="m",
    layer_bytes=(25 * MB,) * 24,
    output_bytes=10 * MB,
    cache_bytes_per_token_and_layer=1000,
    context=1000,
    hidden_bytes=4096,
)


def device(name: str, memory_mb: int, *, layer_s: float = 0.01, read_mb_per_s: float = 600, **more: object) -> DeviceProfile:
    plain = DeviceProfile(
        id=DeviceId(name),
        free_bytes=10**11,
        limit_bytes=memory_mb * MB,
        times=LayerTimes(layer_s=layer_s, batch_layer_s=4 * layer_s),
        disk=Disk(mode="direct", read_bytes_per_s=read_mb_per_s * MB),
    )
    return msgspec.structs.replace(plain, **more)


def cluster(*devices: DeviceProfile) -> Cluster:
    return Cluster(devices=devices, links=uniform_links([each.id for each in devices], round_trip_s=0.001, bytes_per_s=1e8))


def test_enough_memory_is_m4_and_too_little_m3() -> None:
    found = schedule(cluster(device("a", 400), device("b", 400)), MODEL)
    assert found is not None
    assert found.sets == (DeviceSet.M4, DeviceSet.M4)
    found = schedule(cluster(device("a", 200), device("b", 200)), MODEL)
    assert found is not None
    assert found.sets == (DeviceSet.M3, DeviceSet.M3)


def test_a_slow_disk_is_never_made_to_reread() -> None:
    found = halda(cluster(device("a", 300), device("b", 200, read_mb_per_s=90)), MODEL)
    assert found is not None
    assert found.sets[1] is DeviceSet.M4
    assert found.windows[1] * found.num_rounds * 26 * MB <= 200 * MB


def test_macos_without_metal_is_m1_and_reads_at_random() -> None:
    disk = Disk(mode="nocache", read_bytes_per_s=1e9, mapped_bytes_per_s=8e8, random_bytes_per_s=2e8)
    found = schedule(cluster(device("a", 200, system="macos", disk=disk), device("b", 200)), MODEL)
    assert found is not None
    assert found.sets[0] is DeviceSet.M1
    mac = _Device(device("a", 200, system="macos", disk=disk), MODEL, is_head=True, hop_s=0.0)
    assert _coefficients(mac, DeviceSet.M1, MODEL)[0] == pytest.approx(0.01 + 26 * MB / 2e8)


def test_one_round_is_never_worse_in_its_objective() -> None:
    """Whatever is feasible at k is, multiplied, feasible and no dearer at 1."""
    compared = 0
    for seed in range(60):
        scenario = draw_scenario(random.Random(seed))
        found = schedule(scenario.cluster, scenario.model)
        if found is not None:
            compared += 1
            assert found.num_rounds == 1, f"seed {seed}"
    assert compared > 30


def test_the_program_against_every_window() -> None:
    for seed in range(12):
        chance = random.Random(seed)
        profiles = [
            device(f"d{index}", chance.choice([150, 250, 400]), layer_s=chance.choice([0.004, 0.01, 0.03]),
                   read_mb_per_s=chance.choice([200, 600, 2000]))
            for index in range(3)
        ]  # fmt: skip
        devices = [_Device(each, MODEL, is_head=index == 0, hop_s=0.001) for index, each in enumerate(profiles)]
        sets = tuple(chance.choice([DeviceSet.M3, DeviceSet.M4]) for _ in devices)
        for k in valid_rounds(MODEL.num_layers)[:4]:
            total = MODEL.num_layers // k
            prices = [_coefficients(each, kind, MODEL) for each, kind in zip(devices, sets, strict=True)]
            best = None
            for windows in itertools.product(range(1, total + 1), repeat=3):
                limits = [total * _thresholds(each, MODEL)[0] for each in devices]
                fits = all(
                    window <= limit if kind is DeviceSet.M4 else window >= limit
                    for window, limit, kind in zip(windows, limits, sets, strict=True)
                )
                if sum(windows) == total and fits:
                    cost = sum(
                        k * (a * window + c) / (1.01 if index == 0 else 1.0)
                        for index, ((a, _, c), window) in enumerate(zip(prices, windows, strict=True))
                    )
                    best = cost if best is None else min(best, cost)
            found = _solve(devices, MODEL, sets, k)
            assert (found is None) == (best is None)
            if found is not None and best is not None:
                spent = sum(
                    k * (a * window + c) / (1.01 if index == 0 else 1.0)
                    for index, ((a, _, c), window) in enumerate(zip(prices, found.windows, strict=True))
                )
                assert spent == pytest.approx(best)


def test_weak_devices_are_dropped_and_the_head_never() -> None:
    found = halda(cluster(device("a", 2000, layer_s=0.05), device("b", 2000, layer_s=0.005), device("c", 2000)), MODEL)
    assert found is not None
    assert found.dropped == (DeviceId("c"),)
    assert found.windows[0] >= 1
    assert sum(found.windows) * found.num_rounds == MODEL.num_layers


def test_memory_decides_the_proportional_split() -> None:
    split = split_by_memory(cluster(device("a", 100), device("b", 300), device("c", 200)), MODEL)
    # b: 0.5 of 24, c: 0.33333, which cuts the boundary down to 19, a: the rest.
    assert split.num_layers == (5, 12, 7)
    assert split.num_rounds == 1


def test_baselines_place_every_layer() -> None:
    for seed in range(30):
        scenario = draw_scenario(random.Random(seed))
        split = BASELINES["proportional"](scenario.cluster, scenario.model)
        assert sum(split.totals) == scenario.model.num_layers
        assert min(split.totals) >= 0
