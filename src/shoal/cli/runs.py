"""`shoal runs`, `shoal runs recover RUN`, `shoal leave RUN`: the training runs that this device takes part in."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from shoal.errors import DeviceRefused
from shoal.runs import registry

LEAVE_S = 60.0
RECOVER_S = 20.0
_LOOK_S = 0.1


def runs(*, as_json: bool) -> None:
    """Lists the runs that this device takes part in."""
    rows: list[dict[str, Any]] = []
    for entry in registry.entries():
        said = registry.ask(entry, "status")
        rows.append(said or {"run": entry.run, "node": entry.node, "address": entry.address, "phase": "silent"})
    if as_json:
        sys.stdout.write(json.dumps(rows) + "\n")
        return
    if not rows:
        sys.stdout.write("no run on this device: `shoal train SCRIPT` starts one\n")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("RUN", "DEVICE", "STATE", "STEP", "LOSS", "DEVICES", "SAMPLES/S", "ADDRESS"):
        table.add_column(title, justify="right" if title in ("STEP", "LOSS", "DEVICES", "SAMPLES/S") else "left")
    for row in rows:
        loss = row.get("loss")
        table.add_row(
            row["run"],
            str(row["node"])[:8],
            "suspended" if row.get("is_suspended") else row["phase"],
            f"{row['step'] + 1}/{row['num_steps']}" if "step" in row else "",
            f"{loss:.4f}" if loss is not None else "",
            str(row.get("members", "")),
            f"{row['samples_per_s']:.3g}" if "samples_per_s" in row else "",
            row["address"],
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def leave(run: str, *, as_json: bool) -> None:
    """Lets this device's members of a run leave at the next step boundary, and waits for it.

    Raises:
        ValueError: this device is in no such run.
        DeviceRefused: one has not left in time.
    """
    own = _own(run)
    for entry in own:
        registry.ask(entry, "leave")
    give_up_s = time.monotonic() + LEAVE_S
    nodes = {entry.node for entry in own}
    while nodes & {entry.node for entry in registry.entries()}:
        if time.monotonic() > give_up_s:
            raise DeviceRefused(f"a member of '{run}' has not left within {LEAVE_S:g} s: its step takes longer, or it hangs")
        time.sleep(0.1)
    if as_json:
        sys.stdout.write(json.dumps({"run": run, "left": sorted(nodes)}) + "\n")
    else:
        sys.stdout.write(f"left '{run}' with {len(nodes)} member{'s' if len(nodes) > 1 else ''}\n")


def recover(run: str, *, is_sure: bool, as_json: bool) -> None:
    """Says what goes on without the members of a run that are lost, and what does not; lets it go on if the owner is sure.

    Raises:
        ValueError: this device is in no such run.
        DeviceRefused: the run has its majority, or nobody here has its state.
        SystemExit: it needs to be sure of.
    """
    said = [(entry, registry.ask(entry, "status") or {}) for entry in _own(run)]
    waiting = [(entry, status) for entry, status in said if status.get("is_suspended")]
    if not waiting:
        raise DeviceRefused(f"'{run}' has a majority of its members: nothing is lost, and there is nothing to recover")
    entry, status = max(waiting, key=lambda each: (each[1]["has_state"], each[1]["step"]))
    if not status["has_state"]:
        raise DeviceRefused(
            f"this device has not got the state of '{run}': recover it on one that has, or start it again from a checkpoint"
        )
    step, absent = status["step"] + 1, [str(node) for node in status["absent"]]
    if is_sure:
        status = _recovered(entry)
    if as_json:
        told = {"run": run, "step": step, "lost": absent, "members": status["members"], "is_recovered": is_sure}
        sys.stdout.write(json.dumps(told) + "\n")
    elif is_sure:
        sys.stdout.write(f"'{run}' goes on after step {step} without {_names(absent)}\n")
    else:
        sys.stdout.write(_what_recovering_means(run, status, step, absent))
    if not is_sure:
        sys.exit(1)


def _what_recovering_means(run: str, status: dict[str, Any], step: int, absent: list[str]) -> str:
    here = status["num_listed"] - len(absent)
    return (
        f"'{run}' waits: {here} of its {status['num_listed']} members {'answers' if here == 1 else 'answer'}, "
        "and a majority has to.\n"
        f"kept: the model and its ledger up to step {step} of {status['num_steps']}\n"
        f"lost: {_names(absent)}, and every step after {step} that they may have computed\n"
        "Are they only cut off, then bring them back instead: the run goes on by itself. Should they still train somewhere, "
        "what they did since is given up when they meet this device again.\n"
        f"Nothing was changed. To go on without them: shoal runs recover {run} --yes\n"
    )


def _recovered(entry: registry.Entry) -> dict[str, Any]:
    """Asks for it, and waits until it is done. Raises DeviceRefused."""
    registry.ask(entry, "recover")
    give_up_s = time.monotonic() + RECOVER_S
    while (status := registry.ask(entry, "status") or {}).get("is_suspended", True):
        if time.monotonic() > give_up_s:
            raise DeviceRefused(f"the member of '{entry.run}' did not go on within {RECOVER_S:g} s: is it still there?")
        time.sleep(_LOOK_S)
    return status


def _names(nodes: list[str]) -> str:
    return ", ".join(f"member {node[:8]}" for node in nodes)


def _own(run: str) -> list[registry.Entry]:
    """This device's members of a run. Raises ValueError."""
    entries = registry.entries()
    own = [entry for entry in entries if entry.run == run]
    if not own:
        known = sorted({entry.run for entry in entries})
        raise ValueError(f"this device is in no run '{run}'" + (f": it is in {', '.join(known)}" if known else ""))
    return own
