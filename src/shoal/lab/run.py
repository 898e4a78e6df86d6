"""One run of a scenario, from nothing to its facts and back to nothing."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import LabError
from shoal.lab import records
from shoal.lab.cluster import DeviceProcess, Lab
from shoal.lab.facts import Facts, Observer, this_machine
from shoal.lab.scenario import Fault, Scenario
from shoal.lab.timeline import Executed, Timeline, describe

_TICK_S = 0.02
_SAMPLE_S = 0.25
_LOGS_KEPT = 20
_OUTPUT_BYTES_MAX = 64 << 20
_LAST_LINE_BYTES_MAX = 1000
_PROGRESS_S = 2.0

Say = Callable[[str], None]


class _Workload:
    """What is waited for: a command on a device, the traffic coordinator beside them, or every device's command."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._coordinator: subprocess.Popen[bytes] | None = None
        self._process: DeviceProcess | None = None
        workload = lab.scenario.workload
        if workload.program == "tcp":
            self._start_traffic()
        elif workload.command is not None:
            assert workload.device is not None
            self._process = lab.start(workload.device, workload.command)

    def _start_traffic(self) -> None:
        lab, workload = self._lab, self._lab.scenario.workload
        controls = start_traffic_agents(lab)
        plan = {
            "controls": {name: str(control) for name, control in controls.items()},
            "addresses": {name: lab.address(name) for name in lab.devices},
            "router": str(records.socket_of(lab.id)),
            "paths": [[*ends, path] for ends, path in lab.paths.items()],
            "seconds": workload.seconds_per_pair,
            "num_round_trips": workload.num_round_trips,
            "at_once": workload.at_once,
        }
        command = [sys.executable, "-m", "shoal.lab.traffic", "coordinate", json.dumps(plan)]
        self._coordinator = lab.start_helper(command, name="traffic")

    @property
    def ended(self) -> str:
        """What has come to its end; '' if nothing has."""
        if self._coordinator is not None:
            return "workload" if self._coordinator.poll() is not None else ""
        if self._process is not None:
            return "workload" if self._process.exit_status is not None else ""
        own = [process for name in self._lab.devices for process in self._lab.processes(name)]
        return "commands" if own and all(process.exit_status is not None for process in own) else ""

    def progress(self) -> str:
        """How far the traffic coordinator has come, in its own words; '' where there is none."""
        if self._coordinator is None:
            return ""
        return (self._lab.folder / "traffic.err").read_text().rstrip("\n").rpartition("\n")[2]

    def stop(self) -> None:
        if self._coordinator is not None:
            self._coordinator.kill()
            self._coordinator.wait()

    def result(self) -> tuple[Any, int | None]:
        """What it printed, and its exit status (None: it was ended)."""
        if self._coordinator is not None:
            return read_output(self._lab.folder / "traffic.out"), self._coordinator.poll()
        if self._process is not None:
            return read_output(self._process.stdout), self._process.exit_status
        printed = {
            name: read_output(self._lab.processes(name)[0].stdout) for name in self._lab.devices if self._lab.processes(name)
        }
        return printed, None


def start_traffic_agents(lab: Lab) -> dict[str, Path]:
    """Starts a traffic agent on every device; returns the socket by which each is told what to do, see `traffic.Agents`."""
    controls = {name: lab.device_folder(name) / "traffic.sock" for name in lab.devices}
    for name, control in controls.items():
        lab.start(name, [sys.executable, "-m", "shoal.lab.traffic", "agent", str(control)])
    return controls


def run(
    scenario: Scenario, *, seed: int | None = None, say: Say = lambda _: None, prepare: Callable[[Lab], None] | None = None
) -> Facts:
    """Makes the lab, runs commands, workload and timeline, and takes everything down.

    Args:
        prepare: called with the lab before its commands start.

    Raises:
        LabUnavailable, LabError: see `Lab`.
    """
    with Lab(scenario, seed=seed, say=say) as lab:
        if prepare is not None:
            prepare(lab)
        observer = Observer(lab)
        lab.start_commands()
        say("running")
        workload = _Workload(lab)
        try:
            executed, ended = _follow(lab, workload, observer, say)
            if lab.router_is_alive():
                observer.sample()
        finally:
            workload.stop()
        result, status = workload.result()
        exit_statuses = {name: [process.exit_status for process in lab.processes(name)] for name in lab.devices}
        failures = [
            describe_failure(process)
            for name in lab.devices
            for process in lab.processes(name)
            if process.exit_status not in (0, None)
        ]
        marks = observer.marks()
        lab.end_commands()
        logs = _keep_logs(lab)
        facts = Facts(
            scenario=scenario.name,
            seed=lab.seed,
            scale_bytes=scenario.scale_bytes,
            machine=this_machine(),
            seconds=round(observer.seconds, 3),
            ended=ended,
            devices=observer.devices(exit_statuses),
            links=observer.links(),
            router=observer.router(),
            timeline=executed,
            workload=result,
            workload_status=status,
            failures=failures,
            marks=marks,
            logs=str(logs),
        )
        (logs / "facts.json").write_bytes(msgspec.json.encode(facts))
    return facts


