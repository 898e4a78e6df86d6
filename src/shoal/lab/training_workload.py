"""A training run as a workload: devices of a lab join, are killed and come back. No torch: computing takes a set time.

`member` runs on a device and prints a line of JSON per step, at last one of the whole; `Training` starts members in a lab,
and reads what they printed. All devices of a lab have this machine's clock.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from shoal.errors import LabError
from shoal.lab.cluster import DeviceProcess, Lab
from shoal.lab.linear_model import Linear
from shoal.lab.scenario import Kill
from shoal.runs.run import Run, StepDone
from shoal.training.samples import SampleOrder

PORT = 5203
_LOOK_S = 0.05


class Settings(msgspec.Struct, frozen=True):
    """What every member is told.

    Attributes:
        num_parameters: the state has three times as many float32, what is reduced in every step once as many.
        compute_s: what one device alone takes for a step.
        folder: for checkpoints; None: none are written.
    """

    num_parameters: int
    num_steps: int
    compute_s: float
    members_min: int
    global_batch: int = 120
    checkpoint_every: int = 5
    folder: str | None = None


class Step(NamedTuple):
    """A step as one member applied it; `at_s` on the machine's clock."""

    step: int
    at_s: float
    loss: float
    members: int
    digest: str
    part: int


def member(address: str, peers: Sequence[str], settings: Settings) -> None:
    """Takes part until the run ends, and prints what happens.

    Raises:
        ShoalError: it cannot.
    """
    model = Linear(50, padding=settings.num_parameters - 50, num_samples=2400)
    order = SampleOrder(0, 2400, settings.global_batch)
    run = Run(
        "lab",
        model,
        order,
        num_steps=settings.num_steps,
        listen=f"{address}:{PORT}",
        peers=tuple(f"{peer}:{PORT}" for peer in peers),
        folder=Path(settings.folder) if settings.folder is not None else None,
        checkpoint_every=settings.checkpoint_every,
        members_min=settings.members_min,
        samples_per_s=settings.global_batch / max(settings.compute_s, 1e-3),
    )
    part = 0

    def note(done: StepDone) -> None:
        row = Step(done.step, time.monotonic(), done.loss, done.num_members, model.digest()[:12], part)
        print(json.dumps(row), flush=True)  # noqa: T201

    run.on_step = note
    run.on_loss = lambda: print(json.dumps({"lost_at_s": time.monotonic()}), flush=True)  # noqa: T201
    while (task := run.next_task()) is not None:
        part = len(task.part)
        began_s = time.monotonic()
        loss, gradients = model.loss_and_gradients(order.samples(task.part))
        wanted_s = settings.compute_s * part / settings.global_batch
        time.sleep(max(0.0, wanted_s - (time.monotonic() - began_s)))
        run.contribute(task, gradients, loss_sum=loss)
        part = 0
    run.close()
    whole = {
        "node": run.me,
        "finished": run.is_finished,
        "transfer_s": run.transfer_s,
        "transfer_bytes": run.transfer_bytes,
        "snapshot_s": run.snapshot_s,
        "digest": model.digest()[:12],
        "entries": [[entry.step, entry.epoch, len(entry.parts), entry.digest] for entry in run.entries],
        "samples": [[part.first, part.stop] for entry in run.entries for _, part in entry.parts],
        "warnings": run.warnings,
    }
    print(json.dumps(whole), flush=True)  # noqa: T201


class Training:
    """Members on devices of an open lab, by the devices' names."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.processes: dict[str, DeviceProcess] = {}

    def start(self, device: str, settings: Settings, *, peers: Sequence[str] = ()) -> None:
        file = self._lab.folder / f"training-{device}-{len(self._lab.processes(device))}.json"
        file.write_bytes(msgspec.json.encode(settings))
        command = [sys.executable, "-m", "shoal.lab.training_workload", self._lab.address(device), str(file)]
        command += [self._lab.address(peer) for peer in peers]
        self.processes[device] = self._lab.start(device, command)

    def kill(self, device: str) -> float:
        """SIGKILL. Returns when."""
        self._lab.apply(Kill(at_s=0.0, device=device))
        return time.monotonic()

    def steps(self, device: str) -> list[Step]:
        """What the member has printed so far."""
        text = self.processes[device].stdout.read_text(errors="replace")
        return [Step(*json.loads(line)) for line in text.split("\n")[:-1] if line.startswith("[")]

    def losses(self, device: str) -> list[float]:
        """When the member noticed that another was lost, on the machine's clock."""
        text = self.processes[device].stdout.read_text(errors="replace")
        return [json.loads(line)["lost_at_s"] for line in text.split("\n")[:-1] if line.startswith('{"lost')]

    def wait_step(self, device: str, step: int, timeout_s: float) -> None:
        """Until the member has applied it. Raises LabError."""
        give_up_s = time.monotonic() + timeout_s
        while not any(each.step >= step for each in self.steps(device)):
            if time.monotonic() > give_up_s or self.processes[device].exit_status is not None:
                raise LabError(f"{device} did not come to step {step}: {self._said(device)}")
            time.sleep(_LOOK_S)

    def end(self, device: str, timeout_s: float) -> dict[str, Any]:
        """What the member printed at its end. Raises LabError, subprocess.TimeoutExpired."""
        process = self.processes[device]
        if process.wait(timeout_s) != 0:
            raise LabError(f"the member on {device} failed: {self._said(device)}")
        last = process.stdout.read_text(errors="replace").strip().rpartition("\n")[2]
        found: dict[str, Any] = json.loads(last)
        return found

    def _said(self, device: str) -> str:
        said = self.processes[device].stderr.read_text(errors="replace").strip().splitlines()
        return said[-1] if said else "it said nothing"


def durations(steps: Sequence[Step], *, after_s: float = 0.0, until_s: float = float("inf")) -> list[float]:
    """Seconds from each step to the next, of those that ended in between."""
    return [later.at_s - earlier.at_s for earlier, later in pairwise(steps) if after_s < later.at_s <= until_s]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m shoal.lab.training_workload", description=__doc__)
    parser.add_argument("address")
    parser.add_argument("settings", type=Path)
    parser.add_argument("peers", nargs="*")
    arguments = parser.parse_args()
    member(arguments.address, arguments.peers, msgspec.json.decode(arguments.settings.read_bytes(), type=Settings))


if __name__ == "__main__":
    main()
