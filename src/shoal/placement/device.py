"""What a placement is made of: devices as they were measured, a model as it is in its file, and the decision itself."""

from __future__ import annotations

import msgspec

from shoal.ids import DeviceId, LayerRange


class Device(msgspec.Struct, frozen=True):
    """One device as it was measured.

    `layer_s` is the time for one token through one layer; `memory_bytes` is what the model may use there;
    `read_bytes_per_s` is how fast its disk reads the model past the page cache, 0 where it cannot stream weights.
    """

    id: DeviceId
    layer_s: float
    memory_bytes: int
    read_bytes_per_s: float = 0.0


class ModelSize(msgspec.Struct, frozen=True):
    """What a model needs: bytes of each layer's weights, of the head's output projection, of each layer's KV cache at
    the asked context, and of a stage's activations and runtime. `ring_bytes` are the least through which weights are
    streamed.
    """

    layer_bytes: tuple[int, ...]
    output_bytes: int
    cache_bytes_per_layer: int
    overhead_bytes: int
    ring_bytes: int = 0


class Assignment(msgspec.Struct, frozen=True):
    """One device's part: a window of consecutive layers per round, the bytes they take, and the time that one token is
    expected to take there.

    `weights_bytes` is the memory for its weights, where they do not all fit and the rest is streamed through `ring_bytes`
    of it; else None and 0.
    """

    device: DeviceId
    windows: tuple[LayerRange, ...]
    needed_bytes: int
    token_s: float
    weights_bytes: int | None = None
    ring_bytes: int = 0

    @property
    def num_layers(self) -> int:
        return sum(map(len, self.windows))


class Placement(msgspec.Struct, frozen=True):
    """Who holds what, in ring order: the first stage first, the head last.

    `left_out` names the devices that hold nothing, each with the reason.
    """

    stages: tuple[Assignment, ...]
    left_out: tuple[tuple[DeviceId, str], ...]

    @property
    def rounds(self) -> int:
        """How often a token goes round the ring."""
        return len(self.head.windows)

    @property
    def head(self) -> Assignment:
        return self.stages[-1]

    @property
    def token_s(self) -> float:
        """Expected time of one token through all stages, hops not counted."""
        return sum(stage.token_s for stage in self.stages)
