"""Draws clusters and models to plan for, by chance: the published generator behind every figure about placement.

Caps, disks, links and models are drawn from ranges that homes have; `Scarcity` says how much of the model fits. Chance is an
argument: the same sequence of numbers gives the same scenario, on any machine, with any version (`random.Random(seed)` has
promised its `random()` since Python 3.2).

Source of the ranges: devices of prima.cpp's table 3 (arXiv 2504.08791v2) and ours; Wi-Fi and Ethernet at home.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

import msgspec

from shoal.ids import DeviceId
from shoal.placement.profile import Accelerator, Cluster, DeviceProfile, Disk, LayerTimes, LinkProfile, ModelProfile, System
from shoal.units import MIB

Scarcity = Literal["short", "tight", "ample"]
"""What the devices hold together of the model: 25-75 %, 75-130 % or 130-300 %."""
_SHARES: dict[Scarcity, tuple[float, float]] = {"short": (0.25, 0.75), "tight": (0.75, 1.3), "ample": (1.3, 3.0)}
_SCARCITIES: tuple[Scarcity, ...] = ("short", "short", "tight", "ample")
_RUNTIME_BYTES = 90 * MIB
_SYSTEMS: tuple[System, ...] = ("linux", "linux", "linux", "macos", "windows", "android")
T = TypeVar("T")


class Chance(Protocol):
    """`random.Random` fits."""

    def random(self) -> float:
        """Uniform in [0, 1)."""


class Shape(msgspec.Struct, frozen=True):
    """A transformer that people run: figures of the models' published configurations."""

    name: str
    num_layers: int
    hidden_size: int
    kv_width: int
    feed_forward_size: int
    vocab_size: int


SHAPES = (
    Shape("llama-3.2-1b", 16, 2048, 512, 8192, 128256),
    Shape("llama-3.2-3b", 28, 3072, 1024, 8192, 128256),
    Shape("qwen2.5-7b", 28, 3584, 512, 18944, 152064),
    Shape("llama-3.1-8b", 32, 4096, 1024, 14336, 128256),
    Shape("qwen2.5-14b", 48, 5120, 1024, 13824, 152064),
    Shape("qwen2.5-32b", 64, 5120, 1024, 27648, 152064),
    Shape("llama-3.1-70b", 80, 8192, 1024, 28672, 128256),
)
_BITS = (4.5, 6.5625, 8.5)  # Q4_K, Q6_K, Q8_0


class Scenario(msgspec.Struct, frozen=True):
    """A question to a planner."""

    scarcity: Scarcity
    model: ModelProfile
    cluster: Cluster


def draw_scenario(
    chance: Chance, *, scarcity: Scarcity | None = None, num_devices: int | None = None, shape: Shape | None = None
) -> Scenario:
    """Draws one. What is given is not drawn.

    Args:
        num_devices: else 2 to 8.
    """
    shape = shape or _one_of(chance, SHAPES)
    drawn: Scarcity = _one_of(chance, _SCARCITIES) if scarcity is None else scarcity
    model = draw_model(chance, shape)
    count = num_devices or 2 + int(7 * chance.random())
    room_bytes = _between(chance, *_SHARES[drawn]) * (
        sum(model.layer_bytes) + model.output_bytes + model.num_layers * model.cache_bytes_per_layer
    )
    weights = [_log_between(chance, 0.35, 2.0) for _ in range(count)]
    devices = tuple(
        _draw_device(chance, model, DeviceId(f"d{index}"), int(room_bytes * weight / sum(weights)))
        for index, weight in enumerate(weights)
    )
    return Scenario(drawn, model, Cluster(devices=devices, links=_draw_links(chance, [device.id for device in devices])))


def draw_model(chance: Chance, shape: Shape) -> ModelProfile:
    """A file of this shape in one of three quantisations; as in llama.cpp's mixes, the first and last eighth of the layers
    and every third between are larger."""
    bits = _one_of(chance, _BITS)
    context = _one_of(chance, (2048, 4096, 8192))
    hidden = shape.hidden_size
    weights = 2 * hidden * hidden + 2 * hidden * shape.kv_width + 3 * hidden * shape.feed_forward_size
    layer_bytes = []
    eighth = shape.num_layers // 8
    for layer in range(shape.num_layers):
        is_larger = layer < eighth or layer >= shape.num_layers - eighth or (layer - eighth) % 3 == 2
        layer_bytes.append(int(weights * bits / 8 * (1.12 if is_larger and bits < 6 else 1.0)))
    micro_batch = 512
    return ModelProfile(
        name=f"{shape.name} at {bits:g} bits",
        layer_bytes=tuple(layer_bytes),
        output_bytes=int(hidden * shape.vocab_size * max(bits, 6.5625) / 8),
        cache_bytes_per_token_and_layer=2 * 2 * shape.kv_width,
        context=context,
        hidden_bytes=4 * hidden,
        embedding_row_bytes=int(hidden * bits / 8),
        stage_bytes=48 * MIB + 12 * micro_batch * hidden * 4,
        micro_batch=micro_batch,
    )


