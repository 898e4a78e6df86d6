"""Decides which consecutive layers each device holds: shares in proportion to speed, cut to what fits memory. What fits
nowhere is streamed from disk, by whom that costs least; then a token goes round several times where that hides reading.

A first planner behind the interface that a better one will keep: every stage takes about the same time, so that
prefill's micro-batches flow without waiting for one slow device. It does not ask whether fewer devices would be faster.

Source: the pipeline balance of GPipe (Huang et al., 2019); memory limits by water-filling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from shoal.errors import InfeasiblePlacement
from shoal.ids import LayerRange
from shoal.placement.device import Assignment, Device, ModelSize, Placement
from shoal.placement.window import RING_UNITS, DeviceClock, TensorLoad, choose_streamed, ring_time_s
from shoal.units import format_bytes

_ROUNDS_MAX = 24
_GAIN_MIN = 0.02
"""More rounds must be faster by as much."""
_PIECES_PER_LAYER_MAX = 16


def place_layers(devices: Sequence[Device], model: ModelSize, *, rounds: int | None = None, hop_s: float = 0.0) -> Placement:
    """Assigns all layers.

    Args:
        devices: the head first, then the others in the order in which the ring visits them; at least one.
        rounds: how often a token goes round; None chooses what is fastest.
        hop_s: from one device to the next.

    Returns:
        Stages in ring order; devices that hold no layer are left out, except the head, which embeds and samples.

    Raises:
        InfeasiblePlacement: names the missing bytes and what would help.
        ValueError: some device holds fewer layers than there are rounds.
    """
    head, *others = devices
    ring = [*others, head]
    capacities = [_layers_that_fit(device, model, is_head=device is head) for device in ring]
    num_layers = len(model.layer_bytes)
    if sum(capacities) >= num_layers:
        counts = _share(num_layers, [1.0 / device.layer_s for device in ring], capacities)
    elif (streaming_counts := _share_streaming(ring, head, model, capacities)) is not None:
        counts = streaming_counts
    else:
        raise InfeasiblePlacement(_explain_shortage(ring, head, model, capacities))
    return _assign(ring, head, model, counts, rounds, hop_s)


def place_by_hand(
    devices: Sequence[Device],
    model: ModelSize,
    counts: Sequence[int],
    *,
    rounds: int | None = None,
    hop_s: float = 0.0,
) -> Placement:
    """Assigns `counts[i]` layers to device i, the head's count first, as the owner asked.

    Raises:
        ValueError: the counts do not add up, or do not match the devices or the rounds.
    """
    if len(counts) != len(devices) or min(counts) < 0 or sum(counts) != len(model.layer_bytes):
        raise ValueError(
            f"layer counts {','.join(map(str, counts))} do not fit {len(devices)} devices and "
            f"{len(model.layer_bytes)} layers: give one count per device, the head's first, that add up"
        )
    head, *others = devices
    return _assign([*others, head], head, model, [*counts[1:], counts[0]], rounds, hop_s)


def cut_windows(counts: Sequence[int], rounds: int) -> list[tuple[LayerRange, ...]]:
    """A window of consecutive layers per device and round, in the order of a token's way; sizes of a device's windows
    differ by one at most."""
    windows: list[list[LayerRange]] = [[] for _ in counts]
    first = 0
    for number in range(rounds):
        for device, count in enumerate(counts):
            stop = first + count // rounds + (number < count % rounds)
            windows[device].append(LayerRange(first, stop))
            first = stop
    return [tuple(of_device) for of_device in windows]


def _assign(
    ring: list[Device], head: Device, model: ModelSize, counts: list[int], rounds: int | None, hop_s: float
) -> Placement:
    left_out = tuple(
        (device.id, "no layer fits its memory, or the others are much faster")
        for device, count in zip(ring, counts, strict=True)
        if not count and device is not head
    )
    used = [(device, count) for device, count in zip(ring, counts, strict=True) if count or device is head]
    rounds_max = 1 if len(used) == 1 else min(count for _, count in used if count)
    if rounds is not None and not 1 <= rounds <= rounds_max:
        allowed = f"1 to {rounds_max} are possible, as many as the device with fewest layers has"
        raise ValueError(f"{rounds} rounds: {allowed if len(used) > 1 else 'a device alone goes round once'}")
    plans = [_Rounds(used, head, model, rounds or 1, hop_s)]
    if rounds is None and plans[0].streams:
        # What counts is how many layers a window has at most.
        by_width = {math.ceil(rounds_max / width) for width in range(1, rounds_max)}
        plans += [_Rounds(used, head, model, more, hop_s) for more in sorted(by_width) if more <= _ROUNDS_MAX]
    best = plans[0]
    for plan in plans[1:]:
        if plan.token_s < best.token_s * (1 - _GAIN_MIN):
            best = plan
    return Placement(best.stages(), left_out)


class _Rounds:
    """A ring of given devices, layers and rounds, with the sizes of ring buffers that make it fastest."""

    def __init__(self, used: list[tuple[Device, int]], head: Device, model: ModelSize, rounds: int, hop_s: float) -> None:
        self._hop_s = hop_s if len(used) > 1 else 0.0
        self._used, self._head, self._model = used, head, model
        self._windows = cut_windows([count for _, count in used], rounds)
        self._loads = [
            _loads(device, of_device, model, is_head=device is head)
            for (device, _), of_device in zip(used, self._windows, strict=True)
        ]
        self._weights_bytes = [
            _weights_bytes(device, of_device, model, is_head=device is head)
            for (device, _), of_device in zip(used, self._windows, strict=True)
        ]
        self.streams = any(num_bytes is not None for num_bytes in self._weights_bytes)
        self._piece_bytes = max(load.num_bytes for loads in self._loads for window in loads for load in window)
        self._units = [0.0] * len(used)
        self.token_s, self._visits_s = self._time(self._units)
        if self.streams:
            self._size_rings()

    def _size_rings(self) -> None:
        """The same for all first, then each device by itself."""
        candidates = [[units] * len(self._used) for units in RING_UNITS if units >= 2]
        timed = [(self._time(units)[0], units) for units in candidates]
        self.token_s, self._units = min(timed)
        for index, num_bytes in enumerate(self._weights_bytes):
            if num_bytes is None:
                continue
            for units in RING_UNITS:
                changed = [*self._units[:index], units, *self._units[index + 1 :]]
                if units >= 2 and (token_s := self._time(changed)[0]) < self.token_s:
                    self.token_s, self._units = token_s, changed
        self._visits_s = self._time(self._units)[1]

    def _time(self, units: Sequence[float]) -> tuple[float, list[float]]:
        clocks = []
        for index, (device, _) in enumerate(self._used):
            ring_bytes, streamed = self._ring_bytes(index, units[index]), frozenset[str]()
            weights_bytes, loads = self._weights_bytes[index], self._loads[index]
            if weights_bytes is not None:
                tensors = [tensor for window in loads for tensor in window]
                streamed = choose_streamed(tensors, weights_bytes - ring_bytes)
            clocks.append(DeviceClock(loads, streamed, ring_bytes=ring_bytes, read_bytes_per_s=device.read_bytes_per_s))
        return ring_time_s(clocks, hop_s=self._hop_s)

    def _ring_bytes(self, index: int, units: float) -> int:
        available_bytes = self._weights_bytes[index]
        if available_bytes is None:
            return 0
        return max(self._piece_bytes, min(int(units * self._piece_bytes), available_bytes))

    def stages(self) -> tuple[Assignment, ...]:
        found = []
        for index, (device, _) in enumerate(self._used):
            needed_bytes = _needed_bytes(self._model, self._windows[index], is_head=device is self._head)
            weights_bytes = self._weights_bytes[index]
            found.append(
                Assignment(
                    device.id,
                    self._windows[index],
                    needed_bytes if weights_bytes is None else min(needed_bytes, device.memory_bytes),
                    self._visits_s[index],
                    weights_bytes,
                    self._ring_bytes(index, self._units[index]),
                )
            )
        return tuple(found)


def _weights_bytes(device: Device, windows: Sequence[LayerRange], model: ModelSize, *, is_head: bool) -> int | None:
    """Memory for weights and the ring, where they do not all fit and the device can stream."""
    if _needed_bytes(model, windows, is_head=is_head) <= device.memory_bytes or not device.read_bytes_per_s:
        return None
    return device.memory_bytes - model.overhead_bytes - sum(map(len, windows)) * model.cache_bytes_per_layer


def _loads(device: Device, windows: Sequence[LayerRange], model: ModelSize, *, is_head: bool) -> list[list[TensorLoad]]:
    """Pieces as large as those that a device streams, or a few per layer where those would be very many."""
    mean_bytes = sum(model.layer_bytes) / len(model.layer_bytes)
    per_byte_s = device.layer_s / mean_bytes
    piece_bytes = max(model.ring_bytes / 2, mean_bytes / _PIECES_PER_LAYER_MAX, 1)

    def pieces(name: str, num_bytes: int) -> list[TensorLoad]:
        count = max(1, math.ceil(num_bytes / piece_bytes))
        each = num_bytes // count
        return [TensorLoad(f"{name}.{number}", each, each * per_byte_s) for number in range(count)]

    loads = [
        [load for layer in range(window.first, window.stop) for load in pieces(str(layer), model.layer_bytes[layer])]
        for window in windows
    ]
    if is_head:
        loads[-1] += pieces("output", model.output_bytes)
    return loads


def _needed_bytes(model: ModelSize, windows: Sequence[LayerRange], *, is_head: bool) -> int:
    layers = [layer for window in windows for layer in range(window.first, window.stop)]
    weights = sum(model.layer_bytes[layer] for layer in layers)
    return weights + len(layers) * model.cache_bytes_per_layer + model.overhead_bytes + is_head * model.output_bytes


def _layers_that_fit(device: Device, model: ModelSize, *, is_head: bool) -> int:
    """Counts with the largest layer, so that any run of that many fits."""
    free_bytes = device.memory_bytes - model.overhead_bytes - is_head * model.output_bytes
    return max(0, free_bytes // (max(model.layer_bytes) + model.cache_bytes_per_layer))


def _share(num_layers: int, speeds: list[float], capacities: list[int]) -> list[int]:
    """Whole layers in proportion to `speeds`, none above its capacity: what one cannot hold, the others share."""
    counts = [0] * len(speeds)
    open_devices = {index for index, capacity in enumerate(capacities) if capacity}
    while sum(counts) < num_layers:
        # The layer goes to whoever would finish first with one more.
        best = min(open_devices, key=lambda index: ((counts[index] + 1) / speeds[index], index))
        counts[best] += 1
        if counts[best] == capacities[best]:
            open_devices.discard(best)
    return counts


def _share_streaming(ring: list[Device], head: Device, model: ModelSize, capacities: list[int]) -> list[int] | None:
    """Counts where some devices hold more layers than fit: each further layer goes where reading then takes least time.

    None where some layer's cache has no room either.
    """
    counts = list(capacities)
    mean_bytes = sum(model.layer_bytes) / len(model.layer_bytes)

    def room_bytes(index: int, count: int) -> float:
        """What is left for weights; the head's output projection is streamed as layers are."""
        return ring[index].memory_bytes - model.overhead_bytes - count * model.cache_bytes_per_layer

    def read_s(index: int, count: int) -> float:
        device = ring[index]
        weights_bytes = count * mean_bytes + (model.output_bytes if device is head else 0)
        return (weights_bytes - room_bytes(index, count) + model.ring_bytes) / device.read_bytes_per_s

    def can_hold(index: int, count: int) -> bool:
        return ring[index].read_bytes_per_s > 0 and room_bytes(index, count) >= model.ring_bytes

    while sum(counts) < len(model.layer_bytes):
        open_devices = [index for index, count in enumerate(counts) if can_hold(index, count + 1)]
        if not open_devices:
            return None
        best = min(open_devices, key=lambda index: (read_s(index, counts[index] + 1), index))
        counts[best] += 1
    return counts


def _explain_shortage(ring: list[Device], head: Device, model: ModelSize, capacities: list[int]) -> str:
    layer_bytes = max(model.layer_bytes) + model.cache_bytes_per_layer
    missing = len(model.layer_bytes) - sum(capacities)
    needed = sum(model.layer_bytes) + len(model.layer_bytes) * model.cache_bytes_per_layer + model.output_bytes
    head_short = head.memory_bytes < model.overhead_bytes + model.output_bytes
    free = ", ".join(f"{device.id} {format_bytes(device.memory_bytes)}" for device in ring)
    advice = "use a smaller quantisation or --context, raise --memory, or add a device"
    if head_short and not missing:
        advice = "take the request on a device with more memory"
    return (
        f"the model needs {format_bytes(needed)} and room to work, free are {free}: {missing} of "
        f"{len(model.layer_bytes)} layers ({format_bytes(missing * layer_bytes)}) fit nowhere; {advice}"
    )
