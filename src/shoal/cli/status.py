"""`shoal status`: devices, what they have and what they hold."""

from __future__ import annotations

import asyncio

import msgspec
from rich.console import Console
from rich.table import Table

from shoal.cli.client import open_channel
from shoal.runtime.messages import AskStatus, DeviceStatus, Status
from shoal.units import format_bytes, format_seconds


def status(address: str, *, as_json: bool) -> None:
    """Asks the agent at `address` for itself and its peers, and prints them."""
    answer = asyncio.run(_ask(address))
    if as_json:
        print(msgspec.json.encode(answer).decode())  # noqa: T201
        return
    table = Table("device", "address", "round trip", "system", "cores", "memory for models", "holds", box=None)
    for device in answer.devices:
        table.add_row(*_row(device))
    Console().print(table)


async def _ask(address: str) -> Status:
    channel = await open_channel(address)
    try:
        await channel.send(AskStatus())
        return await channel.expect(Status, timeout_s=30.0)
    finally:
        await channel.close()


def _row(device: DeviceStatus) -> list[str]:
    survey = device.survey
    if survey is None:
        return ["?", device.address, "-", f"[red]{device.problem}[/]", "", "", ""]
    return [
        survey.device,
        device.address,
        format_seconds(device.round_trip_s) if device.round_trip_s else "here",
        survey.system,
        str(survey.num_cores),
        f"{format_bytes(survey.memory_usable_bytes)} of {format_bytes(survey.memory_total_bytes)}",
        ", ".join(survey.engines) or "-",
    ]
