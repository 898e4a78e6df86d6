"""A lab that stands: devices, links and what may be done to them. `Lab` makes it, changes it, and takes it down.

Everything is written down (`records.py`) before it is made, so an end at any point leaves only what can be found again.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from shoal.errors import LabError, ShoalError
from shoal.lab import block_device, cgroups, copies, namespaces, records, requirements
from shoal.lab.enter import Place
from shoal.lab.paths import Pair, find_paths, path_packet_bytes
from shoal.lab.process_identity import ProcessIdentity, boot_id, wait_ended
from shoal.lab.router_messages import (
    Block,
    CloseInbound,
    DirectedLink,
    Done,
    MoveAddress,
    PathPlan,
    Port,
    Ready,
    RouterClient,
    RouterPlan,
)
from shoal.lab.scenario import (
    FILL_IN,
    Change,
    ChangeAddress,
    Cut,
    DeviceSpec,
    Disk,
    Fault,
    Freeze,
    Heal,
    Kill,
    OpenInbound,
    Redraw,
    Scenario,
    Sleep,
    Squeeze,
    Start,
    Thaw,
    Wake,
    split_command,
)
from shoal.lab.scenario import CloseInbound as CloseInboundFault
from shoal.lab.shaping import LinkShape
from shoal.lab.timeline import changed_shapes

READY_TIMEOUT_S = 60.0
_ROUTER_TIMEOUT_S = 20.0
_END_GRACE_S = 3.0
_LISTENING = "0A"


@dataclass
class DeviceProcess:
    """A command on a device. `exit_status` is as the shell counts: 128 and more is a signal; None while it runs."""

    device: str
    command: list[str]
    popen: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path
    identity: ProcessIdentity | None

    @property
    def exit_status(self) -> int | None:
        status = self.popen.poll()
        return status if status is None or status >= 0 else 128 - status

    def wait(self, timeout_s: float) -> int:
        """Raises subprocess.TimeoutExpired."""
        self.popen.wait(timeout_s)
        status = self.exit_status
        assert status is not None
        return status


@dataclass
class _DeviceState:
    address: str
    is_asleep: bool = False
    is_frozen: bool = False
    processes: list[DeviceProcess] = field(default_factory=list)


class Lab:
    """A cluster on this machine. Use it as a context manager: whatever happens inside, it is taken down.

    Args:
        seed: of losses, jitter and redraws; the scenario's own if None.
        say: takes one line about what is being done.

    Raises (when entered):
        LabUnavailable: this machine cannot be a lab.
        LabError: something could not be made; what had been made is gone again.
    """

    def __init__(self, scenario: Scenario, *, seed: int | None = None, say: Callable[[str], None] = lambda _: None) -> None:
        self.scenario = scenario
        self.seed = scenario.seed if seed is None else seed
        self.id = records.new_id(scenario.name)
        self.folder = records.folder_of(self.id)
        self.shapes: dict[Pair, LinkShape] = scenario.shapes
        self.paths = find_paths(list(scenario.devices), scenario.hubs, self.shapes, relay=scenario.relay)
        self.router_priority = ""
        self.num_file_bytes = 0
        self._say = say
        self._rng = random.Random(f"{self.seed}/redraw")
        self._devices: dict[str, _DeviceState] = {}
        self._cut: set[Pair] = set()
        self._record: records.LabRecord | None = None
        self._hierarchy: cgroups.Hierarchy | None = None
        self._router: subprocess.Popen[bytes] | None = None
        self._client: RouterClient | None = None

    def __enter__(self) -> Self:
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- making it

    def open(self) -> None:
        """Makes devices and links; commands are started with `start_commands`."""
        requirements.require()
        own = ProcessIdentity.of(os.getpid())
        assert own is not None
        self._hierarchy = cgroups.detect()
        names = list(self.scenario.devices)
        for index, name in enumerate(names):
            self._devices[name] = _DeviceState(address=f"{namespaces.NETWORK}.0.{index + 1}")
        self._write(
            records.LabRecord(
                id=self.id,
                scenario=self.scenario.name,
                boot=boot_id(),
                owner=own,
                namespaces={name: f"shoal-{self.id}-{index}" for index, name in enumerate(names)},
                groups={name: f"{self.id}/{name}" for name in names},
                addresses={name: state.address for name, state in self._devices.items()},
            )
        )
        for name, device in self.scenario.devices.items():
            self._say(f"making {name}")
            try:
                self._make_device(name, device)
            except ShoalError as error:
                raise LabError(f"devices.{name}: {error}") from error
        self._say("starting the router")
        self._start_router()
        for name in names:
            self._configure_network(name)
        self._write_hosts()
        self._write(msgspec.structs.replace(self.record, state="ready"))

    @property
    def record(self) -> records.LabRecord:
        assert self._record is not None, "the lab is not open"
        return self._record

    @property
    def router(self) -> RouterClient:
        assert self._client is not None, "the lab is not open"
        return self._client

    def _write(self, new: records.LabRecord) -> None:
        self._record = new
        records.save(new)

    def _make_device(self, name: str, device: DeviceSpec) -> None:
        hierarchy, folder = self._groups, self.device_folder(name)
        for part in ("files", "home", "tmp"):
            (folder / part).mkdir(parents=True)
        for file in device.files:
            source = Path(file.path).expanduser()
            self.num_file_bytes += copies.copy_file(source, folder / "files" / source.name, layers=file.layer_range)
        if self.scenario.cold:
            copies.make_cold(folder / "files")
        disk_bytes_s = self.scenario.disk_bytes_s(name)
        group = self.record.groups[name]
        cgroups.prepare(hierarchy, group)
        with contextlib.suppress(LabError):  # a folder in memory has no disk
            cgroups.count_reads(hierarchy, group, block_device.disk_of(folder))
        cgroups.limit(
            hierarchy,
            group,
            cgroups.Limits(
                memory_bytes=self.scenario.memory_bytes(name),
                cores=device.cores,
                core_set=device.core_set,
                disk_read_bytes_s=disk_bytes_s,
                disk=block_device.disk_of(folder) if disk_bytes_s is not None else None,
            ),
        )
        namespaces.create(self.record.namespaces[name])
        (folder / "hosts").write_text("")
        place = Place(
            network=str(namespaces.path_of(self.record.namespaces[name])),
            groups=cgroups.entry_files(hierarchy, group),
            hostname=name,
            files=[(str(folder / "hosts"), "/etc/hosts")],
            folder=str(folder / "home"),
            environment=self._environment(name, device),
        )
        self._write(msgspec.structs.replace(self.record, places={**self.record.places, name: place}))

    def _environment(self, name: str, device: DeviceSpec) -> dict[str, str]:
        home = self.device_folder(name) / "home"
        own = {
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / ".cache"),
            "XDG_CONFIG_HOME": str(home / ".config"),
            "XDG_DATA_HOME": str(home / ".local/share"),
            "XDG_STATE_HOME": str(home / ".local/state"),
            "TMPDIR": str(self.device_folder(name) / "tmp"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "SHOAL_NAME": name,
            # Devices of a lab name each other by address, on a network that is the lab's own.
            "SHOAL_PLAIN": "1",
        }
        return own | {key: self.expand(name, value) for key, value in device.environment.items()}

    def _start_router(self) -> None:
        pairs = list(self.shapes)
        index_of = {pair: index for index, pair in enumerate(pairs)}
        plan = RouterPlan(
            ports=[
                Port(name, self.record.places[name].network, namespaces.TUN, state.address)
                for name, state in self._devices.items()
            ],
            links=[DirectedLink(*pair, self.shapes[pair]) for pair in pairs],
            paths=[PathPlan(*ends, [index_of[pair] for pair in path]) for ends, path in self.paths.items()],
            seed=self.seed,
            socket=str(records.socket_of(self.id)),
            multicast=self.scenario.multicast,
            closed_inbound=[name for name, device in self.scenario.devices.items() if device.behind_nat],
        )
        with (self.folder / "router.log").open("wb") as log:
            self._router = subprocess.Popen(
                [sys.executable, "-m", "shoal.lab.router"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the lab, which ends its router last
            )
        self._write(msgspec.structs.replace(self.record, router=ProcessIdentity.of(self._router.pid)))
        assert self._router.stdin is not None
        assert self._router.stdout is not None
        try:
            self._router.stdin.write(msgspec.json.encode(plan) + b"\n")
            self._router.stdin.flush()
            line = self._router.stdout.readline()
            reply = msgspec.json.decode(line, type=Ready | Done)
        except (OSError, msgspec.MsgspecError) as error:
            said = (self.folder / "router.log").read_text(errors="replace").strip().splitlines()
            raise LabError(f"the router did not start: {said[-1] if said else 'it said nothing'}") from error
        if isinstance(reply, Done):
            raise LabError(reply.problem)
        self.router_priority = reply.priority
        self._client = RouterClient(records.socket_of(self.id))

    @property
    def _groups(self) -> cgroups.Hierarchy:
        assert self._hierarchy is not None
        return self._hierarchy

    # ---- what it is

    @property
    def devices(self) -> list[str]:
        return list(self.scenario.devices)

    def address(self, device: str) -> str:
        return self._devices[device].address

    def device_folder(self, device: str) -> Path:
        return self.folder / "devices" / device

    def files_folder(self, device: str) -> Path:
        """Where the device's own copies are."""
        return self.device_folder(device) / "files"

    def usage(self, device: str) -> cgroups.Usage:
        return cgroups.usage(self._groups, self.record.groups[device])

    def processes(self, device: str) -> list[DeviceProcess]:
        """Commands that were started there, in order."""
        return self._devices[device].processes

    def router_is_alive(self) -> bool:
        return self._router is not None and self._router.poll() is None

    # ---- commands

    def expand(self, device: str, text: str) -> str:
        """Fills in {address}, {address:OTHER}, {files}, {home}, {python}, {seed}, {memory} (bytes) and {device}."""

        def value(match: re.Match[str]) -> str:
            name, other = match[1], match[2] or device
            if other not in self._devices:
                raise LabError(f"'{match[0]}': this lab has no device '{other}'")
            memory_bytes = self.scenario.memory_bytes(other)
            values = {
                "address": self._devices[other].address,
                "files": str(self.files_folder(other)),
                "home": str(self.device_folder(other) / "home"),
                "python": sys.executable,
                "seed": str(self.seed),
                "memory": str(memory_bytes) if memory_bytes is not None else "",
                "device": other,
            }
            return values[name]

        return FILL_IN.sub(value, text)

    def way_in(self, device: str) -> list[str]:
        """Words before a command that make it one of the device's: for whoever starts it with pipes of its own."""
        place = msgspec.json.encode(records.place_of(self.record, device)).decode()
        return [sys.executable, "-m", "shoal.lab.enter", place]

    def start(self, device: str, command: str | Sequence[str]) -> DeviceProcess:
        """Starts a command on a device; its output goes to files. Placeholders are filled in."""
        words = split_command(command) if isinstance(command, str) else list(command)
        words = [self.expand(device, word) for word in words]
        state = self._devices[device]
        base = self.device_folder(device) / f"{len(state.processes)}"
        stdout, stderr = base.with_suffix(".out"), base.with_suffix(".err")
        with stdout.open("wb") as out, stderr.open("wb") as err:
            popen = subprocess.Popen(
                [*self.way_in(device), *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        process = DeviceProcess(device, words, popen, stdout, stderr, ProcessIdentity.of(popen.pid))
        state.processes.append(process)
        return process

    def run(self, device: str, command: str | Sequence[str], *, timeout_s: float = 60.0) -> tuple[int, str, str]:
        """Runs a command on a device to its end: exit status, standard output, standard error.

        Raises:
            LabError: it took longer; it has been killed.
        """
        process = self.start(device, command)
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            process.popen.kill()
            process.popen.wait()
            raise LabError(f"{device}: `{' '.join(process.command)}` took longer than {timeout_s} s") from error
        return status, process.stdout.read_text(errors="replace"), process.stderr.read_text(errors="replace")

    def start_helper(self, command: Sequence[str], *, name: str) -> subprocess.Popen[bytes]:
        """Starts a process beside the devices; its output goes to `name`.out and `name`.err in the lab's folder."""
        with (self.folder / f"{name}.out").open("wb") as out, (self.folder / f"{name}.err").open("wb") as err:
            helper = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
        if (identity := ProcessIdentity.of(helper.pid)) is not None:
            self._write(msgspec.structs.replace(self.record, helpers=[*self.record.helpers, identity]))
        return helper

    def start_commands(self) -> None:
        """Starts every device's command, in the scenario's order, and waits for the ports that shall be ready."""
        for name, device in self.scenario.devices.items():
            if device.command is not None:
                self.start_command(name)

    def start_command(self, device: str) -> DeviceProcess:
        """Starts a device's own command, and waits for its port. Raises LabError."""
        spec = self.scenario.devices[device]
        assert spec.command is not None
        self._say(f"starting {device}'s command")
        process = self.start(device, spec.command)
        if spec.ready_port is not None:
            self.wait_listening(process, spec.ready_port)
        return process

    def wait_listening(self, process: DeviceProcess, port: int) -> None:
        """Waits until something on the process's device listens on the port. Raises LabError if it ends instead."""
        give_up_s = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < give_up_s:
            if process.exit_status is not None:
                said = process.stderr.read_text(errors="replace").strip().splitlines()
                raise LabError(
                    f"{process.device}: `{' '.join(process.command)}` ended with status {process.exit_status} before it "
                    f"listened on port {port}{': ' + said[-1] if said else ''}"
                )
            if port in _listening_ports(process.popen.pid, self.record.namespaces[process.device]):
                return
            time.sleep(0.02)
        raise LabError(f"{process.device}: nothing listens on port {port} after {READY_TIMEOUT_S:.0f} s")

    # ---- faults and changes

    def apply(self, fault: Fault) -> str:
        """Does what a fault says.

        Returns:
            What came of it where that is not what was asked for, in words.
        """
        match fault:
            case Kill():
                self._kill(fault.device)
            case Start():
                command = self.scenario.devices[fault.device].command
                assert command is not None
                self.start(fault.device, command)
            case Freeze() | Thaw():
                self._freeze(fault.device, frozen=isinstance(fault, Freeze))
            case Sleep() | Wake():
                self._sleep(fault.device, asleep=isinstance(fault, Sleep))
            case Squeeze():
                return self._squeeze(fault)
            case Disk():
                self._slow_disk(fault)
            case CloseInboundFault() | OpenInbound():
                self.router.ask(CloseInbound(fault.device, isinstance(fault, CloseInboundFault)), Done)
            case ChangeAddress():
                self._change_address(fault.device)
            case Cut() | Heal():
                self._cut_or_heal(fault)
            case Change() | Redraw():
                self.reshape(changed_shapes(fault, self.shapes, rng=self._rng))
        return ""

    def reshape(self, changes: dict[Pair, LinkShape]) -> None:
        """Gives links new shapes, at once; the largest packets follow their rates. Raises LabError."""
        self.router.reshape([DirectedLink(*pair, shape) for pair, shape in changes.items()])
        rates_changed = any(self.shapes[pair].rate_bit_s != shape.rate_bit_s for pair, shape in changes.items())
        self.shapes |= changes
        if rates_changed:
            for name in self._devices:
                namespaces.set_packet_bytes(
                    self.record.namespaces[name],
                    self._packet_bytes(name),
                    congestion_control=self.scenario.congestion_control,
                )

    def _kill(self, device: str) -> None:
        for process in self._devices[device].processes:
            if process.identity is not None:  # one that has just been started may not have entered the device yet
                process.identity.send(signal.SIGKILL)
        records.end_device(self.record, device)

    def _freeze(self, device: str, *, frozen: bool) -> None:
        cgroups.freeze(self._groups, self.record.groups[device], frozen=frozen)
        self._devices[device].is_frozen = frozen

    def _sleep(self, device: str, *, asleep: bool) -> None:
        if asleep:
            self._freeze(device, frozen=True)
        self._devices[device].is_asleep = asleep
        self._tell_blocked()
        if not asleep:
            self._freeze(device, frozen=False)

    def _squeeze(self, fault: Squeeze) -> str:
        wanted = int(fault.memory_mib * (1 << 20) * self.scenario.scale_bytes)
        reached = cgroups.squeeze_memory(self._groups, self.record.groups[fault.device], wanted)
        return f"the cap is {reached} bytes: what is in use cannot be reclaimed" if reached != wanted else ""

    def _slow_disk(self, fault: Disk) -> None:
        limits = cgroups.Limits(
            disk_read_bytes_s=max(1, int(fault.disk_mb_s * 1e6 * self.scenario.scale_bytes)),
            disk=block_device.disk_of(self.device_folder(fault.device)),
        )
        cgroups.limit(self._groups, self.record.groups[fault.device], limits)

    def _cut_or_heal(self, fault: Cut | Heal) -> None:
        is_cut = isinstance(fault, Cut)
        links = {pair: self.shapes[pair] for pair in fault.pairs if pair in self.shapes}
        self.reshape({pair: msgspec.structs.replace(shape, is_up=not is_cut) for pair, shape in links.items()})
        for pair in fault.pairs:
            if pair not in links:
                (self._cut.add if is_cut else self._cut.discard)(pair)
        self._tell_blocked()

    def _tell_blocked(self) -> None:
        """A pair is blocked while its path is cut or either of its ends is asleep."""
        for source, target in self.paths:
            asleep = self._devices[source].is_asleep or self._devices[target].is_asleep
            self.router.ask(Block(source, target, asleep or (source, target) in self._cut), Done)

    def _change_address(self, device: str) -> None:
        state = self._devices[device]
        old = state.address
        prefix, third, last = old.rsplit(".", 2)
        new = f"{prefix}.{(int(third) + 1) % 256}.{last}"
        namespaces.change_address(self.record.namespaces[device], old, new)
        state.address = new
        self.router.ask(MoveAddress(device, new), Done)
        for name in self._devices:
            if (name, device) in self.paths:
                namespaces.move_route(
                    self.record.namespaces[name],
                    old,
                    new,
                    self._path_bytes(name, device),
                    congestion_control=self.scenario.congestion_control,
                )
        self._write_hosts()
        addresses = {name: other.address for name, other in self._devices.items()}
        self._write(msgspec.structs.replace(self.record, addresses=addresses))

    # ---- network configuration

    def _configure_network(self, device: str) -> None:
        namespaces.configure(
            self.record.namespaces[device],
            self._devices[device].address,
            self._packet_bytes(device),
            congestion_control=self.scenario.congestion_control,
            multicast=self.scenario.multicast,
        )

    def _packet_bytes(self, device: str) -> dict[str, int]:
        return {
            self._devices[target].address: self._path_bytes(source, target)
            for source, target in self.paths
            if source == device
        }

    def _path_bytes(self, source: str, target: str) -> int:
        return path_packet_bytes(self.paths[source, target], self.shapes, limit=self.scenario.mtu)

    def _write_hosts(self) -> None:
        """Devices know each other by name. Written in place: the file is mounted over /etc/hosts."""
        lines = ["127.0.0.1 localhost", *(f"{state.address} {name}" for name, state in self._devices.items())]
        for name in self._devices:
            (self.device_folder(name) / "hosts").write_text("\n".join(lines) + "\n")

    # ---- taking it down

    def end_commands(self) -> None:
        """Asks every command to end, and kills what does not within a few seconds."""
        running = [
            process.identity
            for state in self._devices.values()
            for process in state.processes
            if process.exit_status is None and process.identity is not None
        ]
        for name, state in self._devices.items():
            if state.is_frozen:
                with contextlib.suppress(OSError, LabError):
                    self._freeze(name, frozen=False)
        for identity in running:
            identity.send(signal.SIGTERM)
        wait_ended(running, timeout_s=_END_GRACE_S)
        for name in self._devices if self._record else ():
            records.end_device(self.record, name)

    def close(self) -> None:
        """Takes everything down. May be called again.

        Raises:
            LabError: something would not go; the record stays, and `shoal lab clean` tries again.
        """
        if self._record is None:
            return
        with contextlib.suppress(OSError):
            self._write(msgspec.structs.replace(self._record, state="ending"))
        try:
            self.end_commands()
        finally:
            for state in self._devices.values():
                for process in state.processes:
                    process.popen.wait()
            self._end_router()
            problems = records.remove(self._record)
        if problems:
            raise LabError(f"the lab {self.id} is not wholly gone: {'; '.join(problems)}; try `shoal lab clean`")
        self._record = None

    def _end_router(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._router is None:
            return
        for stream in (self._router.stdin, self._router.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self._router.wait(2.0)
        except subprocess.TimeoutExpired:
            self._router.kill()
            self._router.wait()
        self._router = None

    def keep_logs(self, target: Path) -> None:
        """Copies what the devices' commands and the router have said."""
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / "router.log", target / "router.log")
        for name, state in self._devices.items():
            for process in state.processes:
                for path in (process.stdout, process.stderr):
                    shutil.copy(path, target / f"{name}-{path.name}")


def _listening_ports(pid: int, namespace: str) -> set[int]:
    """TCP ports on which somebody listens in the network of a process, once it has entered its namespace."""
    found: set[int] = set()
    with contextlib.suppress(OSError, IndexError, ValueError):
        inside = os.stat(f"/proc/{pid}/ns/net")
        if (inside.st_dev, inside.st_ino) != namespaces.identity(namespace):
            return found
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING:
                    found.add(int(fields[1].rsplit(":", 1)[1], 16))
    return found
