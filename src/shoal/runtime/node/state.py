"""The folder in which a device remembers who it is: its key, what its cores stored, how often it started.

key            the private key; whoever has it is this device
log            what the cores stored (`disk.py`)
incarnation    of its last start; every start has a higher one
agent.json     where the agent that runs is reached by its owner
lock           held while one runs: two agents of one key would be two devices with one name
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import IO

import msgspec
import platformdirs

from shoal.errors import CannotWrite, DamagedFile, DeviceError, DeviceUnreachable
from shoal.runtime.node.disk import Disk
from shoal.transport.exclusive import hold
from shoal.transport.identity import DeviceKeys

_ROSTER_FILES = ("log", "incarnation")


def default_folder() -> Path:
    """Where this user's device is remembered; `SHOAL_STATE` names another place."""
    named = os.environ.get("SHOAL_STATE")
    return Path(named) if named else Path(platformdirs.user_state_dir("shoal")) / "device"


class AgentFile(msgspec.Struct, frozen=True):
    """What an agent writes down for its owner's other commands."""

    address: str
    pid: int
    agent: str = ""
    """Where clients of models find it."""


class DeviceState:
    """One device's folder, locked while this lives.

    Args:
        folder: made if it is not there, readable by its owner only.

    Raises:
        CannotWrite: the folder cannot be made or written.
        DeviceError: another process runs from it, or its key is damaged.
    """

    def __init__(self, folder: Path, *, is_durable: bool = False) -> None:
        self.folder = folder
        self._is_durable = is_durable
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = _lock(folder / "lock")
        except OSError as error:
            raise CannotWrite(f"{folder} cannot be used for this device's state: {error.strerror or error}") from error
        try:
            self._open()
        except BaseException:
            self._lock.close()
            raise

    def _open(self) -> None:
        self.keys = DeviceKeys.load_or_create(self.folder / "key")
        self.disk = Disk(self.folder / "log", is_durable=self._is_durable)

    def next_incarnation(self, *, least: int = 1) -> int:
        """A number above all that this device had, at least `least`; on disk before it is used.

        Raises:
            DamagedFile: the file is no number.
        """
        path = self.folder / "incarnation"
        before = 0
        with contextlib.suppress(FileNotFoundError):
            text = path.read_text()
            try:
                before = int(text)
            except ValueError:
                raise DamagedFile(
                    f"{path} holds no number: write one above all before, such as {_FAR_AHEAD}, or delete the folder "
                    "and join again by a new invitation"
                ) from None
        incarnation = max(before + 1, least)
        _replace(path, str(incarnation).encode())
        return incarnation

    @property
    def is_paused(self) -> bool:
        """Whether the owner wants others to have nothing of this device; it survives a restart."""
        return (self.folder / "paused").exists()

    @is_paused.setter
    def is_paused(self, wanted: bool) -> None:
        path = self.folder / "paused"
        if wanted:
            _replace(path, b"")
        else:
            path.unlink(missing_ok=True)

    def announce_agent(self, address: str, agent: str = "") -> None:
        """Writes down where the owner's commands find this agent, and where clients do."""
        _replace(self.folder / "agent.json", msgspec.json.encode(AgentFile(address, os.getpid(), agent)))

    def forget_cluster(self, *, keep_key: bool = False) -> None:
        """This device belongs nowhere any more. What it remembered is kept beside, until the next time."""
        self.disk.close()
        old = self.folder / "left"
        shutil.rmtree(old, ignore_errors=True)
        old.mkdir(mode=0o700)
        for name in (*_ROSTER_FILES, *(() if keep_key else ("key",))):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.folder / name, old / name)
        self._open()

    def close(self) -> None:
        """Everything is on disk, and another process may start from the folder."""
        self.disk.close()
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "agent.json").unlink()
        self._lock.close()


_FAR_AHEAD = 1_000_000


def runs_from(folder: Path) -> bool:
    """Whether an agent has said that it runs from there."""
    return (folder / "agent.json").exists()


def find_agent(folder: Path) -> tuple[str, DeviceKeys]:
    """Where the owner reaches the agent that runs from `folder`, and its key.

    Raises:
        DeviceUnreachable: none does.
    """
    address = _agent_file(folder).address
    try:
        return address, DeviceKeys.from_seed((folder / "key").read_bytes())
    except (OSError, ValueError) as error:
        raise DeviceUnreachable(f"{folder / 'key'} cannot be read ({error}): is this the device's owner?") from error


def agent_address(folder: Path) -> str | None:
    """Where clients of models reach the agent that runs from `folder`; None where it serves none.

    Raises:
        DeviceUnreachable: none runs from there.
    """
    return _agent_file(folder).agent or None


def _agent_file(folder: Path) -> AgentFile:
    try:
        return msgspec.json.decode((folder / "agent.json").read_bytes(), type=AgentFile)
    except (OSError, msgspec.DecodeError):
        raise DeviceUnreachable(
            f"no agent runs from {folder}: start it with `shoal up`, or name its folder with --state"
        ) from None


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CannotWrite(f"{path} cannot be written: {error.strerror or error}") from error


def _lock(path: Path) -> IO[bytes]:
    """Raises DeviceError where another process has it."""
    try:
        return hold(path)
    except OSError:
        raise DeviceError(
            f"another agent runs from {path.parent}: stop it, or give this one a folder of its own with --state"
        ) from None
