"""How fast eight real devices on loopback agree, and notice who is gone: processes, TLS, disk writes (no fsync).

`decide`: from the event decoded at the leader to the quorum's last acknowledgement, the writes of all who acknowledged
included. `kill`, `freeze`: from the signal to the last of the seven others knowing. `new_leader`: from the kill of the
leader to the last of the others knowing the new one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.core import measure_core
from benchmarks.one_process import measure_one_process
from benchmarks.record import finish, is_quick
from shoal.lab.member_cluster import Line, MemberProcess, make_group, member_cluster, wait_active
from shoal.runtime.node import clock
from shoal.runtime.node.priority import why_not_realtime

NUM_DEVICES = 8
GROUP = "bench"
LINK_HOLD_S = 0.02
RETRY_S = 0.05
"""How long a link must hold before it is reported to be back, and how soon a device looks whether the record shows what it
wants. Neither is part of a decision; 2 and 0.5 s would make this long."""
SETTINGS = (f"--link-hold={LINK_HOLD_S}", f"--retry={RETRY_S}")
HELD_MB = 900


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _wait_epoch(device: MemberProcess, since: int, *, active: int | None = None) -> Line:
    return device.wait_for(
        lambda line: line["is"] == "RecordAdopted" and (active is None or len(line["active"]) == active),
        since=since,
        within_s=20.0,
    )


def measure_decisions(devices: list[MemberProcess], rounds: int) -> dict[str, list[float]]:
    """Seconds per decision, by event, as the leader measures them."""
    leader, reporter, leaver = devices[0], devices[1], devices[-1]
    source = devices[2]
    found: dict[str, list[float]] = {"disconnect": [], "connect": [], "scale_in": [], "scale_out": []}
    for number in range(rounds):
        for event, device, words in (
            ("disconnect", reporter, ("link", GROUP, source.node, "down")),
            ("connect", reporter, ("link", GROUP, source.node, "up")),
            ("scale_in", leaver, ("exit", GROUP)),
            ("scale_out", leaver, ("enter", GROUP)),
        ):
            # Events come at any moment between two of the leader's heartbeats.
            time.sleep(0.02 + 0.017 * (number % 6))
            marks = [len(each.lines) for each in devices]
            device.say(*words)
            active = {"scale_in": NUM_DEVICES - 1, "scale_out": NUM_DEVICES}.get(event)
            for each, mark in zip(devices, marks, strict=True):
                _wait_epoch(each, mark, active=active)
            found[event] += [line["decide_s"] for line in leader.told("Decided", since=marks[0])]
    return found


def _noticed(others: list[MemberProcess], lost: MemberProcess, marks: list[int], at_s: float) -> float:
    """When the last of them knew, seconds after `at_s`."""
    return max(
        float(
            other.wait_for(lambda line: line["is"] == "MemberGone" and line["node"] == lost.node, since=mark)["at_s"] - at_s
        )
        for other, mark in zip(others, marks, strict=True)
    )


def _restart(devices: list[MemberProcess], index: int) -> None:
    """Returns when it is in the group again, as all know."""
    old = devices[index]
    old.stop()
    marks = [len(device.lines) for device in devices]
    devices[index] = new = MemberProcess(old.folder, old.name, *SETTINGS)
    marks[index] = 0
    for device, mark in zip(devices, marks, strict=True):
        if device is not new:
            device.wait_for(lambda line: line["is"] == "MemberHere" and line["node"] == new.node, since=mark)
        wait_active(device, GROUP, devices, since=mark)


def measure_loss(devices: list[MemberProcess], rounds: int) -> dict[str, list[float]]:
    """Seconds until all others know: kill, kill of one that holds much memory, freeze."""
    found: dict[str, list[float]] = {"kill": [], "kill_900mb": [], "freeze": []}
    for number in range(rounds):
        for how in ("kill", "kill_900mb", "freeze"):
            time.sleep(0.2 + 0.03 * number)
            victim, others = devices[-1], devices[:-1]
            if how == "kill_900mb":
                victim.ask("hold", str(HELD_MB), answer="holds", within_s=30.0)
            marks = [len(device.lines) for device in devices]
            at_s = clock.now_s()
            os.kill(victim.process.pid, signal.SIGSTOP if how == "freeze" else signal.SIGKILL)
            found[how].append(_noticed(others, victim, marks[:-1], at_s))
            if how == "freeze":
                os.kill(victim.process.pid, signal.SIGCONT)
                for device, mark in zip(devices, marks, strict=True):
                    wait_active(device, GROUP, devices, since=mark)
            else:
                _restart(devices, len(devices) - 1)
    return found


def measure_new_leader(devices: list[MemberProcess]) -> float:
    """Seconds from the kill of the leader until all others know another. The group goes on, and takes it back."""
    known = devices[0].told("LeaderChanged")[-1]["leader"]
    index = next(index for index, device in enumerate(devices) if device.node == known)
    leader, others = devices[index], [device for device in devices if device.node != known]
    time.sleep(0.2)
    marks = [len(device.lines) for device in others]
    at_s = clock.now_s()
    leader.kill()
    known_s = max(
        float(
            other.wait_for(
                lambda line: line["is"] == "LeaderChanged" and line["leader"] not in (None, leader.node), since=mark
            )["at_s"]
            - at_s
        )
        for other, mark in zip(others, marks, strict=True)
    )
    for other, mark in zip(others, marks, strict=True):
        wait_active(other, GROUP, others, since=mark)
    _restart(devices, index)
    return known_s


@contextmanager
def busy(num_processes: int) -> Iterator[None]:
    """So many processes that want a core all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_processes)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def group_of_eight(folder: Path, *arguments: str) -> Iterator[list[MemberProcess]]:
    """Started, and one group of active members."""
    with member_cluster(folder, NUM_DEVICES, *SETTINGS, *arguments) as devices:
        make_group(devices, GROUP)
        time.sleep(1.0)
        yield devices