def _follow(lab: Lab, workload: _Workload, observer: Observer, say: Say) -> tuple[list[Executed], str]:
    """Until the workload, the time or the router is at its end."""
    timeline = Timeline(lab.scenario.timeline)
    executed: list[Executed] = []
    began_s = time.monotonic()
    next_sample_s = 0.0
    next_progress_s, progress = _PROGRESS_S, ""
    while True:
        now_s = time.monotonic() - began_s
        if not lab.router_is_alive():
            return executed, "router lost"
        for at_s, fault in timeline.due(now_s):
            executed.append(execute(lab, fault, at_s=at_s, began_s=began_s))
            say(describe_executed(executed[-1]))
        if now_s >= next_sample_s:
            observer.sample()
            next_sample_s = now_s + _SAMPLE_S
        if now_s >= next_progress_s:
            next_progress_s = now_s + _PROGRESS_S
            before, progress = progress, workload.progress()
            if progress != before:
                say(progress)
        if ended := workload.ended:
            return executed, ended
        if now_s >= lab.scenario.seconds_max:
            return executed, "time limit"
        wait_s = min(_TICK_S, (timeline.next_s or now_s + _TICK_S) - now_s)
        time.sleep(max(0.0, wait_s))


def execute(lab: Lab, fault: Fault, *, at_s: float, began_s: float) -> Executed:
    """Does what a fault says; what went wrong with it is a fact of the run, not its end."""
    try:
        problem = lab.apply(fault)
    except (LabError, OSError) as error:
        problem = str(error)
    kind = str(fault.__struct_config__.tag)
    return Executed(
        at_s=round(at_s, 3), done_s=round(time.monotonic() - began_s, 3), do=kind, what=describe(fault), problem=problem
    )


def describe_executed(executed: Executed) -> str:
    """One line: '12.001 s: cut between laptop and phone'."""
    what = executed.what
    if "between" in what:
        where = f"between {what['between'][0]} and {what['between'][1]}"
    elif "from" in what:
        where = f"from {what['from']} to {what['to']}"
    else:
        where = str(what.get("device", "all links"))
    rest = ", ".join(f"{key} {value}" for key, value in what.items() if key not in ("between", "from", "to", "device"))
    problem = f" ({executed.problem})" if executed.problem else ""
    return f"{executed.done_s:.3f} s: {executed.do} {where}{' ' + rest if rest else ''}{problem}"


def describe_failure(process: DeviceProcess) -> str:
    """One line: 'laptop: `shoal up` ended with status 2: port 7433 is in use'."""
    with process.stderr.open("rb") as file:
        file.seek(max(0, process.stderr.stat().st_size - _LAST_LINE_BYTES_MAX))
        said = file.read().decode(errors="replace").strip().rpartition("\n")[2]
    ended = f"{process.device}: `{shlex.join(process.command)}` ended with status {process.exit_status}"
    return f"{ended}: {said}" if said else ended


def read_output(path: Path) -> Any:
    """What a command printed: as JSON if it is JSON as a whole, or its last line is; otherwise as text."""
    with contextlib.suppress(OSError):
        with path.open("rb") as file:
            text = file.read(_OUTPUT_BYTES_MAX).decode(errors="replace").strip()
        for candidate in (text, text.rpartition("\n")[2]):
            with contextlib.suppress(ValueError):
                return json.loads(candidate)
        return text
    return ""


def _keep_logs(lab: Lab) -> Path:
    """Copies the logs out of the lab, and forgets the oldest of earlier runs."""
    target = records.logs_folder() / lab.id
    lab.keep_logs(target)
    kept = sorted(records.logs_folder().iterdir(), key=lambda folder: folder.stat().st_mtime)
    for folder in kept[:-_LOGS_KEPT]:
        shutil.rmtree(folder, ignore_errors=True)
    return target
