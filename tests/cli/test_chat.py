"""The chat as a user types it, in a terminal of its own."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="needs a pseudo-terminal, which this system has not")

pytestmark = pytest.mark.slow
TinyModel = Callable[[str, str], Path]


class Terminal:
    """What a program writes, read up to a text; what follows is kept for the next reading."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unread = ""

    def read_until(self, text: str, *, timeout_s: float = 20.0) -> str:
        give_up_s = time.monotonic() + timeout_s
        while text not in self._unread:
            assert time.monotonic() < give_up_s, f"'{text}' did not come, but: {self._unread!r}"
            if select.select([self._descriptor], [], [], 0.1)[0]:
                self._unread += os.read(self._descriptor, 4096).decode(errors="replace")
        seen, found, self._unread = self._unread.partition(text)
        return seen + found


def test_a_chat_remembers_is_stopped_and_is_left(tiny_model: TinyModel) -> None:
    model = tiny_model("qwen2", "Q4_K")  # which says 2,000 tokens before it ends
    ours, theirs = pty.openpty()
    arguments = ["run", str(model), f"--models={model.parent}", "--temperature=0", "--threads=1", "-v"]
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb", "COLUMNS": "120"},
    )
    os.close(theirs)
    terminal = Terminal(ours)
    try:
        terminal.read_until("> ")
        os.write(ours, b"hello\n")
        # A model of noise talks until the context is full, so it is interrupted; text follows where the status line ends.
        terminal.read_until("loading layers")
        terminal.read_until("\x1b[2K")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert "tokens/s" not in terminal.read_until("\n> "), "answered to its end, not stopped"
        time.sleep(0.5)  # readline notices a signal only once it waits
        process.send_signal(signal.SIGINT)
        terminal.read_until("Ctrl-D leaves")
        terminal.read_until("> ")
        os.write(ours, b"/clear\n")
        terminal.read_until("> ")
        os.write(ours, b"\x04")
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
