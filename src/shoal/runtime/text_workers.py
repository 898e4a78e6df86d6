"""Workers without weights, one per model that is asked about its texts; they end when nobody has asked for a while."""

from __future__ import annotations

import asyncio
from pathlib import Path

from shoal.errors import WorkerLost
from shoal.runtime.messages import ApplyTemplate, Detokenize, Message, OpenTexts, TextsReady, Tokenize
from shoal.runtime.worker_process import WorkerProcess

KEEP_S = 120.0
OPEN_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 60.0
"""A template comes from a stranger and may loop for long: then its process ends, and nothing else."""
_WORKERS_MAX = 4


class _Entry:
    """One model's worker, started on first use."""

    def __init__(self) -> None:
        self.worker: WorkerProcess | None = None
        self.turn = asyncio.Lock()
        self.closing: asyncio.TimerHandle | None = None


class TextWorkers:
    """Answers questions about texts, by model file."""

    def __init__(self) -> None:
        self._entries: dict[Path, _Entry] = {}
        self._ending: set[asyncio.Task[None]] = set()

    async def ask(self, path: Path, request: Tokenize | Detokenize | ApplyTemplate) -> Message:
        """The worker's answer, `Failed` included; one question per model at a time, in order.

        Raises:
            ModelError: the file cannot be opened.
            WorkerLost: the worker ended or took too long; the next question starts another.
        """
        while True:
            while path not in self._entries and len(self._entries) >= _WORKERS_MAX:
                self._let_go(next(iter(self._entries)))
            entry = self._entries.setdefault(path, _Entry())
            async with entry.turn:
                if self._entries.get(path) is entry:  # else it was let go of while we waited
                    return await self._ask(path, entry, request)

    async def _ask(self, path: Path, entry: _Entry, request: Message) -> Message:
        if entry.closing is not None:
            entry.closing.cancel()
        try:
            if entry.worker is None:
                entry.worker = await WorkerProcess.start()
                await entry.worker.send(OpenTexts(str(path)))
                await entry.worker.expect(TextsReady, timeout_s=OPEN_TIMEOUT_S)
            await entry.worker.send(request)
            answer = await asyncio.wait_for(entry.worker.receive(), ANSWER_TIMEOUT_S)
        except TimeoutError:
            self._let_go(path)
            raise WorkerLost(f"no answer about the texts of {path.name} within {ANSWER_TIMEOUT_S:.0f} s") from None
        except BaseException:
            # Whoever leaves in the middle leaves an answer on the line: a new worker is simpler than reading it.
            self._let_go(path)
            raise
        entry.closing = asyncio.get_running_loop().call_later(KEEP_S, self._let_go, path)
        return answer

    async def close(self) -> None:
        """Ends all of them."""
        for path in list(self._entries):
            self._let_go(path)
        await asyncio.gather(*self._ending)

    def _let_go(self, path: Path) -> None:
        entry = self._entries.pop(path, None)
        if entry is None:
            return
        if entry.closing is not None:
            entry.closing.cancel()
        if entry.worker is not None:
            task = asyncio.get_running_loop().create_task(entry.worker.stop())
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
