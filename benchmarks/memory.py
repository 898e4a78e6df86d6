"""A model larger than memory, on one device of the lab: seconds per token against what disk, memory and processor allow.

The bound comes from cap, file and machine alone: `max(C, S / D)`. `C` is the time of a token with everything in memory,
measured on a device alike without a cap; `D` is the disk's rate, which the lab sets; `S = weights + cache + floor - cap`
are the bytes that cannot stay, where `floor` is the anonymous memory of an idle agent and worker. The cap holds 60 % of
the weights; three rates make the disk the bound by two, both equal, and computing the bound by two. Every run starts with
the file outside the page cache.

* `ratio_one`: the worst of `measured_s / bound_s` (medians over rounds), and `ratios` by scenario.
* `floor_mb`: that memory of an idle agent and worker.
* `ratio_ring`, `mmap_ratio`, `mmap_vs_llamacpp` (our speed over llama.cpp's) and `read_ratio`: see `memory_ring.py`.
* `prefill_ratio`: see `prefill.py`.
* `oom_kills`, and per scenario `peak_bytes` (page cache included) and `pinned_bytes` (without it).

All runs must give the same tokens.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import memory_ring
from benchmarks.models import random_model, smollm2
from benchmarks.prefill import measure_prefill
from benchmarks.record import finish, is_quick
from shoal.compute.model import Model
from shoal.errors import LabUnavailable
from shoal.lab import copies
from shoal.lab.cluster import Lab
from shoal.lab.model_workload import vouch_for
from shoal.lab.scenario import DeviceSpec, Disk, FileSpec, LinkSpec, Scenario, Squeeze, Workload, check
from shoal.units import MIB

PORT = 7433
DISK_MB_S = 800.0
"""Until a token's time, and with it the rates, are known."""
CORES = 0.5
"""Little, so that a token takes long enough for this machine's disk to reach the rates."""
CONTEXT = 512
CONTEXT_MIN = 16
SCENARIOS = {"disk": 2.0, "balanced": 1.0, "compute": 0.5}
"""Seconds of reading per second of computing."""
AMPLE_MIB = 16 * 1024
"""A cap that is none."""


def scenario(model: Path) -> Scenario:
    """A device with a disk and a share of a core, one without a disk's limit to compare with, and one that asks."""
    home = DeviceSpec(memory_mib=AMPLE_MIB, disk_mb_s=DISK_MB_S, cores=CORES, files=[FileSpec(path=str(model.absolute()))])
    devices = {"home": home, "roomy": DeviceSpec(memory_mib=AMPLE_MIB, cores=CORES), "client": DeviceSpec()}
    links = [LinkSpec(between=("client", name)) for name in ("home", "roomy")]
    return Scenario(name="memory", devices=devices, links=links, workload=Workload(program="none"), seconds_max=1200)


class Bench:
    """One lab; every answer comes from a fresh agent that finds nothing of the file in memory."""

    def __init__(self, lab: Lab, model: Path) -> None:
        self._lab = lab
        self._file = lab.files_folder("home") / model.name

    def floor_bytes(self, device: str) -> int:
        """Anonymous memory of an agent and a worker that wait, with hardly any cache and all weights in the map."""
        return int(self.answer(device, tokens=1, context=CONTEXT_MIN)["anonymous_bytes"])

    def answer(self, device: str, *, tokens: int, memory_bytes: int | None = None, context: int = CONTEXT) -> dict[str, Any]:
        """Asks for `tokens` and returns what the client printed, and what the device used meanwhile."""
        lab = self._lab
        copies.make_cold(self._file.parent)
        command = f"shoal up --listen={{address}}:{PORT} --models={self._file.parent}"
        command += f" --memory={memory_bytes}" if memory_bytes is not None else ""
        agent = lab.start(device, command)
        lab.wait_listening(agent, PORT)
        before, pinned = lab.usage(device), Peak(lab, device)
        ask = [
            *("shoal", "run", str(self._file), f"--agent={{address:{device}}}:{PORT}", "--json", "--temperature=0"),
            # What is streamed is not repacked, and other kernels give other bits.
            *(
                "--threads=1",
                "--no-repack",
                f"--context={context}",
                f"--max-tokens={tokens}",
                "--raw",
                "--",
                "one two three",
            ),
        ]
        try:
            status, output, errors = lab.run("client", ask, timeout_s=300)
        finally:
            pinned_bytes = pinned.stop()
            after = lab.usage(device)  # of an agent and a worker that have answered and now wait
            agent.popen.terminate()
            agent.wait(20)
        if status != 0:
            raise RuntimeError(f"{device}: {errors.strip() or output}\n{agent.stderr.read_text()}")
        answer = json.loads(output)
        return {
            **answer,
            "token_s": 1.0 / answer["tokens_per_s"] if tokens > 1 else None,
            "anonymous_bytes": after.anonymous_bytes,
            "pinned_bytes": pinned_bytes,
            "peak_bytes": after.memory_bytes_peak,
            "page_ins": after.page_ins - before.page_ins,
            "oom_kills": after.oom_kills - before.oom_kills,
        }


