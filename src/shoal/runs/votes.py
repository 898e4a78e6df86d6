"""Who a member was in its former life, and what it promised then: a file in the run's folder.

A device that comes back as the member that it was keeps its word, and may vote for its former self: so a run of which most
members were down for a while has its quorum again. Whoever has no such file is another member, whose vote nobody counted.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import msgspec

from shoal.errors import CannotWrite, DamagedFile, DeviceRefused
from shoal.ids import GroupId, NodeId
from shoal.membership.group.ballot import read_file
from shoal.membership.messages import Record
from shoal.transport.exclusive import hold

FILE = "votes"
LOCK = "votes.lock"


class Life(msgspec.Struct, frozen=True):
    """A member while its process lives.

    Attributes:
        incarnation: one more than in the life before.
        group: what the group's core had stored; empty before it has.
    """

    run: GroupId
    node: NodeId
    incarnation: int = 1
    group: bytes = b""

    @property
    def record(self) -> Record | None:
        """The last one that it knew to be agreed on; None: it had stored nothing."""
        return read_file(self.group).committed if self.group else None


class Votes:
    """The file of one member, held while this lives.

    Args:
        folder: the run's; made if it is not there.

    Raises:
        CannotWrite: the folder cannot be written to.
        DeviceRefused: another process has it.
    """

    def __init__(self, folder: Path, run: GroupId) -> None:
        self._path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotWrite(f"{folder} cannot be written to: {error.strerror}") from error
        try:
            self._lock = hold(folder / LOCK)
        except BlockingIOError as error:
            raise DeviceRefused(
                f"another member of a run keeps its files in {folder}: give each a folder of its own"
            ) from error
        except OSError as error:
            raise CannotWrite(f"{folder} cannot be written to: {error.strerror}") from error
        self._writing = threading.Lock()
        self._life: Life | None = None
        self.former = self._read(run)
        """Of this run; None: there was none, or nothing of it can be believed."""

    def _read(self, run: GroupId) -> Life | None:
        with contextlib.suppress(OSError, msgspec.MsgspecError, DamagedFile):
            life = msgspec.msgpack.decode(self._path.read_bytes(), type=Life)
            if life.run == run and life.record is not None:
                return life
        return None

    def begin(self, life: Life) -> None:
        """Is written before anything is said as this member. Raises CannotWrite."""
        with self._writing:
            self._write(life)

    def write(self, group: bytes) -> None:
        """What the group's core stores; on disk when this returns.

        Raises:
            CannotWrite: neither this can be written, nor what is there be removed: nothing may be promised.
        """
        with self._writing:
            if self._life is None:
                return  # forgotten: this life is the last one of its member, and needs no memory
            try:
                self._write(msgspec.structs.replace(self._life, group=group))
            except CannotWrite:
                self._forget()

    def forget(self) -> None:
        """This member will not come back. Raises CannotWrite."""
        with self._writing:
            self._forget()

    def close(self) -> None:
        self._lock.close()

    def _forget(self) -> None:
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise CannotWrite(f"{self._path} can neither be written nor removed: {error.strerror}") from error
        self._life = None

    def _write(self, life: Life) -> None:
        scratch = self._path.with_name(f"{FILE}.part")
        try:
            with scratch.open("wb") as file:
                file.write(msgspec.msgpack.encode(life))
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            raise CannotWrite(f"{self._path} cannot be written: {error.strerror}") from error
        self._life = life


def sync_folder(folder: Path) -> None:
    """So that a file's name, too, survives a power cut; where the system has such a thing."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
