"""What joining, losing a device and the run itself cost: parts of `make bench-train`.

* `join_stall_s`: three devices train (10 MB of gradient, 30 MB of state, a step of about 2 s), a fourth joins over links of
  5, 10 and 20 MB/s. The longest step of the three until the step before its first, less their median before, the greatest of
  the three. `join_step_s` the same for its first step, which waits for its slow links as well.
* `transfer_ratio`: its transfer's seconds over the least that those links allow.
* `resume_ms`: four devices with short steps, one is killed, then another: from the moment when a survivor notices to its
  next step, less a median step; the median. `detect_ms` is from the kill to that moment, `step_ms` the median step.
* `overhead`: two processes on this machine train a small network with torch: seconds per step over those of plain DDP on
  Gloo, in turn, the median of three.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from shoal.ids import NodeId
from shoal.lab.cluster import Lab
from shoal.lab.scenario import DeviceSpec, LinkSpec, Scenario
from shoal.lab.training_workload import Settings, Training, durations
from shoal.transfer.shards import Source, bound_s

LAN_MBIT_S = 400.0
TO_JOINER_MBIT_S = {"a": 40.0, "b": 80.0, "c": 160.0}
NUM_PARAMETERS = 2_500_000
LATENCY_S = 0.001
MEMBERS = ("a", "b", "c")
DDP = """
import sys, time, json, statistics, torch, torch.distributed as dist
kind, rank, address, store, steps = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
torch.set_num_threads(1)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 512))
x = torch.randn(4096, 512)
data = torch.utils.data.TensorDataset(x, x.roll(1, 1))
loss_of = torch.nn.MSELoss(reduction="sum")
times = []
if kind == "ddp":
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(net.parameters())
    sampler = torch.utils.data.DistributedSampler(data, 2, rank)
    while len(times) < steps:
        for a, b in torch.utils.data.DataLoader(data, 64, sampler=sampler):
            optimizer.zero_grad()
            loss_of(model(a), b).backward()
            optimizer.step()
            times.append(time.monotonic())
else:
    import shoal.pytorch as sp
    optimizer = torch.optim.AdamW(net.parameters())
    run = sp.join("overhead", model=net, optimizer=optimizer, dataset=data, global_batch=128, steps=steps, devices=2,
                  listen=address if rank == 0 else "127.0.0.1:0", peers=[address] if rank else [])
    for batch in run:
        if run.step(loss_of(net(batch.x), batch.y)):
            times.append(time.monotonic())