def summarise(spent: dict[str, list[float]]) -> dict[str, float]:
    """Microseconds, p50 and p99 of each event, and of the worst of those that have a target."""
    figures: dict[str, float] = {}
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        each = {event: _percentile(values, share) * 1e6 for event, values in spent.items()}
        figures |= {f"{event}_us_{name}": value for event, value in each.items()}
        figures[f"decide_us_{name}"] = max(each[event] for event in ("scale_in", "connect", "disconnect"))
    return figures


def measure_realtime(folder: Path, rounds: int) -> dict[str, float]:
    """Decisions with real-time priority, and beside two busy processes; nothing where it is not granted."""
    refusal = why_not_realtime()
    if refusal:
        _tell(refusal)
        return {}
    figures: dict[str, float] = {}
    with group_of_eight(folder, "--realtime") as devices:
        for name, num_busy in (("realtime", 0), ("realtime_busy", 2)):
            _tell(f"decisions, {name}: {rounds} per event")
            with busy(num_busy):
                found = summarise(measure_decisions(devices, rounds))
            figures |= {f"{name}_{key}": value for key, value in found.items()}
    return figures


def measure_all(folder: Path, *, rounds: int, one_process_rounds: int, losses: int, leaders: int) -> dict[str, float]:
    """All figures. Eight processes are started once for each priority."""
    _tell(f"decisions in one process: {one_process_rounds} per event")
    spent = measure_one_process(folder / "one-process", NUM_DEVICES, one_process_rounds, link_hold_s=LINK_HOLD_S)
    figures = {f"one_process_{name}": value for name, value in summarise(spent).items()}
    _tell("one core")
    figures["core_us_p99"] = measure_core(2.0)["core_us_p99"]
    with group_of_eight(folder / "normal") as devices:
        _tell(f"decisions: {rounds} per event")
        decisions = summarise(measure_decisions(devices, rounds))
        _tell(f"losses: {losses} of each kind")
        lost = measure_loss(devices, losses)
        _tell(f"new leaders: {leaders}")
        lost["new_leader"] = [measure_new_leader(devices) for _ in range(leaders)]
    figures |= decisions
    figures["decide_ms_p50_max"] = decisions["decide_us_p50"] / 1e3
    figures["decide_ms_p99_max"] = decisions["decide_us_p99"] / 1e3
    names = {"kill": "kill_known", "kill_900mb": "kill_known_900mb", "freeze": "freeze_known", "new_leader": "new_leader"}
    for name, values in lost.items():
        figures[f"{names[name]}_ms"] = _percentile(values, 0.5) * 1e3
        figures[f"{names[name]}_ms_max"] = max(values) * 1e3
    return figures | measure_realtime(folder / "realtime", rounds)


def _tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Measures, prints one JSON object, and keeps it."""
    rounds, losses, leaders = (25, 1, 1) if is_quick() else (200, 5, 5)
    counts = {"rounds": rounds, "one_process_rounds": 5 * rounds, "losses": losses, "leaders": leaders}
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure_all(Path(folder), **counts)
    _tell(f"took {time.monotonic() - started_s:.0f} s")
    settings = {"devices": NUM_DEVICES, **counts, "link_hold_s": LINK_HOLD_S, "retry_s": RETRY_S}
    finish("members", {name: round(figure, 3) for name, figure in figures.items()} | counts, settings)


if __name__ == "__main__":
    main()
