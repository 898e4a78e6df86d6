"""`shoal train`: a script as a member of a run, or as several on this machine."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from shoal.errors import DeviceRefused, DeviceUnreachable
from shoal.runs.port import parse_address
from shoal.runs.trust import Trust, check_plain, is_loopback
from shoal.runtime.node.owner import AskCluster, ClusterStatus, OwnerLink
from shoal.transport.identity import DeviceKeys

_ENDED_S = 10.0


class Settings(NamedTuple):
    """What `shoal train` was asked. `devices` processes are started on this machine. `state` is the device's folder;
    `is_plain`: links prove nothing, on this machine only."""

    script: Path
    arguments: list[str]
    listen: str
    peers: list[str]
    folder: Path | None
    devices: int
    wait_for: int | None
    state: Path
    is_plain: bool = False


def train(settings: Settings) -> None:
    """Runs the script, as one member or as several on this machine, until it ends.

    Raises:
        ValueError: no such script, or an address that is none.
        DeviceRefused: torch is not installed, or plain links were asked for that leave this machine.
        DeviceUnreachable: others shall take part, and no agent runs that knows the cluster.
    """
    if not settings.script.is_file():
        raise ValueError(f"{settings.script} is no file: name a Python script that calls shoal.pytorch.join")
    if importlib.util.find_spec("torch") is None:
        raise DeviceRefused("training needs PyTorch: pip install 'shoal[train]'")
    for address in (settings.listen, *settings.peers):
        parse_address(address)
    with TemporaryDirectory(prefix="shoal-run-") as folder:
        place = Path(folder)
        sys.exit(_wait(_start(settings, _trust_files(settings, place), place), place))


def _trust_files(settings: Settings, folder: Path) -> list[Path | None]:
    """For each device that is started: whom it trusts. The folder is readable by this user only.

    In a cluster these are its members. Where nobody else can take part, keys are made that end with the run.
    """
    if settings.is_plain:
        check_plain(settings.listen)
        return [None] * settings.devices
    files: list[Path | None] = [folder / f"trust-{index + 1}" for index in range(settings.devices)]
    members = _cluster(settings.state)
    if members:
        keys = [settings.state / "key"] * settings.devices
    elif settings.peers or not is_loopback(settings.listen):
        raise DeviceUnreachable(
            f"no agent with a cluster runs from {settings.state}, and members of a run prove who they are: start `shoal up` "
            "on each device and `shoal join` them, or try it on this machine with --devices or --plain"
        )
    else:
        keys = [folder / f"key-{index + 1}" for index in range(settings.devices)]
        members = [DeviceKeys.load_or_create(key).public_key for key in keys]
    for file, key in zip(files, keys, strict=True):
        assert file is not None
        Trust.write(file, key, members)
    return files


def _cluster(state: Path) -> list[bytes]:
    """Public keys of the members of this device's cluster; none where no agent runs here."""
    try:
        with OwnerLink(state) as owner:
            status = owner.ask(AskCluster(), ClusterStatus)
    except DeviceUnreachable:
        return []
    return [bytes.fromhex(member.public_key) for member in status.members if member.public_key]


def _start(settings: Settings, trust: list[Path | None], scratch: Path) -> list[subprocess.Popen[bytes]]:
    host, port = parse_address(settings.listen)
    if settings.devices > 1 and port == 0:
        port = _free_port(host)
    processes = []
    for index in range(settings.devices):
        environment = {
            **os.environ,
            "SHOAL_LISTEN": f"{host}:{port if index == 0 else 0}",
            "SHOAL_PEERS": ",".join(settings.peers or ([f"{host}:{port}"] if index else [])),
            "SHOAL_FOLDER": str(_folder(settings.folder, index) or ""),
            "SHOAL_TRUST": str(trust[index] or ""),
            "SHOAL_DEVICES": str(settings.wait_for or (1 if settings.peers else settings.devices)),
        }
        if settings.devices > 1:
            # Several on one machine share its processors; each taking all of them would slow all.
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // settings.devices)))
        command = [sys.executable, str(settings.script), *settings.arguments]
        # One says how far it is; the others would say the same, and are heard only where they fail.
        with ExitStack() as stack:
            said = stack.enter_context(_said_by(scratch, index).open("wb")) if index else None
            output = subprocess.DEVNULL if index else None
            process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=output, stderr=said)
        processes.append(process)
    return processes


def _said_by(scratch: Path, index: int) -> Path:
    return scratch / f"said-{index + 1}"


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("shoal: ") if lines else "it said nothing"


def _folder(folder: Path | None, index: int) -> Path | None:
    """Devices have a disk each, and so do those that are played."""
    return None if folder is None else folder if index == 0 else folder / f"device-{index + 1}"


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])


def _wait(processes: list[subprocess.Popen[bytes]], scratch: Path) -> int:
    """The first one's status. Ctrl-C and SIGTERM are passed on: members leave at a step boundary."""

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = processes[0].wait()
        for index, process in enumerate(processes[1:], 1):
            # The others have their last step as well, and only their end to come to.
            with suppress(subprocess.TimeoutExpired):
                if process.wait(_ENDED_S) != 0 and status == 0:
                    reason = _last_line(_said_by(scratch, index))
                    sys.stderr.write(f"shoal: device {index + 1} ended with status {process.returncode}: {reason}\n")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return status