gaps = [b - a for a, b in zip(times, times[1:])][len(times) // 5:]
print(json.dumps(statistics.median(gaps)))
"""


def _scenario(links: list[LinkSpec], names: str) -> Scenario:
    return Scenario(name="training", devices={name: DeviceSpec() for name in names}, links=links)


def _mesh(names: str) -> list[LinkSpec]:
    pairs = [(one, other) for index, one in enumerate(names) for other in names[index + 1 :]]
    return [LinkSpec(between=pair, rate_mbit_s=LAN_MBIT_S) for pair in pairs]


def join(*, step_s: float = 2.0, num_steps: int = 14) -> dict[str, Any]:
    """A fourth device joins three."""
    links = _mesh("abc") + [LinkSpec(between=(name, "d"), rate_mbit_s=rate) for name, rate in TO_JOINER_MBIT_S.items()]
    with Lab(_scenario(links, "abcd")) as lab:
        training = Training(lab)
        settings = Settings(NUM_PARAMETERS, num_steps, len(MEMBERS) * step_s, members_min=3)
        training.start("a", settings)
        for name in "bc":
            training.start(name, settings, peers=["a"])
        training.wait_step("a", 4, 60.0)
        joined_s = training.steps("a")[-1].at_s
        training.start("d", settings, peers=["b"])
        training.wait_step("d", 0, 60.0)
        whole = training.end("d", 60.0)
        first = training.steps("d")[0]
        stalls, firsts = [], []
        for name in MEMBERS:
            steps = training.steps(name)
            usual_s = statistics.median(durations(steps, until_s=joined_s))
            before_s = next(step.at_s for step in steps if step.step == first.step - 1)
            stalls.append(max(durations(steps, after_s=joined_s, until_s=before_s)) - usual_s)
            firsts.append(next(step.at_s for step in steps if step.step == first.step) - before_s - usual_s)
    sources = [Source(NodeId(name), rate * 1e6 / 8, LATENCY_S) for name, rate in TO_JOINER_MBIT_S.items()]
    least_s = bound_s(sources, num_bytes=whole["transfer_bytes"])
    return {
        "join_stall_s": round(max(stalls), 3),
        "join_step_s": round(max(firsts), 3),
        "transfer_ratio": round(whole["transfer_s"] / least_s, 3),
        "transfer_s": round(whole["transfer_s"], 3),
    }


def resume(*, killed: str = "dc") -> dict[str, Any]:
    """Some of four are killed, one after the other."""
    with Lab(_scenario(_mesh("abcd"), "abcd")) as lab:
        training = Training(lab)
        settings = Settings(10_000, 400, 0.4, members_min=4)
        training.start("a", settings)
        for name in "bcd":
            training.start(name, settings, peers=["a"])
        found, detections, usual = [], [], []
        for name in killed:
            seen = training.steps("a") if "a" in training.processes else []
            training.wait_step("a", (seen[-1].step if seen else 0) + 12, 60.0)
            usual_s = statistics.median(durations(training.steps("a")[-10:]))
            killed_s = training.kill(name)
            step = training.steps("a")[-1].step
            training.wait_step("a", step + 3, 30.0)
            after_s = next(each.at_s for each in training.steps("a") if each.step > step and each.at_s > killed_s + 1e-3)
            noticed_s = min((at_s for at_s in training.losses("a") if at_s > killed_s - 0.05), default=after_s)
            detections.append((noticed_s - killed_s) * 1e3)
            usual.append(usual_s * 1e3)
            found.append((after_s - max(noticed_s, killed_s) - usual_s) * 1e3)
        for name in sorted(set("abcd") - set(killed)):
            training.kill(name)
    return {
        "resume_ms": round(statistics.median(found), 1),
        "detect_ms": round(statistics.median(detections), 1),
        "step_ms": round(statistics.median(usual), 1),
        "resumes_ms": [round(each, 1) for each in found],
    }


def overhead(*, steps: int = 150, rounds: int = 3) -> dict[str, Any]:
    """Against plain DDP."""
    seconds: dict[str, list[float]] = {"ddp": [], "shoal": []}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.py"
        script.write_text(DDP)
        for number in range(rounds):
            for kind in seconds:
                arguments = [f"127.0.0.1:{17431 + number}", f"{folder}/store-{number}", str(steps)]
                processes = [
                    subprocess.Popen(
                        [sys.executable, str(script), kind, str(rank), *arguments],
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
                    )
                    for rank in range(2)
                ]
                try:
                    outputs = [process.communicate(timeout=120)[0] for process in processes]
                finally:
                    for process in processes:
                        process.kill()
                seconds[kind].append(max(json.loads(output) for output in outputs))
    ddp_s, shoal_s = (statistics.median(seconds[kind]) for kind in ("ddp", "shoal"))
    return {"overhead": round(shoal_s / ddp_s, 3), "ddp_step_s": seconds["ddp"], "shoal_step_s": seconds["shoal"]}


def measure(*, is_quick: bool = False) -> dict[str, Any]:
    """All of it; less of each where it must be quick. Raises LabUnavailable, LabError."""
    figures: dict[str, Any] = {}
    quick = (partial(join, step_s=0.7, num_steps=12), partial(resume, killed="d"), partial(overhead, steps=40, rounds=1))
    for part in quick if is_quick else (join, resume, overhead):
        figures |= part()
        print(figures, file=sys.stderr, flush=True)
    return figures


if __name__ == "__main__":
    print(json.dumps(measure()))
