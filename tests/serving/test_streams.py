"""Clients that leave, that do not read, and devices that are lost, while an answer is on its way."""

from __future__ import annotations

import functools
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.serving.server import Server, figure, running, wait_until

pytestmark = pytest.mark.slow
LONG: dict[str, Any] = {"model": "plain", "prompt": "The sea", "max_tokens": 2000, "ignore_eos": True, "temperature": 0.0}


@pytest.fixture(scope="module")
def one(served_models: Path, cache: Path) -> Iterator[Server]:
    """A server with one model and one worker, whose work can be watched."""
    with running(str(served_models / "plain.gguf"), "--queue=3", models=served_models, cache=cache) as server:
        server.load("plain")
        yield server


@pytest.fixture(autouse=True)
def nothing_stays_behind(one: Server) -> Iterator[None]:
    """A test leaves the ring quiet: nobody is answered or waits, no worker computes, no connection is open."""
    connections = psutil.Process(one.process.pid).net_connections("tcp")
    yield
    wait_until(one.is_quiet, within_s=5.0)
    wait_until(lambda: not is_computing(one), within_s=5.0)
    left = psutil.Process(one.process.pid).net_connections("tcp")
    assert sum(c.status == psutil.CONN_ESTABLISHED for c in left) <= sum(
        c.status == psutil.CONN_ESTABLISHED for c in connections
    )


def is_computing(server: Server) -> bool:
    def spent() -> float:
        return sum(sum(worker.cpu_times()[:2]) for worker in server.workers())

    before = spent()
    time.sleep(0.15)
    return spent() - before > 0.05


def opened(server: Server, path: str, body: dict[str, Any], *, receive_bytes: int | None = None) -> socket.socket:
    """A connection on which a request has been sent and nothing has been read."""
    raw = socket.socket()
    if receive_bytes is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    raw.settimeout(30.0)
    raw.connect(server.address)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    raw.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return raw


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("moment", ["at once", "while the prompt is read", "in the answer"])
def test_a_client_that_leaves_frees_the_ring(one: Server, stream: bool, moment: str) -> None:
    body = {**LONG, "stream": stream}
    if moment == "while the prompt is read":
        body |= {"prompt": "word " * 900, "max_tokens": 200}
    cancelled = one.figure("shoal:request_failures_total", cause="cancelled")
    raw = opened(one, "/v1/completions", body)
    if moment == "in the answer" and stream:
        assert raw.recv(4096).startswith(b"HTTP/1.1 200")
    elif moment != "at once":
        wait_until(lambda: one.figure("vllm:num_requests_running") == 1, within_s=5.0)
        time.sleep(0.05 if moment == "while the prompt is read" else 0.3)
    raw.close()
    left_s = time.monotonic()
    wait_until(one.is_quiet, within_s=2.0)
    assert not is_computing(one)
    assert time.monotonic() - left_s < 2.0
    if moment != "at once":
        assert one.figure("shoal:request_failures_total", cause="cancelled") == cancelled + 1
    with one.openai() as client:
        assert client.completions.create(model="plain", prompt="The sea", max_tokens=2).usage is not None


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_the_line_is_forgotten(one: Server, stream: bool) -> None:
    first = opened(one, "/v1/completions", {**LONG, "stream": True})
    wait_until(lambda: one.figure("vllm:num_requests_running") == 1, within_s=5.0)
    second = opened(one, "/v1/completions", {**LONG, "stream": stream})
    wait_until(lambda: one.figure("vllm:num_requests_waiting") == 1, within_s=5.0)
    second.close()
    wait_until(lambda: one.figure("vllm:num_requests_waiting") == 0, within_s=1.0)
    assert one.figure("vllm:num_requests_running") == 1
    first.close()


def test_a_client_of_openais_library_that_breaks_off(one: Server) -> None:
    with one.openai() as client:
        stream = client.completions.create(model="plain", prompt="The sea", max_tokens=2000, stream=True)
        next(iter(stream))
        stream.close()
    wait_until(one.is_quiet, within_s=2.0)


def test_a_client_that_does_not_read_holds_nobody_up(one: Server) -> None:
    body = {**LONG, "stream": True, "logprobs": 20, "max_tokens": 1500}
    done = one.figure("vllm:request_success_total")
    slow = opened(one, "/v1/completions", body, receive_bytes=4096)
    wait_until(lambda: one.figure("vllm:request_success_total") == done + 1, within_s=20.0)
    with one.openai() as client:
        started_s = time.monotonic()
        client.completions.create(model="plain", prompt="Another", max_tokens=2)
        assert time.monotonic() - started_s < 1.0
    received = bytearray()
    while b"data: [DONE]\n\n" not in received[-64:]:
        chunk = slow.recv(1 << 20)
        assert chunk, "the whole answer was kept for it"
        received += chunk
    slow.close()
    assert len(received) > 1 << 20
    assert received.count(b"data: {") >= 1000


