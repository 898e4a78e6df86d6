"""What HTTP costs: a real server, a real model on one device, raw sockets as clients.

* `first_byte_ms_p50`: from sending a request on an open connection to the first byte of the answer's text, less the time in
  which the ring read the prompt (`vllm:request_prefill_time_seconds` of that very request). Template, tokenising, the
  choice of the first token and all ways between processes are in it.
* `overhead_share`: what a streamed token costs besides computing, as a share of the 10 ms that it has at 100 tokens/s: the
  processor time of the process that serves HTTP, and the time in which the worker turns it into text and a message.
* `leaked_requests`: requests, connections and their tasks that are left when 200 clients that wait for their stream and 50
  that leave at random moments, by any of three ways, have all gone. `slow_down` compares tokens per second and the
  round trip of `/health` in the last quarter of that time with the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil

from benchmarks.models import smollm2
from benchmarks.record import finish, is_quick
from shoal.compute.gguf import GGUFFile
from shoal.runtime.messages import Delta, encode
from shoal.text.streaming import StopFilter, TextStream
from shoal.text.tokenizer import Tokenizer
from tests.serving.server import Server, figure, running

FIRST_BYTES, FIRST_BYTES_QUICK = 200, 40
TOKENS, TOKENS_QUICK = 6000, 1000
CROWD_S, CROWD_QUICK_S = 300.0, 15.0
NUM_IDLE, NUM_LEAVING = 200, 50
TOKEN_S = 0.01
"""A token's time at 100 tokens/s."""
SETTLE_S = 10.0


