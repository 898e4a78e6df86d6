"""Asks running agents what a planner wants to know: one worker per device measures itself with the model, and ends.

Devices are asked one after the other, as for an engine: several of them may share one machine. What workers do not report
yet is assumed, and each assumption is named in what comes back, so that a plan can show it.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from shoal.cli.client import DEFAULT_PORT, agent_address, answers
from shoal.compute.model import Model
from shoal.errors import DeviceUnreachable, ModelNotFound, RequestError
from shoal.ids import EngineId
from shoal.placement.profile import (
    Cluster,
    DeviceProfile,
    Disk,
    LayerTimes,
    LinkProfile,
    ModelProfile,
    ReadMode,
    System,
)
from shoal.runtime.channel import connect, split_address
from shoal.runtime.deployment import CONTEXT_DEFAULT, LOAD_TIMEOUT_S, MEASURE_TIMEOUT_S
from shoal.runtime.messages import AskStatus, AskSurvey, ModelFile, StartWorker, Status, Survey, WorkerReport
from shoal.runtime.model_store import ModelStore
from shoal.units import MIB, format_bytes

LINK_BYTES_PER_S_DEFAULT = 117e6
"""Gigabit Ethernet less its headers."""
MICRO_BATCH = 512
_GROWTH_BYTES = 48 * MIB
_STATUS_TIMEOUT_S = 30.0


class Measured(msgspec.Struct, frozen=True):
    """A cluster as it was found, and in words what of it is assumed."""

    cluster: Cluster
    assumed: tuple[str, ...]


def model_profile(path: Path, *, context: int | None) -> ModelProfile:
    """A model file as planners see it.

    Raises:
        ModelError: it is damaged or of an unknown kind.
        RequestError: the context is longer than the model's.
    """
    model = Model(path)
    try:
        shape = model.shape
        if context is not None and context > shape.context_length:
            raise RequestError(f"--context {context}: {shape.name} was made for at most {shape.context_length} tokens")
        embedding = model.file.tensors["token_embd.weight"]
        return ModelProfile(
            name=shape.name,
            layer_bytes=tuple(model.layer_bytes),
            output_bytes=model.output_bytes,
            cache_bytes_per_token_and_layer=shape.kv_bytes_per_token_and_layer,
            context=context or min(CONTEXT_DEFAULT, shape.context_length),
            hidden_bytes=shape.hidden_bytes,
            embedding_row_bytes=embedding.num_bytes // shape.vocab_size,
            stage_bytes=_GROWTH_BYTES + 12 * MICRO_BATCH * shape.hidden_bytes,
            micro_batch=MICRO_BATCH,
        )
    finally:
        model.close()


async def ask_cluster(
    store: ModelStore, path: Path, profile: ModelProfile, *, agent: str | None, own_agent: list[str], link_bytes_per_s: float
) -> Measured:
    """Measures the devices of the agent at `agent`, of this device's, or of one that is started with `own_agent` for it.

    Raises:
        DeviceUnreachable: a device does not answer.
        ModelNotFound: a device lacks the model.
    """

    def report(text: str) -> None:
        if sys.stderr.isatty():
            print(text, file=sys.stderr)  # noqa: T201

    model = await asyncio.to_thread(store.identify, path)
    if agent is None and (own_agent or not await answers("127.0.0.1", DEFAULT_PORT)):
        own_agent = [*own_agent, f"--models={path.parent}"]  # it is asked for the file by content, wherever that lies
    async with agent_address(agent, own_agent) as address:
        return await measure_cluster(address, model, profile, link_bytes_per_s=link_bytes_per_s, report=report)


async def measure_cluster(
    address: str, model: ModelFile, profile: ModelProfile, *, link_bytes_per_s: float, report: Callable[[str], None]
) -> Measured:
    """The agent at `address` becomes the head; it and its peers are measured.

    Raises:
        DeviceUnreachable: a peer does not answer.
        ModelNotFound: a device lacks the model.
    """
    host, port = split_address(address, default_port=0)
    addresses = [(host, port), *await _peers_of(host, port)]
    devices, round_trips_s, assumed = [], [], []
    for index, (host, port) in enumerate(addresses):
        report(f"measuring {host}:{port}")
        device, round_trip_s = await _measure_device(host, port, model, profile, head=index == 0)
        devices.append(device)
        round_trips_s.append(round_trip_s)
    if "output_s" not in devices[0].spreads:
        assumed.append(f"{devices[0].id} projects to its vocabulary as fast as it computes layers of as many bytes")
    links = []
    if len(devices) > 1:
        assumed.append(f"links carry {format_bytes(link_bytes_per_s)}/s (shoal plan --link-rate)")
        for first, source in enumerate(devices):
            for second, target in enumerate(devices):
                if first != second:
                    links.append(
                        LinkProfile(
                            source=source.id,
                            target=target.id,
                            round_trip_s=max(round_trips_s[first], round_trips_s[second]),
                            bytes_per_s=link_bytes_per_s,
                        )
                    )
    if len(devices) > 2:
        assumed.append("between two peers the round trip is the longer one of theirs from here")
    return Measured(Cluster(devices=tuple(devices), links=tuple(links)), tuple(assumed))


async def _peers_of(host: str, port: int) -> list[tuple[str, int]]:
    channel = await connect(host, port)
    try:
        await channel.send(AskStatus())
        status = await channel.expect(Status, timeout_s=_STATUS_TIMEOUT_S)
    finally:
        await channel.close()
    peers = []
    for device in status.devices[1:]:
        if device.survey is None:
            raise DeviceUnreachable(
                f"{device.address} does not answer ({device.problem}): start it, or plan with --profiles"
            )
        peers.append(split_address(device.address, default_port=0))
    return peers


async def _measure_device(
    host: str, port: int, model: ModelFile, profile: ModelProfile, *, head: bool
) -> tuple[DeviceProfile, float]:
    channel = await connect(host, port)
    try:
        await channel.send(AskSurvey(model))
        # Whoever has not seen its files before hashes them now.
        survey = await channel.expect(Survey, timeout_s=LOAD_TIMEOUT_S)
        if not survey.has_model:
            raise ModelNotFound(
                f"device {survey.device} ({host}:{port}) lacks the model: copy it into {survey.model_folders[0]}"
            )
        round_trip_s = await channel.round_trip_s()
        start = StartWorker(
            engine=EngineId(secrets.randbits(63) | 1),
            model=model,
            memory_bytes=survey.memory_usable_bytes,
            for_plan=True,
            head=head,
        )
        await channel.send(start)
        report = await channel.expect(WorkerReport, timeout_s=MEASURE_TIMEOUT_S)
    finally:
        await channel.close()  # ends the worker
    output_layers = profile.output_bytes / profile.mean_layer_bytes
    return (
        DeviceProfile(
            id=survey.device,
            system=_system(survey.system),
            # The agent's figure has the owner's limit or the head-room in it.
            free_bytes=survey.memory_usable_bytes,
            limit_bytes=survey.memory_usable_bytes,
            runtime_bytes=report.runtime_bytes,
            times=LayerTimes(
                layer_s=report.layer_s,
                batch_layer_s=report.batch_layer_s,
                output_s=report.output_s or report.layer_s * output_layers,
            ),
            disk=_disk(report),
            spreads=report.spreads,
        ),
        round_trip_s,
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
