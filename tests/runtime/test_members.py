"""Members of one cluster answer together, over links that prove who is at their other end; whoever is removed is out."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import ssl
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from shoal.cli.client import OwnAgent, open_channel
from shoal.cli.demo import demo_model
from shoal.cli.run import Answer, ask
from shoal.errors import RequestError, WorkerLost
from shoal.runtime.agent import GREETING_MAX, GREETING_TIMEOUT_S
from shoal.runtime.messages import AskStatus, AskSurvey, EngineOptions, Status, Survey, Through
from shoal.runtime.node.owner import (
    AskCluster,
    ClusterStatus,
    Done,
    Invitation,
    JoinCluster,
    Joined,
    MakeInvitation,
    OwnerLink,
    Pause,
    RemoveDevice,
)
from shoal.runtime.node.state import find_agent
from shoal.transport.control import AS_AGENT, PREFACE_MAGIC
from shoal.transport.identity import DeviceKeys
from shoal.transport.secure import TrustStore
from tests.runtime.cluster import request

NAMES = ("first", "second", "third")


def _ask_owner(state: Path, message: object, kind: type) -> object:
    with OwnerLink(state) as owner:
        return owner.ask(message, kind)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def members(folder: Path, models: dict[str, Path]) -> AsyncGenerator[dict[str, OwnAgent], None]:
    """Agents that have joined one cluster, by name."""
    async with contextlib.AsyncExitStack() as stack:
        agents = {}
        for name, own in models.items():
            arguments = [f"--name={name}", f"--state={folder / name}", "--members=127.0.0.1:0", f"--models={own}"]
            agents[name] = agent = await OwnAgent.start(arguments)
            stack.push_async_callback(agent.stop)
        made = await asyncio.to_thread(_ask_owner, folder / "first", MakeInvitation(9, 600.0), Invitation)
        assert isinstance(made, Invitation)
        for name in list(models)[1:]:
            await asyncio.to_thread(_ask_owner, folder / name, JoinCluster(made.token), Joined)
        yield agents


async def answer(agent: OwnAgent, *, tokens: int = 12, within_s: float = 10.0, num_stages: int = 0) -> Answer:
    """Asks until so many devices take part: a device that has just joined is trusted a moment later."""
    give_up_s = asyncio.get_running_loop().time() + within_s
    # Planned, a small model may stay on one device.
    asked = request(demo_model(), tokens=tokens, options=EngineOptions(num_threads=1, placement="proportional"))
    while True:
        found = await ask(agent.address, asked, show=lambda _: None, status=lambda _: None)
        if len(found.engine.stages) == num_stages or asyncio.get_running_loop().time() > give_up_s:
            return found
        await asyncio.sleep(0.3)


@pytest.mark.slow
def test_members_answer_together_and_a_removed_one_is_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with members(tmp_path, dict.fromkeys(NAMES, demo_model().parent)) as agents:
            # Those whom the first member told of each other need a moment more.
            await asyncio.sleep(1.0)
            together = await answer(agents["first"], num_stages=3)
            assert {stage.device for stage in together.engine.stages} == set(NAMES)
            assert together.engine.encrypts
            await _check_links_measured_by_work(agents["first"], tmp_path)
            await _check_through(agents["first"])

            long = asyncio.create_task(answer(agents["first"], tokens=1500, num_stages=3))
            await asyncio.sleep(1.5)
            await asyncio.to_thread(_ask_owner, tmp_path / "first", RemoveDevice("third"), Done)
            with pytest.raises(WorkerLost, match="third is gone"):
                await asyncio.wait_for(long, 10.0)
            without = await answer(agents["first"], num_stages=2)
            assert {stage.device for stage in without.engine.stages} == {"first", "second"}
            assert without.finished.token_ids == together.finished.token_ids
            await agents["first"].stop()

    asyncio.run(scenario())
    assert "Traceback" not in capfd.readouterr().err  # though agents ended while leases stood


@pytest.mark.slow
def test_a_member_without_the_model_is_left_out_and_a_stranger_gets_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        async with members(tmp_path, {"first": demo_model().parent, "second": empty}) as agents:
            await asyncio.sleep(1.0)
            alone = await answer(agents["first"], num_stages=1)
            ((device, reason),) = alone.engine.left_out
            assert device == "second"
            assert "lacks" in reason
            assert "scp" in reason
            await asyncio.to_thread(_ask_owner, tmp_path / "second", Pause(is_paused=True), Done)
            # Another engine, for which everybody is asked anew.
            paused = request(demo_model(), options=EngineOptions(num_threads=1, context=512))
            other = await ask(agents["first"].address, paused, show=lambda _: None, status=lambda _: None)
            ((device, reason),) = other.engine.left_out
            assert "paused by its owner" in reason
            assert "shoal resume" in reason
            await asyncio.to_thread(_come_as_stranger, tmp_path / "first")
            await asyncio.to_thread(_say_nothing, tmp_path / "first", GREETING_MAX + 8)

    asyncio.run(scenario())


async def _check_links_measured_by_work(first: OwnAgent, folder: Path) -> None:
    """Whoever receives a prompt's frames is told by their sender how fast they came."""
    if sys.platform != "linux":
        return

    def heard(name: str) -> int:
        status = _ask_owner(folder / name, AskCluster(), ClusterStatus)
        assert isinstance(status, ClusterStatus)
        return status.counters["network_num_carried"]

    options = EngineOptions(num_threads=1, placement="proportional")
    asked = request(demo_model(), tokens=1, prompt="The sea is the friend of the sailor. " * 40, options=options)
    await ask(first.address, asked, show=lambda _: None, status=lambda _: None)
    give_up_s = time.monotonic() + 5.0
    # From the second: what the head's worker says is only read while it answers.
    while not await asyncio.to_thread(heard, "third"):
        assert time.monotonic() < give_up_s, "the frames of a prompt measured no link"
        await asyncio.sleep(0.1)


