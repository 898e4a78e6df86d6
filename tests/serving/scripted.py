"""A runtime that says what a test tells it to, behind the real HTTP server in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx2

from shoal.ids import ModelHash
from shoal.runtime.agent import Request
from shoal.runtime.engines import Send
from shoal.runtime.messages import (
    Accepted,
    Delta,
    EngineDescription,
    EngineOptions,
    Finished,
    ListModels,
    LoadModel,
    ModelEntry,
    Models,
    Unloaded,
    UnloadModel,
)
from shoal.serving.app import make_app
from shoal.serving.catalogue import Catalogue
from shoal.serving.connection import http_server
from shoal.serving.gate import GateOptions
from shoal.serving.metrics import Metrics
from shoal.serving.service import Service
from shoal.transport.link import listen

Script = Callable[[Request, Send], Awaitable[None]]
ENGINE = EngineDescription(model="m", model_hash=ModelHash("0"), stages=[], context=4096, left_out=[])
FINISHED = Finished(
    reason="stop",
    text="",
    prompt_tokens=1,
    cached_tokens=0,
    token_ids=[1],
    prefill_s=0.0,
    decode_s=0.0,
    stages=[],
    hop_us=[],
)


async def say_one_word(_: Request, send: Send) -> None:
    await send(Accepted(prompt_tokens=1, cached_tokens=0))
    await send(Delta(text="word", token_id=1))
    await send(FINISHED)


class ScriptedRuntime:
    """Has one model, `m`, which is loaded at once; answers are `script`'s."""

    def __init__(self, script: Script = say_one_word) -> None:
        self.script = script
        self.num_ended = 0
        """Answers that came to their end, or were cancelled."""

    async def serve(self, request: Request, send: Send) -> None:
        match request:
            case ListModels():
                await send(Models([ModelEntry("m", "/m.gguf", 1, 0.0)]))
            case LoadModel():
                await send(ENGINE)
            case UnloadModel():
                await send(Unloaded())
            case _:
                try:
                    await self.script(request, send)
                finally:
                    self.num_ended += 1


@contextlib.asynccontextmanager
async def serving(runtime: ScriptedRuntime, gate: GateOptions | None = None) -> AsyncIterator[httpx2.AsyncClient]:
    """The server over `runtime`, and a client of it."""
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    catalogue = Catalogue(runtime, ["m"], options=EngineOptions())
    await catalogue.start()
    try:
        while catalogue.loading_state() is not None:
            await asyncio.sleep(0)
        app = make_app(Service(catalogue, Metrics()), gate or GateOptions())
        url = f"http://127.0.0.1:{port}"
        async with http_server(app, listener), httpx2.AsyncClient(base_url=url, timeout=20.0) as client:
            yield client
    finally:
        await catalogue.close()
