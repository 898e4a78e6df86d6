"""What a lab has made on this machine, on disk before it is made: so that it can be found and removed whatever happens.

Every lab has one folder with its record, its router's socket, and its devices' files and logs. `remove` takes everything
in the record down again, by identity: processes that are in the lab's own control groups or network namespaces, then those
groups and namespaces, then the folder. It touches nothing else, and may be called again after it was interrupted.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import platformdirs

from shoal.errors import LabError
from shoal.lab import cgroups, namespaces
from shoal.lab.enter import Place
from shoal.lab.process_identity import ProcessIdentity, boot_id, wait_ended

FOLDER_VARIABLE = "SHOAL_LAB_FOLDER"
_RECORD = "record.json"
_END_TIMEOUT_S = 5.0
_KILL_ROUNDS = 20


class LabRecord(msgspec.Struct, frozen=True):
    """One lab.

    Attributes:
        id: also the name of its folder, and part of every name it gives.
        owner: the process that made it and removes it.
        state: "starting", "ready" or "ending".
        namespaces, groups: per device, names of what it has, or is about to have.
        router: its process, once started.
        helpers: processes beside the devices, such as the traffic's coordinator.
        addresses: per device, as of now.
        places: per device, how a process gets in.
    """

    id: str
    scenario: str
    boot: str
    owner: ProcessIdentity
    state: str = "starting"
    namespaces: dict[str, str] = {}
    groups: dict[str, str] = {}
    router: ProcessIdentity | None = None
    helpers: list[ProcessIdentity] = []
    addresses: dict[str, str] = {}
    places: dict[str, Place] = {}

    @property
    def is_orphan(self) -> bool:
        """Whether nobody is left who would remove it."""
        return self.boot != boot_id() or not self.owner.is_running()


def root_folder() -> Path:
    """Where labs live: `SHOAL_LAB_FOLDER`, or shoal's folder for state. It should be on a disk: see `block_device`."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else Path(platformdirs.user_state_dir("shoal")) / "lab"


def logs_folder() -> Path:
    """Where the logs of finished runs are kept."""
    return root_folder() / "logs"


def new_id(scenario: str) -> str:
    return f"{scenario[:24] or 'lab'}-{secrets.token_hex(3)}"


def folder_of(lab_id: str) -> Path:
    return root_folder() / "labs" / lab_id


def socket_of(lab_id: str) -> Path:
    return folder_of(lab_id) / "router.sock"


def save(record: LabRecord) -> None:
    """Writes the record, whole or not at all."""
    folder = folder_of(record.id)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = folder / f"{_RECORD}.new"
    temporary.write_bytes(msgspec.json.encode(record))
    temporary.replace(folder / _RECORD)


def all_records() -> Iterator[LabRecord]:
    """Every lab that has left a trace here."""
    folder = root_folder() / "labs"
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            yield msgspec.json.decode((entry / _RECORD).read_bytes(), type=LabRecord)


def unreadable_folders() -> list[Path]:
    """Folders of labs that were interrupted before their record stood: they have made nothing else."""
    folder = root_folder() / "labs"
    known = {record.id for record in all_records()}
    return [entry for entry in sorted(folder.iterdir()) if entry.name not in known] if folder.is_dir() else []


def find_running(lab_id: str | None) -> LabRecord:
    """The lab that is meant: the only one, or the one of that id or scenario. Raises LabError."""
    running = [record for record in all_records() if not record.is_orphan]
    matching = [record for record in running if lab_id in (None, record.id, record.scenario)]
    if len(matching) == 1:
        return matching[0]
    if not running:
        raise LabError("no lab is running here: `shoal lab up SCENARIO` starts one")
    names = ", ".join(record.id for record in running)
    raise LabError(
        f"{'several labs are' if lab_id is None else f'not one lab {lab_id} is'} running: choose with --lab: {names}"
    )


def place_of(record: LabRecord, device: str) -> Place:
    """How to get into a device. Raises LabError."""
    if device not in record.places:
        raise LabError(f"the lab {record.id} has no device '{device}'; it has {', '.join(record.places)}")
    return record.places[device]


def remove(record: LabRecord) -> list[str]:
    """Removes everything that a lab has made.

    Returns:
        What could not be removed, in words; nothing if all is gone. The folder stays until all else is gone.
    """
    problems: list[str] = []
    if record.boot == boot_id():
        hierarchy = _hierarchy()
        beside = [*([record.router] if record.router is not None else []), *record.helpers]
        for process in beside:
            process.send(signal.SIGKILL)
        wait_ended(beside, timeout_s=_END_TIMEOUT_S)
        for device in record.groups.keys() | record.namespaces.keys():
            problems += _end_processes(record, device, hierarchy)
        for name in record.namespaces.values():
            namespaces.delete(name)
            if namespaces.identity(name) is not None:
                problems.append(f"the network namespace {name} cannot be removed")
        if hierarchy is not None:
            for name in [*record.groups.values(), record.id]:
                try:
                    cgroups.remove(hierarchy, name)
                except LabError as error:
                    problems.append(str(error))
            cgroups.remove_parent(hierarchy)
    if not problems:
        shutil.rmtree(folder_of(record.id), ignore_errors=True)
    return problems


def end_device(record: LabRecord, device: str) -> list[str]:
    """Kills every process of one device, at once. Returns problems, in words."""
    return _end_processes(record, device, _hierarchy())


def members(record: LabRecord, device: str) -> list[ProcessIdentity]:
    """The processes of a device, by its control group and its network."""
    return _members(record, device, _hierarchy())


def _hierarchy() -> cgroups.Hierarchy | None:
    try:
        return cgroups.detect()
    except (LabError, OSError):
        return None


def _members(record: LabRecord, device: str, hierarchy: cgroups.Hierarchy | None) -> list[ProcessIdentity]:
    pids: set[int] = set()
    if hierarchy is not None and device in record.groups:
        pids |= set(cgroups.processes(hierarchy, record.groups[device]))
    if device in record.namespaces:
        pids |= set(namespaces.processes_inside(record.namespaces[device]))
    return [identity for pid in pids - {os.getpid()} if (identity := ProcessIdentity.of(pid)) is not None]


def _end_processes(record: LabRecord, device: str, hierarchy: cgroups.Hierarchy | None) -> list[str]:
    """Kills until nobody is left, since a process may have had a child meanwhile."""
    left: list[ProcessIdentity] = []
    for _ in range(_KILL_ROUNDS):
        left = _members(record, device, hierarchy)
        if not left:
            return []
        for process in left:
            process.send(signal.SIGKILL)
        if hierarchy is not None and device in record.groups:
            with contextlib.suppress(OSError, LabError):  # what is frozen cannot die
                cgroups.freeze(hierarchy, record.groups[device], frozen=False)
        wait_ended(left, timeout_s=_END_TIMEOUT_S / _KILL_ROUNDS)
    return [f"processes {', '.join(str(process.pid) for process in left)} of {device} do not end"]