async def _check_through(first: OwnAgent) -> None:
    """The owner's commands reach other members' agents through this device's."""
    channel = await open_channel(first.address)
    await channel.send(AskStatus())
    status = await channel.expect(Status)
    assert len(status.devices) == 3
    assert all(device.survey for device in status.devices)
    await channel.send(Through(status.devices[1].address))
    await channel.send(AskSurvey())
    assert (await channel.expect(Survey)).device == "second"
    await channel.close()
    astray = await open_channel(first.address)
    await astray.send(Through("192.0.2.1:1"))
    with pytest.raises(RequestError, match="shoal status"):
        await astray.expect(Survey)
    await astray.close()


def _say_nothing(state: Path, count: int) -> None:
    """So many come as agents and begin no TLS: those beyond the bound are hung up on at once, all after a while."""
    address, _ = find_agent(state)
    host, port = address.rsplit(":", 1)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection((host, int(port)), timeout=5.0)) for _ in range(count)]
        for sock in socks:
            sock.sendall(PREFACE_MAGIC + AS_AGENT)
        time.sleep(0.5)
        assert len(select.select(socks, [], [], 0.0)[0]) >= 8
        time.sleep(GREETING_TIMEOUT_S)
        assert len(select.select(socks, [], [], 1.0)[0]) == count


def _come_as_stranger(state: Path) -> None:
    """As a member's agent, with a key that nobody knows."""
    address, keys = find_agent(state)
    host, port = address.rsplit(":", 1)
    stranger = TrustStore(DeviceKeys.generate(), [keys.public_key])
    sock = socket.create_connection((host, int(port)), timeout=5.0)
    sock.sendall(PREFACE_MAGIC + AS_AGENT)
    answered = b""
    # In TLS 1.3 the dialler is done first: that it is refused shows with the first bytes.
    with contextlib.suppress(ssl.SSLError, ConnectionError), stranger.dial(sock, keys.node) as secured:
        secured.settimeout(5.0)
        secured.sendall(b"\0\0\0\0")
        answered = secured.recv(4096)
    assert answered == b""


@pytest.mark.full
def test_a_model_moves_to_a_member_that_comes_where_that_is_faster(tmp_path: Path) -> None:
    """Alone, the first device has too little memory, and reads for every token."""

    def arguments(name: str, *more: str) -> list[str]:
        return [
            f"--name={name}", f"--state={tmp_path / name}", "--members=127.0.0.1:0", f"--models={demo_model().parent}", *more
        ]  # fmt: skip

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            first = await OwnAgent.start(arguments("first", "--memory=190MB"))
            stack.push_async_callback(first.stop)
            asked = request(demo_model(), tokens=8, options=EngineOptions(num_threads=1, repack=False, context=256))

            async def devices() -> tuple[set[str], list[int], int]:
                found = await ask(first.address, asked, show=lambda _: None, status=lambda _: None)
                streamed = sum(stage.streamed_bytes for stage in found.engine.stages)
                return {stage.device for stage in found.engine.stages}, found.finished.token_ids, streamed

            alone, tokens, streamed = await devices()
            assert alone == {"first"}
            assert streamed > 0
            second = await OwnAgent.start(arguments("second"))
            stack.push_async_callback(second.stop)
            made = await asyncio.to_thread(_ask_owner, tmp_path / "first", MakeInvitation(1, 600.0), Invitation)
            assert isinstance(made, Invitation)
            await asyncio.to_thread(_ask_owner, tmp_path / "second", JoinCluster(made.token), Joined)
            give_up_s = asyncio.get_running_loop().time() + 60.0
            while (found := await devices())[0] == alone:
                assert asyncio.get_running_loop().time() < give_up_s, "it did not move"
                await asyncio.sleep(0.5)
            assert "second" in found[0]
            assert found[1] == tokens
            assert found[2] < streamed

    asyncio.run(scenario())
