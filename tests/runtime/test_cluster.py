"""Agents, workers and a ring as real processes: answers, and what happens when something is killed or wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.cli.client import open_channel
from shoal.errors import (
    ContextExceeded,
    DeviceRefused,
    InfeasiblePlacement,
    ModelNotFound,
    RequestError,
    ShoalError,
    WorkerLost,
)
from shoal.runtime.channel import Channel, connect, split_address
from shoal.runtime.messages import Delta, EngineOptions, Failed, Hello, encode
from tests.runtime.cluster import Cluster, cluster, ended, request, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
TinyModel = Callable[[str, str], Path]


@pytest.fixture
def model(tiny_model: TinyModel) -> Path:
    return tiny_model("llama", "Q4_K")


def test_three_devices_answer_as_one_does_to_the_bit(model: Path) -> None:
    async def scenario() -> None:
        asked = request(model, tokens=24, digest=True, prompt="word " * 100)
        async with cluster(1, model.parent) as alone, cluster(3, model.parent) as together:
            one, three = await alone.ask(asked), await together.ask(asked)
        assert [len(window) for stage in three.engine.stages for window in stage.windows] == [1, 1, 1]
        assert len(one.engine.stages) == 1
        assert three.finished.token_ids == one.finished.token_ids
        assert three.finished.logits_digest == one.finished.logits_digest != ""
        assert len(three.finished.hop_us) == 23
        assert three.text == one.text

    asyncio.run(scenario())


def test_a_second_turn_computes_only_what_is_new(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(2, model.parent) as devices:
            first = await devices.ask(request(model, prompt="word " * 50, tokens=8))
            again = await devices.ask(request(model, prompt="word " * 60, tokens=8))
            assert first.finished.cached_tokens == 0
            assert again.finished.cached_tokens >= 49
        async with cluster(1, model.parent) as fresh:
            alone = await fresh.ask(request(model, prompt="word " * 60, tokens=8))
        assert alone.finished.token_ids == again.finished.token_ids

    asyncio.run(scenario())


async def _cut_off(devices: Cluster, model: Path, victim: int) -> tuple[float, ShoalError]:
    """Kills the worker of `victim` in the middle of an answer; seconds until the client knew, and what it was told."""
    killed_s: list[float] = []

    def kill(_text: str) -> None:
        if not killed_s:
            killed_s.append(time.monotonic())
            devices.workers(victim)[0].send_signal(signal.SIGKILL)

    with pytest.raises(WorkerLost) as caught:
        await devices.ask(
            request(model, tokens=100_000, options=EngineOptions(context=2048, layer_counts=[1, 1, 1])), on_text=kill
        )
    return time.monotonic() - killed_s[0], caught.value


@pytest.mark.parametrize("victim", [0, 1, 2], ids=["head", "first", "second"])
def test_a_killed_worker_is_an_error_within_a_second_and_the_next_prompt_works(model: Path, victim: int) -> None:
    async def scenario() -> None:
        async with cluster(3, model.parent) as devices:
            seconds, error = await _cut_off(devices, model, victim)
            assert seconds < 1.0
            assert "the answer was cut off" in str(error)
            assert "ask again" in str(error)
            # Nothing of that engine is left, and the agents live.
            await wait_until(lambda: not any(devices.workers(index) for index in range(3)), within_s=1.0)
            answer = await devices.ask(request(model))
            assert len(answer.finished.token_ids) == 16
            assert len(answer.engine.stages) == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("victim", [0, 1], ids=["head", "other"])
def test_a_killed_agent_takes_its_workers_along_within_a_second(model: Path, victim: int) -> None:
    async def scenario() -> None:
        async with cluster(2, model.parent) as devices:
            await devices.ask(request(model))
            workers = [*devices.workers(0), *devices.workers(1)]
            assert len(workers) == 2
            os.kill(devices.agents[victim].pid, signal.SIGKILL)
            # The other half of the engine is of no use any more, and goes too.
            await wait_until(lambda: all(ended(worker) for worker in workers), within_s=1.0)

    asyncio.run(scenario())


def test_a_client_that_goes_away_stops_its_answer(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(2, model.parent) as devices:
            options = EngineOptions(num_threads=1, context=2048)
            for _ in range(25):  # whether the agent notices in sending or in listening is chance
                channel = await open_channel(devices.head.address)
                await channel.send(request(model, tokens=100_000, options=options))
                while not isinstance(await channel.receive(), Delta):
                    pass
                await channel.close()
                # The same engine is free for the next one at once.
                answer = await asyncio.wait_for(devices.ask(request(model, tokens=4, options=options)), 5.0)
                assert len(answer.finished.token_ids) == 4, "what is left of the answer before is none of this one"

    asyncio.run(scenario())


def test_requests_wait_for_each_other(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(2, model.parent) as devices:
            answers = await asyncio.gather(*(devices.ask(request(model, tokens=12)) for _ in range(3)))
        assert len({tuple(answer.finished.token_ids) for answer in answers}) == 1

    asyncio.run(scenario())


def test_mistakes_are_one_clear_line(model: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster(1, model.parent) as devices:
            with pytest.raises(ModelNotFound, match=r"no model 'nonesuch': not a file, and no \.gguf of that name in"):
                await devices.ask(request(Path("nonesuch")))
            small = EngineOptions(context=16, num_threads=1)
            with pytest.raises(ContextExceeded, match=r"the context holds 16: shorten the prompt or raise --context"):
                await devices.ask(request(model, options=small, prompt="word " * 50))
            # And the engine is still there for a prompt that fits.
            assert (await devices.ask(request(model, options=small, token_ids=[5, 6], prompt=None, tokens=3))).text
            with pytest.raises(RequestError, match=r"--context 9999: .* was made for at most 2048 tokens"):
                await devices.ask(request(model, options=EngineOptions(context=9999)))
            with pytest.raises(RequestError, match="temperature"):
                await devices.ask(request(model, sampling=request(model).sampling.__class__(temperature=-1.0)))
            with pytest.raises(RequestError, match="token id 99999 is outside the vocabulary of 512"):
                await devices.ask(request(model, token_ids=[99999], prompt=None))
            with pytest.raises(ShoalError, match=r"layer counts 1,1 do not fit 1 devices and 3 layers"):
                await devices.ask(request(model, options=EngineOptions(layer_counts=[1, 1])))
            broken = tmp_path / "broken.gguf"
            broken.write_bytes(model.read_bytes()[:10_000])
            with pytest.raises(ShoalError, match="truncated"):
                await devices.ask(request(broken))
            answer = await devices.ask(request(model))
            assert len(answer.finished.token_ids) == 16

    asyncio.run(scenario())


def test_a_model_that_does_not_fit_names_the_bytes(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(2, model.parent, "--memory=1MB") as devices:
            with pytest.raises(InfeasiblePlacement, match=r"device-\d lacks [\d.]+ MB .*--memory"):
                await devices.ask(request(model))
            assert not devices.workers(0)
            # The other learns of it by the end of its lease.
            await wait_until(lambda: not devices.workers(1), within_s=5.0)

    asyncio.run(scenario())


def test_a_device_without_the_model_is_told_how_to_get_it(model: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        empty = tmp_path / "models"
        empty.mkdir()
        async with cluster(2, model.parent, own={1: [f"--models={empty}"]}) as devices:
            with pytest.raises(ModelNotFound, match=rf"device device-1 .* lacks {model.name} .*scp .*{empty}/"):
                await devices.ask(request(model))

    asyncio.run(scenario())


def test_a_peer_that_is_not_there_is_named(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(1, model.parent, "--peer=127.0.0.1:1") as devices:
            with pytest.raises(ShoalError, match=r"no shoal answers at 127\.0\.0\.1:1 .*start one there with `shoal up`"):
                await devices.ask(request(model))
            status = await devices.status()
            assert status.devices[0].survey is not None
            assert "no shoal answers" in status.devices[1].problem

    asyncio.run(scenario())


def test_another_version_is_refused_in_one_line(model: Path) -> None:
    async def scenario() -> None:
        async with cluster(1, model.parent) as devices:
            host, port = split_address(devices.head.address, default_port=0)
            reader, writer = await asyncio.open_connection(host, port)
            channel = Channel(reader, writer, peer="agent")
            await channel.expect(Hello)
            await channel.send(Hello(protocol=1, version="0.0.9"))
            with pytest.raises(DeviceRefused, match=r"runs shoal 0\.0\.9 .* install the same version on both"):
                await channel.expect(Failed)
            await channel.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        struct.pack(">I", 2**31) + b"x" * 100,
        struct.pack(">I", 5) + b"\xc1\xc1\xc1\xc1\xc1",
        encode(Delta(text="no request", token_id=1)),
    ],
    ids=["http", "huge", "no msgpack", "no request"],
)
def test_a_malformed_message_is_counted_and_hung_up_on(model: Path, garbage: bytes) -> None:
    async def scenario() -> None:
        async with cluster(1, model.parent) as devices:
            host, port = split_address(devices.head.address, default_port=0)
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(garbage)
            await asyncio.wait_for(reader.read(), 5.0)  # to the end: it hung up
            writer.close()
            channel = await connect(host, port)
            await channel.close()
            status = await devices.status()
            assert status.devices[0].survey is not None
            assert status.devices[0].survey.num_refused_frames == 1

    asyncio.run(scenario())
