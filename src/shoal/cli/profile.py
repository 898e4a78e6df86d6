"""`shoal profile`: what each device of a cluster measures of itself with a model, which is what plans rest on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from shoal.cli.cluster_profile import Measured, ask_cluster
from shoal.placement.profile import BATCH_TOKENS, DeviceProfile
from shoal.runtime.model_store import ModelStore
from shoal.units import format_age, format_bytes, format_seconds

_NOW_S = 30.0


def profile(
    model: str, *, agent: str | None, own_agent: list[str], model_folders: list[Path], fresh: bool, as_json: bool
) -> None:
    """Measures, where nothing is kept or `fresh` wants it, and prints.

    Raises:
        ModelNotFound: a device lacks the model.
        DeviceUnreachable: a device does not answer.
    """
    store = ModelStore(model_folders)
    path = store.resolve(model)
    measured = asyncio.run(ask_cluster(store, path, agent=agent, own_agent=own_agent, link_bytes_per_s=None, fresh=fresh))
    if as_json:
        print(msgspec.json.encode(measured).decode())  # noqa: T201
    else:
        _print(measured)


def _print(measured: Measured) -> None:
    console = Console()
    table = Table(
        "device", "system", "memory", "a layer", f"{BATCH_TOKENS} tokens", "output projection", "disk", "measured", box=None
    )
    for index, device in enumerate(measured.cluster.devices):
        table.add_row(*_row(device, is_head=index == 0))
    console.print(table)
    for link in measured.cluster.links:
        console.print(
            f"{link.source} to {link.target}: round trip {format_seconds(link.round_trip_s)}, "
            f"{format_bytes(int(link.bytes_per_s))}/s",
            highlight=False,
        )
    for assumption in measured.assumed:
        console.print(f"assumed: {assumption}", highlight=False)


def _row(device: DeviceProfile, *, is_head: bool) -> list[str]:
    def timed(name: str, seconds: float) -> str:
        """With the spread: the longest less the shortest, against the median."""
        return f"{format_seconds(seconds)} (spread {device.spreads[name]:.0%})" if name in device.spreads else "-"

    times, disk = device.times, device.disk
    return [
        device.id + (" (head)" if is_head else ""),
        device.system,
        format_bytes(device.memory_bytes),
        timed("layer_s", times.layer_s),
        timed("batch_layer_s", times.batch_layer_s),
        timed("output_s", times.output_s),
        f"{format_bytes(int(disk.read_bytes_per_s))}/s, {disk.mode}" if disk else "not needed",
        f"{format_age(device.age_s)} ago" if device.age_s > _NOW_S else "now",
    ]