def _draw_device(chance: Chance, model: ModelProfile, name: DeviceId, room_bytes: int) -> DeviceProfile:
    """A device with `room_bytes` for weights and cache, on its graphics processor if it has one and besides."""
    memory_bytes_per_s = _log_between(chance, 6e9, 60e9)
    # Decoding reads every weight once, at most at the memory's rate.
    layer_s = model.mean_layer_bytes / (memory_bytes_per_s * _between(chance, 0.5, 0.9))
    speed_up = _log_between(chance, 3.0, 12.0)  # a batch of 32 against 32 tokens
    times = _times(model, layer_s, speed_up)
    system = _one_of(chance, _SYSTEMS)
    accelerator = None
    if system != "android" and chance.random() < 0.25:
        shares_memory = system == "macos"
        on_accelerator = int(room_bytes * (1.0 if shares_memory else _between(chance, 0.3, 0.7)))
        accelerator = Accelerator(
            memory_bytes=on_accelerator,
            times=_times(model, layer_s / _log_between(chance, 2.0, 12.0), 20.0),
            copy_s=0.0 if shares_memory else 60e-6,
            shares_memory=shares_memory,
        )
        room_bytes -= 0 if shares_memory else on_accelerator
    read_bytes_per_s = _log_between(chance, 0.15e9, 3.5e9)
    return DeviceProfile(
        id=name,
        system=system,
        free_bytes=2 * (room_bytes + _RUNTIME_BYTES + model.stage_bytes + 32 * MIB),
        limit_bytes=room_bytes + _RUNTIME_BYTES + model.stage_bytes + 32 * MIB,
        runtime_bytes=_RUNTIME_BYTES,
        times=times,
        accelerator=accelerator,
        disk=Disk(
            mode="nocache" if system == "macos" else "direct",
            read_bytes_per_s=read_bytes_per_s,
            mapped_bytes_per_s=read_bytes_per_s * _between(chance, 0.3, 0.8),
            random_bytes_per_s=read_bytes_per_s * _between(chance, 0.02, 0.2),
        ),
        memory_read_bytes_per_s=memory_bytes_per_s,
    )


def _times(model: ModelProfile, layer_s: float, speed_up: float) -> LayerTimes:
    return LayerTimes(
        layer_s=layer_s,
        batch_layer_s=layer_s * max(1.0, 32 / speed_up),
        output_s=layer_s * model.output_bytes / model.mean_layer_bytes,
    )


def _draw_links(chance: Chance, names: Sequence[DeviceId]) -> tuple[LinkProfile, ...]:
    """Each device on cable or Wi-Fi; a hop takes both devices' share of the delay, and the slower one's rate."""
    access = []
    for _ in names:
        is_wired = chance.random() < 0.5
        delay_s = _log_between(chance, 0.1e-3, 0.4e-3) if is_wired else _log_between(chance, 0.8e-3, 4e-3)
        rate = _one_of(chance, (115e6, 115e6, 290e6)) if is_wired else _log_between(chance, 6e6, 75e6)
        access.append((delay_s, rate))
    return tuple(
        LinkProfile(
            source=source,
            target=target,
            round_trip_s=(access[first][0] + access[second][0]) * _between(chance, 0.9, 1.3),
            bytes_per_s=min(access[first][1], access[second][1]) * _between(chance, 0.85, 1.0),
        )
        for first, source in enumerate(names)
        for second, target in enumerate(names)
        if first != second
    )


def _between(chance: Chance, low: float, high: float) -> float:
    return low + (high - low) * chance.random()


def _log_between(chance: Chance, low: float, high: float) -> float:
    return low * math.pow(high / low, chance.random())


def _one_of(chance: Chance, choices: Sequence[T]) -> T:
    return choices[int(len(choices) * chance.random())]
