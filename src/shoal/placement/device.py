"""What a placement is made of: devices as they were measured, a model as it is in its file, and the decision itself."""

from __future__ import annotations

import msgspec

from shoal.ids import DeviceId, LayerRange


class Device(msgspec.Struct, frozen=True):
    """One device as it was measured.

    `layer_s` is the time for one token through one layer; `memory_bytes` is what the model may use there.
    """

    id: DeviceId
    layer_s: float
    memory_bytes: int


class ModelSize(msgspec.Struct, frozen=True):
    """What a model needs: bytes of each layer's weights, of the head's output projection, of each layer's KV cache at
    the asked context, and of a stage's activations and runtime.
    """

    layer_bytes: tuple[int, ...]
    output_bytes: int
    cache_bytes_per_layer: int
    overhead_bytes: int


class Assignment(msgspec.Struct, frozen=True):
    """One device's part: its layers, the bytes they need, and the time that one token is expected to take there."""

    device: DeviceId
    layers: LayerRange
    needed_bytes: int
    compute_s: float


class Placement(msgspec.Struct, frozen=True):
    """Who holds what, in ring order: the first stage first, the head last.

    `left_out` names the devices that hold nothing, each with the reason.
    """

    stages: tuple[Assignment, ...]
    left_out: tuple[tuple[DeviceId, str], ...]

    @property
    def head(self) -> Assignment:
        return self.stages[-1]

    @property
    def compute_s(self) -> float:
        """Expected computing of one token through all stages."""
        return sum(stage.compute_s for stage in self.stages)
