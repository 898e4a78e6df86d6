"""Which runs this device is in: a small file per member, for `shoal runs` and `shoal leave`.

Their owner alone can read them. A file whose process is gone is removed by whoever finds it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import msgspec
import platformdirs
import psutil

from shoal.errors import ShoalError
from shoal.ids import NodeId
from shoal.runs.port import Hello, dial, receive_message, send_message
from shoal.runs.trust import Trust

ASK_S = 3.0


class Entry(msgspec.Struct, frozen=True):
    run: str
    node: NodeId
    address: str
    pid: int
    began_s: float
    """When the process began, so that another one with its number is not taken for it."""
    trust: str | None = None
    """The file that says what its links prove (`Trust.read`); None: nothing."""


def folder() -> Path:
    return Path(os.environ.get("SHOAL_STATE") or platformdirs.user_state_dir("shoal")) / "runs"


class Registered:
    """This process's membership, listed until `close`."""

    def __init__(self, run: str, node: NodeId, address: str, *, trust: str | None = None) -> None:
        entry = Entry(run, node, address, os.getpid(), psutil.Process().create_time(), trust)
        self._path = folder() / f"{node}.json"
        with contextlib.suppress(OSError):  # a run does not fail for not being listed
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._path.write_bytes(msgspec.json.encode(entry))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def entries() -> list[Entry]:
    """All members on this device whose process lives."""
    found = []
    for path in sorted(folder().glob("*.json")) if folder().is_dir() else []:
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            entry = msgspec.json.decode(path.read_bytes(), type=Entry)
            if _is_alive(entry):
                found.append(entry)
            else:
                path.unlink(missing_ok=True)
    return found


def _is_alive(entry: Entry) -> bool:
    try:
        return abs(psutil.Process(entry.pid).create_time() - entry.began_s) < 2.0
    except psutil.Error:
        return False


def ask(entry: Entry, question: str) -> dict[str, Any] | None:
    """Asks a member "status", or to "leave"; what it says of itself, None if it does not answer."""
    try:
        trust = Trust.read(Path(entry.trust)) if entry.trust is not None else None
        sock = dial(entry.address, Hello(entry.run, "ask", entry.node), trust=trust, node=entry.node, timeout_s=ASK_S)
    except ShoalError:
        return None
    try:
        sock.settimeout(ASK_S)
        send_message(sock, question.encode())
        return msgspec.json.decode(receive_message(sock), type=dict[str, Any])
    except (ShoalError, msgspec.MsgspecError):
        return None
    finally:
        sock.close()
