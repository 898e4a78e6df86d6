"""Events and time: keep-alives, failures before and after the headers, clients that say or read nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Message

from shoal.errors import WorkerLost
from shoal.runtime import errors_by_name
from shoal.runtime.agent import Request
from shoal.runtime.engines import Send
from shoal.runtime.messages import Accepted, Delta, Progress
from shoal.serving import app, connection, events
from shoal.serving.gate import GateOptions
from tests.serving.scripted import FINISHED, ScriptedRuntime, say_one_word, serving

pytestmark = pytest.mark.slow
ASKED = {"model": "m", "prompt": "a", "stream": True}


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20.0))


def test_comments_keep_a_stream_alive_and_say_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE_S", 0.05)

    async def slow(_: Request, send: Send) -> None:
        await asyncio.sleep(0.2)
        await send(Progress("reading the prompt", 3, 7))
        await asyncio.sleep(0.2)
        await send(Delta(text="word", token_id=1))
        await send(FINISHED)

    async def scenario() -> None:
        async with serving(ScriptedRuntime(slow)) as client:
            text = (await client.post("/v1/completions", json=ASKED)).text
        comments = [line for line in text.splitlines() if line.startswith(":")]
        assert comments.count(": waiting") >= 2
        assert comments.count(": reading the prompt 3/7") >= 2
        assert text.endswith("data: [DONE]\n\n")

    play(scenario)


def test_a_failure_before_the_headers_is_a_status_and_after_them_an_event() -> None:
    lost = errors_by_name.failure(WorkerLost("device a is gone"))

    async def early(_: Request, send: Send) -> None:
        await send(lost)

    async def late(_: Request, send: Send) -> None:
        await send(Accepted(prompt_tokens=1, cached_tokens=0))
        await send(Delta(text="word", token_id=1))
        await asyncio.sleep(0.05)
        await send(lost)

    async def scenario() -> None:
        async with serving(ScriptedRuntime(early)) as client:
            reply = await client.post("/v1/completions", json=ASKED)
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
            assert reply.json()["error"]["message"] == "device a is gone"
        async with serving(ScriptedRuntime(late)) as client:
            reply = await client.post("/v1/completions", json=ASKED)
            assert reply.status_code == 200
            last = reply.text.strip().split("\n\n")[-1]
            assert last.startswith('data: {"error":{"message":"device a is gone"')
            whole = await client.post("/v1/completions", json={**ASKED, "stream": False})
            assert whole.status_code == 503

    play(scenario)


def test_a_fault_of_ours_is_500_and_tells_no_secrets(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(_request: Request, _send: Send) -> None:
        raise KeyError("secret")

    async def scenario() -> None:
        async with serving(ScriptedRuntime(broken)) as client:
            for stream in (True, False):
                reply = await client.post("/v1/completions", json={**ASKED, "stream": stream})
                assert reply.status_code == 500
                assert "secret" not in reply.text
                assert reply.json()["error"]["type"] == "server_error"

    play(scenario)
    assert "secret" in caplog.text, "whoever runs the server sees all of it"


def test_a_reader_that_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "BUFFER_BYTES_MAX", 200_000)

    async def flood(_: Request, send: Send) -> None:
        for _index in range(100_000):
            await send(Delta(text="word " * 200, token_id=1))
            await asyncio.sleep(0)

    async def scenario() -> None:
        runtime = ScriptedRuntime(flood)
        async with serving(runtime) as client:
            async with client.stream("POST", "/v1/completions", json=ASKED):
                while not runtime.num_ended:
                    await asyncio.sleep(0.01)
            # The next one finds a ring that is free.
            runtime.script = say_one_word
            assert (await client.post("/v1/completions", json={**ASKED, "stream": False})).status_code == 200

    play(scenario)


@pytest.mark.parametrize("num_words", [7_000, 1_000_000], ids=["all of it written", "more to come"])
def test_a_reader_that_stops_reading_is_cut_off_in_time(monkeypatch: pytest.MonkeyPatch, num_words: int) -> None:
    monkeypatch.setattr(connection, "READ_TIMEOUT_S", 0.2)
    monkeypatch.setattr(events, "BUFFER_BYTES_MAX", 1 << 40)

    async def flood(_: Request, send: Send) -> None:
        for index in range(num_words):
            await send(Delta(text="word " * 200, token_id=1))
            if index >= 7_000:
                await asyncio.sleep(0.01)
        await send(FINISHED)

    async def scenario() -> None:
        runtime = ScriptedRuntime(flood)
        async with serving(runtime) as client:
            reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port, limit=1024)
            writer.write(_request(b'{"model":"m","prompt":"a","stream":true}'))
            await asyncio.sleep(1.0)
            assert runtime.num_ended == 1
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while chunk := await reader.read(1 << 20):
                    received += chunk
            assert b"[DONE]" not in received
            writer.close()

    play(scenario)


def test_a_reader_that_is_slow_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "READ_TIMEOUT_S", 0.2)

    async def flood(_: Request, send: Send) -> None:
        for _index in range(6_000):
            await send(Delta(text="word " * 200, token_id=1))
        await send(FINISHED)

    async def scenario() -> None:
        async with serving(ScriptedRuntime(flood)) as client:
            reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port, limit=1 << 16)
            writer.write(_request(b'{"model":"m","prompt":"a","stream":true}'))
            received = b""
            while b"[DONE]" not in received[-64:]:
                received += await reader.read(1 << 20)
                await asyncio.sleep(0.01)
            assert received.count(b"data: {") == 6_001
            writer.close()

    play(scenario)


def _request(body: bytes) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize("opening", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: "])
def test_a_connection_that_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch, opening: bytes) -> None:
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 0.2)

    async def scenario() -> None:
        async with serving(ScriptedRuntime()) as client:
            reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
            writer.write(opening)
            assert await asyncio.wait_for(reader.read(), 2.0) == b""
            writer.close()

    play(scenario)


def test_headers_that_trickle_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 0.3)

    async def scenario() -> None:
        async with serving(ScriptedRuntime()) as client:
            reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
            ended = asyncio.create_task(reader.read())
            for letter in b"GET /health HTTP/1.1\r\n" + b"x" * 100:
                if ended.done():
                    break
                writer.write(bytes([letter]))
                await asyncio.sleep(0.02)
            assert ended.done()
            writer.close()
            await asyncio.gather(ended, return_exceptions=True)

    play(scenario)


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_TIMEOUT_S", 0.2)

    async def scenario() -> None:
        async with serving(ScriptedRuntime()) as client:
            reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
            writer.write(_request(b"{" * 50)[:-49])
            reply = await asyncio.wait_for(reader.read(), 2.0)
            assert reply.startswith(b"HTTP/1.1 408")
            assert b'"error"' in reply
            writer.close()

    play(scenario)


def test_headers_that_are_too_long_or_no_http_are_refused() -> None:
    async def scenario() -> None:
        async with serving(ScriptedRuntime()) as client:
            for opening in (b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000, b"\x16\x03\x01 hello\r\n\r\n"):
                reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
                writer.write(opening)
                reply = await asyncio.wait_for(reader.read(), 2.0)
                assert reply.startswith(b"HTTP/1.1 400")
                assert b'{"error":{"message":' in reply
                writer.close()

    play(scenario)


@pytest.mark.parametrize(
    ("origins", "allowed"),
    [([], None), (["http://a.example"], "http://a.example"), (["*"], "*")],
    ids=["none", "one", "all"],
)
def test_web_pages_are_let_in_only_where_asked_for(origins: list[str], allowed: str | None) -> None:
    async def scenario() -> None:
        async with serving(ScriptedRuntime(), GateOptions(origins=origins)) as client:
            asked = {**ASKED, "stream": False}
            reply = await client.post("/v1/completions", json=asked, headers={"origin": "http://a.example"})
            assert reply.status_code == (200 if allowed else 403)
            assert reply.headers.get("access-control-allow-origin") == allowed
            before = await client.options(
                "/v1/completions",
                headers={"origin": "http://a.example", "access-control-request-method": "POST", "host": "localhost"},
            )
            assert before.headers.get("access-control-allow-origin") == allowed
            other = await client.post("/v1/completions", json=asked, headers={"origin": "http://b.example"})
            assert other.status_code == (200 if allowed == "*" else 403)
            own = str(client.base_url).rstrip("/")
            assert (await client.post("/v1/completions", json=asked, headers={"origin": own})).status_code == 200

    play(scenario)


def test_events_keep_their_order_on_the_short_way_and_through_the_buffer() -> None:
    """The connection takes what is written at once in some moments and not in others, as one with a full socket does."""

    async def scenario() -> None:
        received: list[bytes] = []
        is_open = True

        def write(data: bytes) -> bool:
            if is_open:
                received.append(data)
            return is_open

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body" and message["body"]:
                await asyncio.sleep(0.001)
                received.append(message["body"])

        async def produce(outbox: events.Outbox) -> None:
            nonlocal is_open
            for number in range(300):
                is_open = number % 7 < 4
                outbox.put(b"%d" % number)
                if number % 5 == 0:
                    await asyncio.sleep(0.002)

        async def receive() -> Message:
            return await asyncio.Future()

        stream = events.EventStream(produce, report=lambda _: None)
        await stream({"type": "http", "state": {connection.WRITE_CHUNK: write}}, receive, send)
        said = b"".join(received)
        assert said == b"".join(b"data: %d\n\n" % number for number in range(300)) + b"data: [DONE]\n\n"
        assert len(received) > 60, "some went the short way"

    play(scenario)