def post(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def chat(prompt: str, max_tokens: int) -> dict[str, Any]:
    return {
        "model": "smollm2", "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, "stream": True,
        "temperature": 0.0, "ignore_eos": True,
    }  # fmt: skip


async def first_byte_ms(server: Server, count: int) -> list[float]:
    """For `count` requests one after the other, each with a prompt that is not in the cache."""
    found = []
    reader, writer = await asyncio.open_connection(*server.address)
    for index in range(count):
        body = post("/v1/chat/completions", chat(f"{index} things I know about the sea", 4))
        before_s = prefill_s(server)
        started_s = time.perf_counter()
        writer.write(body)
        received = b""
        first_s = None
        while b"data: [DONE]\n\n\r\n" not in received:
            received += await reader.read(65536)
            # The piece before has the role, and no text.
            if first_s is None and b'"delta":{"content":' in received:
                first_s = time.perf_counter() - started_s
        await reader.readuntil(b"0\r\n\r\n") if not received.endswith(b"0\r\n\r\n") else None
        assert first_s is not None
        found.append((first_s - (prefill_s(server) - before_s)) * 1e3)
    writer.close()
    return found


def prefill_s(server: Server) -> float:
    return server.figure("vllm:request_prefill_time_seconds_sum")


async def serving_s(server: Server, num_tokens: int) -> tuple[float, float]:
    """Processor seconds of the serving process per streamed token, and the tokens' own time on the wall."""
    process = psutil.Process(server.process.pid)
    reader, writer = await asyncio.open_connection(*server.address)
    spent_s = took_s = 0.0
    done = 0
    while done < num_tokens:
        before, started_s = process.cpu_times(), time.perf_counter()
        writer.write(post("/v1/chat/completions", chat("Tell me about the sea", 500)))
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received = received[-64:] + await reader.read(65536)
        after = process.cpu_times()
        spent_s += after.user + after.system - before.user - before.system
        took_s += time.perf_counter() - started_s
        done += 500
    writer.close()
    return spent_s / done, took_s / done


def detokenising_s(count: int) -> float:
    """Seconds per token from its id to an encoded message with its text, as the worker does it; caches are cold there, so
    the slowest tenth is quoted."""
    with GGUFFile.open(smollm2()) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    text = "The sea is the old friend of the sailor, and 1,234 gulls cry: größe! "
    ids = tokenizer.encode(text * (count // 20))[:count]
    stream, stops = TextStream(tokenizer), StopFilter(["never said"])
    times = []
    for token_id in ids:
        started_s = time.perf_counter()
        shown, _ = stops.push(stream.push(token_id))
        encode(Delta(text=shown, token_id=token_id))
        times.append(time.perf_counter() - started_s)
    return sorted(times)[len(times) * 9 // 10]


class Crowd:
    """Clients that wait, and clients that leave."""

    def __init__(self, server: Server, *, seed: int) -> None:
        self._server = server
        self._random = random.Random(seed)
        self.num_answers = 0
        self.num_left = 0
        self.health_ms: list[tuple[float, float]] = []
        self.tokens: list[tuple[float, float]] = []

    async def run(self, duration_s: float) -> None:
        tasks = [asyncio.create_task(self._wait()) for _ in range(NUM_IDLE)]
        tasks += [asyncio.create_task(self._leave()) for _ in range(NUM_LEAVING)]
        try:
            await self._watch(duration_s)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, ConnectionError):
                raise result

    async def _wait(self) -> None:
        while True:
            reader, writer = await asyncio.open_connection(*self._server.address)
            try:
                writer.write(post("/v1/chat/completions", chat("Say something", 32)))
                received = b""
                while b"[DONE]" not in received:
                    chunk = await reader.read(65536)
                    if not chunk or b"HTTP/1.1 4" in chunk or b'"error"' in chunk:
                        raise RuntimeError(f"a client that waits was sent away: {chunk[:300]!r}")
                    received = received[-64:] + chunk
                self.num_answers += 1
            finally:
                writer.transport.abort()

    async def _leave(self) -> None:
        while True:
            reader, writer = await asyncio.open_connection(*self._server.address)
            try:
                body = chat("word " * self._random.randint(1, 300), 64) | {"stream": self._random.random() < 0.8}
                request = post("/v1/chat/completions", body)
                # Some leave in the middle of their own request.
                size = len(request) if self._random.random() < 0.9 else self._random.randrange(len(request))
                writer.write(request[:size])
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._random.expovariate(1 / 3.0)):
                        while await reader.read(65536):
                            pass
            finally:
                way = self._random.randrange(3)
                if way == 0:
                    writer.transport.abort()
                else:
                    with contextlib.suppress(OSError):
                        if way == 1:
                            writer.write_eof()
                    writer.close()
                self.num_left += 1

    async def _watch(self, duration_s: float) -> None:
        started_s = time.monotonic()
        async with httpx2.AsyncClient(base_url=self._server.url, timeout=10.0) as client:
            while (now_s := time.monotonic() - started_s) < duration_s:
                asked_s = time.perf_counter()
                await client.get("/health")
                self.health_ms.append((now_s / duration_s, (time.perf_counter() - asked_s) * 1e3))
                page = (await client.get("/metrics")).text
                self.tokens.append((time.monotonic() - started_s, figure(page, "vllm:generation_tokens_total")))
                await asyncio.sleep(0.25)

    def slow_down(self, duration_s: float) -> dict[str, float]:
        """Last quarter against first: 1 is no change."""

        def rate(first: float, last: float) -> float:
            part = [sample for sample in self.tokens if first * duration_s <= sample[0] <= last * duration_s]
            return (part[-1][1] - part[0][1]) / (part[-1][0] - part[0][0])

        early = statistics.median(ms for share, ms in self.health_ms if share < 0.25)
        late = statistics.median(ms for share, ms in self.health_ms if share >= 0.75)
        return {
            "tokens_per_s_first": round(rate(0.0, 0.25), 1),
            "tokens_per_s_last": round(rate(0.75, 1.0), 1),
            "health_ms_first": round(early, 2),
            "health_ms_last": round(late, 2),
        }


def leaks(server: Server) -> tuple[int, dict[str, int]]:
    """What is left of a crowd that has gone, after some seconds at most."""
    process = psutil.Process(server.process.pid)
    port = server.address[1]
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        connections = sum(
            1 for link in process.net_connections("tcp") if link.laddr.port == port and link.status != psutil.CONN_LISTEN
        )
        with server.http() as http:
            page = http.get("/metrics").text
        found = {
            "running": int(figure(page, "vllm:num_requests_running")),
            "waiting": int(figure(page, "vllm:num_requests_waiting")),
            "connections": connections,
        }
        if not any(found.values()) or time.monotonic() > deadline_s:
            return sum(found.values()), found
        time.sleep(0.1)


def main() -> None:
    quick = is_quick()
    duration_s = CROWD_QUICK_S if quick else CROWD_S
    with _served() as server:
        process = psutil.Process(server.process.pid)
        asyncio.run(first_byte_ms(server, 10))
        first_bytes = sorted(asyncio.run(first_byte_ms(server, FIRST_BYTES_QUICK if quick else FIRST_BYTES)))
        print(f"first bytes: {first_bytes[0]:.2f} to {first_bytes[-1]:.2f} ms", file=sys.stderr)
        http_s, token_s = asyncio.run(serving_s(server, TOKENS_QUICK if quick else TOKENS))
        text_s = detokenising_s(5000)
        print(
            f"per token: HTTP {http_s * 1e6:.0f} us, text {text_s * 1e6:.0f} us, all {token_s * 1e6:.0f} us", file=sys.stderr
        )
        before = process.memory_info().rss, process.num_fds()
        crowd = Crowd(server, seed=0)
        asyncio.run(crowd.run(duration_s))
        leaked, left = leaks(server)
        after = process.memory_info().rss, process.num_fds()
        print(f"left behind: {left}", file=sys.stderr)
    figures = {
        "first_byte_ms_p50": round(statistics.median(first_bytes), 3),
        "overhead_share": round((http_s + text_s) / TOKEN_S, 4),
        "leaked_requests": leaked,
        "first_byte_ms_p90": round(first_bytes[len(first_bytes) * 9 // 10], 3),
        "http_us_per_token": round(http_s * 1e6, 1),
        "detokenising_us_per_token": round(text_s * 1e6, 1),
        "left": left,
        "slow_down": crowd.slow_down(duration_s),
        "answers": crowd.num_answers,
        "clients_that_left": crowd.num_left,
        "memory_growth_bytes": after[0] - before[0],
        "descriptors_growth": after[1] - before[1],
        "crowd_s": duration_s,
    }
    finish("api", figures, {"model": "smollm2", "threads": 1, "idle": NUM_IDLE, "leaving": NUM_LEAVING})


@contextlib.contextmanager
def _served() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "smollm2.gguf").symlink_to(smollm2())
        with running(str(Path(folder) / "smollm2.gguf"), models=Path(folder)) as server:
            server.load("smollm2")
            yield server


if __name__ == "__main__":
    main()
