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

from shoal.cli.client import DEFAULT_PORT, agent_address, answers, open_channel
from shoal.compute.model import Model
from shoal.errors import DeviceUnreachable, ModelNotFound
from shoal.ids import EngineId
from shoal.placement.profile import Cluster, DeviceProfile, ModelProfile
from shoal.runtime.channel import HERE, Distance
from shoal.runtime.cluster_profile import device_of_report, links_from_head, model_of_file
from shoal.runtime.deployment import LOAD_TIMEOUT_S, MEASURE_TIMEOUT_S
from shoal.runtime.messages import AskStatus, AskSurvey, ModelFile, StartWorker, Status, Survey, Through, WorkerReport
from shoal.runtime.model_store import ModelStore
from shoal.runtime.question import MICRO_BATCH_RING
from shoal.units import format_bytes

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
        # As over several devices, which is what plans are for; one alone takes more tokens at once.
        return model_of_file(model, context=context, micro_batch=MICRO_BATCH_RING)
    finally:
        model.close()


async def ask_cluster(
    store: ModelStore, path: Path, *, agent: str | None, own_agent: list[str], link_bytes_per_s: float | None, fresh: bool
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
        return await measure_cluster(address, model, link_bytes_per_s=link_bytes_per_s, fresh=fresh, report=report)


async def measure_cluster(
    address: str, model: ModelFile, *, link_bytes_per_s: float | None, fresh: bool, report: Callable[[str], None]
) -> Measured:
    """The agent at `address` becomes the head; it and its peers are measured, or say what they were measured to do lately;
    `fresh` wants it measured now. `link_bytes_per_s` takes the place of what links were measured to carry.

    Raises:
        DeviceUnreachable: a peer does not answer.
        ModelNotFound: a device lacks the model.
    """
    devices, distances, assumed = [], [], []
    for peer in (None, *await _peers_of(address)):
        report(f"measuring {peer or address}")
        device, distance = await _measure_device(address, peer, model, fresh=fresh)
        devices.append(device)
        if link_bytes_per_s is not None and peer is not None:
            distance = distance._replace(bytes_per_s=link_bytes_per_s)
        distances.append(distance)
    if "output_s" not in devices[0].spreads:
        assumed.append(f"{devices[0].id} projects to its vocabulary as fast as it computes layers of as many bytes")
    if len(devices) > 1 and link_bytes_per_s is not None:
        assumed.append(f"links carry {format_bytes(int(link_bytes_per_s))}/s (--link-rate)")
    if len(devices) > 2:
        assumed.append("between two peers: the longer of their round trips from here, the slower of their links")
    links = links_from_head([device.id for device in devices], distances)
    return Measured(Cluster(devices=tuple(devices), links=links), tuple(assumed))


async def _peers_of(address: str) -> list[str]:
    channel = await open_channel(address)
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
        peers.append(device.address)
    return peers


async def _measure_device(
    address: str, peer: str | None, model: ModelFile, *, fresh: bool
) -> tuple[DeviceProfile, Distance]:
    """The device at `address`, the head, or a peer of it."""
    channel = await open_channel(address)
    try:
        if peer is not None:
            await channel.send(Through(peer))
        await channel.send(AskSurvey(model))
        # Whoever has not seen its files before hashes them now.
        survey = await channel.expect(Survey, timeout_s=LOAD_TIMEOUT_S)
        if not survey.has_model:
            raise ModelNotFound(
                f"device {survey.device} ({peer or address}) lacks the model: copy it into {survey.model_folders[0]}"
            )
        distance = await channel.distance() if peer is not None else HERE
        start = StartWorker(
            engine=EngineId(secrets.randbits(63) | 1),
            model=model,
            memory_bytes=survey.memory_usable_bytes,
            for_plan=True,
            fresh=fresh,
            head=peer is None,
        )
        await channel.send(start)
        report = await channel.expect(WorkerReport, timeout_s=MEASURE_TIMEOUT_S)
    finally:
        await channel.close()  # ends the worker
    device = device_of_report(report, survey.device, memory_bytes=survey.memory_usable_bytes, system=survey.system)
    return device, distance
