"""Rings of devices that hold a model's weights only in part: `memory.py` runs this and prints its figures.

**The ring of four** has `home4`'s links. Every device has the same memory, for a quarter of 60 % of the weights beside what
agent, worker and cache take, and the same disk, whose rate makes reading take twice as long as computing and hops, as long,
or half as long. The bound is the best of any k rounds and any read-ahead A: with S = W + KV + floor + A - cap bytes to read
per device and token, at D bytes per second, where a device computes C,

    T >= S / D,   T >= sum of V + k * hops,   V >= C,   V >= (S - k * A) / D   (two devices or more)

C and hops are measured with everything in memory.

`floor` is the anonymous memory of an idle agent and worker.

**The starved ring** has three devices without delays, 550 MB of layers each, a cap of 400 MB and a disk of 600 MB/s: planned
by us, and with `--residency mmap`. **Alone**, one device with room for two thirds of that model uses `--residency mmap`, and
llama.cpp, with the same disk; and streams from a faster one, where bytes read are counted at the disk over 50 tokens, beside
a process that writes a log into the same memory (`read_ratio`: over W + KV + floor - cap).
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.models import CACHE
from shoal.compute.model import Model
from shoal.lab import copies
from shoal.lab.cluster import Lab
from shoal.lab.model_workload import PORT, vouch_for
from shoal.lab.random_model import write_random_model
from shoal.lab.scenario import DeviceSpec, Disk, FileSpec, LinkSpec, Scenario, Squeeze, Workload, check, load
from shoal.lab.shapes import SHAPES
from shoal.units import MIB

CONTEXT = 256
RESIDENT_SHARE = 0.6
AMPLE_MIB = 12 * 1024
CORES = 0.5
"""So slow that the disk of this machine can keep up with four devices that read at once."""
STARVED_DISK_MB_S = 600.0
STARVED_CAP_MB = 400.0
READ_DISK_MB_S = 1500.0
STARVED_LAYERS = (22, 22, 22)
ASK_TIMEOUT_S = 300.0
SHORT_PROMPT = "--expect-prompt=4"
"""Tokens are timed, so plans are made for a prompt as short as the one that is asked."""


def ring_model() -> Path:
    """3.7 GB in 48 layers; IQ3_S, which takes long to compute for its size, as larger models on slower machines do."""
    return _made("ring-48", "IQ3_S", num_layers=48, hidden_size=4096, feed_forward_size=11008, num_heads=32)


def starved_model() -> Path:
    """66 layers of 25 MB, 1.65 GB, as in the measurement of prima.cpp that this is compared with."""
    return _made("starved-66", "F16", num_layers=66, hidden_size=1024, feed_forward_size=3072, num_heads=8)


def _made(name: str, quantisation: str, **changes: Any) -> Path:
    path = CACHE / f"{name}-{quantisation}.gguf"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        shape = msgspec.structs.replace(SHAPES["tiny"], head_size=128, num_kv_heads=8, vocab_size=4096, **changes)
        write_random_model(path, shape, quantisation=quantisation)
    return path


def weights_bytes(path: Path) -> tuple[int, int]:
    """All that is multiplied with, and the cache of all layers."""
    model = Model(path)
    try:
        cache_bytes = CONTEXT * model.shape.kv_bytes_per_token_and_layer * len(model.layer_bytes)
        return sum(model.layer_bytes) + model.output_bytes, cache_bytes
    finally:
        model.close()


class Ring:
    """Devices of one lab, each with its own copy of the model, and one that asks the first of them."""

    def __init__(self, lab: Lab, model: Path, names: Sequence[str]) -> None:
        self._lab, self._model, self.names = lab, model, list(names)
        for name in names:
            vouch_for(lab, name, lab.files_folder(name) / model.name, original=model)

    def answer(self, options: Sequence[str], *, tokens: int, memory_bytes: Sequence[int] | None = None) -> dict[str, Any]:
        """From fresh agents that find nothing of the file in memory: what the client printed, and what devices used."""
        with self.standing(self.names, memory_bytes):
            return self.ask(options, tokens=tokens)

    def forget_profiles(self) -> None:
        """Lets devices measure themselves anew for the next answer."""
        for name in self.names:
            (self._lab.device_folder(name) / "home" / ".cache" / "shoal" / "profiles.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def standing(self, names: Sequence[str], memory_bytes: Sequence[int] | None = None) -> Iterator[None]:
        """Fresh agents on some devices, with nothing of the file in memory.

        Args:
            memory_bytes: of all devices of the ring, in its order.
        """
        lab, head, agents = self._lab, self.names[0], []
        for name in names:
            copies.make_cold(lab.files_folder(name))
            command = f"shoal up --listen={{address}}:{PORT} --models={lab.files_folder(name)}"
            if memory_bytes is not None:
                command += f" --memory={memory_bytes[self.names.index(name)]}"
            if name == head:
                command += "".join(f" --peer={{address:{other}}}:{PORT}" for other in self.names[1:])
            agents.append(lab.start(name, command))
        try:
            for agent in agents:
                lab.wait_listening(agent, PORT)
            yield
        finally:
            for agent in agents:
                agent.popen.terminate()
            for agent in agents:
                agent.wait(20)

    def ask(self, options: Sequence[str], *, tokens: int) -> dict[str, Any]:
        """What the client printed, and what devices used, of agents that stand."""
        lab, head = self._lab, self.names[0]
        before = {name: lab.usage(name) for name in self.names}
        file = lab.files_folder(head) / self._model.name
        ask = ["shoal", "run", str(file), f"--agent={{address:{head}}}:{PORT}", "--json", "--temperature=0", "--threads=1"]
        # What is streamed is not repacked, and other kernels give other bits.
        ask += ["--no-repack", f"--context={CONTEXT}", f"--max-tokens={tokens}", *options, "--raw", "--", "one two three"]
        status, output, errors = lab.run("client", ask, timeout_s=ASK_TIMEOUT_S)
        after = {name: lab.usage(name) for name in self.names}
        if status != 0:
            raise RuntimeError(errors.strip() or output)
        answer: dict[str, Any] = json.loads(output)
        return {
            **answer,
            "token_s": 1.0 / answer["tokens_per_s"] if tokens > 1 else None,
            "anonymous": [after[name].anonymous_bytes for name in self.names],  # before the agents end
            "peak": [after[name].memory_bytes_peak for name in self.names],
            "oom_kills": sum(after[name].oom_kills - before[name].oom_kills for name in self.names),
            "bytes_read": sum(after[name].bytes_read - before[name].bytes_read for name in self.names),
        }


def bound_s(*, must_read_bytes: float, read_bytes_per_s: float, compute_s: float, hops_s: float, num_devices: int) -> float:
    """Of equal devices that compute `compute_s` and must read as much each: the least T of the module's program."""
    least_s = float("inf")
    for rounds in range(1, 65):
        # With any T, reading ahead as much as the disk allows within T leaves least to wait for.
        low_s, high_s = must_read_bytes / read_bytes_per_s, 1e6
        for _ in range(100):
            token_s = (low_s + high_s) / 2
            ahead_bytes = token_s * read_bytes_per_s - must_read_bytes
            visit_s = max(compute_s, token_s - rounds * ahead_bytes / read_bytes_per_s)
            if num_devices * visit_s + rounds * hops_s <= token_s:
                high_s = token_s
            else:
                low_s = token_s
        least_s = min(least_s, high_s)
    return least_s


