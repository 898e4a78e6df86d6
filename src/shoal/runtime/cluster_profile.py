"""What workers and agents reported, as planners want it: one place for `run`, `serve`, `plan` and `profile`."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from shoal.compute.model import Model
from shoal.errors import RequestError
from shoal.ids import DeviceId
from shoal.placement.profile import Accelerator, DeviceProfile, Disk, LayerTimes, LinkProfile, ModelProfile, ReadMode, System
from shoal.runtime.channel import Distance
from shoal.runtime.messages import WorkerReport

CONTEXT_DEFAULT = 4096
FLOAT_BYTES = 4


def checked_context(context: int | None, *, context_length: int, name: str) -> int:
    """The context to plan for. Raises RequestError where it is longer than the model's."""
    if context is not None and context > context_length:
        raise RequestError(f"--context {context}: {name} was made for at most {context_length} tokens")
    return context or min(CONTEXT_DEFAULT, context_length)


def stage_bytes(hidden_bytes: int, micro_batch: int) -> int:
    """Of one stage, beside weights and cache: its widest activations are a few times its hidden states, and two frames wait
    on each link. What a worker takes beyond what it had when it was measured is in the planner's head-room."""
    return 12 * micro_batch * hidden_bytes


def model_of_file(model: Model, *, context: int | None, micro_batch: int) -> ModelProfile:
    """A model that is open here. Raises RequestError where the context is longer than the model's."""
    shape = model.shape
    return ModelProfile(
        name=shape.name,
        layer_bytes=tuple(model.layer_bytes),
        output_bytes=model.output_bytes,
        cache_bytes_per_token_and_layer=shape.kv_bytes_per_token_and_layer,
        context=checked_context(context, context_length=shape.context_length, name=shape.name),
        hidden_bytes=shape.hidden_bytes,
        embedding_row_bytes=model.file.tensors["token_embd.weight"].num_bytes // shape.vocab_size,
        stage_bytes=stage_bytes(shape.hidden_bytes, micro_batch),
        micro_batch=micro_batch,
    )


def model_of_report(report: WorkerReport, *, context: int | None, micro_batch: int) -> ModelProfile:
    """The same from what a worker said. Raises RequestError where the context is longer than the model's."""
    hidden_bytes = FLOAT_BYTES * report.hidden_size
    return ModelProfile(
        name=report.model_name,
        layer_bytes=tuple(report.layer_bytes),
        output_bytes=report.output_bytes,
        cache_bytes_per_token_and_layer=report.cache_bytes_per_token_and_layer,
        context=checked_context(context, context_length=report.context_length, name=report.model_name),
        hidden_bytes=hidden_bytes,
        embedding_row_bytes=report.embedding_row_bytes,
        stage_bytes=stage_bytes(hidden_bytes, micro_batch),
        micro_batch=micro_batch,
    )


def device_of_report(
    report: WorkerReport, device: DeviceId, *, memory_bytes: int, system: str = "", may_stream: bool = True
) -> DeviceProfile:
    """A device as its worker measured it.

    Args:
        memory_bytes: what a worker may take there, all in all; the owner's limit or the head-room is in it.
        system: as the device calls it.
    """
    mean_layer_bytes = sum(report.layer_bytes) / len(report.layer_bytes)
    return DeviceProfile(
        id=device,
        system=_system(system),
        free_bytes=memory_bytes,
        limit_bytes=memory_bytes,
        runtime_bytes=report.runtime_bytes,
        times=LayerTimes(
            layer_s=report.layer_s,
            batch_layer_s=report.batch_layer_s,
            # Where it was not measured: as fast as layers of as many bytes.
            output_s=report.output_s or report.layer_s * report.output_bytes / mean_layer_bytes,
        ),
        accelerator=_accelerator(report),
        disk=_disk(report) if may_stream else None,
        spreads=report.spreads,
        age_s=report.age_s,
    )


def links_from_head(devices: Sequence[DeviceId], distances: Sequence[Distance]) -> tuple[LinkProfile, ...]:
    """All ordered pairs, where only the head measured, and only in one direction: the way back is taken to be like it, and
    between two others the longer of their round trips and the slower of their links.

    Args:
        distances: of each device from the head, whose own is `HERE`.
    """
    return tuple(
        LinkProfile(
            source=source,
            target=target,
            round_trip_s=max(first.round_trip_s, second.round_trip_s),
            bytes_per_s=min(first.bytes_per_s, second.bytes_per_s),
        )
        for source, first in zip(devices, distances, strict=True)
        for target, second in zip(devices, distances, strict=True)
        if source != target
    )


def _accelerator(report: WorkerReport) -> Accelerator | None:
    found = report.accelerator
    if found is None:
        return None
    return Accelerator(
        memory_bytes=found.memory_bytes,
        times=LayerTimes(layer_s=found.layer_s, batch_layer_s=found.batch_layer_s),
        shares_memory=found.shares_memory,
    )


def _disk(report: WorkerReport) -> Disk | None:
    """None where weights cannot be streamed, or surely all fit, so that nobody read."""
    if not report.read_bytes_per_s:
        return None
    return Disk(mode=msgspec.convert(report.read_mode, ReadMode), read_bytes_per_s=report.read_bytes_per_s)


def _system(text: str) -> System:
    first = text.lower().split()[0] if text else ""
    names: dict[str, System] = {"darwin": "macos", "windows": "windows", "android": "android"}
    return names.get(first, "linux")
