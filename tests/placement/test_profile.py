"""What planners are told."""

from __future__ import annotations

import random

import msgspec
import pytest

from shoal.ids import DeviceId
from shoal.placement.profile import Cluster, DeviceProfile, LayerTimes, LinkProfile, ModelProfile, decode_cluster, units_of
from shoal.placement.scenario import draw_scenario
from shoal.units import MIB

TIMES = LayerTimes(layer_s=0.01, batch_layer_s=0.08)


def device(name: str, **changes: object) -> DeviceProfile:
    return msgspec.structs.replace(DeviceProfile(id=DeviceId(name), free_bytes=1000 * MIB, times=TIMES), **changes)


def test_a_limit_is_exact_and_without_one_a_fifth_stays_free() -> None:
    assert device("a").memory_bytes == 800 * MIB
    assert device("a", limit_bytes=900 * MIB).memory_bytes == 900 * MIB
    assert device("a", limit_bytes=2000 * MIB).memory_bytes == 1000 * MIB


def test_batches_take_no_less_than_a_token() -> None:
    assert TIMES.prefill_layer_s(1) == 0.01
    assert TIMES.prefill_layer_s(512) == pytest.approx(1.28)


def test_units_make_up_the_layer() -> None:
    model = ModelProfile(
        name="m", layer_bytes=(10 * MIB + 1,), output_bytes=0, cache_bytes_per_token_and_layer=0, hidden_bytes=4
    )
    units = units_of(10 * MIB + 1, model)
    assert sum(units) == 10 * MIB + 1
    assert len(units) == 3
    assert max(units) <= 4 * MIB


@pytest.mark.parametrize(
    ("links", "text"),
    [
        ([("a", "b")], "b -> a was not measured"),
        ([("a", "b"), ("b", "a"), ("a", "b")], "given twice"),
        ([("a", "b"), ("b", "a"), ("a", "c")], "a -> c does not join"),
    ],
)
def test_links_must_be_complete(links: list[tuple[str, str]], text: str) -> None:
    profiles = [
        LinkProfile(source=DeviceId(source), target=DeviceId(target), round_trip_s=0.001, bytes_per_s=1e8)
        for source, target in links
    ]
    with pytest.raises(ValueError, match=text):
        Cluster(devices=(device("a"), device("b")), links=tuple(profiles))


def test_a_file_says_where_it_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"devices\[0\]\.times"):
        decode_cluster(b'{"devices": [{"id": "a", "free_bytes": 5, "times": {"layer_s": -1, "batch_layer_s": 1}}]}')
    with pytest.raises(ValueError, match="unknown field"):
        decode_cluster(b'{"tpyo": 1}')


def test_scenarios_depend_on_their_seed_alone_and_survive_json() -> None:
    first, again, other = (draw_scenario(random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert decode_cluster(msgspec.json.encode(first.cluster)) == first.cluster


@pytest.mark.parametrize("scarcity", ["short", "tight", "ample"])
def test_scarcity_is_what_it_says(scarcity: str) -> None:
    for seed in range(20):
        scenario = draw_scenario(random.Random(seed), scarcity=scarcity)  # type: ignore[arg-type]
        model = scenario.model
        needed = sum(model.layer_bytes) + model.output_bytes + model.num_layers * model.cache_bytes_per_layer
        room = 0
        for each in scenario.cluster.devices:
            room += each.weights_room_bytes(model)
            if each.accelerator and not each.accelerator.shares_memory:
                room += each.accelerator.memory_bytes
        low, high = {"short": (0.25, 0.75), "tight": (0.75, 1.3), "ample": (1.3, 3.0)}[scarcity]
        assert low * 0.99 <= room / needed <= high * 1.01