def home_ring(model: Path) -> Scenario:
    home = load("home4")
    files = [FileSpec(path=str(model.absolute()))]
    device = DeviceSpec(memory_mib=AMPLE_MIB, disk_mb_s=3000, cores=CORES, files=files)
    devices = dict.fromkeys(home.devices, device)
    links = [*home.links, LinkSpec(between=("client", next(iter(devices))))]
    return msgspec.structs.replace(
        home, devices={**devices, "client": DeviceSpec()}, links=links, workload=Workload(program="none"),
        multicast=False, seconds_max=1500,
    )  # fmt: skip


def measure_home(regimes: dict[str, float], *, tokens: int) -> dict[str, dict[str, Any]]:
    """Figures per regime: seconds of reading per second of computing and hops."""
    model = ring_model()
    played = home_ring(model)
    check(played, label="benchmark")
    total_bytes, cache_bytes = weights_bytes(model)
    found: dict[str, dict[str, Any]] = {}
    with Lab(played) as lab:
        names = [name for name in lab.devices if name != "client"]
        ring = Ring(lab, model, names)
        equal = f"--layers={','.join(['12'] * len(names))}"
        floors = ring.answer([equal], tokens=1)["anonymous"]
        roomy = ring.answer([equal], tokens=tokens)
        compute_s = sum(stage["compute_s"] for stage in roomy["stages"])
        hops_s = roomy["token_s"] - compute_s
        must_read_bytes = (1 - RESIDENT_SHARE) * total_bytes / len(names)
        kept_bytes = (RESIDENT_SHARE * total_bytes + cache_bytes) / len(names)
        caps = [int(floor_bytes + kept_bytes) for floor_bytes in floors]
        for name, cap in zip(names, caps, strict=True):
            lab.apply(Squeeze(device=name, memory_mib=cap / MIB))
        for regime, disk_share in regimes.items():
            rate = must_read_bytes / (disk_share * roomy["token_s"])
            for name in names:
                lab.apply(Disk(device=name, disk_mb_s=rate * 1e-6))
            answer = ring.answer([SHORT_PROMPT], tokens=tokens, memory_bytes=caps)
            if answer["token_ids"] != roomy["token_ids"]:
                raise RuntimeError(f"ring, {regime}: {answer['token_ids']} instead of {roomy['token_ids']}")
            found[regime] = row = {
                "bound_s": bound_s(
                    must_read_bytes=must_read_bytes,
                    read_bytes_per_s=rate,
                    compute_s=compute_s / len(names),
                    hops_s=hops_s,
                    num_devices=len(names),
                ),
                "measured_s": answer["token_s"],
                "compute_s": compute_s,
                "hops_s": hops_s,
                "disk_mb_s": rate * 1e-6,
                "must_read_bytes": must_read_bytes * len(names),
                "streamed_bytes": sum(stage["streamed_bytes"] for stage in answer["stages"]),
                "rounds": len(answer["stages"][0]["layers"]),
                "peak_bytes": answer["peak"],
                "floor_bytes": floors,
                "cap_bytes": caps,
                "oom_kills": answer["oom_kills"],
                "stages": [
                    {key: stage[key] for key in ("compute_s", "disk_s", "wait_s", "wire_s")} for stage in answer["stages"]
                ],
            }
            print("ring", regime, row, file=sys.stderr)
    return found