def _counts(server: Server, name: str, number: int) -> bool:
    return server.figure(f"vllm:num_requests_{name}") == number


def test_requests_are_answered_in_their_order_and_too_many_are_sent_away(one: Server) -> None:
    order: list[int] = []

    def ask(index: int) -> None:
        with one.openai() as client:
            client.completions.create(
                model="plain", prompt=f"Number {index}", max_tokens=200, extra_body={"ignore_eos": True}
            )
            order.append(index)

    first = opened(one, "/v1/completions", {**LONG, "n": 8})
    wait_until(functools.partial(_counts, one, "running", 1), within_s=5.0)
    threads = []
    for index in range(3):
        threads.append(threading.Thread(target=ask, args=(index,)))
        threads[-1].start()
        wait_until(functools.partial(_counts, one, "waiting", index + 1), within_s=5.0)
    with one.openai() as client, pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="plain", prompt="One too many", max_tokens=2)
    assert caught.value.code == "queue_full"
    assert caught.value.type == "rate_limit_error"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    first.close()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2]


def test_a_prompt_tells_how_far_it_is_read(one: Server) -> None:
    body = {"model": "plain", "messages": [{"role": "user", "content": "word " * 1000}], "max_tokens": 2, "stream": True}
    with one.http() as http:
        text = http.post("/v1/chat/completions", json=body).text
    comments = [line for line in text.splitlines() if line.startswith(":")]
    steps = [line.rsplit(" ", 1)[1].split("/") for line in comments if line.startswith(": reading the prompt")]
    assert len(steps) >= 2
    done = [int(step[0]) for step in steps]
    assert done == sorted(done)
    assert done[-1] == int(steps[-1][1])


def busy_worker(server: Server) -> psutil.Process:
    """The one that computes, of those with a model and those with texts only."""
    before = {worker: sum(worker.cpu_times()[:2]) for worker in server.workers()}
    time.sleep(0.1)
    return max(before, key=lambda worker: sum(worker.cpu_times()[:2]) - before[worker])


def test_a_lost_worker_is_an_error_event_and_the_next_request_works(one: Server) -> None:
    with one.openai() as client:
        stream = client.completions.create(
            model="plain", prompt="The sea", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        busy_worker(one).send_signal(signal.SIGKILL)
        with pytest.raises(openai.APIError, match="cut off") as caught:
            list(stream)
        assert caught.value.code == "device_lost"
        wait_until(one.is_quiet, within_s=2.0)
        answer = client.with_options(max_retries=5).completions.create(model="plain", prompt="The sea", max_tokens=2)
        assert answer.usage is not None
    raw = opened(one, "/v1/completions", {**LONG, "stream": True})
    received = raw.recv(65536)
    busy_worker(one).send_signal(signal.SIGKILL)
    while chunk := raw.recv(65536):
        received += chunk
        if b'"error"' in received or b"[DONE]" in received:
            break
    raw.close()
    assert received.count(b"HTTP/1.1 200") == 1
    assert b'data: {"error":{"message":' in received
    assert b"[DONE]" not in received
    one.load("plain")


def test_a_worker_lost_before_anything_was_sent_is_a_plain_error(one: Server) -> None:
    raw = opened(one, "/v1/completions", {**LONG, "stream": False})
    wait_until(lambda: one.figure("vllm:num_requests_running") == 1, within_s=5.0)
    busy_worker(one).send_signal(signal.SIGKILL)
    received = raw.recv(65536)
    raw.close()
    assert received.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 1" in received
    one.load("plain")


def test_the_figures_of_answers(one: Server) -> None:
    with one.http() as http:
        before = http.get("/metrics").text
        http.post("/v1/completions", json={**LONG, "prompt": "one two three " * 20, "max_tokens": 5})
        http.post("/v1/completions", json={**LONG, "prompt": "one two three " * 20, "max_tokens": 5})
        reply = http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    after = reply.text

    def more(name: str, **labels: str) -> float:
        return figure(after, name, **labels) - figure(before, name, **labels)

    assert more("vllm:generation_tokens_total", model_name="plain") == 10
    assert more("vllm:request_success_total", finished_reason="length") == 2
    prompt = more("vllm:prompt_tokens_total")
    assert prompt > 40
    assert more("vllm:prefix_cache_queries_total") == prompt
    assert prompt / 2 - 40 < more("vllm:prefix_cache_hits_total") < prompt / 2
    for name in (
        "time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens",
    ):  # fmt: skip
        assert more(f"vllm:{name}_count") == 2, name
    assert more("vllm:inter_token_latency_seconds_count") == 8
    assert 0 < figure(after, "vllm:kv_cache_usage_perc") <= 1
    assert "vllm:num_preemptions_total" in after or "vllm:num_preemptions" in after
    assert figure(after, "shoal:stage_compute_seconds") > 0
    assert figure(after, "shoal:stage_layers") == 3
    assert figure(after, "shoal:model_loaded", model_name="plain") == 1
