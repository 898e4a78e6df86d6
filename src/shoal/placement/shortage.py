"""Says what is missing where nothing fits, and what would help."""

from __future__ import annotations

from shoal.placement.profile import Cluster, ModelProfile
from shoal.units import format_bytes


def explain_shortage(cluster: Cluster, model: ModelProfile) -> str:
    """What is missing, in bytes, and what would help."""
    cache_bytes, num_layers = model.cache_bytes_per_layer, model.num_layers
    needed = sum(model.layer_bytes) + num_layers * cache_bytes + model.output_bytes
    rooms, streams = [], False
    for device in cluster.devices:
        room = device.weights_room_bytes(model)
        if device.accelerator and not device.accelerator.shares_memory and room >= 0:
            room += device.accelerator.memory_bytes
        rooms.append(max(0, room))
        streams = streams or device.disk is not None
    free = ", ".join(f"{device.id} {format_bytes(room)}" for device, room in zip(cluster.devices, rooms, strict=True))
    head_room = cluster.head.weights_room_bytes(model)
    head_need = model.ring_bytes_min if cluster.head.disk else model.output_bytes
    if head_room < head_need:
        return (
            f"{cluster.head.id} takes the request and lacks {format_bytes(head_need - head_room)} for its output projection "
            "and working memory: allow it that much more (--memory), or ask a device with more memory"
        )
    if streams:
        # Weights can be read from disk; what must stay are the cache and a ring on each device.
        needed = num_layers * cache_bytes + len(cluster.devices) * model.ring_bytes_min
        missing = max(needed - sum(rooms), cache_bytes)
        return (
            f"the KV cache of {model.context} tokens and room to stream take {format_bytes(needed)}, free are {free}: "
            f"about {format_bytes(missing)} are missing; use a shorter --context, raise --memory, or add a device"
        )
    missing = max(needed - sum(rooms), int(model.mean_layer_bytes) + cache_bytes)
    return (
        f"{model.name} takes {format_bytes(needed)} with {model.context} tokens of context, free are {free}, and no device "
        f"can stream weights: about {format_bytes(missing)} are missing; use a smaller quantisation or --context, raise "
        "--memory, or add a device"
    )
