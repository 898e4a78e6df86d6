"""Who a process is, beyond a number that is used again: its id and when it started."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import msgspec

_POLL_S = 0.01


class ProcessIdentity(msgspec.Struct, frozen=True):
    """`start_ticks` is the kernel's start time of the process, in clock ticks since boot."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """None where there is no such process, or it has ended and only waits to be reaped."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        # The name in parentheses may contain anything, so fields are counted from its end.
        fields = text.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    def is_running(self) -> bool:
        return ProcessIdentity.of(self.pid) == self

    def send(self, number: signal.Signals) -> bool:
        """Signals this process and never a later one with its number. Returns whether it was there."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            # The descriptor stands for the process that has the number now; only then is it compared.
            if not self.is_running():
                return False
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)
            return True
        finally:
            os.close(descriptor)


def wait_ended(processes: list[ProcessIdentity], *, timeout_s: float) -> list[ProcessIdentity]:
    """Waits for processes to end; returns those that have not."""
    give_up_s = time.monotonic() + timeout_s
    while (left := [process for process in processes if process.is_running()]) and time.monotonic() < give_up_s:
        time.sleep(_POLL_S)
    return left


def boot_id() -> str:
    """Changes with every start of the machine; '' where it cannot be known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
