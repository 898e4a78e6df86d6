"""Decides which consecutive layers each device holds: shares in proportion to speed, cut to what fits memory. What fits
nowhere is streamed from disk, by whom that costs least.

A first planner behind the interface that a better one will keep: every stage takes about the same time, so that
prefill's micro-batches flow without waiting for one slow device. It does not ask whether fewer devices would be faster.

Source: the pipeline balance of GPipe (Huang et al., 2019); memory limits by water-filling.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.errors import InfeasiblePlacement
from shoal.ids import LayerRange
from shoal.placement.device import Assignment, Device, ModelSize, Placement
from shoal.units import format_bytes


def place_layers(devices: Sequence[Device], model: ModelSize) -> Placement:
    """Assigns all layers.

    Args:
        devices: the head first, then the others in the order in which the ring visits them; at least one.

    Returns:
        Stages in ring order; devices that hold no layer are left out, except the head, which embeds and samples.

    Raises:
        InfeasiblePlacement: names the missing bytes and what would help.
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
    return _assign(ring, head, model, counts)


def place_by_hand(devices: Sequence[Device], model: ModelSize, counts: Sequence[int]) -> Placement:
    """Assigns `counts[i]` layers to device i, the head's count first, as the owner asked.

    Raises:
        ValueError: the counts do not add up, or do not match the devices.
    """
    if len(counts) != len(devices) or min(counts) < 0 or sum(counts) != len(model.layer_bytes):
        raise ValueError(
            f"layer counts {','.join(map(str, counts))} do not fit {len(devices)} devices and "
            f"{len(model.layer_bytes)} layers: give one count per device, the head's first, that add up"
        )
    head, *others = devices
    return _assign([*others, head], head, model, [*counts[1:], counts[0]])


def _assign(ring: list[Device], head: Device, model: ModelSize, counts: list[int]) -> Placement:
    stages, left_out, first = [], [], 0
    for device, count in zip(ring, counts, strict=True):
        layers = LayerRange(first, first + count)
        first += count
        if not count and device is not head:
            left_out.append((device.id, "no layer fits its memory, or the others are much faster"))
            continue
        stages.append(_assignment(device, layers, model, is_head=device is head))
    return Placement(stages=tuple(stages), left_out=tuple(left_out))


def _assignment(device: Device, layers: LayerRange, model: ModelSize, *, is_head: bool) -> Assignment:
    needed_bytes = _needed_bytes(model, layers, is_head=is_head)
    compute_s = len(layers) * device.layer_s
    if needed_bytes <= device.memory_bytes or not device.read_bytes_per_s:
        return Assignment(device.id, layers, needed_bytes, compute_s)
    weights_bytes = device.memory_bytes - model.overhead_bytes - len(layers) * model.cache_bytes_per_layer
    read_s = (needed_bytes - device.memory_bytes + model.ring_bytes) / device.read_bytes_per_s
    return Assignment(device.id, layers, device.memory_bytes, max(compute_s, read_s), weights_bytes)


def _needed_bytes(model: ModelSize, layers: LayerRange, *, is_head: bool) -> int:
    weights = sum(model.layer_bytes[layers.first : layers.stop])
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
