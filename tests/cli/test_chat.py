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


def read_until(terminal: int, text: str, *, timeout_s: float = 20.0) -> str:
    seen, give_up_s = "", time.monotonic() + timeout_s
    while text not in seen:
        assert time.monotonic() < give_up_s, f"'{text}' did not come, but: {seen!r}"
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


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
    try:
        read_until(ours, "> ")
        os.write(ours, b"hello\n")
        # A model of noise talks until the context is full, so it is interrupted.
        read_until(ours, "loading layers")
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        read_until(ours, "> ")
        os.write(ours, b"/clear\n")
        read_until(ours, "> ")
        os.write(ours, b"\x04")
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