class Peak:
    """The most memory beside the page cache, sampled."""

    def __init__(self, lab: Lab, device: str) -> None:
        self._lab, self._device = lab, device
        self._bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.1):
            self._bytes = max(self._bytes, self._lab.usage(self._device).pinned_bytes)

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return self._bytes


def measure(lab: Lab, model: Path, *, names: Sequence[str], tokens: int) -> dict[str, dict[str, float]]:
    """Figures of every scenario."""
    opened = Model(model)
    weights_bytes = sum(opened.layer_bytes) + opened.output_bytes
    cache_bytes = CONTEXT * opened.shape.num_layers * opened.shape.kv_bytes_per_token_and_layer
    opened.close()
    bench = Bench(lab, model)
    floor_bytes = bench.floor_bytes("roomy")
    roomy = bench.answer("roomy", tokens=tokens)
    compute_s, expected_ids = roomy["token_s"], roomy["token_ids"]
    must_read_bytes = int((1 - memory_ring.RESIDENT_SHARE) * weights_bytes)
    cap_bytes = weights_bytes + floor_bytes + cache_bytes - must_read_bytes
    lab.apply(Squeeze(device="home", memory_mib=cap_bytes / MIB))
    found: dict[str, dict[str, float]] = {}
    for name in names:
        read_bytes_per_s = must_read_bytes / (SCENARIOS[name] * compute_s)
        lab.apply(Disk(device="home", disk_mb_s=read_bytes_per_s * 1e-6))
        answer = bench.answer("home", tokens=tokens, memory_bytes=cap_bytes)
        if answer["token_ids"] != expected_ids:
            raise RuntimeError(f"{name}: {answer['token_ids']} instead of {expected_ids}")
        found[name] = row = {
            "bound_s": max(compute_s, must_read_bytes / read_bytes_per_s),
            "measured_s": answer["token_s"],
            "compute_s": compute_s,
            "disk_mb_s": read_bytes_per_s * 1e-6,
            "cap_bytes": cap_bytes,
            "floor_bytes": floor_bytes,
            "must_read_bytes": must_read_bytes,
            "streamed_bytes": sum(stage["streamed_bytes"] for stage in answer["stages"]),
            **{key: answer[key] for key in ("peak_bytes", "pinned_bytes", "oom_kills", "page_ins")},
        }
        print(name, row, file=sys.stderr)
    return found


def main() -> None:
    # The larger one takes minutes; beside the smaller one, what a worker takes for itself is not small.
    model = random_model("llama-3.2-1b", "F16") if is_quick() else memory_ring.ring_model()
    played = scenario(model)
    check(played, label="benchmark")
    # Most of a run is starting programs on a fifth of a core.
    rounds, tokens, names = (1, 5, ["disk", "balanced"]) if is_quick() else (1, 12, list(SCENARIOS))
    try:
        with Lab(played) as lab:
            for device in ("home", "roomy"):
                vouch_for(lab, device, lab.files_folder("home") / model.name, original=model)
            details = [measure(lab, model, names=names, tokens=tokens) for _ in range(rounds)]
        ring = {} if is_quick() else memory_ring.measure_home(SCENARIOS, tokens=9)
        starved = {} if is_quick() else memory_ring.measure_starved(rounds=2, tokens=12)
        alone = {} if is_quick() else memory_ring.measure_alone(rounds=1, tokens=6)
        prefill = {} if is_quick() else measure_prefill(smollm2(), rounds=3)
    except LabUnavailable as error:
        sys.exit(f"shoal: {error}")
    ratios = {
        name: statistics.median(found[name]["measured_s"] / found[name]["bound_s"] for found in details) for name in names
    }
    rows = [*(row for found in details for row in found.values()), *ring.values()]
    ring_ratios = {name: round(row["measured_s"] / row["bound_s"], 4) for name, row in ring.items()}
    figures = {
        "ratio_one": round(max(ratios.values()), 4),
        "ratios": {name: round(ratio, 4) for name, ratio in ratios.items()},
        "read_ratio": alone.get("read_ratio"),
        "floor_mb": round(details[0][names[0]]["floor_bytes"] / 1e6, 1),
        "oom_kills": sum(row["oom_kills"] for row in rows),
        "ratio_ring": max(ring_ratios.values(), default=None),
        "ring_ratios": ring_ratios,
        "mmap_ratio": starved.get("mmap_ratio"),
        "mmap_vs_llamacpp": alone.get("mmap_vs_llamacpp"),
        "prefill_ratio": prefill.get("prefill_ratio"),
        "details": details,
        "prefill": prefill,
        "ring": ring,
        "starved": starved,
        "alone": alone,
    }
    finish("memory", figures, {"cores": CORES, "context": CONTEXT, "tokens": tokens})


if __name__ == "__main__":
    main()