def starved_ring(model: Path) -> Scenario:
    files = [FileSpec(path=str(model.absolute()))]
    device = DeviceSpec(memory_mib=STARVED_CAP_MB * 1e6 / MIB, disk_mb_s=STARVED_DISK_MB_S, files=files)
    names = ("first", "second", "third")
    links = [LinkSpec(between=pair) for pair in (("first", "second"), ("second", "third"), ("third", "first"))]
    links.append(LinkSpec(between=("client", "first")))
    devices = {**dict.fromkeys(names, device), "client": DeviceSpec()}
    return Scenario(name="starved", devices=devices, links=links, workload=Workload(program="none"), seconds_max=1500)


def measure_starved(*, rounds: int, tokens: int) -> dict[str, Any]:
    """Seconds per token, planned by us and with the map, in turns."""
    model = starved_model()
    played = starved_ring(model)
    check(played, label="benchmark")
    by_hand = f"--layers={','.join(map(str, STARVED_LAYERS))}"
    auto_s, mmap_s = [], []
    with Lab(played) as lab:
        ring = Ring(lab, model, [name for name in lab.devices if name != "client"])
        caps = [int(STARVED_CAP_MB * 1e6)] * len(ring.names)
        for _ in range(rounds):
            auto = ring.answer([by_hand], tokens=tokens, memory_bytes=caps)
            mapped = ring.answer([by_hand, "--residency=mmap", "--rounds=1"], tokens=max(4, tokens // 3))
            if auto["token_ids"][: len(mapped["token_ids"])] != mapped["token_ids"]:
                raise RuntimeError(f"starved: {auto['token_ids']} instead of {mapped['token_ids']}")
            auto_s.append(auto["token_s"])
            mmap_s.append(mapped["token_s"])
            print("starved", auto_s[-1], mmap_s[-1], auto["stages"], file=sys.stderr)
    return {
        "auto_s": statistics.median(auto_s),
        "mmap_s": statistics.median(mmap_s),
        "mmap_ratio": statistics.median(slow / fast for slow, fast in zip(mmap_s, auto_s, strict=True)),
        "rounds": len(auto["stages"][0]["layers"]),
    }


def alone(model: Path) -> Scenario:
    files = [FileSpec(path=str(model.absolute()))]
    device = DeviceSpec(memory_mib=AMPLE_MIB, disk_mb_s=READ_DISK_MB_S, files=files)
    links = [LinkSpec(between=("client", "only"))]
    return Scenario(
        name="alone",
        devices={"only": device, "client": DeviceSpec()},
        links=links,
        workload=Workload(program="none"),
        seconds_max=1500,
    )


def measure_alone(*, rounds: int, tokens: int) -> dict[str, Any]:
    """What one device reads, and seconds per token of our map and of llama.cpp's, in turns, under the same cap."""
    model = starved_model()
    total_bytes, cache_bytes = weights_bytes(model)
    played = alone(model)
    check(played, label="benchmark")
    with Lab(played) as lab:
        ring = Ring(lab, model, ["only"])
        (floor_bytes,) = ring.answer([], tokens=1)["anonymous"]
        needed_bytes = total_bytes + cache_bytes + floor_bytes
        cap_bytes = total_bytes * 2 // 3
        lab.apply(Squeeze(device="only", memory_mib=cap_bytes / MIB))
        read_bytes = _bytes_per_token(lab, ring, cap_bytes)
        lab.apply(Disk(device="only", disk_mb_s=STARVED_DISK_MB_S))
        ours_s, theirs_s = [], []
        for _ in range(rounds):
            ours_s.append(ring.answer(["--residency=mmap"], tokens=tokens)["token_s"])
            theirs_s.append(_llamacpp_token_s(lab, model, tokens))
            print("alone", ours_s[-1], theirs_s[-1], file=sys.stderr)
    return {
        "read_ratio": read_bytes / (needed_bytes - cap_bytes),
        "read_bytes": read_bytes,
        "must_read_bytes": needed_bytes - cap_bytes,
        "ours_s": statistics.median(ours_s),
        "llamacpp_s": statistics.median(theirs_s),
        "mmap_vs_llamacpp": statistics.median(theirs / ours for ours, theirs in zip(ours_s, theirs_s, strict=True)),
    }


def _bytes_per_token(lab: Lab, ring: Ring, cap_bytes: int) -> float:
    """At the disk, over 50 tokens: what 56 of them read more than six, so that loading does not count."""
    log = lab.device_folder("only") / "log"
    writer = lab.start("only", ["sh", "-c", f"while :; do head -c 50000 /dev/zero >> {log}; sleep 0.1; done"])
    try:
        few, many = (ring.answer([], tokens=tokens, memory_bytes=[cap_bytes]) for tokens in (6, 56))
    finally:
        writer.popen.kill()
        writer.popen.wait()
        log.unlink(missing_ok=True)
    print("reads", few["bytes_read"], many["bytes_read"], many["token_s"], file=sys.stderr)
    return float(many["bytes_read"] - few["bytes_read"]) / 50


def _llamacpp_token_s(lab: Lab, model: Path, tokens: int) -> float:
    copies.make_cold(lab.files_folder("only"))
    ask = [sys.executable, "-m", "benchmarks.llamacpp_decode", str(lab.files_folder("only") / model.name)]
    ask = ["env", f"PYTHONPATH={Path(__file__).parent.parent}", *ask, f"--tokens={tokens}", f"--context={CONTEXT}"]
    status, output, errors = lab.run("only", ask, timeout_s=ASK_TIMEOUT_S)
    if status != 0:
        raise RuntimeError(f"llama.cpp: {errors.strip() or output}")
    return float(json.loads(output)["token_s"])
