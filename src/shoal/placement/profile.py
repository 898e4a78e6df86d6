"""What a planner is told: devices, links and a model, as they were measured.

A figure is the median of several repetitions; `spreads` says how far they lay apart. Memory is what the owner allows, or
a share of what is free; what a worker takes besides weights is subtracted here, in one place.

Pure values. They are read from JSON (`decode_cluster`) and written as JSON, so that a plan can be made again from a report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from shoal.ids import DeviceId
from shoal.units import MIB

MEMORY_SHARE = 0.8
"""Of free memory, where the owner sets no limit: 20 % head-room."""
HEAD_ROOM_BYTES = 32 * MIB
"""Left free beside resident weights, for what no worker can know before (pages of libraries, tokenizer, template): with 24
MiB or less a full page cache loses single pages and reads them back singly."""
BATCH_TOKENS = 32
"""Tokens of the batch whose time per layer is measured for prefill."""
STREAMING_UNITS_MIN = 2
"""The least a ring holds, in units: one is read while another is computed."""

UNITS_COUNTED = 32
"""Units of a ring that predictions tell apart."""

System = Literal["linux", "macos", "android", "windows"]
ReadMode = Literal["direct", "nocache", "dontneed", "mapped"]
"""How weights are read past the page cache: `O_DIRECT`, `F_NOCACHE`, `POSIX_FADV_DONTNEED`, or not at all."""

Seconds = Annotated[float, msgspec.Meta(ge=0.0)]
Bytes = Annotated[int, msgspec.Meta(ge=0)]
PositiveSeconds = Annotated[float, msgspec.Meta(gt=0.0)]
PositiveRate = Annotated[float, msgspec.Meta(gt=0.0)]


class LayerTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds on one backend: an average layer with everything resident, for one token and for `BATCH_TOKENS`, and the
    output projection of one token."""

    layer_s: PositiveSeconds
    batch_layer_s: PositiveSeconds
    output_s: Seconds = 0.0

    def prefill_layer_s(self, num_tokens: int) -> float:
        """One layer for a micro-batch: in proportion to the measured batch, never less than a single token."""
        return max(self.layer_s, self.batch_layer_s * num_tokens / BATCH_TOKENS)


class Accelerator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A graphics processor. `memory_bytes` is what the model may use of its memory; `copy_s` is what it costs to bring one
    token's hidden state there and back. With `shares_memory` its layers take the device's memory as well."""

    memory_bytes: Bytes
    times: LayerTimes
    copy_s: Seconds = 0.0
    shares_memory: bool = False


class Disk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The disk under this model file. `mapped_` and `random_bytes_per_s` are what page faults reach in order and out of
    order; only published planners ask for them. 0: not measured."""

    mode: ReadMode
    read_bytes_per_s: PositiveRate
    mapped_bytes_per_s: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0
    random_bytes_per_s: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device.

    `free_bytes` is what it has free, `limit_bytes` what its owner allows, `runtime_bytes` what a worker takes before any
    weights. `disk` is None where weights cannot be streamed. `memory_read_bytes_per_s` is its memory bandwidth and
    `swappable_bytes` what Android moves out of the way; only published planners ask. `spreads` is by field,
    (highest - lowest) / median, `age_s` how long ago that was measured.
    """

    id: DeviceId
    system: System = "linux"
    free_bytes: Bytes
    limit_bytes: Bytes | None = None
    runtime_bytes: Bytes = 0
    times: LayerTimes
    accelerator: Accelerator | None = None
    disk: Disk | None = None
    memory_read_bytes_per_s: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0
    swappable_bytes: Bytes = 0
    spreads: dict[str, float] = {}
    age_s: Seconds = 0.0

    @property
    def memory_bytes(self) -> int:
        """What a worker may take here, all in all."""
        if self.limit_bytes is None:
            return int(self.free_bytes * MEMORY_SHARE)
        return min(self.limit_bytes, self.free_bytes)

    def weights_room_bytes(self, model: ModelProfile) -> int:
        """Left for weights, ring and KV cache; negative where a worker cannot even start."""
        return self.memory_bytes - self.runtime_bytes - model.stage_bytes - HEAD_ROOM_BYTES


class LinkProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One direction between two devices: the round trip of a small frame between two workers, and the rate."""

    source: DeviceId
    target: DeviceId
    round_trip_s: Seconds
    bytes_per_s: PositiveRate

    def hop_s(self, num_bytes: int) -> float:
        """From the last layer of one device to the first of the next."""
        return self.round_trip_s / 2 + num_bytes / self.bytes_per_s


class ModelProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model at a context.

    `layer_bytes` are true sizes, layer by layer. `output_bytes` is the output projection, which the head streams like a
    layer where it has no room. `embedding_row_bytes` is one row of the embedding. `stage_bytes` are the activations,
    graphs and frames of one stage. `unit_bytes` is the most that is streamed as one piece.
    """

    name: str
    layer_bytes: Annotated[tuple[Annotated[int, msgspec.Meta(gt=0)], ...], msgspec.Meta(min_length=1)]
    output_bytes: Bytes
    cache_bytes_per_token_and_layer: Bytes
    context: Annotated[int, msgspec.Meta(gt=0)] = 4096
    hidden_bytes: Annotated[int, msgspec.Meta(gt=0)]
    embedding_row_bytes: Bytes = 0
    stage_bytes: Bytes = 0
    unit_bytes: Annotated[int, msgspec.Meta(gt=0)] = 4 * MIB
    micro_batch: Annotated[int, msgspec.Meta(gt=0)] = 512

    @property
    def num_layers(self) -> int:
        return len(self.layer_bytes)

    @property
    def mean_layer_bytes(self) -> float:
        return sum(self.layer_bytes) / len(self.layer_bytes)

    @property
    def cache_bytes_per_layer(self) -> int:
        """Keys and values of one layer at the asked context."""
        return self.cache_bytes_per_token_and_layer * self.context

    @property
    def largest_unit_bytes(self) -> int:
        sizes = {*self.layer_bytes, self.output_bytes or 1}
        return max(units_of(num_bytes, self)[0] for num_bytes in sizes)

    @property
    def ring_bytes_min(self) -> int:
        return STREAMING_UNITS_MIN * self.largest_unit_bytes


def units_of(num_bytes: int, model: ModelProfile, *, ring_bytes: int = 0, units_counted: int = UNITS_COUNTED) -> list[int]:
    """A layer's (or the output projection's) bytes as the pieces in which they are streamed, nearly equal.

    Through a ring of very many units a few are counted as one: it changes little, and predictions take far less time.
    """
    count = max(1, math.ceil(num_bytes / max(model.unit_bytes, ring_bytes // units_counted)))
    size, rest = divmod(num_bytes, count)
    return [size + (index < rest) for index in range(count)]


class Cluster(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Devices, the head first, and the links between them; one direction for each ordered pair.

    Raises:
        ValueError: a device is named twice, or a link is missing, double or to a device that is not there.
    """

    devices: Annotated[tuple[DeviceProfile, ...], msgspec.Meta(min_length=1)]
    links: tuple[LinkProfile, ...] = ()

    def __post_init__(self) -> None:
        names = [device.id for device in self.devices]
        if len(set(names)) != len(names):
            raise ValueError(f"a device is named twice: {', '.join(names)}")
        pairs = [(link.source, link.target) for link in self.links]
        wanted = {(source, target) for source in names for target in names if source != target}
        if len(set(pairs)) != len(pairs):
            raise ValueError("a link is given twice: one per direction is expected")
        for source, target in sorted(set(pairs) - wanted):
            raise ValueError(f"link {source} -> {target} does not join two of the devices {', '.join(names)}")
        for source, target in sorted(wanted - set(pairs)):
            raise ValueError(f"the link {source} -> {target} was not measured: every ordered pair of devices is needed")

    @property
    def head(self) -> DeviceProfile:
        return self.devices[0]

    def hops_s(self, num_bytes: int) -> list[list[float]]:
        """Seconds of a hop by index of source and target, [num_devices, num_devices]; 0 from a device to itself."""
        index = {device.id: position for position, device in enumerate(self.devices)}
        hops = [[0.0] * len(self.devices) for _ in self.devices]
        for link in self.links:
            hops[index[link.source]][index[link.target]] = link.hop_s(num_bytes)
        return hops

    def subset(self, kept: set[DeviceId]) -> Cluster:
        """The same without the other devices. The head must be kept."""
        return Cluster(
            devices=tuple(device for device in self.devices if device.id in kept),
            links=tuple(link for link in self.links if link.source in kept and link.target in kept),
        )


def uniform_links(
    devices: Iterator[DeviceId] | list[DeviceId], *, round_trip_s: float, bytes_per_s: float
) -> tuple[LinkProfile, ...]:
    """All ordered pairs alike: what is assumed of a LAN of which only the round trip is known."""
    names = list(devices)
    return tuple(
        LinkProfile(source=source, target=target, round_trip_s=round_trip_s, bytes_per_s=bytes_per_s)
        for source in names
        for target in names
        if source != target
    )


def decode_cluster(text: bytes) -> Cluster:
    """Reads a cluster from JSON.

    Raises:
        ValueError: says where what is wrong.
    """
    try:
        return msgspec.json.decode(text, type=Cluster)
    except msgspec.DecodeError as error:
        raise ValueError(f"the profiles cannot be read: {error}") from None
