"""What a device's cores stored: one file that only grows, and what it says.

A write is one `write` of some hundred bytes to the end of the file, so that a promise costs microseconds. The newest value
of each key counts. The file is written anew when what is outlived takes more room than what is not.

    offset  size  field
    0       4     CRC-32 of all that follows
    4       4     bytes of the value
    8       2     bytes of the key
    10      ...   key, value

little endian. What was written survives the end of the process at once, and a power cut some seconds later;
with `is_durable` it is answered for only when it does.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shoal.errors import CannotWrite

_HEAD = struct.Struct("<IIH")
_SLACK_BYTES = 4 << 20
"""The file is written anew once so much of it is outlived."""
_VALUE_BYTES_MAX = 64 << 20
_QUIET_S, _SYNC_AFTER_S_MAX = 1.0, 5.0
"""A sync in the background waits for a moment without writes, but not for ever. While a file is synced, a write to it may
wait for milliseconds, and an acknowledgement with it."""
_LOST_ROSTER = "roster/lost"
"""A key whose value no roster can read: so the roster's core learns that statements may be missing."""


class Disk:
    """The values of one device.

    Args:
        path: the file; made if it is not there.
        is_durable: whether `store` answers only when the value would survive a power cut. That takes a disk's time.

    Raises:
        CannotWrite: no such folder, no permission, no room.
    """

    def __init__(self, path: Path, *, is_durable: bool = False) -> None:
        self.path = path
        self.is_durable = is_durable
        self.values: dict[str, bytes] = {}
        self.problem = ""
        """One line where something that had been written could not be read."""
        self._live_bytes = self._bytes = 0
        self._waiting: list[Callable[[], None]] = []
        self._to_sync = threading.Condition()
        self._is_dirty = self._is_closed = False
        self._num_writes = 0
        self._load()
        try:
            self._write_anew()
        except OSError as error:
            raise CannotWrite(f"{path} cannot be written: {error.strerror or error}") from error
        self._syncing = threading.Thread(target=self._sync_for_ever, name="agent-sync", daemon=True)
        self._syncing.start()

    def store(self, key: str, value: bytes, done: Callable[[], None]) -> None:
        """Writes, and calls `done` when the value is as safe as was asked for: at once, or from another thread.

        Raises:
            CannotWrite: no room, or the disk failed. Nothing may be acknowledged then.
        """
        try:
            self._append(self._file, key, value)
            if self._bytes > self._live_bytes + _SLACK_BYTES:
                os.close(self._file)
                self._write_anew()
        except OSError as error:
            raise CannotWrite(f"{self.path} cannot be written: {error.strerror or error}") from error
        if not self.is_durable:
            # The other thread looks by itself: to wake it here would have it take the processor from an acknowledgement.
            self._num_writes += 1
            self._is_dirty = True
            done()
            return
        with self._to_sync:
            self._waiting.append(done)
            self._is_dirty = True
            self._to_sync.notify()

    def close(self) -> None:
        """Ends it; everything is safe then."""
        with self._to_sync:
            self._is_closed = True
            self._to_sync.notify()
        self._syncing.join()
        os.close(self._file)

    # ---- reading

    def _load(self) -> None:
        try:
            data = memoryview(self.path.read_bytes())
        except FileNotFoundError:
            return
        except OSError as error:
            raise CannotWrite(f"{self.path} cannot be read: {error.strerror or error}") from error
        offset = 0
        while offset < len(data):
            if offset + _HEAD.size > len(data):
                return  # cut off while it was written, so nobody was told that it stands
            crc, value_bytes, key_bytes = _HEAD.unpack_from(data, offset)
            stop = offset + _HEAD.size + key_bytes + value_bytes
            is_whole = value_bytes <= _VALUE_BYTES_MAX and stop <= len(data)
            if not is_whole or zlib.crc32(data[offset + 4 : stop]) != crc:
                if is_whole or value_bytes > _VALUE_BYTES_MAX:
                    self._note_damage(offset)
                return
            start = offset + _HEAD.size
            key = bytes(data[start : start + key_bytes]).decode(errors="replace")
            self._keep(key, key_bytes, bytes(data[start + key_bytes : stop]))
            offset = stop

    def _note_damage(self, offset: int) -> None:
        """What follows is lost, newer values of known keys among it. Each core has its own way to go on without."""
        kept = self.path.with_name(self.path.name + ".damaged")
        with suppress(OSError):
            os.replace(self.path, kept)
        self.problem = f"{self.path} is damaged at byte {offset}; what came after is lost, the file is kept as {kept.name}"
        for key in self.values:
            if key.startswith("group/"):
                self.values[key] = b""  # a promise may be missing
        self.values[_LOST_ROSTER] = b""

    def _keep(self, key: str, key_bytes: int, value: bytes) -> None:
        before = self.values.get(key)
        if before is not None:
            self._live_bytes -= _HEAD.size + key_bytes + len(before)
        self.values[key] = value
        self._live_bytes += _HEAD.size + key_bytes + len(value)

    # ---- writing

    def _append(self, file: int, key: str, value: bytes) -> None:
        name = key.encode()
        rest = _HEAD.pack(0, len(value), len(name))[4:] + name + value
        record = zlib.crc32(rest).to_bytes(4, "little") + rest
        written = os.write(file, record)
        if written != len(record):
            os.truncate(file, self._bytes)  # or all that comes later would be unreadable
            raise OSError(f"only {written} of {len(record)} bytes were taken: is the disk full?")
        self._bytes += written
        self._keep(key, len(name), value)

    def _write_anew(self) -> None:
        """All that counts, in a new file that takes the place of the old one when it is safe."""
        values = {key: value for key, value in self.values.items() if key != _LOST_ROSTER}
        lost = self.values.keys() - values.keys()
        temporary = self.path.with_name(self.path.name + ".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | getattr(os, "O_BINARY", 0)
        file = os.open(temporary, flags, 0o600)
        self.values, self._live_bytes, self._bytes = {}, 0, 0
        for key, value in values.items():
            self._append(file, key, value)
        os.fsync(file)
        if os.name == "nt":  # which replaces no file that is open
            os.close(file)
        os.replace(temporary, self.path)
        self._file = os.open(self.path, flags & ~os.O_TRUNC, 0o600) if os.name == "nt" else file
        self.values.update(dict.fromkeys(lost, b""))

    # ---- a power cut

    def _wait_for_quiet(self) -> None:
        """With the lock held, and given back while it waits."""
        for _ in range(int(_SYNC_AFTER_S_MAX / _QUIET_S)):
            before = self._num_writes
            if self._to_sync.wait_for(lambda: self._is_closed, _QUIET_S) or self._num_writes == before:
                return

    def _sync_for_ever(self) -> None:
        while True:
            with self._to_sync:
                if self.is_durable:
                    self._to_sync.wait_for(lambda: self._is_dirty or self._is_closed)
                else:
                    while not self._is_dirty and not self._is_closed:
                        self._to_sync.wait(_QUIET_S)
                if not self._is_dirty:
                    return
                if not self.is_durable:
                    self._wait_for_quiet()
                self._is_dirty = False
                waiting, self._waiting = self._waiting, []
                try:
                    # Another descriptor, since the file may be written anew meanwhile; what is synced is the file.
                    file = os.dup(self._file)
                except OSError:
                    continue
            try:
                os.fsync(file)
            except OSError as error:
                self.problem = f"{self.path} cannot be made safe against power cuts: {error.strerror or error}"
                waiting = []  # nobody may be told that it is
            finally:
                os.close(file)
            for done in waiting:
                done()
