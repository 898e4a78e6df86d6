"""Tells this device's agent how fast others' bytes come to a run: its process is another than the agent's.

What came within a second from a device goes over the owner's link as one measurement; it is the receiver's own, so the agent
takes it as it would a probe's. A run does not wait for it, nor fail for it: where no agent runs, nobody is told.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

import msgspec

from shoal.errors import ShoalError
from shoal.ids import NodeId
from shoal.runs.trust import device_of
from shoal.runtime.node.owner import Done, OwnerLink, TellReceived
from shoal.runtime.node.state import runs_from

TELL_EVERY_S = 1.0
_AGAIN_S = 30.0
"""After the agent did not answer."""
_ANSWER_S = 5.0


class _Sum(msgspec.Struct):
    num_bytes: int = 0
    seconds: float = 0.0


class LinkNews:
    """From any thread; its own does the telling.

    Args:
        folder: the agent's state folder.
        device: this one; what its own members send each other goes over no link.
    """

    def __init__(self, folder: Path, device: NodeId, *, tell_every_s: float = TELL_EVERY_S) -> None:
        self._folder, self._device, self._tell_every_s = folder, device, tell_every_s
        self._lock = threading.Lock()
        self._sums: dict[tuple[NodeId, bool], _Sum] = {}
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="link-news", daemon=True)
        self._thread.start()

    def observe(self, peer: NodeId, num_bytes: int, seconds: float, is_full: bool) -> None:
        """`num_bytes` came from a member of the run in `seconds`; `is_full`: the link was the limit."""
        source = device_of(peer)
        if source == self._device or num_bytes <= 0 or seconds <= 0.0:
            return
        with self._lock:
            found = self._sums.setdefault((source, is_full), _Sum())
            found.num_bytes += num_bytes
            found.seconds += seconds

    def close(self) -> None:
        self._has_ended.set()
        self._thread.join(_ANSWER_S)

    def _run(self) -> None:
        wait_s = self._tell_every_s
        while not self._has_ended.wait(wait_s):
            wait_s = self._tell_every_s
            if not runs_from(self._folder):
                self._take()
                continue
            with suppress(ShoalError, OSError), OwnerLink(self._folder, timeout_s=_ANSWER_S) as owner:
                self._tell(owner)
            wait_s = _AGAIN_S

    def _tell(self, owner: OwnerLink) -> None:
        """As long as the agent answers. Raises ShoalError."""
        while True:
            for news in self._take():
                owner.ask(news, Done)
            if self._has_ended.wait(self._tell_every_s):
                return

    def _take(self) -> list[TellReceived]:
        with self._lock:
            sums, self._sums = self._sums, {}
        return [TellReceived(source, s.num_bytes, s.seconds, is_full) for (source, is_full), s in sums.items()]
