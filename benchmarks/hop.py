"""What one hop of the ring costs: real agents, real workers, loopback.

`hop_us = (time of a token - computing of all stages) / hops`, per decoded token, from one token's choice to the next: so
sampling, detokenising and telling the client are in it too. The median over at least 500 tokens is quoted.

`tls_added_us_p50` is what encrypting adds to a hop: two processes that compute half of the layers each are joined by two
rings of the same links, one with TLS and one without, and tokens take them in turns; the difference of the medians.

Beside it stands what the machine itself takes that day: `socket_us_p50`, one way between two bare processes that compute
half of the model's layers each, exchange the same bytes over blocking sockets, and do nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import socket
import statistics
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from benchmarks.models import smollm2
from benchmarks.record import finish, is_quick
from shoal.cli.client import OwnAgent
from shoal.cli.run import Answer, ask
from shoal.compute.backend import Backend
from shoal.compute.model import Model
from shoal.compute.stage import Stage
from shoal.ids import EngineId, LayerRange
from shoal.runtime.messages import EngineOptions, Generate, Sampling
from shoal.transport.link import Frame, FrameShape, Inbound, Outbound, RingKeys, RingListener, dial

TOKENS = 520
SOCKET_ROUNDS = 200
LINK_TOKENS = 1000
_ENGINE = EngineId(1)


async def decode(num_devices: int, *, threads: int, tokens: int) -> Answer:
    """Decodes `tokens` tokens over a fresh ring."""
    path = smollm2()
    async with contextlib.AsyncExitStack() as stack:
        peers: list[str] = []
        for index in reversed(range(num_devices)):
            arguments = [f"--name=device-{index + 1}", f"--models={path.parent}", *(f"--peer={peer}" for peer in peers)]
            agent = await OwnAgent.start(arguments)
            stack.push_async_callback(agent.stop)
            peers.append(agent.address)
        request = Generate(
            model=str(path),
            prompt="Once upon a time",
            max_tokens=tokens,
            ignore_end=True,
            sampling=Sampling(temperature=0.0),
            options=EngineOptions(num_threads=threads),
        )
        return await ask(peers[-1], request, show=lambda _: None, status=lambda _: None)


class _HalfModel:
    """Half of the layers, on one thread, as a stage of two computes them."""

    def __init__(self) -> None:
        self._model = Model(smollm2())
        layers = LayerRange(0, self._model.shape.num_layers // 2)
        self._stage = Stage(self._model, [layers], Backend(num_threads=1), context=1024, micro_batch=1, head=False)
        self.frame = bytearray(8 + 4 * self._model.shape.hidden_size)
        self.shape = FrameShape(micro_batch=1, hidden_size=self._model.shape.hidden_size, num_visits=2)
        self._x_BD = np.zeros((1, self._model.shape.hidden_size), dtype=np.float32)

    def compute(self, position: int) -> float:
        """Seconds that one token took."""
        started_s = time.perf_counter()
        self._stage.forward(self._x_BD, position)
        return time.perf_counter() - started_s


def _echo(port: int) -> None:
    half = _HalfModel()
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for position in range(SOCKET_ROUNDS):
            sock.recv_into(half.frame, flags=socket.MSG_WAITALL)
            struct.pack_into("<d", half.frame, 0, half.compute(position))
            sock.sendall(half.frame)


def bare_socket_us() -> float:
    """One way between two computing processes, microseconds, median."""
    half = _HalfModel()
    one_way_us: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = multiprocessing.get_context("spawn").Process(target=_echo, args=(server.getsockname()[1],), daemon=True)
        other.start()
        server.settimeout(30.0)
        sock, _ = server.accept()
    with sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for position in range(SOCKET_ROUNDS):
            half.compute(position)
            started_s = time.perf_counter()
            sock.sendall(half.frame)
            sock.recv_into(half.frame, flags=socket.MSG_WAITALL)
            their_s: float = struct.unpack_from("<d", half.frame, 0)[0]
            one_way_us.append((time.perf_counter() - started_s - their_s) / 2 * 1e6)
    other.join()
    return statistics.median(one_way_us)


def links_us(tokens: int) -> dict[bool, float]:
    """One way over a ring's links between two computing processes, with TLS and without: microseconds, medians."""
    half, context = _HalfModel(), multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other = context.Process(target=_pass_back, args=(theirs, tokens), daemon=True)
    other.start()
    links = {encrypts: _join(half, ours, encrypts=encrypts) for encrypts in (False, True)}
    one_way_us: dict[bool, list[float]] = {False: [], True: []}
    frames = {encrypts: outbound.free_frame() for encrypts, (_, outbound) in links.items()}
    home = Frame(half.shape)
    for position in range(tokens):
        half.compute(position)
        encrypts = bool(position % 2)
        inbound, outbound = links[encrypts]
        frames[encrypts].begin(_ENGINE, position, 1)
        started_s = time.perf_counter()
        frames[encrypts] = outbound.send(frames[encrypts])
        inbound.receive(home)
        took_s = time.perf_counter() - started_s - home.timings[0].held_s
        one_way_us[encrypts].append(took_s / 2 * 1e6)
    for inbound, outbound in links.values():
        outbound.close()
        inbound.close()
    other.join()
    return {encrypts: statistics.median(found[tokens // 10 :]) for encrypts, found in one_way_us.items()}


def _pass_back(pipe: Connection, tokens: int) -> None:
    half = _HalfModel()
    links = {encrypts: _join(half, pipe, encrypts=encrypts) for encrypts in (False, True)}
    frames = {encrypts: outbound.free_frame() for encrypts, (_, outbound) in links.items()}
    for position in range(tokens):
        encrypts = bool(position % 2)
        inbound, outbound = links[encrypts]
        frame = frames[encrypts]
        inbound.receive(frame)
        held_ns = int(half.compute(position) * 1e9)
        frame.continue_with(frame.hidden_states, compute_ns=held_ns, disk_ns=0, held_ns=held_ns)
        frames[encrypts] = outbound.send(frame)


def _join(half: _HalfModel, pipe: Connection, *, encrypts: bool) -> tuple[Inbound, Outbound]:
    keys = RingKeys() if encrypts else None
    listener = RingListener("127.0.0.1", engine=_ENGINE, version="benchmark")
    pipe.send((listener.port, keys.public_key if keys else b""))
    port, key = pipe.recv()
    with ThreadPoolExecutor(1) as pool:
        accepting = pool.submit(listener.accept, timeout_s=30.0, keys=keys, previous_key=key)
        sock = dial("127.0.0.1", port, engine=_ENGINE, version="benchmark", keys=keys, next_key=key)
        inbound = accepting.result()
    listener.close()
    return inbound, Outbound(sock, half.shape, frames_max=2)


def main() -> None:
    details: dict[str, Any] = {}
    for num_devices in (3,) if is_quick() else (2, 3, 4):
        answer = asyncio.run(decode(num_devices, threads=1, tokens=TOKENS))
        hops = sorted(answer.finished.hop_us)
        details[str(num_devices)] = found = {
            "p50": round(statistics.median(hops), 1),
            "p90": round(hops[len(hops) * 9 // 10], 1),
            "min": round(hops[0], 1),
            "tokens": len(hops),
            "compute_ms": [round(stage.compute_s * 1e3, 3) for stage in answer.finished.stages],
        }
        print(f"{num_devices} devices: {found}", file=sys.stderr)
    links = links_us(LINK_TOKENS)
    figures = {
        "tls_added_us_p50": round(links[True] - links[False], 1),
        "link_us_p50": round(links[False], 1),
        "link_tls_us_p50": round(links[True], 1),
        "hop_us_p50": max(found["p50"] for found in details.values()),
        "socket_us_p50": round(bare_socket_us(), 1),
        "devices": details,
    }
    finish("hop", figures, {"model": "smollm2", "threads": 1, "tokens": TOKENS})


if __name__ == "__main__":
    main()
