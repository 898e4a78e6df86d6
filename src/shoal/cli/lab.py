"""`shoal lab`: a cluster on this machine, to try what real devices would do before there are any."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shoal.errors import LabError
from shoal.lab import records
from shoal.lab.cluster import Lab
from shoal.lab.facts import Facts, static_marks
from shoal.lab.process_identity import wait_ended
from shoal.lab.router_messages import RouterClient
from shoal.lab.run import describe_executed, execute
from shoal.lab.run import run as run_scenario
from shoal.lab.scenario import Scenario, check, library, load
from shoal.lab.timeline import Timeline

_DOWN_TIMEOUT_S = 30.0
_START_TIMEOUT_S = 300.0
_TICK_S = 0.1


def list_scenarios(*, as_json: bool) -> None:
    """The library."""
    scenarios = {name: load(name) for name in library()}
    if as_json:
        _print(
            json.dumps(
                [{"name": name, "about": found.about, "devices": list(found.devices)} for name, found in scenarios.items()]
            )
        )
        return
    table = Table("scenario", "devices", "what it is", box=None)
    for name, found in scenarios.items():
        table.add_row(name, str(len(found.devices)), found.about)
    Console().print(table)


def prepared(name: str, *, scale: float | None, seconds: float | None) -> Scenario:
    """A scenario with what was typed on top. Raises ValueError."""
    scenario = load(name)
    if scale is not None:
        scenario = msgspec.structs.replace(scenario, scale_bytes=scale)
    if seconds is not None:
        scenario = msgspec.structs.replace(scenario, seconds_max=seconds)
    check(scenario, label=name)
    return scenario


def run(
    scenario: Scenario,
    *,
    seed: int | None,
    as_json: bool,
    model: Path | None = None,
    prompt: str = "",
    max_tokens: int = 0,
    layers: str | None = None,
    context: int | None = None,
    threads: int | None = None,
) -> None:
    """Runs a scenario and reports; status 1 where its workload failed."""
    prepare: Callable[[Lab], None] | None = None
    if model is not None:
        from shoal.lab.model_workload import vouch_for_copies, with_model

        scenario = with_model(
            scenario, model, prompt, max_tokens=max_tokens, layers=layers, context=context, threads=threads
        )
        path = model

        def prepare(lab: Lab) -> None:
            vouch_for_copies(lab, path)

    elif (layers, context, threads) != (None, None, None):
        raise ValueError("--layers, --context and --threads are for --model")
    console = Console(stderr=True, quiet=as_json)
    _warn_of_orphans(console)
    with _ending_on_signals():
        facts = run_scenario(scenario, seed=seed, say=_status(console), prepare=prepare)
    if as_json:
        _print(msgspec.json.encode(facts).decode())
    else:
        report(facts, Console())
    if facts.workload_status not in (0, None) or facts.ended in ("time limit", "router lost"):
        sys.exit(1)


def report(facts: Facts, console: Console) -> None:
    """The facts of a run, for people."""
    workload = facts.workload
    if isinstance(workload, dict) and isinstance(workload.get("pairs"), list):
        console.print(_matrix(workload["pairs"]))
    elif workload not in ("", {}, None):
        console.print("[bold]workload printed[/]")
        # A line for each key: what people write as JSON has few of them, and long lists below.
        lines = [f"{key}: {json.dumps(value)}" for key, value in workload.items()] if isinstance(workload, dict) else []
        text = workload if isinstance(workload, str) else "\n".join(lines) or json.dumps(workload)
        console.print(text, markup=False, highlight=False)
    console.print(_devices_table(facts))
    console.print(_links_table(facts))
    if facts.timeline:
        console.print("[bold]timeline[/]")
        for executed in facts.timeline:
            console.print(f"  {describe_executed(executed)}", markup=False, highlight=False)
    router = facts.router
    status = f" (status {facts.workload_status})" if facts.workload_status else ""
    console.print(
        f"{facts.scenario}, seed {facts.seed}: {facts.seconds:.1f} s, ended by {facts.ended}{status}; "
        f"router {router.core_share_mean:.2f} of a core, {router.core_share_peak:.2f} at its peak, "
        f"priority {router.priority}; logs in {facts.logs}",
        highlight=False,
    )
    for failure in facts.failures:
        console.print(f"[red]failed:[/] {escape(failure)}", highlight=False)
    for mark in facts.marks:
        console.print(f"[yellow]beware:[/] {escape(mark)}", highlight=False)


def _matrix(pairs: list[dict[str, Any]]) -> Table:
    table = _table("from", "to", "Mbit/s", "scenario", "share", "round trip\nms, p50", "p99", "scenario", words=2)
    table.title = "links, measured with TCP, and as the scenario has them"
    for pair in pairs:
        rate, wanted = pair.get("rate_mbit_s"), pair.get("scenario_rate_mbit_s")
        share = f"{100 * rate / wanted:.0f} %" if rate is not None and wanted else ""
        table.add_row(
            pair["from"],
            pair["to"],
            f"{rate:.1f}" if rate is not None else f"[red]{escape(pair.get('problem', '-'))}[/]",
            f"{wanted:.1f}" if wanted is not None else "none",
            share,
            _figure(pair.get("rtt_ms_p50")),
            _figure(pair.get("rtt_ms_p99")),
            _figure(pair.get("scenario_rtt_ms")),
        )
    return table


def _table(*columns: str, words: int) -> Table:
    """A table within 80 columns: `words` columns of text, then figures without units, which the headings have."""
    table = Table(box=None, pad_edge=False, collapse_padding=True, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < words else "right", no_wrap=index >= words, vertical="bottom")
    return table


def _figure(value: float | None) -> str:
    return f"{value:.2f}" if value is not None else "-"


def _megabytes(num_bytes: int | None) -> str:
    return f"{num_bytes * 1e-6:.1f}" if num_bytes is not None else "-"


def _devices_table(facts: Facts) -> Table:
    table = _table(
        "device", "memory\npeak MB", "cap\nMB", "page-ins", "read\nMB", "disk\nMB/s", "CPU\ns", "cores\npeak", "cap", "exit",
        words=1,
    )  # fmt: skip
    table.title = "devices"
    for device in facts.devices:
        killed = f" [red]({device.oom_kills} killed at the cap)[/]" if device.oom_kills else ""
        exits = ",".join("run" if status is None else str(status) for status in device.exit_statuses)
        table.add_row(
            device.name,
            _megabytes(device.memory_bytes_peak),
            _megabytes(device.memory_bytes_max),
            str(device.page_ins),
            _megabytes(device.bytes_read),
            _megabytes(device.disk_bytes_s_max),
            f"{device.cpu_s:.2f}",
            f"{device.cores_peak:.2f}",
            f"{device.cores_max:g}" if device.cores_max is not None else "-",
            f"{exits or '-'}{killed}",
        )
    if any(status is None for device in facts.devices for status in device.exit_statuses):
        table.caption, table.caption_justify = "exit: run means that the command was ended with the run", "left"
    return table


def _links_table(facts: Facts) -> Table:
    table = _table(
        "from", "to", "carried\nMB", "Mbit/s\npeak", "\nlimit", "delay\nms", "queue\nms", "lost by\nqueue", "by\nchance",
        "while\ndown", words=2,
    )  # fmt: skip
    table.title = "links"
    for link in facts.links:
        table.add_row(
            link.source,
            link.target,
            _megabytes(link.num_bytes),
            f"{link.rate_mbit_s_peak:.1f}",
            _limit(link.rate_mbit_s_max, is_up=link.is_up),
            f"{link.delay_ms:g}",
            f"{link.queue_ms_max:.1f}",
            str(link.dropped_by_queue),
            str(link.dropped_by_chance),
            str(link.dropped_while_down),
        )
    return table


def _limit(rate_mbit_s: float | None, *, is_up: bool) -> str:
    if not is_up:
        return "[red]down[/]"
    return f"{rate_mbit_s:g}" if rate_mbit_s is not None else "none"


# ---- a lab that stays


def up(scenario: Scenario, *, seed: int | None, detach: bool, arguments: list[str]) -> None:
    """Keeps a lab open until Ctrl-C, `shoal lab down` or its time is up.

    Args:
        arguments: of this very command, to start it again in the background.
    """
    console = Console(stderr=True)
    _warn_of_orphans(console)
    if detach:
        _detach(arguments, console)
        return
    with _ending_on_signals(), Lab(scenario, seed=seed, say=_status(console)) as lab:
        lab.start_commands()
        console.print(f"[bold]{lab.id}[/] is up: {', '.join(f'{name} {lab.address(name)}' for name in lab.devices)}")
        for mark in static_marks(scenario, os.cpu_count() or 1):
            console.print(f"[yellow]beware:[/] {escape(mark)}", highlight=False)
        console.print(
            f"`shoal lab exec {lab.devices[0]} COMMAND`, `shoal lab links`; Ctrl-C or `shoal lab down` ends it.",
            markup=False,
        )
        timeline, began_s = Timeline(scenario.timeline), time.monotonic()
        while (now_s := time.monotonic() - began_s) < scenario.seconds_max:
            if not lab.router_is_alive():
                raise LabError("the lab's router has ended, and the lab with it")
            for at_s, fault in timeline.due(now_s):
                console.print(
                    describe_executed(execute(lab, fault, at_s=at_s, began_s=began_s)), markup=False, highlight=False
                )
            time.sleep(_TICK_S)
        console.print(f"{lab.id}: its {scenario.seconds_max:g} s are over")


def _detach(arguments: list[str], console: Console) -> None:
    """Starts the lab in a process of its own, and waits until it stands."""
    log = records.logs_folder() / "up.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal", "lab", "up", *arguments],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    give_up_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < give_up_s:
        if process.poll() is not None:
            said = log.read_text(errors="replace").strip().splitlines()
            raise LabError(said[-1].removeprefix("shoal: ") if said else "the lab ended at once")
        for record in records.all_records():
            if record.owner.pid == process.pid and record.state == "ready":
                console.print(f"[bold]{record.id}[/] is up; `shoal lab down` ends it, its words are in {log}")
                return
        time.sleep(_TICK_S)
    process.terminate()
    raise LabError(f"the lab did not stand after {_START_TIMEOUT_S:.0f} s; its words are in {log}")


def execute_in(device: str, command: list[str], *, lab: str | None) -> None:
    """Becomes `command` on a device."""
    from shoal.lab.enter import become

    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        raise ValueError("say what to run, as in `shoal lab exec laptop ping phone`")
    become(records.place_of(records.find_running(lab), device), command)


def links(*, lab: str | None, as_json: bool) -> None:
    """What the links are like now, and what has passed."""
    record = records.find_running(lab)
    client = RouterClient(records.socket_of(record.id))
    try:
        traffic = client.traffic()
    finally:
        client.close()
    if as_json:
        _print(msgspec.json.encode(traffic.links).decode())
        return
    table = _table(
        "from", "to", "\nMbit/s", "delay\nms", "jitter\nms", "loss\n%", "carried\nMB", "queue\nms", "\npeak",
        "lost by\nqueue", "\nchance", "while\ndown", words=2,
    )  # fmt: skip
    table.title = f"links of {record.id}"
    for link in traffic.links:
        shape = link.shape
        table.add_row(
            link.source,
            link.target,
            _limit(round(shape.rate_bit_s * 1e-6, 3) if shape.rate_bit_s is not None else None, is_up=shape.is_up),
            f"{shape.delay_s * 1e3:g}",
            f"{shape.jitter_s * 1e3:g}",
            f"{shape.loss * 100:g}",
            _megabytes(link.num_bytes),
            f"{link.queue_s * 1e3:.1f}",
            f"{link.queue_s_max * 1e3:.1f}",
            str(link.dropped_by_queue),
            str(link.dropped_by_chance),
            str(link.dropped_while_down),
        )
    Console().print(table)


def down(*, lab: str | None) -> None:
    """Ends a lab that is up, and waits until it is gone."""
    record = records.find_running(lab)
    record.owner.send(signal.SIGTERM)
    give_up_s = time.monotonic() + _DOWN_TIMEOUT_S
    while records.folder_of(record.id).exists():
        if not record.owner.is_running():
            problems = records.remove(record)
            if problems:
                raise LabError("; ".join(problems))
            break
        if time.monotonic() > give_up_s:
            raise LabError(f"{record.id} does not end: end process {record.owner.pid} and run `shoal lab clean`")
        time.sleep(_TICK_S)
    # The folder goes first and the process that held it a moment later.
    if wait_ended([record.owner], timeout_s=max(0.0, give_up_s - time.monotonic())):
        raise LabError(f"{record.id} is gone, but its process {record.owner.pid} does not end: end it")
    Console(stderr=True).print(f"{record.id} is gone")


def clean() -> None:
    """Removes what labs whose process is gone have left, and the logs of finished runs."""
    console = Console(stderr=True)
    found, problems = 0, []
    for record in records.all_records():
        if not record.is_orphan:
            console.print(f"{record.id} is running (process {record.owner.pid}): `shoal lab down --lab {record.id}` ends it")
            continue
        found += 1
        left = records.remove(record)
        problems += [f"{record.id}: {problem}" for problem in left]
        if not left:
            console.print(f"removed {record.id}")
    for folder in records.unreadable_folders():
        found += 1
        shutil.rmtree(folder, ignore_errors=True)
        console.print(f"removed {folder.name}")
    shutil.rmtree(records.logs_folder(), ignore_errors=True)
    if not found:
        console.print("no lab has left anything behind")
    if problems:
        raise LabError("; ".join(problems))


# ---- odds and ends


def _status(console: Console) -> Callable[[str], None]:
    def say(text: str) -> None:
        console.print(f"[dim]{escape(text)}[/]", highlight=False)

    return say


def _warn_of_orphans(console: Console) -> None:
    left = [record.id for record in records.all_records() if record.is_orphan]
    if left:
        console.print(f"[yellow]warning:[/] {', '.join(left)} ended without cleaning up: `shoal lab clean` does it")


@contextlib.contextmanager
def _ending_on_signals() -> Iterator[None]:
    """SIGTERM and a closed terminal end a lab as Ctrl-C does: everything is taken down."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(text: str) -> None:
    print(text)  # noqa: T201
