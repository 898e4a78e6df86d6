"""Decides which models may be asked, when each is in memory, and whose turn it is.

A model is loaded when it is first asked for; whoever asks meanwhile is told how long it will take, and comes again.
It is unloaded when nobody has asked for a while, or when another model needs its memory. Requests to one model wait in
line, first come, first served; when the line is full, the next one is sent away.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from shoal.errors import InfeasiblePlacement, ModelNotFound, ShoalError
from shoal.runtime import errors_by_name
from shoal.runtime.agent import Request
from shoal.runtime.engines import Send
from shoal.runtime.messages import (
    EngineDescription,
    EngineOptions,
    Failed,
    ListModels,
    LoadModel,
    Message,
    ModelEntry,
    Models,
    Progress,
    UnloadModel,
)
from shoal.serving.failures import ApiError
from shoal.serving.replies import LoadingState, ModelCard

KEEP_ALIVE_S = 300.0
_SWEEP_S = 1.0
_LISTING_S = 2.0
_LOAD_SECONDS = 2.0
_LOAD_BYTES_PER_S = 400e6
_RETRY_MAX_S = 60.0


class Runtime(Protocol):
    """What answers: an agent in this process, or one that is reached over a connection."""

    async def serve(self, request: Request, send: Send) -> None:
        """Answers by calling `send`; failures are `Failed`. Cancelling it stops the answer."""


async def ask(runtime: Runtime, request: Request, listen: Callable[[Message], None] = lambda _: None) -> Message:
    """The last message of an answer; `listen` hears all of them, each as it comes.

    Raises:
        ShoalError: what the runtime reported.
    """
    last: Message | None = None

    async def send(message: Message) -> None:
        nonlocal last
        if isinstance(message, Failed):
            raise errors_by_name.revive(message)
        last = message
        listen(message)

    await runtime.serve(request, send)
    if last is None:
        raise ShoalError("the answer ended before it began")
    return last


class ServedModel:
    """One model, and who waits for it."""

    def __init__(self, entry: ModelEntry, *, keep_alive_s: float | None) -> None:
        self.id = entry.name
        self.entry = entry
        self.keep_alive_s = keep_alive_s
        """None stays loaded."""
        self.description: EngineDescription | None = None
        self.num_waiting = 0
        self.num_running = 0
        self.last_used_s = time.monotonic()
        self.request_s = 5.0
        """How long a request takes, a running average."""
        self.turn = asyncio.Lock()
        self.loading: asyncio.Task[None] | None = None
        self.load_failure: Exception | None = None
        self.load_progress = "starting"
        self.load_started_s = 0.0
        self.load_takes_s = _LOAD_SECONDS + entry.num_bytes / _LOAD_BYTES_PER_S

    @property
    def state(self) -> Literal["unloaded", "loading", "ready"]:
        if self.loading is not None:
            return "loading"
        return "ready" if self.description is not None else "unloaded"

    @property
    def is_idle(self) -> bool:
        return not self.num_waiting and not self.num_running and self.loading is None

    def card(self) -> ModelCard:
        context = self.description.context if self.description is not None else None
        return ModelCard(
            id=self.id,
            created=int(self.entry.modified_s),
            state=self.state,
            max_model_len=context,
            context_length=context,
        )

    def loading_state(self) -> LoadingState:
        elapsed_s = time.monotonic() - self.load_started_s
        # Past the guess, a load is taken to be half done.
        eta_s = self.load_takes_s - elapsed_s if elapsed_s < self.load_takes_s else elapsed_s / 2
        return LoadingState(self.id, self.load_progress, round(elapsed_s, 1), round(min(max(eta_s, 0.5), _RETRY_MAX_S), 1))


class Catalogue:
    """All models, by the name that clients use.

    Args:
        names: models to serve, as `Generate.model` takes them; none serves every model that the agent finds.
        options: of every engine.
        keep_alive_s: unload after that long without a request; None leaves those named in memory, others for 300 s.
        queue_max: requests that may wait for one model.
    """

    def __init__(
        self,
        runtime: Runtime,
        names: Sequence[str],
        *,
        options: EngineOptions,
        keep_alive_s: float | None = None,
        queue_max: int = 256,
    ) -> None:
        self.runtime = runtime
        self._names = list(names)
        self._options = options
        self._keep_alive_s = keep_alive_s
        self._queue_max = queue_max
        self._models: dict[str, ServedModel] = {}
        self._aliases: dict[str, str] = {}
        self._listed_s = -_LISTING_S
        self._sweeper: asyncio.Task[None] | None = None
        self._evicting = asyncio.Lock()
        self.num_loads = 0

    async def start(self) -> None:
        """Finds the models that were named, and begins to load them.

        Raises:
            ModelNotFound: names one that is not there.
        """
        await self._list()
        self._sweeper = asyncio.create_task(self._sweep())
        for model in self.models:
            if self._names:
                self._begin(model)

    async def close(self) -> None:
        tasks = [model.loading for model in self.models if model.loading is not None]
        tasks += [self._sweeper] if self._sweeper is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def models(self) -> list[ServedModel]:
        return list(self._models.values())

    @property
    def options(self) -> EngineOptions:
        return self._options

    async def refresh(self) -> None:
        """Looks for new files, where every model is served."""
        if not self._names and time.monotonic() - self._listed_s > _LISTING_S:
            await self._list()

    async def find(self, name: str | None, *, param: str | None = "model") -> ServedModel:
        """The model of that name; without a name the only one there is.

        Raises:
            ApiError: 404, or 400 where a name is needed.
        """
        if name is not None and self._aliases.get(name, name) not in self._models:
            await self.refresh()
        if name is None:
            if len(self._models) != 1:
                raise ApiError(400, "model: say which, there is more than one", param="model")
            return next(iter(self._models.values()))
        model = self._models.get(self._aliases.get(name, name))
        if model is None:
            known = ", ".join(list(self._models)[:8]) or "none"
            raise ApiError(
                404, f"The model '{name}' does not exist here; there are: {known}", param=param, code="model_not_found"
            )
        return model

    def loading_state(self) -> LoadingState | None:
        """The first model named at the start that is not in memory for the first time yet, or None where all are."""
        for model in self.models:
            if self._names and model.loading is not None and model.description is None:
                return model.loading_state()
        return None

    def require_ready(self, model: ServedModel) -> EngineDescription:
        """The model's engine; begins to load it where there is none.

        Raises:
            ApiError: 503 with `Retry-After` while it loads; or why the load that somebody waited for failed, once.
        """
        if model.description is not None:
            return model.description
        if model.load_failure is not None:
            failure, model.load_failure = model.load_failure, None
            raise failure
        if model.loading is None:
            self._begin(model)
        state = model.loading_state()
        raise ApiError(
            503,
            f"The model '{model.id}' is loading ({state.state}); try again in {state.eta_s:.0f} s",
            code="model_loading",
            retry_after_s=state.eta_s,
            loading=state,
        )

    def check_room(self, model: ServedModel) -> None:
        """Raises ApiError 429 with `Retry-After` where the line is full."""
        if model.num_waiting >= self._queue_max:
            raise ApiError(
                429,
                f"{model.num_waiting} requests wait for '{model.id}' already: try again later",
                code="queue_full",
                retry_after_s=min(model.request_s, _RETRY_MAX_S),
            )

    @contextlib.asynccontextmanager
    async def turn(self, model: ServedModel) -> AsyncIterator[None]:
        """One request's turn with a model; waits in line for it."""
        self.check_room(model)
        model.num_waiting += 1
        try:
            await model.turn.acquire()
        finally:
            model.num_waiting -= 1
        model.num_running += 1
        started_s = time.monotonic()
        try:
            yield
        finally:
            model.turn.release()
            model.num_running -= 1
            model.last_used_s = time.monotonic()
            model.request_s += 0.2 * (model.last_used_s - started_s - model.request_s)

    def touch(self, model: ServedModel, description: EngineDescription) -> None:
        """Notes the engine that answered, which may be a new one after a device was lost."""
        model.description = description

    # ---- loading

    def _begin(self, model: ServedModel) -> None:
        model.load_started_s = time.monotonic()
        model.load_progress = "starting"
        model.loading = asyncio.create_task(self._load(model))

    async def _load(self, model: ServedModel) -> None:
        def listen(message: Message) -> None:
            if isinstance(message, Progress):
                model.load_progress = message.text

        try:
            while True:
                try:
                    # Rather in memory in another's place than from disk beside it.
                    may_stream = not self._idle(but=model)
                    load = LoadModel(model.entry.path, self._options, may_stream=may_stream)
                    last = await ask(self.runtime, load, listen)
                    break
                except InfeasiblePlacement:
                    if not await self._evict_one(but=model):
                        raise
            assert isinstance(last, EngineDescription)
            model.description = last
            model.load_takes_s = time.monotonic() - model.load_started_s
            self.num_loads += 1
        except Exception as error:
            model.load_failure = error
        finally:
            model.loading = None
            model.last_used_s = time.monotonic()

    async def _evict_one(self, *, but: ServedModel) -> bool:
        """Unloads the model that has been idle for longest; whether there was one."""
        async with self._evicting:
            idle = self._idle(but=but)
            if not idle:
                return False
            await self._unload(min(idle, key=lambda other: other.last_used_s))
            return True

    def _idle(self, *, but: ServedModel) -> list[ServedModel]:
        return [other for other in self.models if other is not but and other.is_idle and other.description is not None]

    async def _unload(self, model: ServedModel) -> None:
        model.description = None
        await ask(self.runtime, UnloadModel(model.entry.path, self._options))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            now_s = time.monotonic()
            for model in self.models:
                limit_s = model.keep_alive_s
                if limit_s is None or model.description is None or not model.is_idle:
                    continue
                if now_s - model.last_used_s >= limit_s:
                    with contextlib.suppress(Exception):
                        await self._unload(model)

    # ---- finding

    async def _list(self) -> None:
        listed = await ask(self.runtime, ListModels())
        assert isinstance(listed, Models)
        self._listed_s = time.monotonic()
        keep_alive_s = self._keep_alive_s
        if not self._names:
            found = {entry.name: entry for entry in listed.models}
            for name, entry in found.items():
                if name not in self._models:
                    self._models[name] = ServedModel(
                        entry, keep_alive_s=KEEP_ALIVE_S if keep_alive_s is None else keep_alive_s
                    )
            for name in [name for name, model in self._models.items() if name not in found and model.is_idle]:
                del self._models[name]
            return
        for name in self._names:
            entry = _find(name, listed.models)
            self._models[entry.name] = ServedModel(entry, keep_alive_s=keep_alive_s)
            self._aliases |= {name: entry.name, entry.path: entry.name, Path(entry.path).name: entry.name}


def _find(name: str, entries: Sequence[ModelEntry]) -> ModelEntry:
    """The model that the owner named on the command line; a path need not be in a model folder."""
    path = Path(name).expanduser()
    if path.is_file():
        status = path.stat()
        return ModelEntry(path.stem, str(path.resolve()), status.st_size, status.st_mtime)
    for entry in entries:
        if name in (entry.name, Path(entry.path).name, Path(entry.path).stem):
            return entry
    close = [entry for entry in entries if entry.name.lower().startswith(name.lower())]
    if len(close) == 1:
        # `owner/repo` names the only quantisation that is there.
        return msgspec.structs.replace(close[0])
    raise ModelNotFound(
        f"no model '{name}': there are {', '.join(entry.name for entry in entries) or 'none'}; "
        "give a path, or a folder with --models"
    )
